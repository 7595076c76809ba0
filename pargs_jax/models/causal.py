"""The one interface of the causal families.

Beside full passes (`encode`) a `CausalModel` has the moves of decoding against a shared prefix: `prefill` the prompt,
look at `siblings` (alternative next tokens, each seeing the prefix and itself), or, where what follows is more than one
token, at what `extend`s the prefix; `pargs_jax.models.cache` appends what stays.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from pargs_jax.models.cache import Cache, with_room
from pargs_jax.models.heads import RewardHead, VocabularyHead
from pargs_jax.models.model import Model, Params


@dataclasses.dataclass(frozen=True)
class CausalModel(Model):
    """A GPT-2, Llama or OPT with a vocabulary head (a language model) or a scalar head (a reward model)."""

    def make_head(self, rngs: nnx.Rngs) -> VocabularyHead | RewardHead:
        config = self.config
        if self.head == "reward":
            return RewardHead(config.head_width, config.initializer_range, rngs=rngs)
        std = config.initializer_range
        return VocabularyHead(config.head_width, config.vocab_size, config.tied_embeddings, std, rngs=rngs)

    def encode(
        self,
        params: Params,
        tokens: Int[Array, "B T"],
        start: Int[Array, "B"] | None = None,
        key: PRNGKeyArray | None = None,
        *,
        prompt_width: int | None = None,
    ) -> Float[Array, "B T D"]:
        """Final hidden states of whole texts. `start` is the number of left-padding tokens of each row (default 0);
        right padding needs no mask, since nothing real comes after it. A key turns dropout on. Where the prompt ends,
        `prompt_width`, makes no difference here; it does to a `PrefixCausalModel`."""
        return self._encode(params, tokens, start, key)[0]

    def logits(self, params: Params, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Next-token logits (fp32) of a model with a vocabulary head."""
        network = self.network(params)
        return network.head(hidden, network.backbone.embed)[..., : self.config.vocab_size]

    def rewards(self, params: Params, hidden: Float[Array, "*B D"]) -> Float[Array, "*B"]:
        """Rewards (fp32) of the texts that end at each hidden state, for a model with a reward head."""
        return self.network(params).head(hidden)

    def prefill(
        self, params: Params, prompts: Int[Array, "B P"], lengths: Int[Array, "B"], capacity: int
    ) -> tuple[Float[Array, "B P D"], Cache]:
        """Reads left-padded prompts into a cache with room for `capacity` tokens; returns their hidden states too."""
        width = prompts.shape[1]
        start = width - lengths
        hidden, new = self._encode(params, prompts, start, None)
        return hidden, Cache(with_room(new, width, capacity), start, jnp.asarray(width, jnp.int32))

    def siblings(
        self, params: Params, cache: Cache, candidates: Int[Array, "B K"]
    ) -> tuple[Float[Array, "B K D"], Any]:
        """Hidden states of K alternative next tokens, each seeing the cached prefix and itself, and their pending keys
        and values. The prefix is held and read once for all K."""
        itself = jnp.eye(candidates.shape[1], dtype=bool)
        return self.extend(params, cache, candidates, jnp.zeros_like(candidates), itself)

    def extend(
        self,
        params: Params,
        cache: Cache,
        tokens: Int[Array, "B T"],
        offsets: Int[Array, "B T"],
        mask: Bool[Array, "*B T T"],
    ) -> tuple[Float[Array, "B T D"], Any]:
        """Hidden states of T new tokens that stand `offsets` tokens after the cached prefix, which all of them see;
        `mask[..., t, s]` says whether token t sees token s. Also their pending keys and values."""
        positions = cache.next_position[:, None] + offsets
        return self.network(params).backbone(tokens, positions, mask, cache.kv, cache.valid)

    def _encode(
        self, params: Params, tokens: Array, start: Array | None, key: PRNGKeyArray | None
    ) -> tuple[Array, Any]:
        batch, length = tokens.shape
        start = jnp.zeros(batch, jnp.int32) if start is None else start
        slots = jnp.arange(length)
        positions = jnp.maximum(slots - start[:, None], 0)
        causal = slots[:, None] >= slots
        mask: Bool[Array, "B T T"] = causal & (slots >= start[:, None])[:, None, :]
        return self.network(params).backbone(tokens, positions, mask, key=key)
