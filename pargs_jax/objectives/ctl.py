"""Twists for sequential Monte Carlo, on scored samples: contrastive twist learning (Zhao et al., 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pargs_jax.errors import InputError
from pargs_jax.objectives.contract import LossResult, Outputs, ScoredLoss
from pargs_jax.options import option

if TYPE_CHECKING:
    from jaxtyping import PRNGKeyArray

    from pargs_jax.data.batches import Batch


@dataclass(frozen=True)
class ContrastiveTwist(ScoredLoss):
    """`contrastive_twist_loss`: the table is log psi_t of a text with each next token, and the target of the particles
    is p(y) exp(w r(y)) (arXiv 2404.17546).

    p is the model that training starts from. The answers must be its own samples, at temperature 1 from the whole
    vocabulary. The paper draws positives and negatives by its own sampler in each step; here both are these samples,
    weighted.
    """

    name = "ctl"
    meaning = "scored samples of the language model: twists of sequential Monte Carlo (smc)"
    head = "table"
    frozen = ("reference",)

    n: int | None = option(
        None, "answers to each prompt of a step", unset="1 in ppo, 4 in rloo and 8 in ctl", at_least=1
    )
    reward_weight: float = option(1.0, "w in the target p(y) exp(w r(y)) of the particles", above=0)

    @property
    def samples(self) -> int:
        return 8 if self.n is None else self.n

    def validate(self, max_length: int) -> None:
        if self.samples < 2:
            raise InputError(f"objective.n: got {self.n}, but ctl compares answers to a prompt; must be at least 2")

    def __call__(
        self, outputs: Outputs, batch: Batch, key: PRNGKeyArray | None = None, *, reference: Outputs
    ) -> LossResult:
        from pargs_jax.objectives.twists import contrastive_twist_loss, twists_of

        loss, metrics = contrastive_twist_loss(
            *outputs.map_logits(twists_of, reference),
            batch.answer_lengths,
            self.reward_weight * batch.rewards,
            batch.weights,
        )
        return LossResult(loss, metrics, batch.weights.sum())
