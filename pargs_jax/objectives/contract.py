"""The contract of objectives: what a loss declares, what it is given, and what it gives back.

An objective is one file with a `Loss`: a frozen dataclass whose fields are its options, and which is called on what a
model says of a batch. It knows arrays, never models; `pargs_jax.training.objective` joins the two. `docs/
adding_an_objective.md` shows how to write one.

A help text lists the options of all objectives and must not wait for JAX: no objective's file imports it at the top.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple, Protocol

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int, PRNGKeyArray

    from pargs_jax.data.batches import Batch


class Outputs(Protocol):
    """What a model says of a batch of B prompts with A answers of R slots. Each method computes what it gives when it
    is called, and gradients flow through it.

    Models with `one_pass` have all of it. Others read every prefix as a text of its own: of them there is `rewards_at`
    alone, and it costs as much as the prefixes that are asked for.
    """

    one_pass: bool

    def states(self, before: int = 0) -> Float[Array, "B A R D"]:
        """Final hidden states at the answers' tokens; `before=1` gives those one token earlier, which predict the
        answers' tokens."""
        ...

    def logits(self) -> Float[Array, "B A R V"]:
        """fp32 outputs of a head that is as wide as the vocabulary, one token before each of the answers' tokens."""
        ...

    def rewards(self) -> Float[Array, "B A R"]:
        """fp32 rewards of all prefixes: entry i-1 is that of an answer's first i tokens."""
        ...

    def rewards_at(self, lengths: Int[Array, "B N"], *, descending: bool = False) -> Float[Array, "B N A"]:
        """fp32 rewards of prefixes of these lengths (at least 1, counted as `Batch.prefix_counts` counts them); an
        answer that is shorter stays at its last. `descending` promises that each row's grow shorter, no two alike."""
        ...


class LossResult(NamedTuple):
    """What a loss makes of a batch, all fp32 scalars.

    Attributes:
        loss: what is minimised, a mean over whatever the objective counts.
        metrics: what is logged beside it. Over several batches means are taken, by weight; extremes of names that end
            in `_min` or `_max`. `accuracy` is what the option `best_metric accuracy` goes by.
        weight: how much the batch counts in a mean over batches: its pairs, or its tokens.
    """

    loss: Float[Array, ""]
    metrics: dict[str, Array]
    weight: Float[Array, ""]


@dataclass(frozen=True)
class Loss:
    """An objective: what it needs, its options (the dataclass's fields), and its loss.

    Class attributes:
        name: what the option `objective.name` calls it.
        meaning: its line in a help text.
        head: the head of the model that it trains (`pargs_jax.models.heads`).
        answers: how many answers of a row it reads: 2, a chosen and a rejected one, or 1.
        reward_range: the least and the largest reward of an answer that it can learn from; None if it does not read
            rewards. One that does reads scored answers (`answers = 1`), and batches have `rewards`.
        has_accuracy: whether `accuracy` is among its metrics.
        scores_prefixes: whether it compares prefixes of answers, which may then end at another tokenizer's tokens.
        frozen: names of other models that it reads and does not train; the loss gets their outputs as keyword arguments
            of these names. The training program gives one, `reference`: the model that training starts from.
    """

    name: ClassVar[str]
    meaning: ClassVar[str]
    head: ClassVar[str]
    answers: ClassVar[int] = 2
    reward_range: ClassVar[tuple[float, float] | None] = None
    has_accuracy: ClassVar[bool] = True
    scores_prefixes: ClassVar[bool] = False
    frozen: ClassVar[tuple[str, ...]] = ()

    def validate(self, max_length: int) -> None:
        """Raises InputError for options that do not go together, or with texts of at most so many tokens."""

    def chance(self, vocab_size: int) -> float:
        """The loss of a model that tells nothing apart, which the option `loss_limit` is a multiple of; infinite
        where that depends on the data, so that there is no limit."""
        raise NotImplementedError

    def __call__(
        self, outputs: Outputs, batch: Batch, key: PRNGKeyArray | None = None, **frozen: Outputs
    ) -> LossResult:
        """The loss of a batch.

        Args:
            outputs: what the trained model says of it.
            batch: token ids, lengths and weights; a row of weight 0 is filler and counts nowhere.
            key: randomness of a training step; without one this is an evaluation, which leaves nothing to chance.
            frozen: what the models named in `frozen` say of it.
        """
        raise NotImplementedError
