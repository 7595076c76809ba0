"""Models that score every next token in one pass: autoregressive reward models, and heads that hold reward tables.

All read the language model's tokens. Like the language model, they read one new token a step, whatever the candidates.
"""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pargs_jax.decoding.guides.contract import Capacity, Chosen, Prompts, Text, VocabularyGuide
from pargs_jax.errors import InputError
from pargs_jax.models.cache import Cache
from pargs_jax.models.causal import CausalModel
from pargs_jax.models.model import Params
from pargs_jax.models.preference_lora import with_preferences


class NextTokenState(NamedTuple):
    """The model has read all but the newest token of each text."""

    cache: Cache
    prompt_end: Int[Array, "B"]
    """The prompt's last token in the guide model's version of the prompt."""
    preferences: Float[Array, "B M"] | None = None
    """Each row's preference vector, for a `PreferenceGuide`."""


@dataclasses.dataclass(frozen=True)
class NextTokenGuide:
    """The base of these guides; they differ in the meaning of their model's head outputs.

    Attributes:
        model: a model that reads the language model's tokens.
        vocab_size: the language model's vocabulary size. The guide's model may have a larger, padded one; padding
            tokens get no reward.
    """

    model: CausalModel
    vocab_size: int
    scores_vocabulary: ClassVar[bool] = True
    adds_up: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.model.config.vocab_size < self.vocab_size:
            raise InputError(
                f"the reward model scores {self.model.config.vocab_size} tokens, the language model proposes "
                f"{self.vocab_size}; they must share a vocabulary"
            )

    def of_head(self, numbers: Float[Array, "B V"]) -> Float[Array, "B V"]:
        """Turns the head's outputs for every token into rewards."""
        return numbers

    def prefill(
        self, params: Params, prompts: Prompts, capacity: Capacity, own_prompts: Prompts | None
    ) -> NextTokenState:
        tokens, lengths = prompts if own_prompts is None else own_prompts
        _, cache = self.model.prefill(params, tokens, lengths, tokens.shape[1] + capacity.answer)
        return NextTokenState(cache._replace(lengths=jnp.maximum(lengths - 1, 0)), tokens[:, -1])

    def score(self, params: Params, state: NextTokenState, text: Text) -> tuple[Float[Array, "B V"], Any]:
        at = jnp.maximum(text.lengths - 1, 0)[:, None]
        last = jnp.take_along_axis(text.tokens, at, axis=1)[:, 0]
        newest = jnp.where(text.answer_lengths > 0, last, state.prompt_end)
        hidden, pending = self.model.siblings(params, state.cache, newest[:, None])
        return self.of_head(self.model.logits(params, hidden[:, 0]))[:, : self.vocab_size], pending

    def commit(self, params: Params, state: NextTokenState, pending: Any, chosen: Chosen) -> NextTokenState:
        return state._replace(cache=self.model.keep(state.cache, pending, chosen.live))

    def rewind(self, state: NextTokenState, text: Text, dropped: Int[Array, "B"]) -> NextTokenState:
        return state._replace(cache=state.cache.forget(dropped))


@dataclasses.dataclass(frozen=True)
class AutoregressiveGuide(NextTokenGuide):
    """An autoregressive reward model (GenARM; Xu et al., 2025). The reward of a token is its log-probability under a
    second language model; the reward of an answer is the sum."""

    adds_up: ClassVar[bool] = True

    def of_head(self, numbers: Float[Array, "B V"]) -> Float[Array, "B V"]:
        return jax.nn.log_softmax(numbers, axis=-1)


class PreferredPrompts(NamedTuple):
    """The own prompts of a `PreferenceGuide`: its model's prompts (None where they are the language model's), and each
    row's preference vector."""

    prompts: Prompts | None
    preferences: Float[Array, "B M"]


@dataclasses.dataclass(frozen=True)
class PreferenceGuide(AutoregressiveGuide):
    """One autoregressive reward model for all weightings of several objectives: its low-rank additions depend on each
    row's preference vector (PARM; Lin et al., 2025). Its model's `lora` is a `PreferenceLora`."""

    def prefill(
        self, params: Params, prompts: Prompts, capacity: Capacity, own_prompts: PreferredPrompts
    ) -> NextTokenState:
        own, preferences = own_prompts
        state = super().prefill(with_preferences(params, preferences), prompts, capacity, own)
        return state._replace(preferences=preferences)

    def score(self, params: Params, state: NextTokenState, text: Text) -> tuple[Float[Array, "B V"], Any]:
        return super().score(with_preferences(params, state.preferences), state, text)


@dataclasses.dataclass(frozen=True)
class RatioGuide:
    """The log-ratio of two language models: a tuned one and the one that it was tuned from, log pi_tuned - log pi_ref
    (EFT; Mitchell et al., 2024), or an expert and an anti-expert (DExperts; Liu et al., 2021). Its params and its own
    prompts are pairs, too.
    """

    tuned: VocabularyGuide
    reference: VocabularyGuide
    scores_vocabulary: ClassVar[bool] = True
    adds_up: ClassVar[bool] = True

    def prefill(
        self, params: Any, prompts: Prompts, capacity: Capacity, own_prompts: tuple[Prompts | None, ...] | None
    ) -> Any:
        parts = zip((self.tuned, self.reference), params, own_prompts or (None, None), strict=True)
        return tuple(guide.prefill(guide_params, prompts, capacity, own) for guide, guide_params, own in parts)

    def score(self, params: Any, state: Any, text: Text) -> tuple[Float[Array, "B V"], Any]:
        tuned, tuned_pending = self.tuned.score(params[0], state[0], text)
        reference, reference_pending = self.reference.score(params[1], state[1], text)
        return tuned - reference, (tuned_pending, reference_pending)

    def commit(self, params: Any, state: Any, pending: Any, chosen: Chosen) -> Any:
        parts = zip((self.tuned, self.reference), params, state, pending, strict=True)
        return tuple(guide.commit(*each, chosen) for guide, *each in parts)

    def rewind(self, state: Any, text: Text, dropped: Int[Array, "B"]) -> Any:
        return self.tuned.rewind(state[0], text, dropped), self.reference.rewind(state[1], text, dropped)
