"""The contract of objectives: what a loss declares, what it receives, and what it returns.

An objective is one file with a `Loss`: a frozen dataclass whose fields are its options. It is called with a model's
outputs for a batch. It knows arrays, never models; `pargs_jax.training.objective` joins the two.
`docs/adding_an_objective.md` shows how to write one.

Help texts list the options of all objectives and must appear quickly, so no objective's file imports JAX at the top.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int, PRNGKeyArray

    from pargs_jax.data.batches import Batch


class Outputs(Protocol):
    """A model's outputs for a batch of B prompts with A answers of R slots. Each method computes its result when it is
    called, and gradients flow through it.

    Models with `one_pass` have all methods. Other models read every prefix as a separate text: they have only
    `rewards_at`, and its cost grows with the number of prefixes.
    """

    one_pass: bool

    def states(self, before: int = 0) -> Float[Array, "B A R D"]:
        """Final hidden states at the answers' tokens; `before=1` gives those one token earlier, which predict the
        answers' tokens."""
        ...

    def logits(self) -> Float[Array, "B A R V"]:
        """fp32 outputs of a head as wide as the vocabulary, at the token before each answer token."""
        ...

    def map_logits(self, function: Callable[..., Any], *others: Outputs) -> Any:
        """What a function makes of each answer token and the logits that predict it. `function(logits, tokens)` gets
        `[*B V]` and `[*B]`, and then the logits of `others`, if any. It returns an array or a tree of arrays, `[*B
        ...]`, which become `[B A R ...]`; entries beyond an answer's end mean nothing. In packed batches this needs no
        logits for the padding of answers, which `logits` does."""
        ...

    def rewards(self) -> Float[Array, "B A R"]:
        """fp32 rewards of all prefixes: entry i-1 is the reward of an answer's first i tokens."""
        ...

    def rewards_of_next(self, candidates: Int[Array, "B A R K"]) -> Float[Array, "B A R K"]:
        """fp32 rewards of prefixes with other next tokens: entry (i, k) is that of an answer's first i tokens followed
        by `candidates[..., i, k]`. For causal reward models."""
        ...

    def rewards_at(self, lengths: Int[Array, "B N"], *, descending: bool = False) -> Float[Array, "B N A"]:
        """fp32 rewards of prefixes of these lengths (at least 1, in the units of `Batch.prefix_counts`). Where an
        answer is shorter than the length, the reward of the whole answer is repeated. `descending` promises that each
        row's lengths strictly decrease."""
        ...


class LossResult(NamedTuple):
    """The result of a loss for a batch, all fp32 scalars.

    Attributes:
        loss: the quantity to minimise, a mean over the objective's units (pairs or tokens).
        metrics: numbers to log with it. Over several batches they are averaged by weight; for names that end in `_min`
            or `_max`, extremes are taken. The option `best_metric accuracy` uses `accuracy`.
        weight: the batch's weight in a mean over batches: its number of pairs or tokens.
    """

    loss: Float[Array, ""]
    metrics: dict[str, Array]
    weight: Float[Array, ""]


@dataclass(frozen=True)
class Loss:
    """An objective: what it needs, its options (the dataclass's fields), and its loss.

    Class attributes:
        name: its name in the option `objective.name`.
        meaning: its line in a help text.
        head: the head of the model that it trains (`pargs_jax.models.heads`).
        answers: how many answers of a row it reads: 2 (chosen and rejected), 1 (chosen), or 0 if the model samples them
            (`on_policy`).
        reward_range: the lowest and the highest reward of an answer that it can learn from; None if it does not read
            rewards. An objective that does reads scored answers (`answers = 1`), and batches have `rewards`.
        samples: how many scored answers to one prompt make a row, which then has as many answers; 0 where every scored
            answer is a row.
        has_accuracy: whether `accuracy` is among its metrics.
        scores_prefixes: whether it compares prefixes of answers, which may then end at another tokenizer's tokens.
        frozen: names of other models that it reads but does not train; the loss gets their outputs as keyword arguments
            with these names. `reference` is the model that training starts from; any other is the causal reward model
            that the option of this name says.
        reads_step: whether the loss gets the number of the training step (from 0) as a keyword argument `step`. It is
            None in an evaluation.
        labels: how many labels a pair has, one from 0 to 1 for each of several objectives; batches then have `labels`.
            0 where a pair only has a chosen and a rejected answer.
        preference_lora: the fields of the `PreferenceLora` (`pargs_jax.models.preference_lora`) that it trains in place
            of the model's own parameters; None where it trains these.
        on_policy: whether it learns from answers that the trained model samples (`objectives.on_policy`).
        critic: whether a value head is trained beside the model; the loss gets its values of the text before each
            token, `[B A R]`, as the keyword argument `values`.
        answers_per_prompt, updates_per_step: answers to each prompt of a step, and optimizer updates on them.
    """

    name: ClassVar[str]
    meaning: ClassVar[str]
    head: ClassVar[str]
    answers: ClassVar[int] = 2
    reward_range: ClassVar[tuple[float, float] | None] = None
    samples: ClassVar[int] = 0
    has_accuracy: ClassVar[bool] = True
    scores_prefixes: ClassVar[bool] = False
    frozen: ClassVar[tuple[str, ...]] = ()
    reads_step: ClassVar[bool] = False
    labels: ClassVar[int] = 0
    preference_lora: ClassVar[Mapping[str, Any] | None] = None
    on_policy: ClassVar[bool] = False
    critic: ClassVar[bool] = False
    answers_per_prompt: ClassVar[int] = 1
    updates_per_step: ClassVar[int] = 1

    def validate(self, max_length: int) -> None:
        """Raises InputError for options that contradict each other, or do not fit texts of up to `max_length`
        tokens."""

    def chance(self, vocab_size: int) -> float:
        """The loss of a model that cannot tell anything apart. The option `loss_limit` is a multiple of it. Infinite if
        this loss depends on the data; then there is no limit."""
        raise NotImplementedError

    def preferences(self, batch: Batch, key: PRNGKeyArray | None) -> Float[Array, "B M"] | None:
        """The preference vector of each row, for a model with `preference_lora`; None for other models. The key is the
        one that the loss gets."""
        return None

    def __call__(self, outputs: Outputs, batch: Batch, key: PRNGKeyArray | None = None, **others: Any) -> LossResult:
        """The loss of a batch.

        Args:
            outputs: the trained model's outputs.
            batch: token ids, lengths and weights; a row of weight 0 is filler and does not count.
            key: randomness of a training step; None in an evaluation, which must be deterministic.
            others: the outputs of the models named in `frozen`, `step` if it `reads_step`, and `values` with a critic.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class ScoredLoss(Loss):
    """An objective that learns from scored answers. Its loss depends on the rewards' scale, so it has no loss of
    chance."""

    answers = 1
    reward_range = (-math.inf, math.inf)
    has_accuracy = False

    def chance(self, vocab_size: int) -> float:
        return math.inf
