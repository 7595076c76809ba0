"""Primitives that the model families share: attention with a cache, layer stacks, dropout, activations."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from pargs_jax.models.attention import attend_whole, masked_scores, mix_values, plain_attention
from pargs_jax.models.cache import write_rows
from pargs_jax.models.casting import converted
from pargs_jax.sharding import ROWS, constrain

Remat = Literal["none", "products", "layers"]

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_new": jax.nn.gelu,
    "gelu_pytorch_tanh": jax.nn.gelu,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "tanh": jnp.tanh,
}


class KeyValues(NamedTuple):
    """Keys and values of one layer, `[B H T D]`; with stacked layers a leading L."""

    keys: Float[Array, "*L B H T D"]
    values: Float[Array, "*L B H T D"]


class BesideCache(NamedTuple):
    """New tokens attend to the real slots of the cache (or each to its own) and, by `mask`, to each other. Their keys
    and values stay outside the cache. `positions` are those of the cached tokens; None if they equal the slots."""

    valid: Bool[Array, "B S"] | Bool[Array, "B T S"]
    mask: Bool[Array, "*B T T"]
    positions: Int[Array, "B S"] | None = None


class InCache(NamedTuple):
    """New tokens are first written into the cache, row b from slot `places[b]` on, and attend to its slots by `mask`.
    This takes one product for all keys, and copies none of them."""

    places: Int[Array, "B"]
    mask: Bool[Array, "B T S"]


Sight = Bool[Array, "*B T T"] | BesideCache | InCache
"""How new tokens see the cache; without a cache, a mask whose entry (t, s) says whether new token t sees new token
s."""


def attend(
    queries: Float[Array, "B Hq T D"],
    new: KeyValues,
    sight: Sight,
    cached: KeyValues | None,
    scale: float | Array,
    cap: float | None = None,
) -> tuple[Float[Array, "B T HqD"], KeyValues]:
    """Attention of T new tokens as `sight` says, softmax in fp32. Also returns the new keys and values (`BesideCache`,
    or no cache), or the cache with them written into it (`InCache`).

    Beside a cache, only the scores of cached and new tokens are joined; keys and values are never copied. With grouped
    queries (Hq a multiple of H), queries share heads. `cap` limits scores smoothly (`soft_cap`).
    """
    if isinstance(sight, BesideCache):
        valid = sight.valid if sight.valid.ndim == 3 else sight.valid[:, None]
        past = masked_scores(queries, cached.keys, valid, scale, cap)
        own = masked_scores(queries, new.keys, sight.mask, scale, cap)
        weights = jax.nn.softmax(jnp.concatenate([past, own], axis=-1), axis=-1)
        split = past.shape[-1]
        mixed = mix_values(weights[..., :split], cached.values) + mix_values(weights[..., split:], new.values)
    elif isinstance(sight, InCache):
        new = jax.tree.map(lambda stored, x: write_rows(stored, x, sight.places), cached, new)
        mixed = plain_attention(queries, new.keys, new.values, sight.mask, scale, cap)
    else:
        mixed = attend_whole(queries, new.keys, new.values, sight, scale, cap)
    return join_heads(mixed), new


def multiply(x: Float[Array, "*B D"], matrix: Float[Array, "D E"]) -> Float[Array, "*B E"]:
    """`x @ matrix`, as a product of two matrices. Its gradient for `matrix` is one too. Without the reshapes, XLA on
    CPUs transposes both sides of that one before the product, which takes a sixth of a training step."""
    return (x.reshape(-1, x.shape[-1]) @ matrix).reshape(*x.shape[:-1], -1)


class Linear(nnx.Module):
    """A linear layer. `pargs_jax.models.lora` and `preference_lora` add low-rank terms to its matrix; `int8` gives it a
    matrix in int8 with scales."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        kernel_init: nnx.initializers.Initializer,
        use_bias: bool = True,
        rngs: nnx.Rngs,
    ) -> None:
        self.kernel = nnx.Param(kernel_init(rngs.params(), (inputs, outputs)))
        self.kernel_scale: nnx.Param | None = nnx.data(None)
        self.bias = nnx.Param(jnp.zeros(outputs)) if use_bias else None
        self.lora_in: nnx.Param | None = nnx.data(None)
        self.lora_out: nnx.Param | None = nnx.data(None)
        self.lora_scale = 0.0
        self.addition: nnx.Module | None = nnx.data(None)

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B E"]:
        out = multiply(x, self.kernel[...].astype(x.dtype))
        if self.kernel_scale is not None:
            out = out * self.kernel_scale[...]
        if self.lora_in is not None:
            out = out + self.lora_scale * multiply(multiply(x, self.lora_in[...]), self.lora_out[...])
        if self.addition is not None:
            out = out + self.addition(x)
        return out if self.bias is None else out + self.bias[...]


def layer_norm(width: int, epsilon: float, rngs: nnx.Rngs, *, learned: bool = True, bias: bool = True) -> nnx.LayerNorm:
    """A layer norm as torch computes it; without `learned`, it has neither scale nor bias."""
    return nnx.LayerNorm(
        width, epsilon=epsilon, use_scale=learned, use_bias=learned and bias, use_fast_variance=False, rngs=rngs
    )


class Embedding(nnx.Module):
    """A table of vectors that returns its parameters' dtype (`nnx.Embed` keeps the dtype it was made with).
    `pargs_jax.models.lora` adds a low-rank term to the table, which is never computed as a whole."""

    def __init__(self, count: int, width: int, std: float, *, rngs: nnx.Rngs) -> None:
        self.embedding = nnx.Param(std * jax.random.normal(rngs.params(), (count, width)))
        self.lora_in: nnx.Param | None = nnx.data(None)
        self.lora_out: nnx.Param | None = nnx.data(None)
        self.lora_scale = 0.0

    def __call__(self, ids: Int[Array, "*B"]) -> Float[Array, "*B D"]:
        rows = self.embedding[...][ids]
        if self.lora_in is not None:
            rows = rows + self.lora_scale * multiply(self.lora_in[...][ids], self.lora_out[...])
        return rows

    def attend(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Products with every row of the table: the logits of tied embeddings."""
        out = multiply(hidden, self.embedding[...].T)
        if self.lora_in is not None:
            out = out + self.lora_scale * multiply(multiply(hidden, self.lora_out[...].T), self.lora_in[...].T)
        return out


def split_heads(x: Float[Array, "B T HD"], heads: int) -> Float[Array, "B H T D"]:
    return x.reshape(*x.shape[:2], heads, -1).transpose(0, 2, 1, 3)


def join_heads(x: Float[Array, "B H T D"]) -> Float[Array, "B T HD"]:
    return x.transpose(0, 2, 1, 3).reshape(x.shape[0], x.shape[2], -1)


def dropout(x: Array, rate: float, key: PRNGKeyArray | None) -> Array:
    """Inverted dropout; without a key, or at rate zero, x unchanged."""
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), 0.0)


# A block applied to one layer's inputs: (block, x, layer index, layer's cache, dropout key) -> (x, layer's output).
BlockStep = Callable[[Any, Array, Any, Any, PRNGKeyArray | None], tuple[Array, Any]]


def make_layers(block: Callable[..., nnx.Module], count: int, unrolled: bool, rngs: nnx.Rngs) -> nnx.Module:
    """`count` blocks: one module whose arrays have a leading L, or, unrolled, a list of modules."""
    if unrolled:
        return nnx.List([block(rngs=rngs) for _ in range(count)])
    return nnx.vmap(lambda keys: block(rngs=keys))(rngs.split(count))


def run_layers(
    layers: nnx.Module,
    step: BlockStep,
    x: Array,
    count: int,
    cache: Any = None,
    key: PRNGKeyArray | None = None,
    *,
    remat: Remat = "none",
) -> tuple[Array, Any]:
    """Runs a stack made by `make_layers`: a `lax.scan` if stacked, which compiles one layer and gives small programs; a
    loop if unrolled. The loop is faster where a step is bound by reading weights, because the scan copies each layer's
    weights out of the stack.

    `cache` is the input of `step` for one layer (such as `KeyValues`), with a leading L if stacked, or a tuple of them
    if unrolled. The second result of `step`, the new keys and values, is returned in the same form. `remat` says what
    stacked layers keep for the backward pass, which recomputes the rest: everything (`none`), the results of matrix
    products with weights (`products`), or only the layers' inputs (`layers`).
    """
    keys = None if key is None else jax.random.split(key, count)
    if isinstance(layers, nnx.List):
        new = []
        for index, block in enumerate(layers):
            x = constrain(x, ROWS, None, None)
            layer_cache = None if cache is None else cache[index]
            x, output = step(block, x, index, layer_cache, None if keys is None else keys[index])
            new.append(output)
        return x, tuple(new)

    definition, params = nnx.split(layers)

    def body(x: Array, layer: Any) -> tuple[Array, Any]:
        layer_params, index, layer_cache, layer_key = layer
        x = constrain(x, ROWS, None, None)
        return step(nnx.merge(definition, converted(layer_params)), x, index, layer_cache, layer_key)

    if remat != "none":
        policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if remat == "products" else None
        # Inside a scan, XLA cannot merge the recomputation with the first computation, so no barriers are needed.
        body = jax.checkpoint(body, policy=policy, prevent_cse=False)
    return jax.lax.scan(body, x, (params, jnp.arange(count), cache, keys))
