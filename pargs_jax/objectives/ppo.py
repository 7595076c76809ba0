"""Proximal policy optimisation (Schulman et al., 2017, arXiv 1707.06347) with a KL penalty (Ziegler et al., 2019, arXiv
1909.08593; Stiennon et al., 2020, arXiv 2009.01325)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pargs_jax.objectives.contract import LossResult, Outputs
from pargs_jax.objectives.on_policy import OnPolicyLoss
from pargs_jax.options import option

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int, PRNGKeyArray

    from pargs_jax.data.batches import Batch, Rollout


@dataclass(frozen=True)
class ProximalPolicy(OnPolicyLoss):
    """`ppo_loss` of every token, with advantages by GAE (Schulman et al., 2016, arXiv 1506.02438), whitened over the
    answers of a step. The critic is one linear layer on the policy's hidden states."""

    name = "ppo"
    meaning = "PPO: the language model itself, on its own answers, against a reward model, with a value head"
    critic = True
    usual_n = 1
    usual_updates = 4

    gamma: float = option(1.0, "discount of later rewards, per token", above=0, at_most=1)
    gae_lambda: float = option(
        0.95, "advantages. 1: all later rewards minus the value; 0: the next value alone", at_least=0, at_most=1
    )
    value_weight: float = option(0.1, "weight of the value head's squared error in the loss", above=0)

    def learn_from(
        self,
        rewards: Float[Array, "B"],
        log_probs: Float[Array, "B R"],
        log_ratios: Float[Array, "B R"],
        lengths: Int[Array, "B"],
        values: Float[Array, "B R"] | None,
    ) -> Rollout:
        from pargs_jax.data.batches import Rollout
        from pargs_jax.objectives.policy_gradients import advantages_by_gae, real_tokens, token_rewards, whitened

        each = token_rewards(rewards, log_ratios, lengths, self.kl_weight)
        advantages = advantages_by_gae(each, values, lengths, self.gamma, self.gae_lambda)
        returns = advantages + values * real_tokens(values, lengths)
        return Rollout(log_probs, whitened(advantages, lengths), returns)

    def __call__(
        self, outputs: Outputs, batch: Batch, key: PRNGKeyArray | None = None, *, values: Float[Array, "B A R"]
    ) -> LossResult:
        from pargs_jax.objectives.policy_gradients import ppo_loss, real_tokens

        answers, lengths = batch.answers[:, 0], batch.answer_lengths[:, 0]
        counted = real_tokens(answers, lengths) * batch.weights[:, None]
        loss, metrics = ppo_loss(
            outputs.logits()[:, 0],
            values[:, 0],
            answers,
            *batch.rollout,
            counted,
            temperature=self.temperature,
            clip=self.clip,
            value_weight=self.value_weight,
        )
        return LossResult(loss, metrics, counted.sum())
