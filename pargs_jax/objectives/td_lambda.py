"""Values of prefixes by temporal differences, on scored answers: Value Augmented Sampling (Han et al., 2024)."""

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
class TemporalDifference(ScoredLoss):
    """`1/2 (V(y[:t]) - G_t)^2`, the mean over all prefixes of a batch, with the TD(lambda) targets of
    `td_lambda_returns` (VAS, arXiv 2405.06639, with the constants of its code)."""

    name = "td_lambda"
    meaning = "scored answers: TD(lambda) values of prefixes, as in VAS"
    head = "reward"

    td_lambda: float = option(
        0.95,
        "target of a prefix's value. 1: the answer's reward; 0: the value of the prefix one token longer",
        at_least=0,
    )

    def validate(self, max_length: int) -> None:
        if self.td_lambda > 1:
            raise InputError(f"objective.td-lambda: got {self.td_lambda:g}, must be at most 1")

    def __call__(self, outputs: Outputs, batch: Batch, key: PRNGKeyArray | None = None) -> LossResult:
        from pargs_jax.objectives.prefix_values import read_values, squared_result, td_lambda_returns

        values, counted = read_values(outputs, batch)
        targets = td_lambda_returns(values, batch.rewards[:, 0], self.td_lambda)
        return squared_result(values, targets, counted, batch)
