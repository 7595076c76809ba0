"""What studies with models have in common: training runs and answers that are made once, and the standard errors of
numbers that depend on prompts and on training runs.

A study trains every model with several seeds, picks settings on the prompts of the split `eval`, and reports numbers of
the split `test`. A second run goes on where the first stopped.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from pargs_jax.commands.generate import generate, open_session
from pargs_jax.commands.train import train
from pargs_jax.config import DecodeConfig, TrainConfig
from pargs_jax.config_files import from_mapping
from pargs_jax.decoding.methods import Method
from pargs_jax.durable_files import write_whole
from pargs_jax.evaluation.answers import System, load_systems
from pargs_jax.evaluation.statistics import Estimate
from pargs_jax.generation.guidance import roles_of
from pargs_jax.generation.session import Session
from pargs_jax.mesh import start

MAX_NEW_TOKENS = 64

Metrics = Mapping[str, Callable[[System], dict[str, float]]]
"""Named numbers of a system's answers: one for each prompt, by the prompt's id."""
Setting = dict[str, Any]
"""What a method was run with, and its numbers `[seeds][prompts]` by `split metric`, such as `test kl`."""


@dataclasses.dataclass(frozen=True)
class Study:
    """Where a study works, and how: the options that all of them have."""

    lm: str
    out: Path
    seeds: int
    task: str = "stories"
    dtype: str = "float32"
    batch_size: int = 100
    scale: float = 1.0
    options: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        """What all studies of a task may share: prompts, pairs, models and answers."""
        return self.out / self.task

    def prompts(self, split: str) -> Path:
        """The file of a split's prompts."""
        return self.folder / f"prompts.{split}.jsonl"

    def pairs(self, split: str) -> Path:
        """The file of preference pairs, of the split `train` or `test`."""
        return self.folder / f"pairs.{split}.jsonl"

    def model(self, name: str, seed: int) -> Path:
        """The folder of a training run."""
        return self.folder / f"{name}-{seed}"

    def count(self, prompts: int) -> int:
        """So many prompts at the study's scale."""
        return max(8, round(self.scale * prompts))


def study_parser(description: str, name: str, lm: str) -> argparse.ArgumentParser:
    """The options of a study; `lm` is the usual language model."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lm", default=lm, help="language model: a folder or hub id")
    parser.add_argument("--out", type=Path, default=Path("runs/studies"), help="folder for models and answers")
    parser.add_argument("--results", type=Path, default=Path("studies", name, "results"), help="folder for the results")
    parser.add_argument("--seeds", type=int, default=5, help="training runs of every reward model")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--batch-size", type=int, default=100, help="rows that are decoded together")
    parser.add_argument("--mesh", default="auto", help="as in train.py and decode.py")
    parser.add_argument(
        "--scale", type=float, default=1.0, help="share of the prompts; 0.02 checks that all of it runs"
    )
    parser.add_argument("--train", nargs="*", default=[], metavar="NAME=VALUE", help="more options of train.py")
    return parser


def open_study(given: argparse.Namespace, task: str) -> Study:
    """The study that a command line describes; starts its devices. Ends the process with one line if its language
    model is not there."""
    if given.lm.startswith((".", "/")) and not Path(given.lm).is_dir():
        sys.exit(f"--lm {given.lm}: is not there; give a folder or the hub id of a language model")
    start(DecodeConfig(mesh=given.mesh))
    return Study(given.lm, given.out, given.seeds, task, given.dtype, given.batch_size, given.scale, tuple(given.train))


def train_models(study: Study, models: Mapping[str, Mapping[str, Any]], seeds: Iterable[int] | None = None) -> None:
    """Trains a model for each name and seed that is not there yet, with these options of `train.py`, by their dotted
    names; those of `--train` win over them. The seeds are all of the study if none are given."""
    given = {name: yaml.safe_load(text) for name, _, text in (word.partition("=") for word in study.options)}
    for seed in range(study.seeds) if seeds is None else seeds:
        for name, options in models.items():
            folder = study.model(name, seed)
            if (folder / "model" / "model.safetensors").exists():
                continue
            config = TrainConfig(out=str(folder), seed=seed, resume=folder.exists(), save_every=0, log_every=50)
            train(with_options(config, {**options, **given}))


def with_options(config: TrainConfig, options: Mapping[str, Any]) -> TrainConfig:
    """The config with options by their dotted names."""
    nested = dataclasses.asdict(config)
    for name, value in options.items():
        *path, last = name.split(".")
        place = nested
        for part in path:
            place = place[part]
        place[last] = value
    return from_mapping(TrainConfig, nested, "--train")


class _Opened:
    """The session of the last models, which the next settings may need again."""

    def __init__(self) -> None:
        self.key: object = None
        self.session: Session | None = None

    def __call__(self, config: DecodeConfig, reward_models: Sequence[str | Path], method: Method) -> Session:
        sources = tuple(map(str, reward_models))
        key = (config.lm, sources, roles_of(method, sources), config.dtype)
        if key != self.key:
            self.key, self.session = key, open_session(config, reward_models, method)
        return self.session


_opened = _Opened()


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes a JSONL file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))


def decode(study: Study, split: str, options: Mapping[str, Any], file: str) -> System:
    """The answers to a split's prompts, decoded with options of `decode.py` unless they are there already."""
    out = study.folder / file
    config = {
        "lm": study.lm,
        "prompts": str(study.prompts(split)),
        "out": str(out),
        "max_new_tokens": MAX_NEW_TOKENS,
        "batch_size": study.batch_size,
        "dtype": study.dtype,
        **options,
    }
    generate(from_mapping(DecodeConfig, config, file), open_models=_opened)
    return load_systems([("", str(out))])[0]


def means_by_prompt(system: System, score: Callable[[str, str], float]) -> dict[str, float]:
    """Each prompt's mean score over its answers."""
    return {
        prompt: sum(score(answer.prompt, answer.response) for answer in answers) / len(answers)
        for prompt, answers in system.by_prompt.items()
    }


def number_of(name: str) -> Callable[[System], dict[str, float]]:
    """The metric of a field of the answers' rows, such as `kl`: each prompt's mean over its answers."""
    return lambda system: {
        prompt: sum(answer.numbers[name] for answer in answers) / len(answers)
        for prompt, answers in system.by_prompt.items()
    }


def add_numbers(setting: Setting, split: str, system: System, metrics: Metrics) -> None:
    """Appends another training run's numbers, one for each prompt in the order of their ids."""
    for name, of in metrics.items():
        values = of(system)
        setting.setdefault(f"{split} {name}", []).append([values[prompt] for prompt in sorted(values)])


def best_on_eval(found: Mapping[str, Setting], metric: str) -> str:
    """The setting with the highest mean of a metric on the prompts of the eval split; the first one of equals."""
    return max(found, key=lambda name: float(np.mean(found[name].get(f"eval {metric}", [[0.0]]))))


def summary(found: Mapping[str, Setting]) -> dict[str, Setting]:
    """The settings with means, standard errors and the means of training runs in place of the numbers, for JSON."""
    return {
        name: {
            key: dict(zip(("mean", "standard_error"), estimate(value), strict=True))
            | {"by_training_run": np.mean(value, axis=1).tolist()}
            if isinstance(value, list)
            else value
            for key, value in setting.items()
        }
        for name, setting in found.items()
    }


def difference(setting: Setting, other: Setting, metric: str) -> Estimate:
    """The mean of paired differences on the test split: seed by seed, or each seed against the one run of the other."""
    return estimate(np.array(setting[f"test {metric}"]) - np.array(other[f"test {metric}"]))


def in_standard_errors(found: Estimate) -> str:
    """A mean in units of its standard error, for a table; `-` if that is 0."""
    return f"{found.mean / found.standard_error:.0f}" if found.standard_error else "-"


def estimate(values: Sequence[Sequence[float]]) -> Estimate:
    """The mean of values `[seeds][prompts]`. Its variance is that over prompts, of means over seeds, plus that over
    seeds, of means over prompts: the sum is at least the variance that both cause."""
    table = np.array(values, float)
    mean, error = Estimate.of(table.mean(axis=0))
    return Estimate(mean, float(np.hypot(error, Estimate.of(table.mean(axis=1))[1])) if len(table) > 1 else error)
