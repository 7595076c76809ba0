"""Low-rank adaptation (LoRA; Hu et al., 2022). The matrices of chosen layers stay frozen; each gets a trained addition
`scale * lora_in @ lora_out` of small rank. After merging, the model has its usual parameters again."""

import dataclasses
import re
import zlib
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import PRNGKeyArray

from pargs_jax.errors import InputError
from pargs_jax.models.layers import Linear

NAMES = ("lora_in", "lora_out")


@dataclasses.dataclass(frozen=True)
class Lora:
    """Which linear layers of the blocks get additions, and of what size.

    Attributes:
        rank: the rank of the additions.
        alpha: the additions are scaled by `alpha / rank`.
        layers: a regular expression that must match the layer's whole name: `query|value`, or `.*` for all.
    """

    rank: int = 16
    alpha: float = 32.0
    layers: str = ".*"

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def adapt(self, block: nnx.Module) -> None:
        """Adds zero additions to a block's chosen layers. `block` may be a stack of blocks."""
        for linear in chosen_layers(block, self.layers, "lora.layers"):
            *stack, inputs, outputs = linear.kernel.shape
            linear.lora_in = nnx.Param(jnp.zeros((*stack, inputs, self.rank)))
            linear.lora_out = nnx.Param(jnp.zeros((*stack, self.rank, outputs)))
            linear.lora_scale = self.scale


def chosen_layers(block: nnx.Module, pattern: str, option: str) -> list[Linear]:
    """The linear layers of a block whose whole names match a regular expression. Raises InputError if none does."""
    linears = {name: part for name, part in vars(block).items() if isinstance(part, Linear)}
    chosen = [part for name, part in linears.items() if re.fullmatch(pattern, name)]
    if not chosen:
        raise InputError(f"{option} {pattern}: matches none of {', '.join(linears)}")
    return chosen


def draw_lora(abstract: Any, key: PRNGKeyArray) -> Any:
    """Draws the additions of a model from its abstract parameters, as a dict of only these. `lora_in` is normal with
    variance 1 / inputs and `lora_out` is zero, so training starts from the unchanged model."""

    def draw(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if path[-1].key == "lora_out":
            return jnp.zeros(leaf.shape)
        own_key = jax.random.fold_in(key, zlib.crc32(jax.tree_util.keystr(path).encode()))
        return jax.random.normal(own_key, leaf.shape) * leaf.shape[-2] ** -0.5

    return jax.tree_util.tree_map_with_path(draw, split_params(abstract, NAMES)[0])


def merge_lora(lora: Lora, params: Any) -> Any:
    """The parameters with every addition merged into its matrix and then removed. Computed in fp32."""
    if not isinstance(params, dict):
        return params
    if "lora_in" not in params:
        return {name: merge_lora(lora, part) for name, part in params.items()}
    rest, kernel = {name: part for name, part in params.items() if name not in NAMES}, params["kernel"]
    addition = jnp.matmul(params["lora_in"], params["lora_out"], precision="highest") * lora.scale
    return rest | {"kernel": (kernel.astype(jnp.float32) + addition).astype(kernel.dtype)}


def split_params(params: Any, names: tuple[str, ...]) -> tuple[Any, Any]:
    """Splits a dict in two: everything at or below one of the names, and the rest. `join_params` reverses this."""
    chosen: dict[Any, Any] = {}
    rest: dict[Any, Any] = {}
    for name, part in params.items():
        if name in names:
            chosen[name] = part
        elif isinstance(part, dict):
            inner, outer = split_params(part, names)
            chosen |= {name: inner} if inner else {}
            rest |= {name: outer} if outer else {}
        else:
            rest[name] = part
    return chosen, rest


def join_params(one: Any, other: Any) -> Any:
    """Joins two dicts that share no leaf."""
    both = {**one, **other}
    for name in one.keys() & other.keys():
        both[name] = join_params(one[name], other[name])
    return both
