"""`--compile-only`: a command's program, compiled for a TPU slice that is not here, from a config alone."""

import dataclasses
from collections.abc import Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from pargs_jax.aot.chips import CHIPS
from pargs_jax.aot.operations import count_operations
from pargs_jax.aot.report import Report, compile_report
from pargs_jax.config import DEMO, DecodeConfig, TrainConfig
from pargs_jax.data.batches import Batch
from pargs_jax.decoding.guides import CausalGuide, Guide, Prompts
from pargs_jax.decoding.loop import Decoder, decode, row_keys
from pargs_jax.decoding.methods import METHODS
from pargs_jax.decoding.state import RowSettings
from pargs_jax.demo import task as demo
from pargs_jax.errors import InputError
from pargs_jax.generation.reward_models import guide_by_text
from pargs_jax.generation.run import settings_of
from pargs_jax.mesh import make_topology_mesh, open_compile_cache, parse_mesh
from pargs_jax.models.causal import CausalModel
from pargs_jax.models.encoder import EncoderModel
from pargs_jax.models.hf import describe_model
from pargs_jax.models.lora import split_params
from pargs_jax.models.model import M, Model
from pargs_jax.sharding import abstract_params, optimizer_shardings, row_shards, row_spec, shardings_of
from pargs_jax.training.objective import Objective
from pargs_jax.training.run import check_length, check_rows, model_to_train, trained_names
from pargs_jax.training.step import TrainState, make_optimizer, make_train_step

SCHEDULED_STEPS = 1000  # of the learning rate, which makes no difference to the program


def compile_training(config: TrainConfig, console: Console | None = None) -> Report:
    """Compiles a training step and prints what it takes.

    Prompts and answers are taken to be half of `max_length` each. Raises InputError for a mesh that is no TPU slice,
    and for whatever `train` would refuse in the model and the options.
    """
    config.validate()
    open_compile_cache(config.compile_cache)
    mesh = make_topology_mesh(config.mesh, "train")
    check_rows(config, mesh)
    source = demo.DEMO_LM if config.model.init == DEMO else config.model.init
    head = "vocabulary" if config.objective.name == "sft" else "reward"
    model = model_to_train(config, describe_model(source, head, attention=config.model.attention))
    check_length(config, model.config.max_positions)
    answers = 1 if config.objective.name == "sft" else 2
    half = config.max_length // 2
    what = (
        f"one step of {config.objective.name}: {config.batch_size} rows in {config.optim.accumulation} micro-batches, "
        f"prompts of {half} tokens, {answers} answer{'s' * (answers > 1)} of {config.max_length - half} each; "
        f"computed in {config.dtype}"
    )
    whole = NamedSharding(mesh, PartitionSpec())
    params, frozen = abstract_params(mesh, model.abstract_params(), "float32"), {}
    if model.lora is not None:
        params, frozen = split_params(params, trained_names(model))
        frozen = jax.tree.map(lambda x: _array(x.shape, config.dtype, x.sharding), frozen)
    optimizer, _ = make_optimizer(config.optim, SCHEDULED_STEPS)
    opt_state = jax.tree.map(
        lambda x, sharding: _array(x.shape, x.dtype, sharding),
        jax.eval_shape(optimizer.init, params),
        optimizer_shardings(optimizer, params, mesh),
    )
    state = TrainState(params, opt_state, _array((), "int32", whole))
    rows = partial(_rows, mesh, config.batch_size)
    batch = Batch(rows(half), rows(), rows(answers, config.max_length - half), rows(answers), rows(dtype="float32"))
    key = jax.eval_shape(lambda: jax.random.key(0))
    key = _array(key.shape, key.dtype, whole)
    objective = Objective(model, config.objective, config.dtype, closing_id=0)
    step = make_train_step(objective, optimizer, accumulation=config.optim.accumulation, places=shardings_of(state))
    arguments = (state, batch, key, frozen)
    advice = _training_options(config, mesh, isinstance(model, EncoderModel))
    return _report(mesh, config.mesh, what, step, arguments, advice, console)


def compile_decoding(config: DecodeConfig, console: Console | None = None) -> Report:
    """Compiles the decoding of one batch and prints what it takes.

    A causal reward model with the language model's vocabulary size is taken to share its tokenizer, any other to have
    one of its own. Raises InputError for a mesh that is no TPU slice, and for models that cannot be used.
    """
    config.validate()
    open_compile_cache(config.compile_cache)
    mesh = make_topology_mesh(config.mesh, "decode")
    unroll = config.unroll == "yes"
    lm = describe_model(demo.DEMO_LM if config.lm == DEMO else config.lm, "vocabulary")
    method = METHODS[config.method or "pargs"]
    k = settings_of(config, method).k or method.k
    reward_models = [describe_model(source, "reward") for source in (config.rm if method.guided else ())]
    if config.prompt_length + config.max_new_tokens > lm.config.max_positions:
        raise InputError(
            f"--prompt-length: {config.prompt_length}, with --max-new-tokens {config.max_new_tokens}, is more than the "
            f"language model's context of {lm.config.max_positions} tokens"
        )
    what = (
        f"{config.batch_size} prompts of {config.prompt_length} tokens and {config.max_new_tokens} new tokens, "
        f"k {k}; computed in {config.dtype}"
    )
    lm, lm_params = _abstract(mesh, lm, config.dtype, unroll)
    guides, guide_params = [], []
    for reward_model in reward_models:
        reward_model, params = _abstract(mesh, reward_model, config.dtype, unroll)
        guides.append(_guide(reward_model, lm, config))
        guide_params.append(params)
    decoder = Decoder(lm, tuple(guides), method.proposer(k), method.rule, eos_ids=(0,))
    keys = jax.eval_shape(lambda: row_keys(0, jnp.zeros(config.batch_size, jnp.uint32)))
    prompts = Prompts(_rows(mesh, config.batch_size, config.prompt_length), _rows(mesh, config.batch_size))
    guide_prompts = tuple(None if isinstance(guide, CausalGuide) else prompts for guide in guides)
    arguments = (
        lm_params,
        tuple(guide_params),
        *prompts,
        _array(keys.shape, keys.dtype, NamedSharding(mesh, row_spec(mesh, config.batch_size))),
        RowSettings(
            _rows(mesh, config.batch_size, len(guides), dtype="float32"),
            _rows(mesh, config.batch_size, dtype="float32"),
            _rows(mesh, config.batch_size),
            _rows(mesh, config.batch_size),
        ),
        guide_prompts,
    )
    program = jax.jit(lambda *args: decode(decoder, *args[:-1], config.max_new_tokens, args[-1]))
    reads = config.max_new_tokens + 1  # of the weights: once for the prompts, then for every token
    return _report(mesh, config.mesh, what, program, arguments, _decoding_options(config), console, reads)


def _abstract(mesh: Mesh, model: M, dtype: str, unroll: bool) -> tuple[M, Any]:
    """A model and its parameters as decoding runs them."""
    model = dataclasses.replace(model, unrolled=unroll)
    return model, abstract_params(mesh, model.abstract_params(), dtype)


class _HostPart:
    """Stands for a retokeniser, of which a program that never runs needs the name only."""

    candidates = staticmethod(lambda *_: None)


def _guide(reward_model: Model, lm: CausalModel, config: DecodeConfig) -> Guide:
    if isinstance(reward_model, CausalModel) and reward_model.config.vocab_size == lm.config.vocab_size:
        return CausalGuide(reward_model)
    return guide_by_text(reward_model, _HostPart(), config.prompt_length, config.max_new_tokens, closing_id=0)


def _array(shape: tuple[int, ...], dtype: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def _rows(mesh: Mesh, count: int, *widths: int, dtype: str = "int32") -> jax.ShapeDtypeStruct:
    return _array((count, *widths), dtype, NamedSharding(mesh, row_spec(mesh, count)))


def _report(
    mesh: Mesh,
    name: str,
    what: str,
    program: Any,
    arguments: tuple[Any, ...],
    options: Iterable[str],
    console: Console | None,
    reads: int = 1,
) -> Report:
    """Compiles a jitted function and prints its report."""
    console = console or Console()
    chip = CHIPS[parse_mesh(name).tpu or ""]
    axes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    console.print(f"{name}: {mesh.size} devices ({axes}); {what}", highlight=False)
    with console.status("compiling"), jax.set_mesh(mesh):
        least, most = (count_operations(program, *arguments, choice=choice) for choice in (min, max))
        report = compile_report(
            program.lower(*arguments), chip=chip, devices=mesh.size, operations=(least, most), argument_reads=reads
        )
    table = Table(box=SIMPLE, show_header=False)
    for cell, value in report.as_row().items():
        table.add_row(cell, value)
    console.print(table)
    for line in report.advice(options):
        console.print(line, highlight=False, style="yellow")
    return report


def _training_options(config: TrainConfig, mesh: Mesh, is_encoder: bool) -> list[str]:
    """What would take less memory, most helpful first."""
    options = []
    if config.model.remat != "layers":
        options.append("--model.remat layers")
    if config.dtype != "bfloat16":
        options.append("--dtype bfloat16")
    if config.batch_size % (2 * config.optim.accumulation * row_shards(mesh)) == 0:
        options.append(f"--optim.accumulation {2 * config.optim.accumulation}: smaller micro-batches")
    if is_encoder and config.objective.chunk > 1:
        options.append(f"--objective.chunk {config.objective.chunk // 2}: fewer prefixes at once")
    if config.optim.moment_dtype != "bfloat16":
        options.append("--optim.moment-dtype bfloat16")
    if not config.lora.rank:
        options.append("--lora.rank 16")
    return [*options, "a larger slice, or more of it on the axis fsdp"]


def _decoding_options(config: DecodeConfig) -> list[str]:
    options = ["--dtype bfloat16"] if config.dtype != "bfloat16" else []
    return [*options, f"--batch-size {max(1, config.batch_size // 2)}", "a larger slice, or more of the axis tensor"]
