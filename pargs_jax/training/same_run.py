"""Checks that a resumed run continues as it began: on the same data, with the same schedule."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pargs_jax.config import OptimConfig
from pargs_jax.data.batches import Example
from pargs_jax.durable_files import write_errors_named_after, write_whole
from pargs_jax.errors import InputError, warn
from pargs_jax.json_text import parse_json
from pargs_jax.training.step import make_optimizer

DATA_FILE = "data.json"


def check_same_data(folder: Path, source: str, examples: Sequence[Example], *, resumes: bool) -> None:
    """Writes a digest of a new run's training rows to `data.json`, and compares it when the run is resumed.

    Raises InputError if the rows differ or the file cannot be used. Warns once for a run that was started before
    digests existed.
    """
    path = folder / DATA_FILE
    now = {"source": source, "rows": len(examples), "digest": digest_of(examples)}
    if resumes and path.exists():
        try:
            before = parse_json(path.read_bytes())
            rows, digest = before["rows"], before["digest"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{path}: cannot be read; restore it, or remove it to continue without the check"
            ) from error
        if digest != now["digest"]:
            raise InputError(
                f"{source}: its tokenised rows differ from those that the run in {folder} began with ({rows} then, "
                f"{now['rows']} now); resume with the original data and tokenizer, or use another output folder"
            )
        return
    if resumes:
        warn(f"{folder}: has no {DATA_FILE}, so it is not checked that {source} is the data that the run began with")
    with write_errors_named_after(path, "use another output folder"):
        write_whole(path, json.dumps(now) + "\n")


def digest_of(examples: Sequence[Example]) -> str:
    """A digest of the training input: all token ids, where texts begin and end, rewards, labels, and
    the order of the rows."""
    total = hashlib.sha256()
    for example in examples:
        prefixes = [ids for of_answer in example.prefixes or () for ids in of_answer]
        texts = [example.prompt, *example.answers, *prefixes]
        lengths = np.array([*example.prefix_counts, *map(len, texts)])
        total.update(b"".join(np.asarray(ids, "<i4").tobytes() for ids in ([len(lengths)], lengths, *texts)))
        if example.rewards is not None:
            total.update(np.asarray(example.rewards, "<f4").tobytes())
        if example.labels is not None:
            total.update(np.asarray(example.labels, "<f4").tobytes())
    return total.hexdigest()


def warn_of_another_schedule(optim: OptimConfig, before: int, now: int, step: int) -> None:
    """Warns if a run planned for `before` steps, and now for `now` steps, continues after `step` with learning rates
    other than planned."""
    if step >= now:
        return
    planned, current = (make_optimizer(optim, steps)[1] for steps in (before, now))
    rest = np.linspace(step, now - 1, 1000).astype(int)
    if not np.allclose(planned(rest), current(rest), rtol=1e-5, atol=0):
        warn(
            f"steps, epochs: the run was planned with {before} steps and now has {now}, which changes its "
            f"{optim.schedule} schedule: the learning rate of step {step + 1} is now {float(current(step)):.3g} "
            f"instead of {float(planned(step)):.3g}"
        )
