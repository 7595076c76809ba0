"""The folder of a training run: whose it is, and whether a run may go on in it."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np

from pargs_jax.config import TrainConfig
from pargs_jax.config_files import from_mapping, read_yaml, to_yaml
from pargs_jax.durable_files import hold, write_failures_named, write_whole
from pargs_jax.errors import InputError
from pargs_jax.options import options, shown, value_of
from pargs_jax.processes import from_first, on_first
from pargs_jax.text.prompts import PROMPT_FORMS
from pargs_jax.training.same_run import DATA_FILE

# What a command leaves that ended before its run began.
BEFORE_A_RUN = (".lock", ".config.yaml.partial", "bad_rows.", DATA_FILE, f".{DATA_FILE}.partial")
USE_ANOTHER = "use another output folder"


@contextmanager
def claimed_folder(config: TrainConfig) -> Iterator[Path]:
    """The run's folder, which the first process claims for all.

    Raises InputError if it holds a run and `config` does not resume one, if the run there has other options, if it
    holds something else, and if another process is writing there.
    """
    with ExitStack() as stack:
        on_first(lambda: stack.enter_context(_locked_folder(config)))
        yield config.output_folder


def save_config(config: TrainConfig, folder: Path) -> None:
    """Writes the config of the run in a folder, which is what makes it a run."""
    with write_failures_named(folder, USE_ANOTHER):
        write_whole(folder / "config.yaml", to_yaml(config))


def saved_config(folder: Path) -> TrainConfig | None:
    """The config of the run in a folder; None if there is no run."""
    path = folder / "config.yaml"
    try:
        if not path.exists():
            return None
    except OSError as error:
        raise InputError(f"{folder}: cannot be read ({error.strerror}); {USE_ANOTHER}") from error
    return from_mapping(TrainConfig, read_yaml(path), str(path))


def saved_prompt_form(folder: Path) -> str | None:
    """The prompt form of the run in a folder, which the first process reads for all; None if there is no run."""
    forms = [None, *PROMPT_FORMS]

    def read() -> int:
        saved = saved_config(folder)
        return 0 if saved is None else forms.index(saved.data.format)

    return forms[int(from_first(np.asarray(on_first(read) or 0)))]


@contextmanager
def _locked_folder(config: TrainConfig) -> Iterator[None]:
    """Makes the run's folder, or checks that the run in it is the one to go on with, and keeps other runs out."""
    folder = config.output_folder
    _check_folder(config, folder)
    with write_failures_named(folder, USE_ANOTHER):
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("ab")
    with lock:
        hold(lock, f"{folder}: another run is writing to it; wait for it to end, or {USE_ANOTHER}")
        _check_folder(config, folder)  # again: a run may have come and gone before the lock was ours
        yield


def _check_folder(config: TrainConfig, folder: Path) -> None:
    """Raises InputError unless the folder is new, or holds the run to go on with."""
    saved = saved_config(folder)
    if saved is not None:
        if not config.resume:
            raise InputError(f"{folder}: already holds a run; resume it, or {USE_ANOTHER}")
        _check_same(saved, config, folder)
        return
    is_free = folder.is_dir() and all(path.name.startswith(BEFORE_A_RUN) for path in folder.iterdir())
    if folder.exists() and not is_free:
        raise InputError(f"{folder}: exists and does not hold a run; {USE_ANOTHER}")


def _check_same(before: TrainConfig, now: TrainConfig, folder: Path) -> None:
    for option in options(TrainConfig):
        was, becomes = (value_of(config, option) for config in (before, now))
        if option.key == "data.format" and becomes is None:
            continue  # left open: the run goes on with its own
        if was != becomes and not option.may_change:
            raise InputError(
                f"{folder}: its run has {option.flag} {shown(was)}, but this one has {shown(becomes)}; "
                f"resume with the same options, or {USE_ANOTHER}"
            )
