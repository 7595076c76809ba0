"""The rows that `train.py` reads: tokenised, from the cache where it may be used, with what there is to say of them."""

import os
import secrets
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import jax
import numpy as np
from rich.console import Console

from pargs_jax.commands.demo import demo_pairs
from pargs_jax.config import TrainConfig
from pargs_jax.data.example_cache import ExampleCache
from pargs_jax.data.example_sets import ExampleSet, Found
from pargs_jax.data.examples import Cutting, Example, tokenise
from pargs_jax.data.preferences import BadRow, write_bad_rows
from pargs_jax.data.sources import Share
from pargs_jax.data_config import DEMO, NO_CACHE, column_names
from pargs_jax.durable_files import write_error_reason, write_errors_named_after
from pargs_jax.errors import InputError
from pargs_jax.processes import from_first, on_first
from pargs_jax.text.prompts import get_form
from pargs_jax.text.tokenization import TextTokenizer

ADVICE = f"give a folder that all processes can write, as --data.cache, or {NO_CACHE!r}"


def load_examples(
    config: TrainConfig, tokenizer: TextTokenizer, prefix_tokenizer: TextTokenizer | None, console: Console
) -> tuple[Sequence[Example], Sequence[Example] | None]:
    """The training examples, and those to evaluate on if there are any. Says what was refused, left out and cut. Raises
    InputError for a source that cannot be used."""
    loss = config.objective.loss
    cutting = Cutting(tokenizer, config.max_length, loss.answers, prefix_tokenizer)
    load = partial(_load, config, cutting=cutting, console=console)
    eval_source = config.data.eval or (DEMO if config.data.train == DEMO else None)
    examples = load(config.data.train, "train")
    if eval_source is not None:
        return examples, load(eval_source, "eval")
    return examples, load(config.data.train, "eval", side="held out") if config.data.held_out else None


def _load(
    config: TrainConfig, source: str, split: str, *, cutting: Cutting, console: Console, side: str = "rest"
) -> Sequence[Example]:
    name, loss = f"{source} ({split})", config.objective.loss
    if source == DEMO:
        rows = demo_pairs(config, split)
        examples, report = tokenise(
            rows, cutting.tokenizer, cutting.max_length, cutting.answers, cutting.prefix_tokenizer, loss.samples
        )
        console.print(f"{name}: {report}", highlight=False)
        return examples
    is_held_out = side == "held out"
    wanted = ExampleSet(
        source,
        "train" if is_held_out else split,
        column_names(config.data.columns, "--data.columns"),
        get_form(config.data.format),
        loss.answers == 2,
        loss.reward_range,
        loss.labels,
        cutting,
        loss.samples,
        config.data.held_out if split == "train" or is_held_out else 0.0,
        side,
    )
    bad_rows = None if is_held_out else config.output_folder / f"bad_rows.{split}.jsonl"
    examples, found = _examples(wanted, config, bad_rows, console)
    if bad_rows is not None:
        if found.census.other_splits:
            console.print(f"{name}: skipped {found.census.other_splits} rows of other splits", highlight=False)
        if found.bad_rows:
            bad = f"{found.bad_rows} of {found.usable + found.bad_rows} rows"
            console.print(f"{name}: {bad} cannot be used; see {bad_rows}", style="yellow", highlight=False)
    console.print(f"{name}: {found.report}", highlight=False)
    return examples


def _examples(
    wanted: ExampleSet, config: TrainConfig, bad_rows: Path | None, console: Console
) -> tuple[Sequence[Example], Found]:
    """The examples of a set, and what was found in its source. Bad rows are written to a file, if one is given."""
    cache = _cache(config, console)
    if cache is None:
        refused: list[BadRow] = []
        examples, found = wanted.load(refused.append)
        write = partial(write_bad_rows, rows=refused)
    else:
        key, token = _agreed_key(wanted)
        cached = cache.get(wanted, key, token)
        examples, found, write = cached.examples, cached.found, cached.copy_bad_rows
    if bad_rows is not None and found.bad_rows:
        with write_errors_named_after(bad_rows, "give another --out"):
            on_first(partial(write, bad_rows))
    return examples, found


def _cache(config: TrainConfig, console: Console) -> ExampleCache | None:
    """The cache; None if it is switched off, or if nothing can be written in its usual place."""
    if config.data.cache == NO_CACHE:
        return None
    usual = Path(os.environ.get("PARGS_JAX_CACHE") or "~/.cache/pargs_jax").expanduser()
    folder = usual if config.data.cache is None else Path(config.data.cache)
    own = Share(jax.process_index(), jax.process_count())
    problem = ""
    try:
        cache = ExampleCache(folder, own, partial(console.print, highlight=False), ADVICE)
        if not os.access(folder, os.W_OK):
            problem = "it cannot be written"
    except (OSError, RuntimeError, ValueError) as error:
        problem = write_error_reason(error) or str(error)
    if from_first(np.asarray(bool(problem))):
        if config.data.cache is not None:
            raise InputError(f"--data.cache: {folder}: {problem or 'the first process cannot use it'}; {ADVICE}")
        console.print(f"{folder}: {problem}, so tokenised rows are not kept; {ADVICE}", style="yellow", highlight=False)
        return None
    if problem:
        raise InputError(f"--data.cache: {folder}: {problem}; {ADVICE}")
    return cache


def _agreed_key(wanted: ExampleSet) -> tuple[str, str]:
    """The set's key and a new token, as the first process has them."""
    texts = on_first(lambda: wanted.key() + secrets.token_hex(8))
    agreed = from_first(np.frombuffer(bytes.fromhex(texts), np.uint8) if texts else np.zeros(24, np.uint8))
    text = agreed.astype(np.uint8).tobytes().hex()
    return text[:32], text[32:]
