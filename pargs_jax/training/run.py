"""A whole training run, from a config to a folder: what `python train.py` does."""

import dataclasses
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh
from rich.console import Console

from pargs_jax.cli import from_mapping, read_yaml, to_yaml
from pargs_jax.config import DEMO, TrainConfig, column_names
from pargs_jax.data.batches import Batches, Example, tokenise
from pargs_jax.data.preferences import Preference, load_preferences, write_bad_rows
from pargs_jax.demo import task as demo
from pargs_jax.durable_files import hold, write_failures_named, write_whole
from pargs_jax.errors import InputError
from pargs_jax.mesh import some_mesh
from pargs_jax.models.encoder import EncoderModel
from pargs_jax.models.hf import EXPORTED, load_model, resolve, save_model
from pargs_jax.models.lora import NAMES as LORA_NAMES
from pargs_jax.models.lora import Lora, draw_lora, join_params, merge_lora, split_params
from pargs_jax.models.model import M, Model
from pargs_jax.options import options, shown, value_of
from pargs_jax.processes import from_first, on_first
from pargs_jax.sharding import place_computed, row_shards, shardings_of
from pargs_jax.text.prompts import PROMPT_FORMS, choose_form, get_form
from pargs_jax.text.tokenization import TextTokenizer
from pargs_jax.training.checkpoint import MEND_AND_RESUME, Checkpoints
from pargs_jax.training.loop import run_steps
from pargs_jax.training.metrics_log import require_packages
from pargs_jax.training.objective import Objective
from pargs_jax.training.same_run import DATA_FILE, check_same_data, warn_of_another_schedule
from pargs_jax.training.step import begin, make_optimizer, make_train_step

DEMO_HELD_OUT = 256  # pairs of the demo's evaluation split
# What a command leaves that ended before its run began.
BEFORE_A_RUN = (".lock", ".config.yaml.partial", "bad_rows.", DATA_FILE, f".{DATA_FILE}.partial")


def train(config: TrainConfig, console: Console | None = None) -> Path:
    """Trains what the config says and returns the run's folder.

    The folder gets `config.yaml` (the effective config), `data.json` (a digest of the rows), `metrics.jsonl`,
    `checkpoints/`, `bad_rows.*.jsonl` where rows were refused, and `model/`: the result as a Hugging Face folder.
    Raises InputError for anything in the config, the data or the model that cannot be used; nothing of an earlier run
    is written over.
    """
    config.validate()
    require_packages(config.log)
    with some_mesh() as mesh, _claimed_folder(config) as out:
        check_rows(config, mesh)
        _train(config, out, console or Console(quiet=jax.process_index() > 0, soft_wrap=True))
    return out


def _train(config: TrainConfig, out: Path, console: Console) -> None:
    source = resolve(demo.DEMO_LM if config.model.init == DEMO else config.model.init)
    head = "vocabulary" if config.objective.name == "sft" else "reward"
    lora = make_lora(config)
    pretrained = load_model(
        source,
        head,
        attention=config.model.attention,
        dtype=config.dtype if lora else "float32",
        from_scratch=config.model.from_scratch,
        seed=config.seed,
    )
    model = model_to_train(config, pretrained.model)
    check_length(config, model.config.max_positions)
    tokenizer = TextTokenizer.load(source, pretrained.eos_ids)
    tokenizer.check_embeddings(model.config.vocab_size, source)
    prefix_tokenizer = _load_prefix_tokenizer(config, model)
    config = _with_prompt_form(config, out, pretrained.prompt_form)
    console.print(to_yaml(config).rstrip(), highlight=False, style="dim")
    load = partial(_load_examples, config, tokenizer=tokenizer, prefix_tokenizer=prefix_tokenizer, console=console)
    examples = load(config.data.train, "train")
    saved = on_first(partial(_saved_config, out))  # None in a new run, and in all processes but the first
    on_first(partial(check_same_data, out, config.data.train, examples, resumes=saved is not None))
    eval_source = config.data.eval or (DEMO if config.data.train == DEMO else None)
    held_out = None
    if eval_source is not None:
        rows = config.batch_size // config.optim.accumulation  # what fits the device in training fits it here
        held_out = Batches(load(eval_source, "eval"), rows, config.max_length, config.seed)
    batches = Batches(examples, config.batch_size, config.max_length, config.seed)
    total = total_steps(config, len(examples))

    objective = Objective(model, config.objective, config.dtype, closing_id=tokenizer.eos_id)
    optimizer, schedule = make_optimizer(config.optim, total)
    params, frozen = pretrained.params, {}
    if lora:
        heads, frozen = split_params(params, trained_names(model))
        params = join_params(
            place_computed(lambda key: draw_lora(model.abstract_params(), key), config.seed),
            jax.tree.map(lambda x: x.astype("float32"), heads),
        )
    state = begin(optimizer, params)
    step = make_train_step(objective, optimizer, accumulation=config.optim.accumulation, places=shardings_of(state))
    on_first(partial(_save_config, config, out))
    with Checkpoints(out / "checkpoints", config.keep, config.keep_best, config.best_metric) as checkpoints:
        if checkpoints.latest_step is not None:
            like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
            jax.tree.map(lambda x: x.delete(), state)  # there may be no room for two
            state = checkpoints.restore(like, partial(console.print, style="yellow", highlight=False))
            console.print(f"resuming after step {int(state.step)} of {total}", highlight=False)
            if saved is not None:
                warn_of_another_schedule(config.optim, total_steps(saved, len(examples)), total, int(state.step))
        if int(state.step) < total:
            state = run_steps(
                config, state, frozen, step, objective, schedule, batches, held_out, checkpoints, total, console
            )
    params = join_params(state.params, frozen)
    del state  # the optimizer's part of it is not needed any more
    if lora:
        params = jax.jit(partial(merge_lora, lora))(params)
    with write_failures_named(out / EXPORTED, MEND_AND_RESUME):
        save_model(
            out / EXPORTED,
            pretrained.model,
            params,
            special_tokens=pretrained.special_tokens,
            prompt_form=config.data.format,
        )
        if jax.process_index() == 0:
            tokenizer.save(out / EXPORTED)
    console.print(f"the model is in {out / EXPORTED}", highlight=False)


def _with_prompt_form(config: TrainConfig, out: Path, remembered: str | None) -> TrainConfig:
    """The config with the prompt form that is used: a resumed run keeps its own; the demo's prompts are in none."""
    form = config.data.format or _form_of_run(out)
    models = [[(config.model.init, remembered)]] if config.data.train != DEMO else []
    form = choose_form(form, models, "--data.format")
    return dataclasses.replace(config, data=dataclasses.replace(config.data, format=form))


def _form_of_run(out: Path) -> str | None:
    """The prompt form of the run in a folder, which the first process reads for all; None if there is no run."""
    forms = [None, *PROMPT_FORMS]

    def read() -> int:
        saved = out / "config.yaml"
        return forms.index(
            from_mapping(TrainConfig, read_yaml(saved), str(saved)).data.format if saved.exists() else None
        )

    return forms[int(from_first(np.asarray(on_first(read) or 0)))]


def total_steps(config: TrainConfig, pairs: int) -> int:
    """How many steps a run takes on so many pairs."""
    return config.steps or max(1, math.ceil(config.epochs * pairs / config.batch_size))


def model_to_train(config: TrainConfig, model: M) -> M:
    """The model as training runs it: with the config's dropout, rematerialisation and low-rank additions."""
    shape = dataclasses.replace(model.config, dropout=config.model.dropout, remat=config.model.remat)
    return dataclasses.replace(model, config=shape, lora=make_lora(config))


def make_lora(config: TrainConfig) -> Lora | None:
    return Lora(config.lora.rank, config.lora.alpha, config.lora.layers) if config.lora.rank else None


def trained_names(model: Model) -> tuple[str, ...]:
    """What is trained beside a frozen model: the additions, and a head that may be new, as reward heads are."""
    return ("head", *LORA_NAMES) if model.head_kind.may_be_new else LORA_NAMES


def check_rows(config: TrainConfig, mesh: Mesh) -> None:
    """Raises InputError unless each device gets as many rows of a micro-batch as the others."""
    shards, rows = row_shards(mesh), config.batch_size // config.optim.accumulation
    if rows % shards:
        raise InputError(
            f"--batch-size: {config.batch_size} in {config.optim.accumulation} micro-batches (--optim.accumulation) is "
            f"{rows} pairs at once, which the mesh's {shards} row shards (data x fsdp) cannot share; make it a multiple"
        )


@contextmanager
def _claimed_folder(config: TrainConfig) -> Iterator[Path]:
    """The run's folder, claimed by the first process for all."""
    with ExitStack() as stack:
        on_first(lambda: stack.enter_context(_locked_folder(config)))
        yield config.output_folder


@contextmanager
def _locked_folder(config: TrainConfig) -> Iterator[None]:
    """Makes the run's folder, or checks that the run in it is the one to go on with, and keeps other runs out."""
    out = config.output_folder
    _check_folder(config, out)
    with write_failures_named(out, "give another --out"):
        out.mkdir(parents=True, exist_ok=True)
        lock = (out / ".lock").open("ab")
    with lock:
        hold(lock, f"{out}: another run is writing there; wait for it to end, or give another --out")
        _check_folder(config, out)  # again: a run may have come and gone before the lock was ours
        yield


def _save_config(config: TrainConfig, out: Path) -> None:
    with write_failures_named(out, "give another --out"):
        write_whole(out / "config.yaml", to_yaml(config))


def _saved_config(out: Path) -> TrainConfig | None:
    """The config of the run in the folder; None if there is no run."""
    path = out / "config.yaml"
    try:
        if not path.exists():
            return None
    except OSError as error:
        raise InputError(f"{out}: cannot be read ({error.strerror}); give another --out") from error
    return from_mapping(TrainConfig, read_yaml(path), str(path))


def _check_folder(config: TrainConfig, out: Path) -> None:
    """Raises InputError unless the folder is new, or holds the run to go on with."""
    saved = _saved_config(out)
    if saved is not None:
        if not config.resume:
            raise InputError(f"{out}: holds a run already; go on with --resume, or give another --out")
        _check_same(saved, config, out)
    elif out.exists() and (not out.is_dir() or any(not p.name.startswith(BEFORE_A_RUN) for p in out.iterdir())):
        raise InputError(f"{out}: is there already and holds no run; give another --out")


def _check_same(before: TrainConfig, now: TrainConfig, out: Path) -> None:
    for option in options(TrainConfig):
        was, becomes = (value_of(config, option) for config in (before, now))
        if option.key == "data.format" and becomes is None:
            continue  # left open: the run goes on with its own
        if was != becomes and not option.may_change:
            raise InputError(
                f"{out}: the run there has {option.flag} {shown(was)}, this one {shown(becomes)}; "
                "resume with the same options, or give another --out"
            )


def check_length(config: TrainConfig, positions: int) -> None:
    if config.max_length > positions:
        raise InputError(
            f"--max-length: got {config.max_length}, but {config.model.init} reads at most {positions} tokens"
        )


def _load_prefix_tokenizer(config: TrainConfig, model: Model) -> TextTokenizer | None:
    source = config.data.prefix_tokenizer
    if source is None:
        return None
    if not isinstance(model, EncoderModel) or config.objective.name != "partial_bt":
        raise InputError(
            "--data.prefix-tokenizer: is for partial_bt and a model with full attention, which reads prefixes apart; "
            "other models are scored at their own tokens"
        )
    return TextTokenizer.load(resolve(demo.DEMO_LM if source == DEMO else source))


def _load_examples(
    config: TrainConfig,
    source: str,
    split: str,
    *,
    tokenizer: TextTokenizer,
    prefix_tokenizer: TextTokenizer | None,
    console: Console,
) -> list[Example]:
    """Reads, renders and tokenises one set; says what was refused and what was cut."""
    form = get_form(config.data.format)
    is_sft = config.objective.name == "sft"
    if source == DEMO:
        size = config.data.demo_pairs if split == "train" else DEMO_HELD_OUT
        made = demo.sft_rows if is_sft else demo.preferences
        rows = [Preference(**{"rejected": None, **row}) for row in made(size, seed=config.seed, split=split)]
    else:
        columns = column_names(config.data.columns, "--data.columns")
        loaded = load_preferences(
            source, form, tokenizer=tokenizer, require_rejected=not is_sft, split=split, columns=columns
        )
        rows = loaded.rows
        if loaded.other_splits:
            console.print(
                f"{source} ({split}): {loaded.other_splits} rows of other splits are left out", highlight=False
            )
        if loaded.bad_rows:
            path = config.output_folder / f"bad_rows.{split}.jsonl"
            with write_failures_named(path, "give another --out"):
                on_first(partial(write_bad_rows, path, loaded.bad_rows))
            console.print(f"{source}: {len(loaded.bad_rows)} rows cannot be used; see {path}", style="yellow")
    examples, report = tokenise(rows, tokenizer, config.max_length, 1 if is_sft else 2, prefix_tokenizer)
    console.print(f"{source} ({split}): {report}", highlight=False)
    return examples
