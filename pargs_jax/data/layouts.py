"""Rows as well-known data sets were published, under the names of columns that the package uses.

A row is recognised by its columns, and converted to one of the shapes that `load_preferences` explains.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from pargs_jax.errors import InputError

_ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
"""The roles of ShareGPT's turns, and ours."""


class Layout(NamedTuple):
    """The columns by which a row is recognised, and the conversion of its fields, which raises InputError with only the
    reason."""

    columns: frozenset[str]
    convert: Callable[[Mapping[str, Any]], dict[str, Any]]


def with_our_columns(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of a row under our names; a row in none of the `LAYOUTS` stays as it is.

    Raises InputError, with only the reason, for a row in one of them that does not say which answer is better.
    """
    for layout in LAYOUTS.values():
        if layout.columns <= fields.keys():
            return {name: fields[name] for name in ("id", "split") if name in fields} | layout.convert(fields)
    return fields


def _pair(prompt: Any, answers: tuple[Any, Any], better: int) -> dict[str, Any]:
    return {"prompt": prompt, "chosen": answers[better], "rejected": answers[1 - better]}


def _shp(fields: Mapping[str, Any]) -> dict[str, Any]:
    """`labels` is 1 where the first answer is better."""
    better = 1 - _zero_or_one(fields, "labels")
    return _pair(fields["history"], (fields["human_ref_A"], fields["human_ref_B"]), better)


def _webgpt(fields: Mapping[str, Any]) -> dict[str, Any]:
    """`score_0` and `score_1` are opposite numbers, or both 0 where neither answer is better."""
    question = fields["question"]
    scores = [fields["score_0"], fields["score_1"]]
    if not all(isinstance(score, int | float) and math.isfinite(score) for score in scores):
        raise InputError(f"score_0 and score_1 are {scores[0]!r} and {scores[1]!r}, must be numbers")
    if scores[0] == scores[1]:
        raise InputError("score_0 and score_1 are equal, so neither answer is better")
    prompt = question.get("full_text") if isinstance(question, dict) else question
    return _pair(prompt, (fields["answer_0"], fields["answer_1"]), int(scores[1] > scores[0]))


def _safe_rlhf(fields: Mapping[str, Any]) -> dict[str, Any]:
    """`better_response_id` is 0 or 1. (`safer_response_id` judges safety alone; map that column to use it.)"""
    answers = fields["response_0"], fields["response_1"]
    return _pair(fields["prompt"], answers, _zero_or_one(fields, "better_response_id"))


def _orca(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A system text, which may be empty, and a question."""
    turns = [{"role": "system", "content": fields["system"]}] if fields["system"] else []
    turns.append({"role": "user", "content": fields["question"]})
    return {"prompt": turns, "chosen": fields["chosen"], "rejected": fields["rejected"]}


def _share_gpt(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A list of turns `{"from", "value"}`; with `chosen` and `rejected` turns that continue it, it is the prompt."""
    if not isinstance(fields["conversations"], list):
        raise InputError("conversations must be a list of turns with from and value")
    turns = [_turn(turn) for turn in fields["conversations"]]
    if fields.get("chosen") is None:
        return {"messages": turns}
    answers = {name: [_turn(fields[name])] for name in ("chosen", "rejected") if fields.get(name) is not None}
    return {"prompt": turns, **answers}


def _turn(turn: Any) -> dict[str, str]:
    role = _ROLES.get(str(turn.get("from"))) if isinstance(turn, dict) else None
    if role is None or not isinstance(turn.get("value"), str):
        raise InputError(f"a turn of a conversation must have a text value, and be from {', '.join(_ROLES)}")
    return {"role": role, "content": turn["value"]}


def _zero_or_one(fields: Mapping[str, Any], name: str) -> int:
    value = fields[name]
    if value not in (0, 1, "0", "1"):  # CSV files hold texts
        raise InputError(f"{name} is {value!r}, must be 0 or 1")
    return int(value)


LAYOUTS: dict[str, Layout] = {
    "SHP": Layout(frozenset({"history", "human_ref_A", "human_ref_B", "labels"}), _shp),
    "WebGPT comparisons": Layout(frozenset({"question", "answer_0", "answer_1", "score_0", "score_1"}), _webgpt),
    "PKU-SafeRLHF": Layout(frozenset({"prompt", "response_0", "response_1", "better_response_id"}), _safe_rlhf),
    "Orca": Layout(frozenset({"system", "question", "chosen", "rejected"}), _orca),
    "ShareGPT": Layout(frozenset({"conversations"}), _share_gpt),
}
"""The layouts by the data sets that have them."""
