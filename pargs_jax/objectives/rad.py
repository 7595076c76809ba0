"""Rewards of scored answers at every prefix, later ones weighing more: RAD (Deng and Raffel, 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pargs_jax.objectives.contract import LossResult, Outputs, ScoredLoss

if TYPE_CHECKING:
    from jaxtyping import PRNGKeyArray

    from pargs_jax.data.batches import Batch


@dataclass(frozen=True)
class RewardAugmented(ScoredLoss):
    """`sum_t t (r(y[:t]) - r)^2 * 2 / (n (n + 1))` of an answer of n tokens with the reward r, then the mean over
    answers (RAD, arXiv 2310.09520; the constant as its code has it)."""

    name = "rad"
    meaning = "scored answers: squared error of the reward at every prefix, weighted by its length"
    head = "reward"

    def __call__(self, outputs: Outputs, batch: Batch, key: PRNGKeyArray | None = None) -> LossResult:
        from pargs_jax.objectives.prefix_values import position_weighted_error, read_values, value_metrics

        values, counted = read_values(outputs, batch, "linear")
        rewards = batch.rewards[:, 0]
        loss = position_weighted_error(values, counted, rewards, batch.weights)
        return LossResult(loss, value_metrics(values, rewards, batch.weights), batch.weights.sum())
