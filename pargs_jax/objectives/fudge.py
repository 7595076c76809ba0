"""An answer's reward, or its label, at every one of its prefixes: CD-FUDGE and FUDGE."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pargs_jax.objectives.contract import Loss, LossResult, Outputs
from pargs_jax.options import option

if TYPE_CHECKING:
    from jaxtyping import PRNGKeyArray

    from pargs_jax.data.batches import Batch


@dataclass(frozen=True)
class PrefixRegression(Loss):
    """`1/2 sum_t (V(y[:t]) - r)^2` (CD-FUDGE: Mudgal et al., 2023), or with labels the binary cross-entropy of every
    prefix (FUDGE: Yang and Klein, 2021), where V is a log-odds. Both are means over all prefixes of a batch."""

    name = "fudge"
    meaning = "scored answers: the final reward, or a label, at every prefix"
    head = "reward"
    answers = 1

    target: Literal["reward", "label"] = option(
        "reward", "target of a prefix's value: its answer's reward (squared error), or the log-odds of a label"
    )

    @property
    def reward_range(self) -> tuple[float, float]:
        return (0.0, 1.0) if self.target == "label" else (-math.inf, math.inf)

    @property
    def has_accuracy(self) -> bool:
        return self.target == "label"

    def chance(self, vocab_size: int) -> float:
        return math.log(2) if self.target == "label" else math.inf

    def __call__(self, outputs: Outputs, batch: Batch, key: PRNGKeyArray | None = None) -> LossResult:
        from pargs_jax.objectives.prefix_values import (
            label_accuracy,
            label_loss,
            mean_over_prefixes,
            read_values,
            squared_result,
        )

        values, counted = read_values(outputs, batch)
        rewards = batch.rewards[:, 0]
        if self.target == "reward":
            return squared_result(values, rewards[:, None], counted, batch)
        loss, prefixes = mean_over_prefixes(label_loss(values, rewards), counted, batch.weights)
        return LossResult(loss, label_accuracy(values, counted, rewards, batch.weights), prefixes)
