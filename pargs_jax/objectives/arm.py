"""Autoregressive reward models: GenARM (Xu et al., 2025, arXiv 2410.08193)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from pargs_jax.objectives.contract import Loss, LossResult, Outputs
from pargs_jax.options import option

if TYPE_CHECKING:
    from jaxtyping import Array, Float, PRNGKeyArray

    from pargs_jax.data.batches import Batch


@dataclass(frozen=True)
class AutoregressiveReward(Loss):
    """`-log sigmoid(beta (log pi(y_w | x) - log pi(y_l | x)))`, the mean over pairs: Bradley-Terry on the
    log-probability that a language model `pi` gives to the whole answer, the sum over its tokens.

    It is DPO without a reference. The reward of a prefix is its own log-probability, so metrics are those of
    `objectives.bradley_terry` with rewards of `beta log pi`.
    """

    name = "arm"
    meaning = "an autoregressive reward model (GenARM): Bradley-Terry on log-probabilities of answers"
    head = "vocabulary"
    usual_beta: ClassVar[float] = 0.5
    """The paper's for helpfulness in SafeRLHF; for HH it has 0.05. A smaller one takes `pi` further from its start."""

    beta: float | None = option(
        None, "factor of log-probabilities in the reward", unset="0.5 in arm, 0.1 in dpo and 0.01 in parm", above=0
    )

    @property
    def factor(self) -> float:
        """`beta`, or the usual one."""
        return self.usual_beta if self.beta is None else self.beta

    def chance(self, vocab_size: int) -> float:
        # It starts as a language model, which may give answers of unequal lengths log-probabilities that differ by
        # hundreds of nats. So the first losses depend on the batches' lengths.
        return math.inf

    def __call__(self, outputs: Outputs, batch: Batch, key: PRNGKeyArray | None = None) -> LossResult:
        from pargs_jax.objectives.likelihood import prefix_log_probs, token_log_probs

        return self.compare(prefix_log_probs(outputs.map_logits(token_log_probs), batch.answer_lengths), batch)

    def compare(self, log_probs: Float[Array, "B 2 R"], batch: Batch) -> LossResult:
        """The loss with rewards of `beta` times these numbers, one for each prefix of the answers."""
        from pargs_jax.objectives.bradley_terry import bradley_terry

        loss, metrics = bradley_terry(self.factor * log_probs, batch.answer_lengths, batch.weights)
        return LossResult(loss, metrics, batch.weights.sum())
