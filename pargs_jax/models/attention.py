"""Attention over whole texts: training and prefill.

`attend_whole` chooses by device and shape. On NVIDIA GPUs in bfloat16 it is cuDNN's flash attention, on TPUs the splash
kernel of JAX; neither writes the `[B H T T]` scores to memory. Everywhere else it is `plain_attention`, which is also
what the kernels are tested against. Any mask works: causal, left padding, prefix-causal, packed texts.
"""

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float

from pargs_jax.sharding import ROWS, current_device, spec_of

Kernel = Literal["plain", "cudnn", "splash"]

LANES = 128
"""The splash kernel works on blocks of a multiple of so many tokens."""

WIDEST_HEAD = 128
"""The widest head that cuDNN's kernel supports on all GPUs with bfloat16."""


def attend_whole(
    queries: Float[Array, "B Hq T D"],
    keys: Float[Array, "B H T D"],
    values: Float[Array, "B H T D"],
    mask: Bool[Array, "*B T T"],
    scale: float | Array,
    cap: float | None = None,
    *,
    kernel: Kernel | None = None,
) -> Float[Array, "B Hq T D"]:
    """Attention of T tokens to each other; `mask[..., t, s]` says whether token t sees token s. With grouped queries
    (Hq a multiple of H), queries share heads. `cap` limits scores smoothly (`soft_cap`). A token that sees nothing gets
    some finite vector.

    `kernel` overrides the choice of `choose_kernel`. Raises ValueError for cuDNN's with a cap, which it does not know.
    """
    kernel = kernel or choose_kernel(queries.dtype, *queries.shape[-2:], is_capped=cap is not None)
    mask = jnp.broadcast_to(mask, (len(queries), *mask.shape[-2:]))
    if kernel == "cudnn":
        if cap is not None:
            raise ValueError("cuDNN's attention cannot cap scores; use the plain kernel")
        return _cudnn(queries, keys, values, mask, scale)
    if kernel == "splash":
        return _splash(queries, keys, values, mask, scale, cap)
    return plain_attention(queries, keys, values, mask, scale, cap)


def choose_kernel(dtype: jnp.dtype, length: int, head_dim: int, is_capped: bool = False) -> Kernel:
    """The kernel for texts of `length` tokens on the devices of the current mesh, or on the default device. cuDNN's
    cannot cap scores."""
    device = current_device()
    if dtype != jnp.bfloat16 or length < LANES:
        return "plain"
    if "NVIDIA" in device.device_kind and head_dim % 8 == 0 and head_dim <= WIDEST_HEAD and not is_capped:
        return "cudnn"
    return "splash" if device.platform == "tpu" else "plain"


def plain_attention(
    queries: Float[Array, "B Hq T D"],
    keys: Float[Array, "B H S D"],
    values: Float[Array, "B H S D"],
    mask: Bool[Array, "*B T S"],
    scale: float | Array,
    cap: float | None = None,
) -> Float[Array, "B Hq T D"]:
    """Attention that writes out all scores, with the softmax in fp32."""
    return mix_values(jax.nn.softmax(masked_scores(queries, keys, mask, scale, cap), axis=-1), values)


def soft_cap(x: Float[Array, "*B"], cap: float | None) -> Float[Array, "*B"]:
    """Numbers between -cap and cap: small ones stay nearly as they are. Without a cap, x unchanged."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def masked_scores(
    queries: Float[Array, "B Hq T D"],
    keys: Float[Array, "B H S D"],
    mask: Bool[Array, "*B T S"],
    scale: float | Array,
    cap: float | None = None,
) -> Float[Array, "B H G T S"]:
    """Scores in fp32; G queries share a head. Invisible ones are fp32's minimum: finite, so that a row that sees
    nothing is not NaN."""
    batch, query_heads, length, head_dim = queries.shape
    heads = keys.shape[1]
    products = soft_cap(_products(queries.reshape(batch, heads, -1, head_dim), keys) * scale, cap)
    products = products.reshape(batch, heads, query_heads // heads, length, keys.shape[2])
    return jnp.where(mask[:, None, None] if mask.ndim == 3 else mask, products, jnp.finfo(jnp.float32).min)


def mix_values(weights: Float[Array, "B H G T S"], values: Float[Array, "B H S D"]) -> Float[Array, "B Hq T D"]:
    """Values mixed by weights, in the values' dtype."""
    batch, heads, group, length, slots = weights.shape
    flat = weights.astype(values.dtype).reshape(batch, heads, group * length, slots)
    return jnp.einsum("bhqs,bhsd->bhqd", flat, values).reshape(batch, heads * group, length, -1)


def _products(queries: Float[Array, "B H Q D"], keys: Float[Array, "B H S D"]) -> Float[Array, "B H Q S"]:
    """Products in fp32."""
    if keys.dtype == jnp.float32:
        return jnp.einsum("bhqd,bhsd->bhqs", queries, keys)
    return _narrow_products(queries, keys)


@jax.custom_vjp
def _narrow_products(queries: Array, keys: Array) -> Array:
    """Products of bfloat16 in fp32, whose gradients are products of bfloat16 again. JAX's own convert the keys to
    fp32."""
    return jnp.einsum("bhqd,bhsd->bhqs", queries, keys, preferred_element_type=jnp.float32)


def _narrow_products_forward(queries: Array, keys: Array) -> tuple[Array, tuple[Array, Array]]:
    return _narrow_products(queries, keys), (queries, keys)


def _narrow_products_backward(inputs: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    queries, keys = inputs
    gradient = gradient.astype(keys.dtype)
    return jnp.einsum("bhqs,bhsd->bhqd", gradient, keys), jnp.einsum("bhqs,bhqd->bhsd", gradient, queries)


_narrow_products.defvjp(_narrow_products_forward, _narrow_products_backward)


def _cudnn(queries: Array, keys: Array, values: Array, mask: Array, scale: float | Array) -> Array:
    length = queries.shape[2]
    if length % 2:  # the kernel's backward pass needs an even length
        queries, keys, values = (jnp.pad(x, ((0, 0), (0, 0), (0, 1), (0, 0))) for x in (queries, keys, values))
        mask = jnp.pad(mask, ((0, 0), (0, 1), (0, 1)))
    if not isinstance(scale, float):
        queries, scale = queries * scale.astype(queries.dtype), 1.0
    queries, keys, values = (x.swapaxes(1, 2) for x in (queries, keys, values))
    mixed = jax.nn.dot_product_attention(queries, keys, values, mask=mask[:, None], scale=scale, implementation="cudnn")
    return mixed.swapaxes(1, 2)[:, :, :length]


def _splash(
    queries: Array,
    keys: Array,
    values: Array,
    mask: Array,
    scale: float | Array,
    cap: float | None = None,
    *,
    interpret: bool = False,
) -> Array:
    length = queries.shape[2]
    lacking = -length % LANES
    queries = queries * jnp.asarray(scale, queries.dtype)
    queries, keys, values = (jnp.pad(x, ((0, 0), (0, 0), (0, lacking), (0, 0))) for x in (queries, keys, values))
    mask = jnp.pad(mask, ((0, 0), (0, lacking), (0, lacking)))
    run = partial(_splash_rows, cap=cap, interpret=interpret)
    spec = spec_of(keys.shape, ROWS, "tensor", None, None)
    if spec is not None:  # the compiler cannot split a kernel by itself
        rows = PartitionSpec(spec[0], None, None)
        run = jax.shard_map(run, in_specs=(spec, spec, spec, rows), out_specs=spec, check_vma=False)
    return run(queries, keys, values, mask)[:, :, :length]


def _splash_rows(
    queries: Array, keys: Array, values: Array, mask: Array, *, cap: float | None, interpret: bool
) -> Array:
    """The kernel for one row after another, because each has its own mask; a TPU's core does one block at a time
    anyway."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash

    heads, length = keys.shape[1:3]
    group = queries.shape[1] // heads
    block = next(size for size in (512, 256, LANES) if length % size == 0)
    sizes = splash.BlockSizes(block, block, block, block, block, block, block, block)

    def of_row(row: tuple[Array, Array, Array, Array]) -> Array:
        queries, keys, values, mask = row
        # Queries that share a head follow one another, so one kernel serves them all.
        own = queries.reshape(heads, 1, group * length, -1)
        kernel = splash.make_splash_mha_single_device(
            jnp.tile(mask, (group, 1))[None], block_sizes=sizes, attn_logits_soft_cap=cap, interpret=interpret
        )
        # Its maker turns this flag into an array, on whose value it then cannot branch.
        kernel.fwd_mask_info = kernel.fwd_mask_info._replace(is_dynamic_mask=True)
        return jax.vmap(kernel)(own, keys[:, None], values[:, None]).reshape(queries.shape)

    return jax.lax.map(of_row, (queries, keys, values, mask))
