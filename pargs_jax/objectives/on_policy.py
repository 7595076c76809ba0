"""What objectives have in common that learn from the trained model's own answers, scored by a reward model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from pargs_jax.errors import InputError
from pargs_jax.objectives.contract import Loss
from pargs_jax.options import option

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

    from pargs_jax.data.batches import Rollout


@dataclass(frozen=True)
class OnPolicyLoss(Loss):
    """An objective on answers that the trained model, the policy, samples itself. A step samples `n` answers to
    each prompt, has them scored, and makes `updates` optimizer updates on all of them.

    Its loss gets batches with a `rollout`, which `learn_from` makes once a step. It does not read the reference again;
    that enters by the KL penalty.
    """

    head = "vocabulary"
    answers = 0
    on_policy = True
    has_accuracy = False
    frozen = ("reference",)
    usual_n: ClassVar[int]
    usual_updates: ClassVar[int]

    rm: str | None = option(
        None,
        "reward model of whole answers, which may have another tokenizer",
        unset="the demo's, runs/partial_bt",
        metavar="PATH_OR_HUB_ID",
    )
    kl_weight: float = option(
        0.05,
        "weight of the KL divergence from the model that training starts from, subtracted from rewards",
        at_least=0,
    )
    clip: float = option(0.2, "by how much the ratio of new to old probability may leave 1 and still gain", above=0)
    n: int | None = option(
        None, "answers to each prompt of a step", unset="1 in ppo, 4 in rloo and 8 in ctl", at_least=1
    )
    updates: int | None = option(
        None, "optimizer updates on the answers of a step", unset="4 in ppo and 1 in rloo", at_least=1
    )
    temperature: float = option(1.0, "temperature at which answers are sampled", above=0)
    max_new_tokens: int = option(64, "longest answer that is sampled, in tokens", at_least=1)
    unfinished_penalty: float = option(
        1.0, "subtracted from the reward of an answer that has not ended after max-new-tokens", at_least=0
    )

    @property
    def answers_per_prompt(self) -> int:
        return self.usual_n if self.n is None else self.n

    @property
    def updates_per_step(self) -> int:
        return self.usual_updates if self.updates is None else self.updates

    def validate(self, max_length: int) -> None:
        if self.max_new_tokens >= max_length:
            raise InputError(
                f"objective.max-new-tokens: got {self.max_new_tokens}, must be below max-length ({max_length}), which "
                "is of prompt and answer together"
            )

    def chance(self, vocab_size: int) -> float:
        return math.inf  # depends on the rewards' scale

    def learn_from(
        self,
        rewards: Float[Array, "B"],
        log_probs: Float[Array, "B R"],
        log_ratios: Float[Array, "B R"],
        lengths: Int[Array, "B"],
        values: Float[Array, "B R"] | None,
    ) -> Rollout:
        """What the updates of a step learn from.

        Args:
            rewards: of the answers, by the reward model.
            log_probs, log_ratios: of their tokens, under the policy, and its difference from the reference's
                (`PolicyNumbers`).
            lengths: tokens of each answer.
            values: of the text before each token; None without a critic.
        """
        raise NotImplementedError
