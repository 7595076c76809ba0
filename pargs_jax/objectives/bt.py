"""Bradley-Terry on full answers: the usual loss of reward models, and the baseline of PARGS."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pargs_jax.objectives.contract import Loss, LossResult, Outputs
from pargs_jax.options import option

if TYPE_CHECKING:
    from jaxtyping import PRNGKeyArray

    from pargs_jax.data.batches import Batch


@dataclass(frozen=True)
class BradleyTerry(Loss):
    """`-log sigmoid(r(y_w) - r(y_l))` (PARGS, Eq. 1; `objectives.bradley_terry`)."""

    name = "bt"
    meaning = "Bradley-Terry on full answers"
    head = "reward"

    margin: float = option(
        0.0, "margin subtracted from the reward difference; pushes the rewards of a pair further apart", at_least=0
    )
    centring: float = option(0.0, "weight of the penalty that keeps rewards around zero; 0: none", at_least=0)

    def chance(self, vocab_size: int) -> float:
        return math.log(2)

    def __call__(self, outputs: Outputs, batch: Batch, key: PRNGKeyArray | None = None) -> LossResult:
        from pargs_jax.objectives.bradley_terry import full_answers, preference_loss

        loss, metrics = preference_loss(
            outputs,
            batch.prefix_counts,
            batch.weights,
            full_answers(batch.prefix_counts),
            is_evaluation=key is None,
            margin=self.margin,
            centring=self.centring,
        )
        return LossResult(loss, metrics, batch.weights.sum())
