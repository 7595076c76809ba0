"""The computation of a training run, assembled from options and a model. It is the same whether the model's parameters
are loaded or only described."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pargs_jax.config import TrainConfig
from pargs_jax.models.lora import NAMES as LORA_NAMES
from pargs_jax.models.lora import Lora, draw_lora, join_params, split_params
from pargs_jax.models.model import Model, Params
from pargs_jax.models.preference_lora import NAMES as PREFERENCE_LORA_NAMES
from pargs_jax.models.preference_lora import PreferenceLora, draw_additions
from pargs_jax.sharding import abstract_params, optimizer_shardings, place_computed, shardings_of
from pargs_jax.training.critic import CRITIC, new_critic
from pargs_jax.training.objective import Objective
from pargs_jax.training.step import StepFunction, TrainState, make_optimizer, make_train_step

REFERENCE = "reference"
"""In `Loss.frozen`: the model that training starts from, as it was."""


def lora_of(config: TrainConfig) -> Lora | PreferenceLora | None:
    """The low-rank additions that are trained in place of the model, as the objective or the options say, or None."""
    if (additions := config.objective.loss.preference_lora) is not None:
        return PreferenceLora(**additions)
    lora = config.lora
    return Lora(lora.rank, lora.alpha, lora.layers) if lora.rank else None


@dataclasses.dataclass(frozen=True)
class TrainingProgram:
    """An objective with the model as training runs it, and the functions that make its steps."""

    config: TrainConfig
    objective: Objective

    @classmethod
    def assemble(
        cls, config: TrainConfig, model: Model, *, closing_id: int, others: Mapping[str, Model] | None = None
    ) -> "TrainingProgram":
        """The program for a loaded or described model, which gets the config's dropout, rematerialisation and low-rank
        additions. `closing_id` is the token that closes a text; `others` are the frozen models that the loss reads,
        other than the reference."""
        shape = dataclasses.replace(model.config, dropout=config.model.dropout, remat=config.model.remat)
        trained = dataclasses.replace(model, config=shape, lora=lora_of(config))
        chosen = config.objective
        known = {REFERENCE: dataclasses.replace(trained, lora=None), **(others or {})}
        if unknown := set(chosen.loss.frozen) - known.keys():
            raise ValueError(f"{chosen.name}: nothing gives it the frozen models {unknown}")
        frozen = tuple((name, known[name]) for name in chosen.loss.frozen)
        options = {"closing_id": closing_id, "chunk": chosen.chunk, "frozen": frozen}
        options["unrolls"] = shape.remat == "none"
        return cls(config, Objective(trained, chosen.loss, config.dtype, **options))

    @property
    def model(self) -> Any:
        return self.objective.model

    @property
    def trained_names(self) -> tuple[str, ...] | None:
        """The trained parts of an otherwise frozen model: the additions, and a new head if any; None if all is
        trained."""
        if self.model.lora is None:
            return None
        if isinstance(self.model.lora, PreferenceLora):
            return PREFERENCE_LORA_NAMES
        return ("head", *LORA_NAMES) if self.model.head_kind.may_be_new else LORA_NAMES

    @property
    def copies_reference(self) -> bool:
        """Whether the reference needs parameters of its own. It does not if it is the frozen part of the model."""
        is_whole = self.trained_names is not None and "head" not in self.trained_names
        return REFERENCE in dict(self.objective.frozen) and not is_whole

    @property
    def others(self) -> dict[str, Model]:
        """The frozen models other than the reference, by name."""
        return {name: model for name, model in self.objective.frozen if name != REFERENCE}

    def begin_params(self, params: Params, seed: int) -> tuple[Params, Params]:
        """Splits a model's parameters into trained ones, including newly drawn additions, and frozen ones. A reference
        gets a copy of them if it needs one, because trained parameters are donated to the step. `params` also holds
        those of `others`, by name. A critic is trained."""
        apart = {name: params[name] for name in self.others}
        params = {name: part for name, part in params.items() if name not in apart}
        critic = new_critic(self.model.config.head_width) if self.objective.loss.critic else {}
        if self.copies_reference:
            apart[REFERENCE] = jax.tree.map(lambda x: jnp.array(x, self.config.dtype, copy=True), params)
        if self.trained_names is None:
            return params | critic, apart
        heads, frozen = split_params(params, self.trained_names)
        draw = draw_additions if isinstance(self.model.lora, PreferenceLora) else draw_lora
        additions = place_computed(lambda key: draw(self.model.abstract_params(), key), seed)
        trained, given = split_params(additions, self.trained_names)
        given = jax.tree.map(lambda x: x.astype(self.config.dtype), given)
        heads = jax.tree.map(lambda x: x.astype("float32"), heads)
        return join_params(trained, heads) | critic, join_params(frozen | apart, given)

    def model_params(self, trained: Params, frozen: Params) -> Params:
        """The parameters of the model alone, of what `begin_params` gives."""
        params, apart = join_params(trained, frozen), (*dict(self.objective.frozen), CRITIC)
        return {name: part for name, part in params.items() if name not in apart}

    def abstract_state(self, optimizer: optax.GradientTransformation, mesh: Mesh) -> tuple[TrainState, Params]:
        """Describes the results of `begin_params` and `begin` as `jax.ShapeDtypeStruct`s on a mesh that may not be
        here."""
        params, frozen = abstract_params(mesh, self.model.abstract_params(), "float32"), {}
        reference = split_params(params, LORA_NAMES)[1]
        if self.trained_names is not None:
            params, frozen = split_params(params, self.trained_names)
        frozen |= {REFERENCE: reference} if self.copies_reference else {}
        frozen |= {name: abstract_params(mesh, other.abstract_params()) for name, other in self.others.items()}
        frozen = jax.tree.map(lambda x: x.update(dtype=jnp.dtype(self.config.dtype)), frozen)
        opt_state = jax.tree.map(
            lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
            jax.eval_shape(optimizer.init, params),
            optimizer_shardings(optimizer, params, mesh),
        )
        whole = NamedSharding(mesh, PartitionSpec())
        return TrainState(params, opt_state, jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)), frozen

    def make_optimizer(self, steps: int) -> tuple[optax.GradientTransformation, optax.Schedule]:
        """The optimizer of a run of `steps` steps, and its learning rates."""
        return make_optimizer(self.config.optim, steps)

    def make_step(self, optimizer: optax.GradientTransformation, state: TrainState) -> StepFunction:
        """The jitted step for states like this one (`make_train_step`). On-policy losses read the reference before it
        (`training.on_policy`)."""
        accumulation, objective = self.config.optim.accumulation, self.objective
        if objective.loss.on_policy:
            objective = dataclasses.replace(objective, frozen=())
        return make_train_step(objective, optimizer, accumulation=accumulation, places=shardings_of(state))
