"""The computation of a training run, assembled from options and a model. It is the same whether the model's parameters
are loaded or only described."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pargs_jax.config import TrainConfig
from pargs_jax.models.lora import NAMES as LORA_NAMES
from pargs_jax.models.lora import Lora, draw_lora, join_params, split_params
from pargs_jax.models.model import Model, Params
from pargs_jax.sharding import abstract_params, optimizer_shardings, place_computed, shardings_of
from pargs_jax.training.critic import CRITIC, new_critic
from pargs_jax.training.objective import Objective
from pargs_jax.training.step import StepFunction, TrainState, make_optimizer, make_train_step

REFERENCE = "reference"
"""In `Loss.frozen`: the model that training starts from, as it was."""


@dataclasses.dataclass(frozen=True)
class TrainingProgram:
    """An objective with the model as training runs it, and the functions that make its steps."""

    config: TrainConfig
    objective: Objective

    @classmethod
    def assemble(cls, config: TrainConfig, model: Model, *, closing_id: int) -> "TrainingProgram":
        """The program for a loaded or described model, which gets the config's dropout, rematerialisation and low-rank
        additions. `closing_id` is the token that closes a text."""
        shape = dataclasses.replace(model.config, dropout=config.model.dropout, remat=config.model.remat)
        lora = Lora(config.lora.rank, config.lora.alpha, config.lora.layers) if config.lora.rank else None
        trained = dataclasses.replace(model, config=shape, lora=lora)
        chosen = config.objective
        if unknown := set(chosen.loss.frozen) - {REFERENCE}:
            raise ValueError(
                f"{chosen.name}: nothing gives it the frozen models {unknown}; {REFERENCE} is the only one"
            )
        frozen = tuple((name, dataclasses.replace(trained, lora=None)) for name in chosen.loss.frozen)
        options = {"closing_id": closing_id, "chunk": chosen.chunk, "frozen": frozen}
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
        return ("head", *LORA_NAMES) if self.model.head_kind.may_be_new else LORA_NAMES

    @property
    def copies_reference(self) -> bool:
        """Whether the reference needs parameters of its own. It does not if it is the frozen part of the model."""
        is_whole = self.trained_names is not None and "head" not in self.trained_names
        return bool(self.objective.frozen) and not is_whole

    def begin_params(self, params: Params, seed: int) -> tuple[Params, Params]:
        """Splits a model's parameters into trained ones, including newly drawn additions, and frozen ones. A reference
        gets a copy of them if it needs one, because trained parameters are donated to the step. A critic is trained."""
        critic = new_critic(self.model.config.head_width) if self.objective.loss.critic else {}
        reference = {}
        if self.copies_reference:
            reference = {REFERENCE: jax.tree.map(lambda x: jnp.array(x, self.config.dtype, copy=True), params)}
        if self.trained_names is None:
            return params | critic, reference
        heads, frozen = split_params(params, self.trained_names)
        frozen |= reference
        additions = place_computed(lambda key: draw_lora(self.model.abstract_params(), key), seed)
        return join_params(additions, jax.tree.map(lambda x: x.astype("float32"), heads)) | critic, frozen

    def model_params(self, trained: Params, frozen: Params) -> Params:
        """The parameters of the model alone, of what `begin_params` gives."""
        params = join_params(trained, frozen)
        return {name: part for name, part in params.items() if name not in (REFERENCE, CRITIC)}

    def abstract_state(self, optimizer: optax.GradientTransformation, mesh: Mesh) -> tuple[TrainState, Params]:
        """Describes the results of `begin_params` and `begin` as `jax.ShapeDtypeStruct`s on a mesh that may not be
        here."""
        params, frozen = abstract_params(mesh, self.model.abstract_params(), "float32"), {}
        reference = split_params(params, LORA_NAMES)[1]
        if self.trained_names is not None:
            params, frozen = split_params(params, self.trained_names)
        frozen |= {REFERENCE: reference} if self.copies_reference else {}
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
