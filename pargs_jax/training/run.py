"""A training run in its folder: starts or resumes it, saves checkpoints, and takes it to its last step."""

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool
from rich.console import Console

from pargs_jax.config import TrainConfig
from pargs_jax.data.batches import Batches
from pargs_jax.data.examples import Example
from pargs_jax.data.packing import Packing
from pargs_jax.errors import InputError
from pargs_jax.models.model import Params
from pargs_jax.models.one_pass import OnePass
from pargs_jax.options import LARGEST_NUMBER
from pargs_jax.processes import on_first
from pargs_jax.sharding import current_mesh, own_rows, row_shards
from pargs_jax.training.checkpoint import Checkpoints
from pargs_jax.training.loop import Trainer, evaluate
from pargs_jax.training.on_policy import OnPolicy, Sampler
from pargs_jax.training.program import TrainingProgram
from pargs_jax.training.run_folder import save_config, saved_config
from pargs_jax.training.same_run import check_same_data, warn_of_another_schedule
from pargs_jax.training.step import begin


def run(
    config: TrainConfig,
    folder: Path,
    program: TrainingProgram,
    params: Params,
    examples: Sequence[Example],
    held_out: Sequence[Example] | None,
    console: Console,
    sampler: Sampler | None = None,
) -> Params:
    """Trains from the folder's newest checkpoint, or from `params` if there is none. Returns the parameters after the
    last step, including the model's frozen ones. Raises InputError if the run was started with other rows, and for
    whatever stops a run (`Trainer.run`).

    Args:
        config: the options, with the prompt form that is used.
        folder: the run's folder, claimed by this process.
        program: the program to run.
        params: the parameters of the program's model, as loaded or drawn, and of its other frozen models, by name. They
            are consumed: the caller cannot use them again.
        examples, held_out: the training rows, and the evaluation rows if there are any.
        console: prints progress and evaluations.
        sampler: samples and scores answers, for an objective that learns from the model's own. Rows are then prompts.
    """
    saved = on_first(partial(saved_config, folder))  # None in a new run, and in every process but the first
    on_first(partial(check_same_data, folder, config.data.train, examples, resumes=saved is not None))
    total = total_steps(config, len(examples))
    loss, prepared = program.objective.loss, partial(Batches, max_length=config.max_length, seed=config.seed)
    updates, copies = loss.updates_per_step, loss.answers_per_prompt
    packed = partial(packing_of, config, program.model, current_mesh())

    def own(rows: int) -> Bool[np.ndarray, "B"] | None:
        return own_rows(current_mesh(), rows) if sampler is None else None  # a sampler reads all prompts

    batches = prepared(
        examples,
        config.batch_size // copies,
        copies=copies,
        packing=packed(config.optim.accumulation),
        own=own(config.batch_size),
    )
    optimizer, schedule = program.make_optimizer(total * updates)
    trained, frozen = program.begin_params(params, config.seed)
    state = begin(optimizer, trained)
    step = program.make_step(optimizer, state)
    if sampler is None:
        rows = config.batch_size // config.optim.accumulation  # what fits the device in training also fits here
        evaluation = partial(evaluate, program.objective)
    else:
        on_policy, rows = OnPolicy(program, sampler), config.batch_size
        step, evaluation = on_policy.make_step(step), on_policy.evaluate
    if held_out is not None:
        evaluation = partial(evaluation, batches=prepared(held_out, rows, packing=packed(), own=own(rows)))
    on_first(partial(save_config, config, folder))
    with Checkpoints(folder / "checkpoints", config.keep, config.keep_best, config.best_metric) as checkpoints:
        if checkpoints.latest_step is not None:
            like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
            jax.tree.map(lambda x: x.delete(), state)  # two may not fit in memory
            state = checkpoints.restore(like, partial(console.print, style="yellow", highlight=False))
            console.print(f"resuming after step {int(state.step)} of {total}", highlight=False)
            if saved is not None:
                warn_of_another_schedule(config.optim, total_steps(saved, len(examples)), total, int(state.step))
        if int(state.step) < total:
            trainer = Trainer(
                config,
                total,
                step,
                lambda number: schedule((number + 1) * updates - 1),
                program.objective,
                frozen,
                batches,
                None if held_out is None else evaluation,
                checkpoints,
                console,
            )
            state = trainer.run(state)
    return program.model_params(state.params, frozen)


def packing_of(config: TrainConfig, model: OnePass, mesh: Mesh | None, micro_batches: int = 1) -> Packing | None:
    """How batches for a model are packed; None if they are not."""
    return Packing(config.pack, micro_batches, row_shards(mesh), model.shares_prompts) if config.pack else None


def total_steps(config: TrainConfig, pairs: int) -> int:
    """The number of steps that a run takes on this many pairs, or prompts. Raises InputError if nothing can count
    them."""
    rows = config.batch_size // config.objective.loss.answers_per_prompt
    total = config.steps or config.epochs * pairs / rows
    most = LARGEST_NUMBER // config.objective.loss.updates_per_step
    if total > most:
        raise InputError(f"steps, epochs: the run would take {total:g} steps, must be at most {most}")
    return max(1, math.ceil(total))
