"""A causal reward model with the language model's own tokens: one cache of the shared prefix, K queries against it."""

import dataclasses
from typing import Any

from jaxtyping import Array, Float, Int

from pargs_jax.decoding.guides.contract import Prompts
from pargs_jax.models.cache import Cache, append_choice
from pargs_jax.models.causal import CausalModel
from pargs_jax.models.model import Params


@dataclasses.dataclass(frozen=True)
class CausalGuide:
    """A causal reward model as a guide.

    The K candidates are K queries that see the cached prefix and themselves, so a step reads the model's weights and
    the cache once, not K times; `commit` writes the winner's keys and values.
    """

    model: CausalModel

    def prefill(self, params: Params, prompts: Prompts, max_new_tokens: int, own_prompts: Prompts | None) -> Cache:
        tokens, lengths = prompts if own_prompts is None else own_prompts
        return self.model.prefill(params, tokens, lengths, tokens.shape[1] + max_new_tokens)[1]

    def score(self, params: Params, state: Cache, candidates: Int[Array, "B K"]) -> tuple[Float[Array, "B K"], Any]:
        hidden, pending = self.model.siblings(params, state, candidates)
        return self.model.rewards(params, hidden), pending

    def commit(self, params: Params, state: Cache, pending: Any, choice: Int[Array, "B"]) -> Cache:
        return append_choice(state, pending, choice)
