"""Answers to evaluate: JSONL files as `decode.py` writes them, or as anything else does that has their fields."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from pargs_jax.config_files import read_yaml
from pargs_jax.data.sources import Rows, SourceRow
from pargs_jax.errors import InputError

NUMBERS = ("tokens", "log_probability", "kl", "lm_tokens", "rm_tokens", "seconds")
"""Fields of a row that hold one number, none of which has to be there."""


@dataclass(frozen=True)
class GivenAnswer:
    """One row of an answers file.

    Attributes:
        id: names the prompt.
        sample: which of the prompt's answers it is, from 0.
        prompt, response: the texts.
        is_whole: whether it ended by itself; None if the file does not say.
        numbers: what else the row says, by field; `guide_reward` is the guide's reward, or `guide_reward_1`, `_2`, ...
            those of several guides.
    """

    id: str
    sample: int
    prompt: str
    response: str
    is_whole: bool | None = None
    numbers: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class System:
    """Answers that were made in one way.

    Attributes:
        name: what it is called in the report.
        source: the file.
        answers: its rows.
        options: those of `decode.py` that they were made with; empty if the file does not say.
        guides: the folders or hub ids of the reward models that guided it; None if that is not known.
    """

    name: str
    source: str
    answers: tuple[GivenAnswer, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    guides: tuple[str, ...] | None = None

    @cached_property
    def by_prompt(self) -> dict[str, list[GivenAnswer]]:
        """The answers to each prompt, in order of their samples."""
        found: dict[str, list[GivenAnswer]] = {}
        for answer in sorted(self.answers, key=lambda answer: answer.sample):
            found.setdefault(answer.id, []).append(answer)
        return found


def name_and_file(word: str) -> tuple[str, str]:
    """What `FILE` or `NAME=FILE` says; the name of the former is empty. Raises InputError for what is neither."""
    name, equals, file = word.partition("=")
    if not equals or Path(word).exists():
        return "", word
    if not name or not file:
        raise InputError(f"answers: got {word!r}, must be FILE or NAME=FILE")
    return name, file


def load_systems(
    files: Sequence[tuple[str, str]], guides_of: Callable[[Mapping[str, Any]], tuple[str, ...]] = lambda options: ()
) -> list[System]:
    """Reads answers files, each with the name of its system; an empty one stands for the file's. A file whose rows have
    a field `method` is a system for each method.

    The options of `decode.py` come from `FILE.config.yaml` where that is there; `guides_of` says which reward models
    they mean.

    Raises InputError for a file that cannot be read, a row that lacks a field or has one of the wrong type, an answer
    that is there twice, or two systems of one name.
    """
    systems: list[System] = []
    for name, source in files:
        settings = Path(f"{source}.config.yaml")
        options = read_yaml(settings) if settings.exists() else {}
        for method, answers in _read(source).items():
            label = " ".join(filter(None, (name, method))) or Path(source).name.split(".jsonl")[0]
            made_with = options | ({"method": method} if method else {})
            guides = guides_of(made_with) if options else None
            systems.append(System(label, source, tuple(answers), made_with, guides))
    names = [system.name for system in systems]
    for system in systems:
        if names.count(system.name) > 1:
            raise InputError(
                f"answers: two systems are called {system.name!r}; give one another name, as in NAME={system.source}"
            )
    return systems


def check_prompts(systems: Sequence[System], baseline: System) -> None:
    """Raises InputError where systems cannot be compared with the baseline: no prompt in common, or one id with two
    prompts. Prompts may be written differently for another language model, or in another form."""
    for system in systems:
        shared = system.by_prompt.keys() & baseline.by_prompt.keys()
        if not shared:
            raise InputError(f"{system.source}: shares no prompt with the baseline {baseline.source}")
        told = [[each.options.get(name) for name in ("lm", "format")] for each in (system, baseline)]
        if told[0] != told[1]:
            continue
        for prompt_id in shared:
            if system.by_prompt[prompt_id][0].prompt != baseline.by_prompt[prompt_id][0].prompt:
                raise InputError(
                    f"{system.source}: the id {prompt_id!r} belongs to a different prompt in {baseline.source}; "
                    "decode both from the same prompts"
                )


def _read(source: str) -> dict[str, list[GivenAnswer]]:
    """The answers of a file by the field `method`, which is empty where there is none."""
    found: dict[str, list[GivenAnswer]] = {}
    seen: dict[tuple[str, str, int], int] = {}
    for row in Rows(source):
        where = f"{source}: line {row.line}"
        answer = _answer(row, where)
        method = row.content.get("method")
        if method is not None and not isinstance(method, str):
            raise InputError(f"{where}: field 'method' is {method!r}, must be a text")
        key = (method or "", answer.id, answer.sample)
        if key in seen:
            raise InputError(
                f"{where}: has the same id and sample as line {seen[key]} ({answer.id!r}, {answer.sample}); several "
                "answers to a prompt are told apart by the field 'sample'"
            )
        seen[key] = row.line
        found.setdefault(method or "", []).append(answer)
    if not found:
        raise InputError(f"{source}: no answers in it")
    return found


def _answer(row: SourceRow, where: str) -> GivenAnswer:
    if row.problem:
        raise InputError(f"{where}: {row.problem}")
    fields = row.content
    if not isinstance(fields, dict):
        raise InputError(f"{where}: is of type {type(fields).__name__}, must be an object with id, prompt and response")
    for name in ("id", "prompt", "response"):
        if fields.get(name) is None:
            raise InputError(f"{where}: field {name!r} is missing; an answer needs id, prompt and response")
    for name in ("prompt", "response"):
        if not isinstance(fields[name], str):
            raise InputError(f"{where}: field {name!r} is of type {type(fields[name]).__name__}, must be a text")
    sample = fields.get("sample", 0)
    if isinstance(sample, bool) or not isinstance(sample, int):
        raise InputError(f"{where}: field 'sample' is {sample!r}, must be a whole number")
    reason = fields.get("finish_reason")
    numbers = {name: _number(fields[name], where, name) for name in NUMBERS if fields.get(name) is not None}
    reward = fields.get("guide_reward")
    if isinstance(reward, list):
        numbers |= {f"guide_reward_{j}": _number(each, where, "guide_reward") for j, each in enumerate(reward, start=1)}
    elif reward is not None:
        numbers["guide_reward"] = _number(reward, where, "guide_reward")
    is_whole = None if reason is None else reason != "length"
    return GivenAnswer(str(fields["id"]), sample, fields["prompt"], fields["response"], is_whole, numbers)


def _number(value: Any, where: str, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InputError(f"{where}: field {name!r} is {value!r}, must be a finite number")
    return float(value)
