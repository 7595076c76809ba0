"""Bradley-Terry on every prefix of the answers: PARGS (Rashid et al., 2024, Eq. 5)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pargs_jax.errors import InputError
from pargs_jax.objectives.bt import BradleyTerry
from pargs_jax.objectives.contract import LossResult, Outputs
from pargs_jax.options import option

if TYPE_CHECKING:
    from jaxtyping import PRNGKeyArray

    from pargs_jax.data.batches import Batch


@dataclass(frozen=True)
class PartialBradleyTerry(BradleyTerry):
    """The mean over i of `-log sigmoid(r(y_w[:i]) - r(y_l[:i]))` (`objectives.bradley_terry`)."""

    name = "partial_bt"
    meaning = "Bradley-Terry on every prefix of the answers"
    scores_prefixes = True

    prefix_weights: Literal["uniform", "linear"] = option(
        "uniform", "weight of a prefix in the loss: the same for all, or proportional to its length"
    )
    stride: int = option(1, "score every n-th prefix", at_least=1)
    sample: int | None = option(None, "how many random prefixes of a pair to score in a step", unset="all", at_least=1)
    minimum_length: int = option(1, "shortest prefix that is scored, in tokens", at_least=1)

    def validate(self, max_length: int) -> None:
        if self.minimum_length >= max_length:
            raise InputError(
                f"objective.minimum-length: got {self.minimum_length}, must be below max-length ({max_length})"
            )

    def __call__(self, outputs: Outputs, batch: Batch, key: PRNGKeyArray | None = None) -> LossResult:
        from pargs_jax.objectives.bradley_terry import choose_prefixes, preference_loss

        sample = None if key is None else self.sample
        prefixes = choose_prefixes(
            batch.prefix_counts,
            batch.most_prefixes,
            weighting=self.prefix_weights,
            stride=self.stride,
            sample=sample,
            minimum_length=self.minimum_length,
            key=key,
        )
        loss, metrics = preference_loss(
            outputs,
            batch.prefix_counts,
            batch.weights,
            prefixes,
            is_evaluation=key is None,
            margin=self.margin,
            centring=self.centring,
        )
        return LossResult(loss, metrics, batch.weights.sum())
