"""`decode.py`: answers by one method, the demo's comparison of methods, or only the program, compiled."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from rich.console import Console

from pargs_jax.aot.report import Report, Step
from pargs_jax.commands.comparison import compare_methods
from pargs_jax.commands.compile_only import abstract_rows, bytes_of, compile_and_print
from pargs_jax.commands.decode_and_explain import decode_and_explain
from pargs_jax.commands.demo import model_source
from pargs_jax.commands.generate import generate, settings_of, unrolls
from pargs_jax.config import DecodeConfig
from pargs_jax.data_config import DEMO
from pargs_jax.decoding.guides import CausalGuide, Prompts
from pargs_jax.decoding.loop import row_keys
from pargs_jax.decoding.methods import METHODS
from pargs_jax.decoding.state import RowSettings
from pargs_jax.errors import InputError
from pargs_jax.generation.program import DecodingProgram
from pargs_jax.generation.reward_models import make_guide, shares_tokens
from pargs_jax.mesh import make_topology_mesh, open_compile_cache
from pargs_jax.models.cache import Cache
from pargs_jax.models.hf import describe_model
from pargs_jax.models.model import Model, Params
from pargs_jax.sharding import abstract_params

LOOKED_UP = ("embed", "positions", "segments")
"""Tables of a model of which a step reads a few rows."""


def run(config: DecodeConfig) -> None:
    """What `decode.py` does."""
    if config.method is None and config.lm == DEMO:
        compare_methods(config)
    elif config.explain is not None:
        decode_and_explain(config)
    else:
        generate(config)


def compile_only(config: DecodeConfig, console: Console | None = None) -> Report:
    """Compiles the decoding of one batch for devices that are not here, and prints what it takes.

    A causal reward model with the language model's vocabulary size is taken to share its tokenizer, any other to have
    one of its own. Raises InputError for a mesh that cannot be compiled for, and for models that cannot be used.
    """
    config.validate()
    open_compile_cache(config.compile_cache)
    mesh = make_topology_mesh(config.mesh, "decode")
    program, arguments = describe_program(config, mesh)
    what = (
        f"{config.batch_size} prompts of {config.prompt_length} tokens and {config.max_new_tokens} new tokens, "
        f"k {program.decoder.candidates}; computed in {config.dtype}"
    )
    return compile_and_print(
        mesh,
        what,
        program,
        arguments,
        name=config.mesh,
        step=Step(least_step_bytes(program, arguments), is_turn_of_loop=True),
        advice=_ways_to_less_memory(config),
        reads=config.max_new_tokens + 1,  # of the weights: once for the prompts, then for every token
        console=console,
    )


def describe_program(config: DecodeConfig, mesh: Mesh) -> tuple[DecodingProgram, tuple[Any, ...]]:
    """The program of one batch, with models that are only described, and its arguments as abstract arrays on a mesh."""
    batch, length, new = config.batch_size, config.prompt_length, config.max_new_tokens
    unrolled = unrolls(config, mesh.devices.flat[0].platform)

    def described(model: Model, weights: str | None) -> tuple[Any, Params]:
        is_int8 = weights == "int8"
        model = dataclasses.replace(model, unrolled=unrolled, int8=is_int8)
        dtype = config.dtype if weights is None or is_int8 else weights
        return model, abstract_params(mesh, model.abstract_params(), dtype)

    lm, lm_params = described(describe_model(model_source(config.lm), "vocabulary"), config.lm_dtype)
    if length + new > lm.config.max_positions:
        raise InputError(
            f"--prompt-length: {length} and --max-new-tokens {new} together exceed the language model's context of "
            f"{lm.config.max_positions} tokens"
        )
    method = METHODS[config.method or "pargs"]
    if method.reward_model not in (None, "full", "partial") or method.draws == "contrastive":
        raise InputError(
            f"--method {config.method}: --compile-only supports only methods with scalar reward models or none"
        )
    if method.search is not None:
        raise InputError(f"--method {config.method}: --compile-only does not support searches")
    settings = settings_of(config, method)
    sources = config.rm if method.guided else ()
    reward_models = [described(describe_model(source, "reward"), config.rm_dtype) for source in sources]
    guides = []
    for source, (model, _) in zip(sources, reward_models, strict=True):
        retokeniser = None if shares_tokens(source, model, lm.config.vocab_size, None) else _HostPart()
        guides.append(make_guide(model, retokeniser, new, closing_id=0))
    program = DecodingProgram.assemble(
        lm, tuple(guides), method, settings.k, new, top_p=settings.top_p, eos_ids=(0,), pad_id=0
    )
    prompts = Prompts(abstract_rows(mesh, batch, length), abstract_rows(mesh, batch))
    keys = jax.eval_shape(lambda: row_keys(0, jnp.zeros(batch, jnp.uint32)))
    whole_numbers = abstract_rows(mesh, batch)
    numbers = abstract_rows(mesh, batch, dtype="float32")
    arguments = (
        (lm_params, tuple(params for _, params in reward_models)),
        *prompts,
        jax.ShapeDtypeStruct(keys.shape, keys.dtype, sharding=whole_numbers.sharding),
        RowSettings(
            abstract_rows(mesh, batch, len(guides), dtype="float32"),
            numbers,
            whole_numbers,
            whole_numbers,
            None if settings.gate_entropy is None else numbers,
        ),
        tuple(None if isinstance(guide, CausalGuide) else prompts for guide in guides),
    )
    return program, arguments


def least_step_bytes(program: DecodingProgram, arguments: tuple[Any, ...]) -> float:
    """Bytes that no step can do without reading, at the end of the longest answer:

        (weights of every model) - (tables of which a step reads a few rows) + (keys and values of B texts of P + N)

    for B prompts of P tokens and answers of N. A language model whose embeddings are its vocabulary head too reads all
    of them. What a step writes and computes in between is not in it: it could stay in the chip's caches.
    """
    models = [program.decoder.lm, *(guide.model for guide in program.decoder.guides)]
    (lm_params, guide_params), prompts, lengths, keys, settings, guide_prompts = arguments
    total = 0.0
    for model, params in zip(models, (lm_params, *guide_params), strict=True):
        total += bytes_of(params)
        ties = model.head == "vocabulary" and model.config.tied_embeddings
        total -= sum(
            bytes_of(params["backbone"][name])
            for name in LOOKED_UP
            if name in params["backbone"] and not (ties and name == "embed")
        )
    start = program.decoder.start
    state = jax.eval_shape(
        lambda *given: start(*given[:5], program.max_new_tokens, given[5]),
        (lm_params, guide_params), prompts, lengths, keys, settings, guide_prompts,
    )  # fmt: skip
    caches = [x for x in jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, Cache)) if isinstance(x, Cache)]
    texts = prompts.shape[1] + program.max_new_tokens
    return total + sum(bytes_of(cache.kv) * min(1.0, texts / cache.slots) for cache in caches)


class _HostPart:
    """Stands for a retokeniser in a program that never runs."""

    candidates = staticmethod(lambda *_: None)


def _ways_to_less_memory(config: DecodeConfig) -> list[str]:
    """What would take less memory, most helpful first."""
    ways = ["--dtype bfloat16"] if config.dtype != "bfloat16" else []
    ways += ["--lm-dtype int8"] if config.lm_dtype != "int8" else []
    ways += ["--rm-dtype int8"] if config.rm and config.rm_dtype != "int8" else []
    return [*ways, f"--batch-size {max(1, config.batch_size // 2)}", "more devices, or a larger tensor axis"]
