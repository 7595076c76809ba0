"""REINFORCE with a leave-one-out baseline (Ahmadian et al., 2024, arXiv 2402.14740): no critic, several answers to each
prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pargs_jax.errors import InputError
from pargs_jax.objectives.contract import LossResult, Outputs
from pargs_jax.objectives.on_policy import OnPolicyLoss

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int, PRNGKeyArray

    from pargs_jax.data.batches import Batch, Rollout


@dataclass(frozen=True)
class LeaveOneOut(OnPolicyLoss):
    """`rloo_loss` of whole answers. Their rewards are `R(y) = r(y) - beta log(pi(y | x) / rho(y | x))`, each less the
    mean over the other answers to the prompt (`leave_one_out`)."""

    name = "rloo"
    meaning = "RLOO: as ppo without a value head; the other answers to a prompt are the baseline"
    usual_n = 4
    usual_updates = 1

    def validate(self, max_length: int) -> None:
        super().validate(max_length)
        if self.answers_per_prompt < 2:
            raise InputError("objective.n: got 1, must be at least 2 for rloo, which compares a prompt's answers")

    def learn_from(
        self,
        rewards: Float[Array, "B"],
        log_probs: Float[Array, "B R"],
        log_ratios: Float[Array, "B R"],
        lengths: Int[Array, "B"],
        values: Float[Array, "B R"] | None,
    ) -> Rollout:
        from pargs_jax.data.batches import Rollout
        from pargs_jax.objectives.policy_gradients import leave_one_out

        penalised = rewards - self.kl_weight * log_ratios.sum(axis=1)
        return Rollout(log_probs, leave_one_out(penalised, self.answers_per_prompt))

    def __call__(self, outputs: Outputs, batch: Batch, key: PRNGKeyArray | None = None) -> LossResult:
        from pargs_jax.objectives.policy_gradients import rloo_loss

        loss, metrics = rloo_loss(
            outputs.logits()[:, 0],
            batch.answers[:, 0],
            batch.answer_lengths[:, 0],
            batch.rollout.log_probs,
            batch.rollout.advantages,
            batch.weights,
            temperature=self.temperature,
            clip=self.clip,
        )
        return LossResult(loss, metrics, batch.weights.sum())
