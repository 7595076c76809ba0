"""For contrastive search: how similar a candidate is to the tokens that the language model has read."""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pargs_jax.decoding.guides.contract import Capacity, Chosen, Prompts, Text
from pargs_jax.models.cache import Cache
from pargs_jax.models.causal import CausalModel
from pargs_jax.models.model import Params


class SimilarityState(NamedTuple):
    """The model's cache and hidden states; it has read each text, prompt included."""

    cache: Cache
    directions: Float[Array, "B S D"]
    """The model's final hidden states at unit length; slot s of a row holds that of the token at position s."""


class _Pending(NamedTuple):
    siblings: Any
    directions: Float[Array, "B K D"]


@dataclasses.dataclass(frozen=True)
class SimilarityGuide:
    """The degeneration penalty of contrastive search (Su et al., 2022): minus the largest cosine between the hidden
    states of a candidate and of any token before it, prompt included.

    `model` is the language model, with its params passed again. It reads each text a second time, into another cache.
    """

    model: CausalModel
    scores_vocabulary: ClassVar[bool] = False
    adds_up: ClassVar[bool] = False

    def prefill(
        self, params: Params, prompts: Prompts, capacity: Capacity, own_prompts: Prompts | None
    ) -> SimilarityState:
        tokens, lengths = prompts
        hidden, cache = self.model.prefill_states(params, tokens, lengths, tokens.shape[1] + sum(capacity))
        free_slots = cache.slots - tokens.shape[1]
        return SimilarityState(cache, jnp.pad(_directions(hidden), ((0, 0), (0, free_slots), (0, 0))))

    def score(
        self, params: Params, state: SimilarityState, text: Text, candidates: Int[Array, "B K"]
    ) -> tuple[Float[Array, "B K"], _Pending]:
        hidden, siblings = self.model.siblings(params, state.cache, candidates)
        directions = _directions(hidden)
        cosines = jnp.einsum("bkd,bsd->bks", directions, state.directions, precision="highest")
        largest = jnp.where(state.cache.valid[:, None], cosines, -1.0).max(axis=-1)
        return -largest, _Pending(siblings, directions)

    def commit(self, params: Params, state: SimilarityState, pending: _Pending, chosen: Chosen) -> SimilarityState:
        rows = jnp.arange(len(chosen.token))
        # A finished row writes nowhere.
        at = jnp.where(chosen.live, state.cache.lengths, state.cache.slots)
        directions = state.directions.at[rows, at].set(pending.directions[rows, chosen.index], mode="drop")
        return SimilarityState(self.model.keep(state.cache, pending.siblings, chosen.live, chosen.index), directions)

    def rewind(self, state: SimilarityState, text: Text, dropped: Int[Array, "B"]) -> SimilarityState:
        return state._replace(cache=state.cache.forget(dropped))


def _directions(hidden: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
    hidden = hidden.astype(jnp.float32)
    norms = jnp.sqrt((hidden * hidden).sum(axis=-1, keepdims=True))
    return hidden / jnp.maximum(norms, 1e-8)
