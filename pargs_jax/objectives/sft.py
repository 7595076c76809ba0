"""Supervised fine-tuning: the next-token loss on the chosen answers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pargs_jax.objectives.contract import Loss, LossResult, Outputs

if TYPE_CHECKING:
    from jaxtyping import PRNGKeyArray

    from pargs_jax.data.batches import Batch


@dataclass(frozen=True)
class SupervisedFineTuning(Loss):
    """`answer_likelihood` of the chosen answers; a batch's weight is its number of answer tokens."""

    name = "sft"
    meaning = "next-token loss on the chosen answers"
    head = "vocabulary"
    answers = 1

    def chance(self, vocab_size: int) -> float:
        return math.log(vocab_size)

    def __call__(self, outputs: Outputs, batch: Batch, key: PRNGKeyArray | None = None) -> LossResult:
        from pargs_jax.objectives.likelihood import mean_likelihood, token_likelihoods

        lengths = batch.answer_lengths[:, 0]
        log_probs, is_likeliest = outputs.map_logits(token_likelihoods)
        loss, metrics = mean_likelihood(log_probs[:, 0], is_likeliest[:, 0], lengths, batch.weights)
        return LossResult(loss, metrics, (lengths * batch.weights).sum())
