"""The folder of a training run: who owns it, and whether a run may continue in it."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np

from pargs_jax.config import TrainConfig
from pargs_jax.config_files import from_mapping, read_yaml, to_yaml
from pargs_jax.durable_files import hold, write_errors_named_after, write_whole
from pargs_jax.errors import InputError
from pargs_jax.options import options, shown, value_of
from pargs_jax.processes import from_first, on_first
from pargs_jax.text.prompts import PROMPT_FORMS
from pargs_jax.training.same_run import DATA_FILE

# Files that a command leaves if it stops before its run begins.
FILES_BEFORE_A_RUN = (".lock", ".config.yaml.partial", "bad_rows.", DATA_FILE, f".{DATA_FILE}.partial")
USE_ANOTHER = "use another output folder"


@contextmanager
def claimed_folder(config: TrainConfig) -> Iterator[Path]:
    """The run's folder, which the first process locks for all.

    Raises InputError if it holds a run and `config` does not resume one, if that run has other options, if the folder
    holds something else, or if another process is writing there.
    """
    with ExitStack() as stack:
        on_first(lambda: stack.enter_context(_locked_folder(config)))
        yield config.output_folder


def save_config(config: TrainConfig, folder: Path) -> None:
    """Writes the config of the run in a folder; a folder with this file counts as a run."""
    with write_errors_named_after(folder, USE_ANOTHER):
        write_whole(folder / "config.yaml", to_yaml(config))


def saved_config(folder: Path) -> TrainConfig | None:
    """The config of the run in a folder; None if there is none."""
    path = folder / "config.yaml"
    try:
        if not path.exists():
            return None
    except OSError as error:
        raise InputError(f"{folder}: cannot be read ({error.strerror}); {USE_ANOTHER}") from error
    return from_mapping(TrainConfig, read_yaml(path), str(path))


def saved_prompt_form(folder: Path) -> str | None:
    """The prompt form of the run in a folder; the first process reads it for all. None if there is no run."""
    forms = [None, *PROMPT_FORMS]

    def read() -> int:
        saved = saved_config(folder)
        return 0 if saved is None else forms.index(saved.data.format)

    return forms[int(from_first(np.asarray(on_first(read) or 0)))]


@contextmanager
def _locked_folder(config: TrainConfig) -> Iterator[None]:
    """Creates the run's folder, or checks that its run is the one to resume, and keeps other runs out."""
    folder = config.output_folder
    _check_folder(config, folder)
    with write_errors_named_after(folder, USE_ANOTHER):
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("ab")
    with lock:
        hold(lock, f"{folder}: another run is writing to it; wait for it to end, or {USE_ANOTHER}")
        _check_folder(config, folder)  # again: another run may have used it before we had the lock
        yield


def _check_folder(config: TrainConfig, folder: Path) -> None:
    """Raises InputError unless the folder is new or holds the run to resume."""
    saved = saved_config(folder)
    if saved is not None:
        if not config.resume:
            raise InputError(f"{folder}: already holds a run; resume it, or {USE_ANOTHER}")
        _check_same(saved, config, folder)
        return
    is_free = folder.is_dir() and all(path.name.startswith(FILES_BEFORE_A_RUN) for path in folder.iterdir())
    if folder.exists() and not is_free:
        raise InputError(f"{folder}: exists and does not hold a run; {USE_ANOTHER}")


def _check_same(before: TrainConfig, now: TrainConfig, folder: Path) -> None:
    for option in options(TrainConfig):
        old, new = (value_of(config, option) for config in (before, now))
        if option.key == "data.format" and new is None:
            continue  # not given: the run keeps its own
        if old != new and not option.may_change:
            raise InputError(
                f"{folder}: its run has {option.flag} {shown(old)}, but this one has {shown(new)}; "
                f"resume with the same options, or {USE_ANOTHER}"
            )
