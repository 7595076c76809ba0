"""Low-rank adaptation (LoRA; Hu et al., 2022). The matrices of chosen layers stay frozen; each gets a trained addition
`scale * lora_in @ lora_out` of small rank. After merging, the model has its usual parameters again.

The layers are the linear ones of the blocks, the table of token embeddings (`embed`), and a vocabulary head with a
matrix of its own (`head`). Where the head is tied to the embeddings, an addition to the table changes both.
"""

import dataclasses
import re
import zlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import PRNGKeyArray

from pargs_jax.errors import InputError
from pargs_jax.models.heads import VocabularyHead
from pargs_jax.models.layers import Embedding, Linear

NAMES = ("lora_in", "lora_out")
EMBED, HEAD = "embed", "head"
"""The names of the two layers outside the blocks: of the backbone, and of the whole model."""


@dataclasses.dataclass(frozen=True)
class Lora:
    """Which layers get additions, and of what size.

    Attributes:
        rank: the rank of the additions.
        alpha: the additions are scaled by `alpha / rank`.
        layers: a regular expression that must match the layer's whole name: `query|value`, or `.*` for all linear
            layers of the blocks. It reaches `embed` and `head` only if it also spells the name out: `.*|embed|head`.
    """

    rank: int = 16
    alpha: float = 32.0
    layers: str = ".*"

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def reaches(self, name: str) -> bool:
        """Whether `embed` or `head` gets an addition, if the model has such a layer."""
        return re.search(rf"\b{name}\b", self.layers) is not None and re.fullmatch(self.layers, name) is not None

    def adapt(self, network: nnx.Module, blocks: list[nnx.Module]) -> None:
        """Adds zero additions to a network's chosen layers. `blocks` are its blocks, or one stack of them.

        Raises InputError if the pattern matches no layer, or a head that cannot have an addition.
        """
        outside = self._outside(network)
        reached = {name: self.reaches(name) for name in outside}
        chosen = [layer for block in blocks for layer in chosen_layers(block, self.layers, "lora.layers", reached)]
        for part in [*chosen, *(outside[name] for name, is_reached in reached.items() if is_reached)]:
            *stack, inputs, outputs = (part.embedding if isinstance(part, Embedding) else part.kernel).shape
            part.lora_in = nnx.Param(jnp.zeros((*stack, inputs, self.rank)))
            part.lora_out = nnx.Param(jnp.zeros((*stack, self.rank, outputs)))
            part.lora_scale = self.scale

    def _outside(self, network: nnx.Module) -> dict[str, Embedding | Linear]:
        """The layers outside the blocks that can have additions. Raises InputError if the head cannot, but should."""
        head = network.head
        has_matrix = isinstance(head, VocabularyHead) and head.linear is not None
        if self.reaches(HEAD) and not has_matrix:
            reason = (
                "the vocabulary head is tied to the token embeddings, so it has no matrix of its own; give embed, "
                "which changes both"
                if isinstance(head, VocabularyHead)
                else "the head gives one reward and is trained in full already; leave head out"
            )
            raise InputError(f"lora.layers {self.layers}: {reason}")
        return {EMBED: network.backbone.embed} | ({HEAD: head.linear} if has_matrix else {})


def chosen_layers(
    block: nnx.Module, pattern: str, option: str, outside: Mapping[str, bool] = MappingProxyType({})
) -> list[Linear]:
    """The linear layers of a block whose whole names match a regular expression. `outside` says of other layers whether
    it matches them. Raises InputError, which names the option, if it matches nothing."""
    linears = {name: part for name, part in vars(block).items() if isinstance(part, Linear)}
    chosen = [part for name, part in linears.items() if re.fullmatch(pattern, name)]
    if not chosen and not any(outside.values()):
        raise InputError(f"{option} {pattern}: matches none of {', '.join([*linears, *outside])}")
    return chosen


def draw_lora(abstract: Any, key: PRNGKeyArray) -> Any:
    """Draws the additions of a model from its abstract parameters, as a dict of only these. One half is zero, so
    training starts from the unchanged model.

    In linear layers `lora_out` is zero and `lora_in` is normal with variance 1 / inputs. In the table of embeddings it
    is the other way round, as in PEFT: the rows of `lora_in` are zero, so that tokens which never occur keep theirs,
    and `lora_out` is normal with variance 1 / width, so that the table changes as fast as the matrices do (in PEFT the
    variance is 1).
    """

    def draw(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
        zero, width = ("lora_in", leaf.shape[-1]) if path[-2].key == EMBED else ("lora_out", leaf.shape[-2])
        if path[-1].key == zero:
            return jnp.zeros(leaf.shape)
        own_key = jax.random.fold_in(key, zlib.crc32(jax.tree_util.keystr(path).encode()))
        return jax.random.normal(own_key, leaf.shape) * width**-0.5

    return jax.tree_util.tree_map_with_path(draw, split_params(abstract, NAMES)[0])


def merge_lora(lora: Lora, params: Any) -> Any:
    """The parameters with every addition merged into its matrix and then removed. Computed in fp32."""
    if not isinstance(params, dict):
        return params
    if "lora_in" not in params:
        return {name: merge_lora(lora, part) for name, part in params.items()}
    rest = {name: part for name, part in params.items() if name not in NAMES}
    name = "kernel" if "kernel" in params else "embedding"
    matrix = params[name]
    addition = jnp.matmul(params["lora_in"], params["lora_out"], precision="highest") * lora.scale
    return rest | {name: (matrix.astype(jnp.float32) + addition).astype(matrix.dtype)}


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
