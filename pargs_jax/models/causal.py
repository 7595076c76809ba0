"""The one interface of the causal families: NNX modules used as pure functions over a plain dict of arrays.

A `CausalModel` is static and hashable, so it can be a static argument of `jax.jit`; its arrays travel apart as
`params`. Beside full passes (`encode`) it has the three moves of decoding against a shared prefix: `prefill` the
prompt, look at `siblings` (alternative next tokens, each seeing the prefix and itself), and `commit` the chosen one.
"""

import dataclasses
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from pargs_jax.models.gpt2 import GPT2Config
from pargs_jax.models.heads import RewardHead, VocabularyHead
from pargs_jax.models.llama import LlamaConfig

CausalConfig = GPT2Config | LlamaConfig
Params = dict[str, Any]
Head = Literal["vocabulary", "reward"]


class Cache(NamedTuple):
    """Keys and values of a left-padded batch; slots `start[b] <= s < length` are real.

    `kv` is `KeyValues[L B H S D]` for stacked layers, a tuple of L `KeyValues[B H S D]` for unrolled ones.
    """

    kv: Any
    start: Int[Array, "B"]
    length: Int[Array, ""]


class CausalNetwork(nnx.Module):
    """Backbone and head, under the names that parameters have in the dict."""

    def __init__(self, config: CausalConfig, head: Head, *, unrolled: bool, rngs: nnx.Rngs) -> None:
        self.backbone = config.make(unrolled=unrolled, rngs=rngs)
        std = config.initializer_range
        if head == "vocabulary":
            self.head = VocabularyHead(config.width, config.vocab_size, config.tied_embeddings, std, rngs=rngs)
        else:
            self.head = RewardHead(config.width, std, rngs=rngs)


@dataclasses.dataclass(frozen=True)
class CausalModel:
    """A GPT-2 or Llama with a vocabulary head (a language model) or a scalar head (a reward model).

    `unrolled` says how `params` hold the layers: stacked on a leading axis and run by a scan (False: small programs,
    quick to compile), or one by one (True: faster decoding where a step is bound by reading weights from memory).
    `stack_layers` and `unstack_layers` convert.
    """

    config: CausalConfig
    head: Head = "vocabulary"
    unrolled: bool = False

    def init(self, key: PRNGKeyArray) -> Params:
        """Random fp32 parameters."""
        network = CausalNetwork(self.config, self.head, unrolled=self.unrolled, rngs=nnx.Rngs(key))
        return nnx.to_pure_dict(nnx.state(network))

    def abstract_params(self) -> Params:
        """The parameters' shapes and dtypes, as `jax.ShapeDtypeStruct`s."""
        return nnx.to_pure_dict(_abstract(self)[1])

    def network(self, params: Params) -> CausalNetwork:
        return nnx.merge(_abstract(self)[0], params)

    def encode(
        self,
        params: Params,
        tokens: Int[Array, "B T"],
        start: Int[Array, "B"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "B T D"]:
        """Final hidden states of whole texts. `start` is the number of left-padding tokens of each row (default 0);
        right padding needs no mask, since nothing real comes after it. A key turns dropout on."""
        return self._encode(params, tokens, start, key)[0]

    def logits(self, params: Params, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Next-token logits (fp32) of a model with a vocabulary head."""
        network = self.network(params)
        return network.head(hidden, network.backbone.embed)

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
        room = [(0, 0), (0, 0), (0, capacity - width), (0, 0)]
        kv = jax.tree.map(lambda x: jnp.pad(x, [(0, 0)] * (x.ndim - 4) + room), new)
        return hidden, Cache(kv, start, jnp.asarray(width, jnp.int32))

    def siblings(
        self, params: Params, cache: Cache, candidates: Int[Array, "B K"]
    ) -> tuple[Float[Array, "B K D"], Any]:
        """Hidden states of K alternative next tokens, each seeing the cached prefix and itself, and their pending keys
        and values. The prefix is held and read once for all K."""
        count = candidates.shape[1]
        slots = jnp.arange(_slots(cache))
        valid = (slots >= cache.start[:, None]) & (slots < cache.length)
        positions = jnp.broadcast_to((cache.length - cache.start)[:, None], candidates.shape)
        itself = jnp.eye(count, dtype=bool)
        return self.network(params).backbone(candidates, positions, itself, cache.kv, valid)

    @staticmethod
    def commit(cache: Cache, pending: Any, choice: Int[Array, "B"]) -> Cache:
        """Appends the chosen sibling of each row, `choice[b]` in `0..K-1`, to the cache."""

        def append(stored: Array, new: Array) -> Array:
            if new.shape[-2] > 1:
                index = choice.reshape((1,) * (new.ndim - 4) + (-1, 1, 1, 1))
                new = jnp.take_along_axis(new, index, axis=-2)
            position = [jnp.zeros((), jnp.int32)] * (stored.ndim - 2) + [cache.length, jnp.zeros((), jnp.int32)]
            return jax.lax.dynamic_update_slice(stored, new, position)

        return Cache(jax.tree.map(append, cache.kv, pending), cache.start, cache.length + 1)

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


@lru_cache(maxsize=64)
def _abstract(model: CausalModel) -> tuple[nnx.GraphDef, nnx.State]:
    def make() -> CausalNetwork:
        return CausalNetwork(model.config, model.head, unrolled=model.unrolled, rngs=nnx.Rngs(0))

    return nnx.split(nnx.eval_shape(make))


def _slots(cache: Cache) -> int:
    return jax.tree.leaves(cache.kv)[0].shape[-2]


def unstack_layers(model: CausalModel, params: Params) -> tuple[CausalModel, Params]:
    """The same model with its layers one by one."""
    if model.unrolled:
        return model, params
    layers = params["backbone"]["layers"]
    single = {i: jax.tree.map(lambda x, i=i: x[i], layers) for i in range(model.config.layers)}
    unrolled = {**params, "backbone": {**params["backbone"], "layers": single}}
    return dataclasses.replace(model, unrolled=True), unrolled


def stack_layers(model: CausalModel, params: Params) -> tuple[CausalModel, Params]:
    """The same model with its layers stacked on a leading axis."""
    if not model.unrolled:
        return model, params
    layers = [params["backbone"]["layers"][i] for i in range(model.config.layers)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *layers)
    return dataclasses.replace(model, unrolled=False), {
        **params,
        "backbone": {**params["backbone"], "layers": stacked},
    }
