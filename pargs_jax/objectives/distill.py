"""A table of rewards that learns what a scalar reward model says of each candidate: the other half of FaRMA."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from pargs_jax.errors import InputError
from pargs_jax.objectives.contract import Loss, LossResult, Outputs
from pargs_jax.options import option

if TYPE_CHECKING:
    from jaxtyping import PRNGKeyArray

    from pargs_jax.data.batches import Batch


@dataclass(frozen=True)
class Distillation(Loss):
    """`distillation_loss`: half the squared distance of a table's rewards to those of a frozen scalar reward model, the
    teacher, for the k likeliest next tokens of the language model at every place of an answer; or, with k = 0, for the
    answer's own tokens.

    FaRMA (arXiv 2502.04517) and Low-rank RAD (arXiv 2407.04615) decode with such a table. The language model is the one
    that training starts from. The candidates cost the teacher k more passes over the answers.
    """

    name = "distill"
    meaning = "rewards of all next tokens, learned from a scalar reward model (objective.teacher)"
    head = "table"
    answers = 1

    teacher: str | None = option(
        None,
        "the causal reward model to learn from, with the tokenizer of the model that training starts from",
        metavar="PATH_OR_HUB_ID",
    )
    k: int = option(
        10, "candidates at each place: the language model's k likeliest; 0: the answer's own token alone", at_least=0
    )

    @property
    def frozen(self) -> tuple[str, ...]:
        return ("teacher", "reference") if self.k else ("teacher",)

    @property
    def has_accuracy(self) -> bool:
        return self.k > 1

    def validate(self, max_length: int) -> None:
        if self.teacher is None:
            raise InputError("objective.teacher: distill needs a reward model to learn from; give a folder or hub id")

    def chance(self, vocab_size: int) -> float:
        return math.inf  # depends on the rewards' scale

    def __call__(
        self,
        outputs: Outputs,
        batch: Batch,
        key: PRNGKeyArray | None = None,
        *,
        teacher: Outputs,
        reference: Outputs | None = None,
    ) -> LossResult:
        from pargs_jax.objectives.backups import token_values
        from pargs_jax.objectives.distillation import distillation_loss, rewards_of_likeliest

        if self.k:
            candidates, rewards = outputs.map_logits(partial(rewards_of_likeliest, self.k), reference)
            targets = teacher.rewards_of_next(candidates)
        else:
            rewards, targets = (x[..., None] for x in (outputs.map_logits(token_values), teacher.rewards()))
        return distillation_loss(rewards[:, 0], targets[:, 0], batch.answer_lengths[:, 0], batch.weights)
