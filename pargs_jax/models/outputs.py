"""The outputs of a model with one pass for a batch, which losses read (`pargs_jax.objectives.contract.Outputs`)."""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pargs_jax.models.model import Params, PromptsWithAnswers


@dataclasses.dataclass(frozen=True, eq=False)
class AnswerOutputs(abc.ABC):
    """The outputs of one pass over a batch, however its texts were laid out in the pass.

    `model` is a `OnePass`, and `batch` is what it read. `hidden` are final hidden states.
    """

    model: Any
    params: Params
    batch: PromptsWithAnswers
    hidden: Float[Array, "..."]
    one_pass: ClassVar[bool] = True

    @abc.abstractmethod
    def states(self, before: int = 0) -> Float[Array, "B A R D"]:
        """Hidden states at the answers' tokens; `before=1` gives those one token earlier, which predict the answers'
        tokens."""

    @abc.abstractmethod
    def token_logits(self) -> Float[Array, "*B V"]:
        """Logits (fp32) that predict each answer token, as the texts were laid out."""

    @property
    @abc.abstractmethod
    def tokens(self) -> Int[Array, "*B"]:
        """The answers' tokens in that layout."""

    @abc.abstractmethod
    def by_answer(self, values: Array) -> Float[Array, "B A R ..."]:
        """Values of the answers' tokens in that layout, arranged by answer."""

    @abc.abstractmethod
    def rewards(self) -> Float[Array, "B A R"]:
        """Rewards (fp32) of all prefixes: entry i-1 is the reward of an answer's first i tokens."""

    @abc.abstractmethod
    def rewards_of_next(self, candidates: Int[Array, "B A R K"]) -> Float[Array, "B A R K"]:
        """Rewards (fp32) of prefixes with other next tokens, for causal models: entry (i, k) is that of an answer's
        first i tokens followed by `candidates[..., i, k]`."""

    def logits(self) -> Float[Array, "B A R V"]:
        """Logits (fp32) that predict each answer token, for a model with a vocabulary head."""
        return self.model.logits(self.params, self.states(before=1))

    def map_logits(self, function: Callable[..., Any], *others: "AnswerOutputs") -> Any:
        """The results of `function(logits, tokens, *logits_of_others)` as `[B A R ...]`. Logits are fp32 and predict
        each answer token; the others' are for the same batch."""
        logits, *more = (outputs.token_logits() for outputs in (self, *others))
        return jax.tree.map(self.by_answer, function(logits, self.tokens, *more))

    def rewards_at(self, lengths: Int[Array, "B N"], *, descending: bool = False) -> Float[Array, "B N A"]:
        """Rewards of prefixes of these lengths (at least 1). Where an answer is shorter than the length, the reward of
        the whole answer is repeated."""
        rewards = self.rewards()

        def at(length: Int[Array, "B"]) -> Float[Array, "B A"]:
            last = jnp.minimum(length[:, None], self.batch.answer_lengths) - 1
            return jnp.take_along_axis(rewards, last[..., None], axis=-1)[..., 0]

        return jax.vmap(at, in_axes=1, out_axes=1)(lengths)


@dataclasses.dataclass(frozen=True, eq=False)
class OnePassOutputs(AnswerOutputs):
    """Each prompt with each answer was a row of its own.

    `hidden` are states from each prompt's last token to its answer's last, `[B A R+1 D]`; `texts` are the prompts with
    their answers, and `starts` the numbers of padding tokens before them.
    """

    texts: Int[Array, "BA T"]
    starts: Int[Array, "BA"]

    def states(self, before: int = 0) -> Float[Array, "B A R D"]:
        return self.hidden[:, :, 1 - before : self.hidden.shape[2] - before]

    def token_logits(self) -> Float[Array, "B A R V"]:
        return self.logits()

    @property
    def tokens(self) -> Int[Array, "B A R"]:
        return self.batch.answers

    def by_answer(self, values: Float[Array, "B A R ..."]) -> Float[Array, "B A R ..."]:
        return values

    def rewards(self) -> Float[Array, "B A R"]:
        return self.model.rewards(self.params, self.states())

    def rewards_of_next(self, candidates: Int[Array, "B A R K"]) -> Float[Array, "B A R K"]:
        place = self.texts.shape[1] - candidates.shape[2]
        nexts = candidates.reshape(-1, *candidates.shape[2:])
        hidden = self.model.encode_with_next(self.params, self.texts, self.starts, place, nexts)
        return self.model.rewards(self.params, hidden).reshape(candidates.shape)


@dataclasses.dataclass(frozen=True, eq=False)
class PackedOutputs(AnswerOutputs):
    """The texts were packed (`pargs_jax.data.packing.PackedTexts`); `hidden` are the states of all slots, `[G N D]`.

    Heads read the M answer tokens only, and what they say of each token is then arranged by answers. Only `logits` and
    `states` are arranged before, which takes memory for the padding of answers too.
    """

    def states(self, before: int = 0) -> Float[Array, "B A R D"]:
        return self.by_answer(self._states(before))

    def token_logits(self) -> Float[Array, "M V"]:
        return self.model.logits(self.params, self._states(before=1))

    @property
    def tokens(self) -> Int[Array, "M"]:
        return self.batch.packed.tokens.reshape(-1)[self.batch.packed.answer_slots]

    def rewards(self) -> Float[Array, "B A R"]:
        return self.by_answer(self.model.rewards(self.params, self._states()))

    def rewards_of_next(self, candidates: Int[Array, "B A R K"]) -> Float[Array, "B A R K"]:
        batch, packed = self.batch, self.batch.packed
        pairs = jnp.maximum(packed.segments, 0) // candidates.shape[1]
        places = packed.positions - batch.prompt_lengths[pairs]
        # Slots of prompts and of padding get any candidates: what they give is not read.
        nexts = candidates[pairs, jnp.maximum(packed.answers - 1, 0), jnp.maximum(places, 0)]
        hidden = self.model.encode_packed_with_next(self.params, packed, nexts)
        rewards = self.model.rewards(self.params, hidden)
        return self.by_answer(rewards.reshape(-1, candidates.shape[-1])[packed.answer_slots])

    def by_answer(self, values: Float[Array, "M ..."]) -> Float[Array, "B A R ..."]:
        """Beyond an answer's end, its last value is repeated."""
        lengths = self.batch.answer_lengths
        first = jnp.cumsum(lengths.reshape(-1)).reshape(lengths.shape) - lengths
        offsets = jnp.minimum(jnp.arange(self.batch.answers.shape[2]), lengths[..., None] - 1)
        return values[first[..., None] + offsets]

    def _states(self, before: int = 0) -> Float[Array, "M D"]:
        slots = self.batch.packed.slots_before if before else self.batch.packed.answer_slots
        return self.hidden.reshape(-1, self.hidden.shape[-1])[slots]
