"""Where the numbers of a run are written: `metrics.jsonl` always, TensorBoard and Weights & Biases on request."""

import importlib
import json
import uuid
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

import jax

from pargs_jax.config import LogConfig, TrainConfig
from pargs_jax.durable_files import append_all, write_errors_named_after, write_whole
from pargs_jax.errors import InputError, warn
from pargs_jax.json_text import parse_json
from pargs_jax.training.checkpoint import MEND_AND_RESUME


class MetricsFile:
    """`metrics.jsonl`: one line per report. A resumed run continues after its checkpoint's step."""

    def __init__(self, path: Path, resumed_step: int) -> None:
        """Drops the lines of later steps. Raises InputError if the file cannot be written."""
        with write_errors_named_after(path, MEND_AND_RESUME):
            lines = path.read_bytes().splitlines() if path.exists() else []
            steps = [_step_of(line) for line in lines]
            if unreadable := steps[:-1].count(None):  # a kill may cut off the last line
                warn(f"{path}: {unreadable} lines are not metrics of a step; they are dropped")
            kept = [line for line, step in zip(lines, steps, strict=True) if step is not None and step <= resumed_step]
            write_whole(path, "".join(line.decode() + "\n" for line in kept))
        self._path = path

    def write(self, step: int, split: str, values: dict[str, float]) -> None:
        """Appends a line. Raises InputError if it cannot be written."""
        with write_errors_named_after(self._path, MEND_AND_RESUME), self._path.open("ab", buffering=0) as file:
            append_all(file, json.dumps({"step": step, "split": split, **values}) + "\n")

    def close(self) -> None:
        """Does nothing: every line is in the file already."""


def _step_of(line: bytes) -> float | None:
    """The step whose metrics a line of the file has; None if it has none."""
    try:
        step = parse_json(line)["step"]
        return step if isinstance(step, int) else None
    except (InputError, KeyError, TypeError):
        return None


class TensorBoard:
    """Scalars `<split>/<name>` in a folder that TensorBoard reads."""

    def __init__(self, folder: Path, resumed_step: int) -> None:
        self._writer = _load("tensorboardX", "tensorboard").SummaryWriter(str(folder), purge_step=resumed_step + 1)

    def write(self, step: int, split: str, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(f"{split}/{name}", value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """Scalars `<split>/<name>` of one run of a W&B project; a resumed run continues it."""

    def __init__(self, config: TrainConfig) -> None:
        folder = config.output_folder
        id_file = folder / "wandb_run_id"
        if not id_file.exists():
            with write_errors_named_after(id_file, MEND_AND_RESUME):
                write_whole(id_file, uuid.uuid4().hex)
        self._run = _load("wandb", "wandb").init(
            project=config.log.wandb,
            name=folder.name,
            dir=str(folder),
            id=id_file.read_text(encoding="utf-8"),
            resume="allow",
            config=asdict(config),
        )

    def write(self, step: int, split: str, values: dict[str, float]) -> None:
        self._run.log({f"{split}/{name}": value for name, value in values.items()}, step=step)

    def close(self) -> None:
        self._run.finish()


class MetricsLog(AbstractContextManager):
    """Writes a run's numbers to all places that the config asks for."""

    def __init__(self, config: TrainConfig, resumed_step: int) -> None:
        """Opens them. Raises InputError if a package is missing or a file cannot be written."""
        folder = config.output_folder
        self._places: list[MetricsFile | TensorBoard | WeightsAndBiases] = []
        if jax.process_index() > 0:  # all processes have the same numbers
            return
        self._places.append(MetricsFile(folder / "metrics.jsonl", resumed_step))
        if config.log.tensorboard:
            self._places.append(TensorBoard(folder / "tensorboard", resumed_step))
        if config.log.wandb is not None:
            self._places.append(WeightsAndBiases(config))

    def __exit__(self, *error: object) -> None:
        for place in self._places:
            place.close()

    def write(self, step: int, split: str, values: dict[str, float]) -> None:
        """Writes the numbers of one report; `split` is train or eval."""
        for place in self._places:
            place.write(step, split, values)


def require_packages(config: LogConfig) -> None:
    """Raises InputError if a package that the options need is not installed."""
    if config.tensorboard:
        _load("tensorboardX", "tensorboard")
    if config.wandb is not None:
        _load("wandb", "wandb")


def _load(package: str, extra: str) -> ModuleType:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise InputError(
            f"log.{extra}: needs the package {package}; install it with: pip install 'pargs-jax[{extra}]'"
        ) from error
