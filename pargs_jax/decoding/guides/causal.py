"""A causal reward model that shares the language model's tokens: one cache per text, and K queries against it."""

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pargs_jax.decoding.guides.contract import Capacity, Chosen, Prompts, Text
from pargs_jax.models.cache import Cache
from pargs_jax.models.causal import CausalModel
from pargs_jax.models.model import Params


@dataclasses.dataclass(frozen=True)
class CausalGuide:
    """A causal reward model as a guide.

    The K candidates are K queries that see the cached text and themselves. A step therefore reads the model's weights
    and the cache once, not K times. `commit` keeps the winner's keys and values.
    """

    model: CausalModel
    scores_vocabulary: ClassVar[bool] = False
    adds_up: ClassVar[bool] = False

    def prefill(self, params: Params, prompts: Prompts, capacity: Capacity, own_prompts: Prompts | None) -> Cache:
        return self._prefill(params, prompts, capacity, own_prompts)[1]

    def read_prompts(
        self, params: Params, prompts: Prompts, capacity: Capacity, own_prompts: Prompts | None
    ) -> tuple[Float[Array, "B"], Cache]:
        last, cache = self._prefill(params, prompts, capacity, own_prompts)
        return self.model.rewards(params, last), cache

    def score(
        self, params: Params, state: Cache, text: Text, candidates: Int[Array, "B K"]
    ) -> tuple[Float[Array, "B K"], Any]:
        hidden, pending = self.model.siblings(params, state, candidates)
        return self.model.rewards(params, hidden), pending

    def commit(self, params: Params, state: Cache, pending: Any, chosen: Chosen) -> Cache:
        return self.model.keep(state, pending, chosen.live, chosen.index)

    def rewind(self, state: Cache, text: Text, dropped: Int[Array, "B"]) -> Cache:
        return state.forget(dropped)

    def read_prefixes(
        self, params: Params, state: Cache, text: Text, new: Int[Array, "B"], width: int
    ) -> tuple[Float[Array, "B W"], Cache]:
        at = jnp.minimum((text.lengths - new)[:, None] + jnp.arange(width), text.tokens.shape[1] - 1)
        hidden, cache = self.model.append(params, state, jnp.take_along_axis(text.tokens, at, axis=1), new)
        return self.model.rewards(params, hidden), cache

    def _prefill(
        self, params: Params, prompts: Prompts, capacity: Capacity, own_prompts: Prompts | None
    ) -> tuple[Float[Array, "B D"], Cache]:
        tokens, lengths = prompts if own_prompts is None else own_prompts
        return self.model.prefill(params, tokens, lengths, tokens.shape[1] + sum(capacity))
