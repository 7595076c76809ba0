"""`train.py`: a whole training run, from a config to a folder, or only its program, compiled."""

import dataclasses
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich.console import Console

from pargs_jax.aot.report import Report, Step
from pargs_jax.commands.command_line import show_config
from pargs_jax.commands.compile_only import abstract_rows, bytes_of, compile_and_print
from pargs_jax.commands.demo import model_source
from pargs_jax.commands.model_card import last_evaluation, training_card, write_card
from pargs_jax.commands.on_policy import check_on_policy, load_scorer, prepare_rollouts
from pargs_jax.commands.training_rows import load_examples
from pargs_jax.config import TrainConfig
from pargs_jax.data.batches import Batch, Batches
from pargs_jax.data.examples import Example
from pargs_jax.data_config import DEMO
from pargs_jax.durable_files import write_errors_named_after
from pargs_jax.errors import InputError
from pargs_jax.mesh import ensured_mesh, make_topology_mesh, open_compile_cache
from pargs_jax.models.adapters import adapts_tied_table, export_adapter
from pargs_jax.models.hf import (
    Pretrained,
    describe_model,
    load_model,
    save_model,
    stored_head,
    takes_preferences,
)
from pargs_jax.models.lora import merge_lora
from pargs_jax.models.model import AnyRewardModel, Model, Params
from pargs_jax.models.preference_lora import PreferenceLora
from pargs_jax.models.sources import EXPORTED, EXPORTED_ADAPTER, find, split_source, tokenizer_folder
from pargs_jax.sharding import row_shards
from pargs_jax.text.prompts import choose_form
from pargs_jax.text.tokenization import TextTokenizer
from pargs_jax.training.checkpoint import MEND_AND_RESUME
from pargs_jax.training.metrics_log import require_packages
from pargs_jax.training.program import REFERENCE, TrainingProgram, lora_of
from pargs_jax.training.run import packing_of
from pargs_jax.training.run import run as run_in_folder
from pargs_jax.training.run_folder import claimed_folder, saved_prompt_form

SCHEDULED_STEPS = 1000  # of the learning rate, which makes no difference to the compiled program


def run(config: TrainConfig) -> None:
    """What `train.py` does."""
    train(config)


def train(config: TrainConfig, console: Console | None = None) -> Path:
    """Trains what the config says and returns the run's folder.

    The folder gets `config.yaml` (the effective config), `data.json` (a digest of the rows), `metrics.jsonl`,
    `checkpoints/`, `bad_rows.*.jsonl` where rows were refused, `model/`: the result as a Hugging Face folder, and with
    LoRA `adapter/`: the low-rank additions as a PEFT adapter.
    Raises InputError for anything in the config, the data or the model that cannot be used; nothing of an earlier run
    is written over.
    """
    config.validate()
    check_objective(config)
    check_packing(config)
    if config.objective.loss.on_policy:
        check_on_policy(config)
    require_packages(config.log)
    with ensured_mesh() as mesh, claimed_folder(config) as folder:
        check_rows(config, mesh)
        _train(
            config, folder, console or Console(quiet=jax.process_index() > 0, soft_wrap=True, markup=False, emoji=False)
        )
    return folder


def compile_only(config: TrainConfig, console: Console | None = None) -> Report:
    """Compiles a training step for devices that are not here, and prints what it takes.

    Prompts and answers are taken to be half of `max_length` each. Raises InputError for a mesh that cannot be compiled
    for, and for whatever `train` would refuse in the model and the options.
    """
    config.validate()
    check_objective(config)
    check_packing(config)
    if config.objective.loss.on_policy:
        raise InputError(
            f"--compile-only: cannot describe a step of {config.objective.name}, which samples answers too; "
            "--objective.name sft has a step of the same size without the sampling"
        )
    open_compile_cache(config.compile_cache)
    mesh = make_topology_mesh(config.mesh, "train")
    check_rows(config, mesh)
    check_start(config)
    model = describe_model(
        model_source(config.model.init), config.objective.loss.head, attention=config.model.attention
    )
    others = {name: describe_model(source, "reward") for name, source in other_sources(config).items()}
    program = training_program(config, model, closing_id=0, others=others)
    optimizer, _ = program.make_optimizer(SCHEDULED_STEPS)
    state, frozen = program.abstract_state(optimizer, mesh)
    answers = config.objective.loss.samples or config.objective.loss.answers
    half = config.max_length // 2
    batch = _half_full(config, model, mesh)
    batch = jax.tree.map(lambda x: abstract_rows(mesh, len(x), *x.shape[1:], dtype=str(x.dtype)), batch)
    key = jax.eval_shape(lambda: jax.random.key(0))
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=NamedSharding(mesh, PartitionSpec()))
    what = (
        f"one step of {config.objective.name}: {config.batch_size} rows in {config.optim.accumulation} micro-batches, "
        f"prompts of {half} tokens, {answers} answer{'s' * (answers > 1)} of {config.max_length - half} each"
        f"{'' if batch.packed is None else ', packed in {} rows of {}'.format(*batch.packed.tokens.shape)}; "
        f"computed in {config.dtype}"
    )
    advice = _ways_to_less_memory(config, mesh, reads_apart=not model.one_pass)
    step = program.make_step(optimizer, state)
    arguments = (state, batch, key, frozen)
    return compile_and_print(
        mesh,
        what,
        step,
        arguments,
        name=config.mesh,
        # What goes in is read once, and the state that comes out is written once.
        step=Step(bytes_of(arguments[:2]) + bytes_of(frozen) + bytes_of(state)),
        advice=advice,
        console=console,
    )


def _half_full(config: TrainConfig, model: Model, mesh: Mesh) -> Batch:
    """A batch whose prompts and answers are half of `max_length` each, laid out as in a run."""
    loss, half = config.objective.loss, config.max_length // 2
    answers = loss.samples or loss.answers
    ids = np.zeros(half, np.int32), np.zeros(config.max_length - half, np.int32)
    rewards = None if loss.reward_range is None else (0.0,) * answers
    labels = (0.0,) * loss.labels if loss.labels else None
    example = Example(ids[0], (ids[1],) * answers, rewards=rewards, labels=labels)
    packing = packing_of(config, model, mesh, config.optim.accumulation)
    rows = [example] * config.batch_size
    return Batches(rows, config.batch_size, config.max_length, config.seed, packing=packing).batch(0)


def training_program(
    config: TrainConfig, model: Model, *, closing_id: int, others: Mapping[str, AnyRewardModel] | None = None
) -> TrainingProgram:
    """The program that a config asks for, with models that were loaded or only described; `others` are those of
    `other_sources`. Raises InputError if a model cannot read texts as long as the config allows, or if another model
    does not fit the first."""
    sources = {config.model.init: model} | {
        other_sources(config)[name]: other for name, other in (others or {}).items()
    }
    for source, each in sources.items():
        if config.max_length > (positions := each.config.max_positions):
            raise InputError(f"--max-length: got {config.max_length}, but {source} reads at most {positions} tokens")
        if config.pack:
            _check_packed(config, source, each)
    for name, other in (others or {}).items():
        if (size := other.config.vocab_size) < model.config.vocab_size:
            raise InputError(
                f"--objective.{name}: {other_sources(config)[name]} has {size} token embeddings, must have "
                f"{model.config.vocab_size} as {config.model.init}"
            )
    program = TrainingProgram.assemble(config, model, closing_id=closing_id, others=others)
    program.model.abstract_params()  # raises if it lacks a layer that --lora.layers names
    return program


def _check_packed(config: TrainConfig, source: str, model: AnyRewardModel) -> None:
    """Raises InputError if a model cannot read packed texts."""
    if not model.one_pass:
        raise InputError(
            f"--pack: got {config.pack}, but {source} has full attention, which reads every prefix separately; leave "
            "it out, or give --model.attention prefix_causal"
        )
    rotary = getattr(model.config, "rotary", None)
    longest = None if rotary is None else rotary.same_up_to(model.config.context_length)
    if longest is not None and config.max_length > longest:
        raise InputError(
            f"--pack: got {config.pack}, but beyond {longest} tokens the positions of {source} depend on the longest "
            f"text of a row ({rotary.kind} RoPE scaling); leave it out, or lower --max-length"
        )


def other_sources(config: TrainConfig) -> dict[str, str]:
    """The folders or hub ids of the frozen models that the objective reads, other than the reference, by name."""
    loss = config.objective.loss
    return {name: getattr(loss, name) for name in loss.frozen if name != REFERENCE}


def check_objective(config: TrainConfig) -> None:
    """Raises InputError if the objective does not go with the low-rank additions or the data that the options name."""
    loss, name = config.objective.loss, config.objective.name
    if loss.preference_lora is not None and config.lora.rank:
        raise InputError(
            f"--lora.rank: got {config.lora.rank}, but {name} trains low-rank additions of its own; leave it out "
            "(--objective.rank is their rank)"
        )
    if loss.labels and config.data.train == DEMO:
        raise InputError(
            f"--data.train: {name} needs pairs with {loss.labels} labels, but the demo's have none; give a file whose "
            "rows have prompt, chosen, rejected and labels"
        )
    if loss.samples and config.data.train == DEMO:
        raise InputError(
            f"--data.train: {name} needs {loss.samples} scored answers to each prompt, but the demo has one; write "
            f"some (decode.py --method top_p --top-p 1 --n {loss.samples} --rm ... --out F.jsonl)"
        )


def check_packing(config: TrainConfig) -> None:
    """Raises InputError if batches cannot be packed as the options say. `training_program` checks the models."""
    if config.pack and config.objective.loss.on_policy:
        raise InputError(
            f"--pack: got {config.pack}, but {config.objective.name} trains on answers that it samples, which are not "
            "packed; leave it out"
        )
    if 0 < config.pack < config.max_length:
        raise InputError(
            f"--pack: got {config.pack}, must be at least --max-length ({config.max_length}), so that every text fits "
            "a row, or 0"
        )


def check_start(config: TrainConfig) -> None:
    """Raises InputError if the model to start from cannot be the start of the objective, or if another model of the
    objective is not a causal reward model, according to their config.json."""
    loss, source = config.objective.loss, model_source(config.model.init)
    if takes_preferences(source):
        raise InputError(f"--model.init: {config.model.init} takes a preference vector; start from a language model")
    if loss.frozen and loss.head == "table" and stored_head(source) == "table":
        raise InputError(
            f"--model.init: {config.model.init} has a table of rewards already; {config.objective.name} starts from "
            "the language model, whose probabilities it needs"
        )
    for name, other in other_sources(config).items():
        if (head := stored_head(other)) != "reward":
            had = "says nothing of its head" if head is None else f"has a {head} head"
            raise InputError(f"--objective.{name}: {other} {had}, must be a reward model with a scalar head")
        if not describe_model(other, "reward").reads_candidates:
            raise InputError(f"--objective.{name}: {other} is an encoder, must be a causal reward model")


def load_others(config: TrainConfig, tokenizer: TextTokenizer) -> dict[str, Pretrained]:
    """The other models of the objective, by name. Raises InputError if one does not have the trained model's tokenizer
    or has no reward head."""
    loaded = {}
    for name, source in other_sources(config).items():
        if not tokenizer.same_vocabulary(TextTokenizer.load(tokenizer_folder(source))):
            raise InputError(f"--objective.{name}: {source} does not have the tokenizer of {config.model.init}")
        loaded[name] = load_model(source, "reward", dtype=config.dtype)
        if loaded[name].new_head:
            raise InputError(f"--objective.{name}: {source} has no reward head, so it is not a reward model")
    return loaded


def check_rows(config: TrainConfig, mesh: Mesh) -> None:
    """Raises InputError unless each device gets as many rows of a micro-batch as the others."""
    shards, rows = row_shards(mesh), config.batch_size // config.optim.accumulation
    if rows % shards:
        raise InputError(
            f"--batch-size: {config.batch_size} in {config.optim.accumulation} micro-batches (--optim.accumulation) is "
            f"{rows} pairs at once, must be a multiple of the mesh's {shards} row shards (data x fsdp)"
        )


def _train(config: TrainConfig, folder: Path, console: Console) -> None:
    check_start(config)
    source = model_source(config.model.init)
    pretrained = load_model(
        source,
        config.objective.loss.head,
        attention=config.model.attention,
        dtype=config.dtype if lora_of(config) else "float32",
        from_scratch=config.model.from_scratch,
        seed=config.seed,
    )
    tokenizer = TextTokenizer.load(tokenizer_folder(source), pretrained.eos_ids)
    tokenizer.check_embeddings(pretrained.model.config.vocab_size, source)
    others = load_others(config, tokenizer)
    program = training_program(
        config,
        pretrained.model,
        closing_id=tokenizer.eos_id,
        others={name: other.model for name, other in others.items()},
    )
    prefix_tokenizer = _load_prefix_tokenizer(config, program.model)
    models, scorer = [[(config.model.init, pretrained.prompt_form)]], None
    if config.objective.loss.on_policy:
        scorer = load_scorer(config, tokenizer, program.model.config.vocab_size)
        models = [[(scorer.source, scorer.prompt_form)], *models]
    config = _with_prompt_form(config, folder, models)
    show_config(config, console, f"(all options are in {folder / 'config.yaml'})")
    sampler = None
    if scorer is not None:
        examples, held_out, sampler = prepare_rollouts(config, tokenizer, scorer, console)
    else:
        examples, held_out = load_examples(config, tokenizer, prefix_tokenizer, console)
    params = {**pretrained.params, **{name: other.params for name, other in others.items()}}
    params = run_in_folder(config, folder, program, params, examples, held_out, console, sampler)
    model, has_adapter = pretrained.model, False
    if isinstance(program.model.lora, PreferenceLora):
        model = dataclasses.replace(model, lora=program.model.lora)
    elif program.model.lora is not None:
        adapted = dataclasses.replace(model, lora=program.model.lora)
        has_adapter = _save_adapter(config, folder, adapted, params, console)
        params = jax.jit(partial(merge_lora, program.model.lora))(params)
    exported = folder / EXPORTED
    with write_errors_named_after(exported, MEND_AND_RESUME):
        save_model(
            exported,
            model,
            params,
            special_tokens=pretrained.special_tokens,
            prompt_form=config.data.format,
        )
        if jax.process_index() == 0:
            tokenizer.save(exported)
            metrics = last_evaluation(folder / "metrics.jsonl")
            card = partial(training_card, config, tokenizer, metrics, rows=len(examples))
            write_card(exported, card())
            if has_adapter:
                write_card(folder / EXPORTED_ADAPTER, card(is_adapter=True))
    console.print(f"saved the model to {exported}", highlight=False)
    if has_adapter:
        console.print(
            f"saved its low-rank additions, as a PEFT adapter, to {folder / EXPORTED_ADAPTER}", highlight=False
        )


def _save_adapter(config: TrainConfig, folder: Path, model: Model, params: Params, console: Console) -> bool:
    """Writes low-rank additions as a PEFT adapter, unless PEFT could not put it on the model that they were trained
    from: transformers has no class for tables and no prefix-causal attention, and an adapter's model must be stored.
    For additions to token embeddings that the head is tied to there is none either, which is printed. Returns whether
    it did."""
    source = model_source(config.model.init)
    found, named = find(source), split_source(source)
    is_own = model.head == "table" or getattr(model.config, "attention", "full") != "full"
    if is_own or found.adapter is not None or config.model.from_scratch:
        return False
    if adapts_tied_table(model):
        console.print(
            "wrote no PEFT adapter: the head is tied to the token embeddings, whose addition PEFT would merge twice",
            highlight=False,
        )
        return False
    adapter = folder / EXPORTED_ADAPTER
    is_local = Path(named.model).is_dir()
    name, _, revision = named.model.partition("@")
    with write_errors_named_after(adapter, MEND_AND_RESUME):
        export_adapter(
            adapter,
            model,
            params,
            base=str(found.model.resolve()) if is_local else name,
            revision=None if is_local else revision or None,
            prompt_form=config.data.format,
        )
    return True


def _with_prompt_form(config: TrainConfig, folder: Path, models: list[list[tuple[str, str | None]]]) -> TrainConfig:
    """The config with the prompt form that is used: a resumed run keeps its own; the demo's prompts are in none."""
    form = config.data.format or saved_prompt_form(folder)
    form = choose_form(form, models if config.data.train != DEMO else [], "--data.format")
    return dataclasses.replace(config, data=dataclasses.replace(config.data, format=form))


def _load_prefix_tokenizer(config: TrainConfig, model: AnyRewardModel) -> TextTokenizer | None:
    source = config.data.prefix_tokenizer
    if source is None:
        return None
    if model.one_pass or not config.objective.loss.scores_prefixes:
        raise InputError(
            "--data.prefix-tokenizer: needs partial_bt and a model with full attention; other models are scored at "
            "their own tokens, so leave it out"
        )
    return TextTokenizer.load(tokenizer_folder(model_source(source)))


def _ways_to_less_memory(config: TrainConfig, mesh: Mesh, *, reads_apart: bool) -> list[str]:
    """What would take less memory, most helpful first."""
    ways = []
    if config.model.remat != "layers":
        ways.append("--model.remat layers")
    if config.dtype != "bfloat16":
        ways.append("--dtype bfloat16")
    if config.batch_size % (2 * config.optim.accumulation * row_shards(mesh)) == 0:
        ways.append(f"--optim.accumulation {2 * config.optim.accumulation}: smaller micro-batches")
    if reads_apart and config.objective.chunk > 1:
        ways.append(f"--objective.chunk {config.objective.chunk // 2}: fewer prefixes at once")
    if config.optim.moment_dtype != "bfloat16":
        ways.append("--optim.moment-dtype bfloat16")
    if config.optim.square_dtype != "bfloat16":
        ways.append("--optim.square-dtype bfloat16")
    if lora_of(config) is None:
        ways.append("--lora.rank 16")
    return [*ways, "more devices, or a larger fsdp axis"]
