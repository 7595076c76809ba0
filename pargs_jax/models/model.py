"""The base of all models: NNX modules used as pure functions over a plain dict of arrays.

A `Model` is static and hashable, so it can be a static argument of `jax.jit`. Its arrays are passed separately as
`params`, `{"backbone": ..., "head": ...}`.
"""

import dataclasses
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, ClassVar, Protocol, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from pargs_jax.models import int8
from pargs_jax.models.heads import Head
from pargs_jax.models.lora import Lora
from pargs_jax.models.preference_lora import PreferenceLora

Params = dict[str, Any]
HeadName = str
"""A name in `CAUSAL_HEADS` or `ENCODER_HEADS`: `vocabulary`, `table`, `reward`, or `value` (a `reward` with a bias)."""


class PromptsWithAnswers(Protocol):
    """What models read in training: a batch of prompts with A answers each (`pargs_jax.data.batches.Batch`)."""

    prompts: Int[Array, "B P"]
    prompt_lengths: Int[Array, "B"]
    answers: Int[Array, "B A R"]
    answer_lengths: Int[Array, "B A"]
    prefixes: Any
    prefix_counts: Int[Array, "B A"]
    packed: "PackedPrompts | None"


class PackedPrompts(Protocol):
    """The same, packed (`pargs_jax.data.packing.PackedTexts`)."""

    tokens: Int[Array, "G N"]
    positions: Int[Array, "G N"]
    segments: Int[Array, "G N"]
    answers: Int[Array, "G N"]
    answer_slots: Int[Array, "M"]
    slots_before: Int[Array, "M"]


class AnyRewardModel(Protocol):
    """What training, decoding and evaluation need from a reward model of any kind.

    Attributes:
        one_pass: whether one pass over an answer gives the rewards of all its prefixes. If so, decoding uses a cache
            (`prefill`, `extend`). If not, every prefix is a separate text, read from its beginning.
        reads_candidates: whether it can read a language model's candidates directly, if both have the same tokens
            (`siblings`, `keep`).
    """

    config: Any
    head: HeadName
    one_pass: ClassVar[bool]
    reads_candidates: ClassVar[bool]

    def abstract_params(self) -> Params: ...

    def read_answers(
        self,
        params: Params,
        batch: PromptsWithAnswers,
        key: PRNGKeyArray | None = None,
        *,
        closing_id: int | None = None,
        chunk: int = 1,
    ) -> Any:
        """The outputs that a loss needs for a batch (`pargs_jax.objectives.contract.Outputs`), such as prefix rewards.

        Args:
            params: the model's parameters.
            batch: prompts with answers.
            key: turns dropout on.
            closing_id: the token that closes a text, for models that read every prefix as a finished text.
            chunk: the number of prefixes that such models read together.
        """
        ...

    def answer_rewards(
        self,
        params: Params,
        prompts: Int[Array, "B P"],
        prompt_lengths: Int[Array, "B"],
        answers: Int[Array, "B R"],
        lengths: Int[Array, "B"],
        closing_id: int | Int[Array, ""] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "B"]:
        """Rewards (fp32) of the first `lengths[b]` tokens of answers to left-padded prompts."""
        ...


class Network(nnx.Module):
    """Backbone and head, named as in the dict of parameters."""

    def __init__(self, model: "Model", *, rngs: nnx.Rngs) -> None:
        self.backbone = model.config.make(unrolled=model.unrolled, rngs=rngs)
        layers = self.backbone.layers
        blocks = list(layers) if model.unrolled else [layers]
        if model.int8:
            for block in blocks:
                int8.adapt(block)
        head = model.head_kind
        self.head = head.make(model.config, head.std(model.config), rngs)
        if model.lora is not None:
            model.lora.adapt(self, blocks)


@dataclasses.dataclass(frozen=True)
class Model:
    """A configuration and a kind of head. Subclasses define what the model can do.

    `unrolled` says how `params` hold the layers. False: stacked on a leading axis and run by a scan, which gives small
    programs that compile quickly. True: one by one, which decodes faster where a step is bound by reading weights from
    memory. `stack_layers` and `unstack_layers` convert. With `lora`, chosen layers have low-rank additions; with
    `int8`, their matrices are in int8 (`pargs_jax.models.int8`), for decoding.
    """

    config: Any
    head: HeadName = "vocabulary"
    unrolled: bool = False
    lora: Lora | PreferenceLora | None = None
    int8: bool = False

    heads: ClassVar[Mapping[HeadName, Head]]
    """The heads that models of this class can have."""

    @property
    def head_kind(self) -> Head:
        """The kind of head that the model has."""
        return self.heads[self.head]

    def init(self, key: PRNGKeyArray) -> Params:
        """Random fp32 parameters."""
        return nnx.to_pure_dict(nnx.state(Network(self, rngs=nnx.Rngs(key))))

    def abstract_params(self) -> Params:
        """The parameters' shapes and dtypes, as `jax.ShapeDtypeStruct`s."""
        return nnx.to_pure_dict(_abstract(self)[1])

    def network(self, params: Params) -> Network:
        return nnx.merge(_abstract(self)[0], params)


M = TypeVar("M", bound=Model)


@lru_cache(maxsize=64)
def _abstract(model: Model) -> tuple[nnx.GraphDef, nnx.State]:
    return nnx.split(nnx.eval_shape(lambda: Network(model, rngs=nnx.Rngs(0))))


def unrolls_by_default(platform: str) -> bool:
    """Whether decoding unrolls layers by default: yes, except on TPU. On GPU a scan over stacked layers copies every
    weight. On TPU it copies none, and compiles in a fraction of the time."""
    return platform != "tpu"


def unstack_layers(model: M, params: Params) -> tuple[M, Params]:
    """The same model with its layers unrolled."""
    if model.unrolled:
        return model, params
    layers = params["backbone"]["layers"]
    single = {i: jax.tree.map(lambda x, i=i: x[i], layers) for i in range(model.config.layers)}
    unrolled = {**params, "backbone": {**params["backbone"], "layers": single}}
    return dataclasses.replace(model, unrolled=True), unrolled


def run_one_by_one(model: M, params: Params) -> tuple[M, Params]:
    """The same model with its layers unrolled, inside a program that differentiates it with respect to stacked
    parameters. The gradients of the layers are stacked at once; those of slices would each be as large as the stack."""
    if model.unrolled:
        return model, params
    count = model.config.layers

    @jax.custom_vjp
    def layers_of(stack: Array) -> tuple[Array, ...]:
        return tuple(stack[i] for i in range(count))

    layers_of.defvjp(lambda stack: (layers_of(stack), None), lambda _, gradients: (jnp.stack(gradients),))
    stacks, tree = jax.tree.flatten(params["backbone"]["layers"])
    layers = dict(enumerate(map(tree.unflatten, zip(*map(layers_of, stacks), strict=True))))
    return dataclasses.replace(model, unrolled=True), {**params, "backbone": {**params["backbone"], "layers": layers}}


def stack_layers(model: M, params: Params) -> tuple[M, Params]:
    """The same model with its layers stacked on a leading axis."""
    if not model.unrolled:
        return model, params
    layers = [params["backbone"]["layers"][i] for i in range(model.config.layers)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *layers)
    return dataclasses.replace(model, unrolled=False), {
        **params,
        "backbone": {**params["backbone"], "layers": stacked},
    }
