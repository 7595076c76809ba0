"""Direct preference optimisation (Rafailov et al., 2023, arXiv 2305.18290)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pargs_jax.objectives.arm import AutoregressiveReward
from pargs_jax.objectives.contract import LossResult, Outputs

if TYPE_CHECKING:
    from jaxtyping import PRNGKeyArray

    from pargs_jax.data.batches import Batch


@dataclass(frozen=True)
class DirectPreference(AutoregressiveReward):
    """`-log sigmoid(r(y_w) - r(y_l))` with `r(y) = beta log(pi(y | x) / pi_ref(y | x))` (Eq. 7), the mean over pairs.

    The reference `pi_ref` is the model that training starts from. Metrics are those of `objectives.bradley_terry`, with
    the rewards of prefixes.
    """

    name = "dpo"
    meaning = "DPO: the language model itself, on preferences, against the model that it starts from"
    frozen = ("reference",)
    usual_beta = 0.1

    def chance(self, vocab_size: int) -> float:
        return math.log(2)

    def __call__(
        self, outputs: Outputs, batch: Batch, key: PRNGKeyArray | None = None, *, reference: Outputs
    ) -> LossResult:
        from pargs_jax.objectives.likelihood import prefix_log_probs, token_log_probs

        log_ratios = outputs.map_logits(token_log_probs) - reference.map_logits(token_log_probs)
        return self.compare(prefix_log_probs(log_ratios, batch.answer_lengths), batch)
