"""Low-rank additions that depend on a preference vector, so that one model serves all weightings of several objectives
(PARM; Lin et al., 2025). Each adapted matrix gets `scale * (A1 W1 B1 + A2 W2(a) B2)`, where W2(a) = sum_i a_i W2_i.

The vector is an ordinary input: each row of a batch may have its own.
"""

import dataclasses
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from pargs_jax.errors import InputError
from pargs_jax.models.lora import chosen_layers, split_params
from pargs_jax.sharding import map_paths, place_param, to_host

PREFERENCE = "preference"
NAMES = ("shared_in", "shared_mix", "shared_out", "own_in", "own_mix", "own_out")
"""The trained arrays of an addition."""
ADDITIONS = "preference_lora.safetensors"
"""The file in a model's folder that holds the additions; the weights they are added to are in other files."""


class BilinearAddition(nnx.Module):
    """The addition to one linear layer, zero at first. `preference` is `[M]`, `[B M]` with one vector per row, or
    `[B T M]` with one per token."""

    def __init__(
        self, stack: tuple[int, ...], inputs: int, outputs: int, rank: int, objectives: int, scale: float
    ) -> None:
        def zeros(*shape: int) -> nnx.Param:
            return nnx.Param(jnp.zeros((*stack, *shape)))

        self.shared_in, self.shared_mix, self.shared_out = zeros(inputs, rank), zeros(rank, rank), zeros(rank, outputs)
        self.own_in, self.own_mix, self.own_out = (
            zeros(inputs, rank),
            zeros(objectives, rank, rank),
            zeros(rank, outputs),
        )
        self.preference = nnx.Param(jnp.full((*stack, objectives), 1.0 / objectives))
        self.scale = scale

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T E"]:
        mix = jnp.einsum("...m,mrs->...rs", self.preference[...].astype(x.dtype), self.own_mix[...])
        shared = x @ self.shared_in[...] @ self.shared_mix[...] @ self.shared_out[...]
        own = x @ self.own_in[...]
        own = jnp.einsum("btr,btrs->bts", own, mix) if mix.ndim == 4 else own @ mix
        return self.scale * (shared + own @ self.own_out[...])


@dataclasses.dataclass(frozen=True)
class PreferenceLora:
    """Which linear layers of the blocks get additions, and of what size. The defaults are those of PARM's code.

    Attributes:
        objectives: M, the length of preference vectors.
        rank: the rank of both parts of the additions.
        alpha: the additions are scaled by `alpha / rank`.
        layers: a regular expression that must match the layer's whole name.
    """

    objectives: int
    rank: int = 4
    alpha: float = 8.0
    layers: str = "query|key|value"

    @classmethod
    def of_config(cls, fields: Any, folder: Path) -> "PreferenceLora":
        """Reads `pargs_preference_lora` of a config.json. Raises InputError if it is malformed."""
        try:
            return cls(int(fields["objectives"]), int(fields["rank"]), float(fields["alpha"]), str(fields["layers"]))
        except (TypeError, KeyError, ValueError) as error:
            raise InputError(f"{folder}/config.json: pargs_preference_lora is {fields!r}: {error!r}") from error

    def adapt(self, network: nnx.Module, blocks: list[nnx.Module]) -> None:
        """Adds zero additions to the chosen layers of a network's blocks, which may be one stack of them."""
        for block in blocks:
            for linear in chosen_layers(block, self.layers, "pargs_preference_lora: layers"):
                *stack, inputs, outputs = linear.kernel.shape
                linear.addition = BilinearAddition(
                    tuple(stack), inputs, outputs, self.rank, self.objectives, self.alpha / self.rank
                )


def draw_additions(abstract: Any, key: PRNGKeyArray) -> Any:
    """Draws a model's additions from its abstract parameters, as a dict of only these.

    As in the published code, `shared_out` and `own_out` are zero, so training starts from the unchanged model; the
    others are uniform within 1 / sqrt(inputs), and within 1 / rank for `own_mix`. Preferences are equal for all
    objectives.
    """

    def draw(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
        name = path[-1].key
        if name in ("shared_out", "own_out"):
            return jnp.zeros(leaf.shape)
        if name == PREFERENCE:
            return jnp.full(leaf.shape, 1 / leaf.shape[-1])
        bound = 1 / leaf.shape[-1] if name == "own_mix" else leaf.shape[-2] ** -0.5
        own_key = jax.random.fold_in(key, zlib.crc32(jax.tree_util.keystr(path).encode()))
        return jax.random.uniform(own_key, leaf.shape, minval=-bound, maxval=bound)

    return jax.tree_util.tree_map_with_path(draw, split_params(abstract, ("addition",))[0])


def with_preferences(params: Any, preferences: Float[Array, "B M"] | Float[Array, "B T M"]) -> Any:
    """Sets the preference vector of each row, or token, in the params of a model with `PreferenceLora`."""
    if not isinstance(params, dict):
        return params
    return {
        name: jnp.broadcast_to(preferences, (*part.shape[:-1], *preferences.shape))
        if name == PREFERENCE
        else with_preferences(part, preferences)
        for name, part in params.items()
    }


def split_additions(params: Any) -> tuple[dict[str, np.ndarray], Any]:
    """All arrays of the additions, by their dotted paths, and the params without them. All processes must call this."""
    found: dict[str, np.ndarray] = {}

    def without(tree: Any, path: str) -> Any:
        if not isinstance(tree, dict):
            return tree
        if "addition" in tree:
            found.update({f"{path}addition.{name}": to_host(x) for name, x in tree["addition"].items()})
        return {name: without(part, f"{path}{name}.") for name, part in tree.items() if name != "addition"}

    rest = without(params, "")
    return found, rest


def read_additions(folder: Path, model: Any, dtype: np.dtype) -> Any:
    """Reads the additions of a model with stacked layers from its folder, and places them on the mesh.

    Raises InputError if the file is missing, or does not hold exactly the arrays that the model needs.
    """
    from safetensors.numpy import load_file

    path = folder / ADDITIONS
    if not path.is_file():
        raise InputError(f"{path}: no such file, but config.json says that the model has preference additions")
    tensors = load_file(path)
    expected, _ = split_params(model.abstract_params(), ("addition",))
    shapes: dict[str, tuple[int, ...]] = {}
    map_paths(lambda name, x: shapes.setdefault(name, x.shape), expected)
    if {name: x.shape for name, x in tensors.items()} != shapes:
        raise InputError(f"{path}: its arrays do not match pargs_preference_lora in config.json")
    return map_paths(lambda name, x: place_param(name, x.shape, dtype, lambda index: tensors[name][index]), expected)
