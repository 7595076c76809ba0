"""Checks that a resumed run continues as it began: on the same data, with the same schedule."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pargs_jax.config import OptimConfig
from pargs_jax.data.examples import Example, digest_of
from pargs_jax.data.stored_examples import StoredExamples
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
    digest = examples.digest if isinstance(examples, StoredExamples) else digest_of(examples)
    now = {"source": source, "rows": len(examples), "digest": digest}
    if resumes and path.exists():
        try:
            before = parse_json(path.read_bytes())
            rows, digest_before = before["rows"], before["digest"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{path}: cannot be read; restore it, or remove it to continue without the check"
            ) from error
        if digest_before != digest:
            raise InputError(
                f"{source}: its tokenised rows differ from those that the run in {folder} began with ({rows} then, "
                f"{now['rows']} now); resume with the original data and tokenizer, or use another output folder"
            )
        return
    if resumes:
        warn(f"{folder}: has no {DATA_FILE}, so it is not checked that {source} is the data that the run began with")
    with write_errors_named_after(path, "use another output folder"):
        write_whole(path, json.dumps(now) + "\n")


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
