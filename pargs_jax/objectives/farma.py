"""Rewards of all next tokens, from pairs alone: FaRMA (Rashid et al., 2025, arXiv 2502.04517)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pargs_jax.errors import InputError
from pargs_jax.objectives.contract import Loss, LossResult, Outputs
from pargs_jax.options import option

if TYPE_CHECKING:
    from jaxtyping import Array, Int, PRNGKeyArray

    from pargs_jax.data.batches import Batch


@dataclass(frozen=True)
class FasterReward(Loss):
    """Two losses in turn, for `phase_steps` steps each: `bradley_terry` on the full answers' rewards, and the
    `consistency_error` of the chosen answers. An evaluation adds them up.

    The reward of a prefix is the entry of its last token in the table that the prefix before it gives, so one causal
    pass has what either loss needs. Metrics are those of `bradley_terry`, with the rewards of prefixes; `full_loss` and
    `consistency`, the two losses; and `spread`, the standard deviation of the rewards of all next tokens. The second
    loss alone would be least if all rewards were equal.
    """

    name = "farma"
    meaning = (
        "rewards of all next tokens (FaRMA): Bradley-Terry on full answers, and prefixes worth their best next token"
    )
    head = "table"
    reads_step = True

    phase_steps: int = option(
        50, "steps with one of the two losses before those with the other; the first is Bradley-Terry", at_least=1
    )
    minimum_length: int = option(1, "shortest prefix that is scored, in tokens", at_least=1)

    def validate(self, max_length: int) -> None:
        if self.minimum_length >= max_length:
            raise InputError(
                f"objective.minimum-length: got {self.minimum_length}, must be below max-length ({max_length})"
            )

    def chance(self, vocab_size: int) -> float:
        return math.inf  # a table starts as logits, whose scale decides the consistency error

    def is_consistency(self, step: int | Int[Array, ""]) -> bool | Int[Array, ""]:
        """Whether a step (from 0) has the second loss."""
        return step // self.phase_steps % 2 == 1

    def __call__(
        self, outputs: Outputs, batch: Batch, key: PRNGKeyArray | None = None, *, step: Int[Array, ""] | None = None
    ) -> LossResult:
        import jax.numpy as jnp

        from pargs_jax.objectives.backups import consistency_error, mean_over_answers, token_values
        from pargs_jax.objectives.bradley_terry import bradley_terry

        rewards, largest, spreads = outputs.map_logits(
            lambda table, tokens: (token_values(table, tokens), table.max(axis=-1), table.std(axis=-1))
        )
        full_loss, metrics = bradley_terry(rewards, batch.answer_lengths, batch.weights)
        chosen = batch.answer_lengths[:, 0], batch.weights
        consistency = consistency_error(rewards[:, 0], largest[:, 0], *chosen, self.minimum_length)
        spread = mean_over_answers(spreads[:, 0], *chosen)
        metrics |= {"full_loss": full_loss, "consistency": consistency, "spread": spread}
        if step is None:
            return LossResult(full_loss + consistency, metrics, batch.weights.sum())
        loss = jnp.where(self.is_consistency(step), consistency, full_loss)
        return LossResult(loss, metrics, batch.weights.sum())
