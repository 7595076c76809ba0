"""One jitted optimizer step, with gradient accumulation and AdamW."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, BFloat16, Float, Int, PRNGKeyArray

from pargs_jax.config import OptimConfig
from pargs_jax.data.batches import Batch
from pargs_jax.models.casting import gradients_of, store_matrices
from pargs_jax.models.lora import join_params
from pargs_jax.models.model import Params
from pargs_jax.sharding import ROWS, constrain, current_mesh, on_every_device, optimizer_shardings, place_whole
from pargs_jax.training.objective import Metrics, Objective


class TrainState(NamedTuple):
    """Everything that a step changes. Randomness and data order depend only on the seed and `step`, so a resumed run
    needs nothing else. `params` are the trained parameters; frozen ones are passed separately."""

    params: Params
    opt_state: optax.OptState
    step: Int[Array, ""]


def make_optimizer(config: OptimConfig, steps: int) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """AdamW with clipping, and its schedule (learning rate by step). Norms and biases have no weight decay."""
    warmup = round(config.warmup * steps)
    ramp = optax.linear_schedule(0.0, config.lr, warmup) if warmup else None
    falls = {
        "cosine": optax.cosine_decay_schedule(config.lr, max(steps - warmup, 1)),
        "linear": optax.linear_schedule(config.lr, 0.0, max(steps - warmup, 1)),
        "constant": optax.constant_schedule(config.lr),
    }
    fall = falls[config.schedule]
    schedule = optax.join_schedules([ramp, fall], [warmup]) if ramp else fall

    def decayed(params: Params) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, _: getattr(path[-1], "key", None) in ("kernel", "embedding"), params
        )

    adam = optax.scale_by_adam(config.b1, config.b2, config.eps, mu_dtype=config.moment_dtype)
    if config.square_dtype == "bfloat16":
        adam = with_short_squares(adam)
    # What optax.adamw chains.
    decay = optax.add_decayed_weights(config.weight_decay, decayed)
    adamw = optax.chain(adam, decay, optax.scale_by_learning_rate(schedule))
    return (optax.chain(optax.clip_by_global_norm(config.clip), adamw) if config.clip else adamw), schedule


def with_short_squares(adam: optax.GradientTransformation) -> optax.GradientTransformation:
    """Adam that keeps its mean squared gradients in bfloat16 between steps.

    A step changes the mean by a share of 1 - b2, which is less than half of bfloat16's spacing unless the square is
    several times the mean: rounded to the nearest, the mean would stand still. So it is rounded up or down at random,
    with chances that make the expected value exact; the randomness depends on nothing but the step and the array. The
    step itself uses the mean before it is rounded.
    """

    def init(params: Params) -> optax.ScaleByAdamState:
        state = adam.init(params)
        return state._replace(nu=jax.tree.map(lambda x: x.astype(jnp.bfloat16), state.nu))

    def update(grads: Params, state: optax.ScaleByAdamState, params: Params | None = None) -> Any:
        state = state._replace(nu=jax.tree.map(lambda x: x.astype(jnp.float32), state.nu))
        updates, state = adam.update(grads, state, params)
        leaves, tree = jax.tree.flatten(state.nu)
        keys = jax.random.split(jax.random.fold_in(jax.random.key(0), state.count), len(leaves))
        nu = tree.unflatten([round_at_random(x, key) for x, key in zip(leaves, keys, strict=True)])
        return updates, state._replace(nu=nu)

    return optax.GradientTransformation(init, update)


def round_at_random(x: Float[Array, "*S"], key: PRNGKeyArray) -> BFloat16[Array, "*S"]:
    """Float32 numbers as one of the two nearest in bfloat16, each with a chance of 1 less its share of the distance."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + jax.random.bits(key, x.shape, jnp.uint16)
    # bfloat16 is the upper half of float32.
    return jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)


StepFunction = Callable[..., tuple[TrainState, Metrics]]


def begin(optimizer: optax.GradientTransformation, params: Params) -> TrainState:
    """The state before the first step. The optimizer's state of a parameter is sharded like the parameter."""
    mesh = current_mesh()
    places = None if mesh is None else optimizer_shardings(optimizer, params, mesh)
    opt_state = jax.jit(optimizer.init, out_shardings=places)(params)
    return TrainState(params, opt_state, place_whole(mesh, lambda: jnp.zeros((), jnp.int32)))


def make_train_step(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    *,
    accumulation: int = 1,
    places: TrainState | None = None,
) -> StepFunction:
    """A jitted `step(state, batch, key, frozen=None) -> (state, metrics)`; the state is donated.

    Args:
        objective: the loss. Gradients are taken of `state.params`; `frozen` holds the model's other parameters, if only
            some are trained.
        optimizer: turns gradients into updates.
        accumulation: the number of micro-batches that a batch is cut into; they run in a scan. Gradients are averaged
            by their weights, so the step equals that of the whole batch.
        places: the shardings of the state; the new state keeps them.

    `key` is the run's; each step folds in its number.
    """

    def loss_of(params: Params, frozen: Params | None, batch: Batch, key: PRNGKeyArray, number: Int[Array, ""]) -> Any:
        return objective(join_params(params, frozen or {}), batch, key, number)

    def gradient(*arguments: Any) -> Any:
        found, grads = jax.value_and_grad(loss_of, has_aux=True)(*arguments)
        return found, gradients_of(grads)

    def micro_step(
        params: Params, frozen: Params | None, number: Int[Array, ""], total: Any, xs: tuple[Batch, PRNGKeyArray]
    ) -> tuple[Any, Metrics]:
        batch, key = xs
        (loss, (metrics, weight)), grads = gradient(params, frozen, batch, key, number)
        summed_grads, summed_weight = total
        summed_grads = jax.tree.map(lambda s, g: s + weight * g, summed_grads, grads)
        return (summed_grads, summed_weight + weight), metrics | {"loss": loss, "weight": weight}

    @partial(jax.jit, donate_argnums=0, out_shardings=None if places is None else (places, None))
    def train_step(
        state: TrainState, batch: Batch, key: PRNGKeyArray, frozen: Params | None = None
    ) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(key, state.step)
        # Gradients keep the computation's dtype, which is the dtype they are computed in. In bf16 this halves their
        # memory.
        params = objective.cast(store_matrices(state.params) if objective.converts_by_layer else state.params)
        if accumulation == 1:
            (loss, (metrics, _)), grads = gradient(params, frozen, batch, key, state.step)
            metrics = metrics | {"loss": loss}
            grads = jax.tree.map(lambda g, p: g.astype(p.dtype), grads, state.params)
        else:
            micro = cut_rows(batch, accumulation)
            zero = (jax.tree.map(jnp.zeros_like, state.params), jnp.zeros(()))
            (grads, total), parts = jax.lax.scan(
                partial(micro_step, params, frozen, state.step), zero, (micro, jax.random.split(key, accumulation))
            )
            grads = jax.tree.map(lambda g: g / total, grads)
            metrics = merge_metrics(parts, parts.pop("weight"))
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = on_every_device(metrics | {"gradient_norm": optax.global_norm(grads)})
        return TrainState(params, opt_state, state.step + 1), metrics

    return train_step


def cut_rows(batch: Batch, parts: int) -> Batch:
    """Splits rows into parts, `[parts B/parts ...]`; each part is spread over the mesh like the whole batch."""
    return jax.tree.map(
        lambda x: constrain(x.reshape(parts, -1, *x.shape[1:]), None, ROWS, *(None,) * (x.ndim - 1)), batch
    )


def merge_metrics(parts: dict[str, Float[Array, "N"]], weights: Float[Array, "N"]) -> Metrics:
    """Combines metrics of N batches: weighted means, but extremes for `*_min` and `*_max`."""
    merged = {}
    for name, values in parts.items():
        if name.endswith("_min"):
            merged[name] = values.min()
        elif name.endswith("_max"):
            merged[name] = values.max()
        else:
            merged[name] = (values * weights).sum() / weights.sum()
    return merged
