"""Parses JSON that may come from anywhere: rows, prompts, answers, configs. What `json` accepts but nothing here could
handle later is refused at once."""

import json
from typing import Any, NoReturn

from pargs_jax.errors import InputError

DEEPEST = 64
"""The most lists and objects that may lie within each other. Python gives up a little below 1,000, and then wherever
the value is next copied, compared or printed."""
LONGEST_INTEGER = 300
"""The most digits of an integer; one of 309 is too large for a float."""


def parse_json(text: str | bytes) -> Any:
    """The value that a JSON text in UTF-8 describes; a byte order mark before it is skipped.

    Raises InputError, with only the reason, for anything else, and for a text that is nested more than `DEEPEST` levels
    or has an integer of more than `LONGEST_INTEGER` digits.
    """
    try:
        decoded = text.decode("utf-8-sig") if isinstance(text, bytes) else text
        value = json.loads(decoded, parse_int=_short_integer)
    except UnicodeDecodeError:
        raise InputError("is not UTF-8") from None
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise InputError(f"is not JSON: {error.msg} at {line}column {error.colno}") from None
    except RecursionError:
        _refuse_nesting()
    if decoded.count("[") + decoded.count("{") > DEEPEST:
        _check_depth(value)
    return value


def _short_integer(digits: str) -> int:
    if len(digits) > LONGEST_INTEGER:
        raise InputError(f"has an integer of {len(digits)} digits, must be at most {LONGEST_INTEGER}")
    return int(digits)


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(DEEPEST):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return
    if any(isinstance(inner, dict | list) for inner in level):
        _refuse_nesting()


def _refuse_nesting() -> NoReturn:
    raise InputError(f"is nested too deeply; lists and objects must lie at most {DEEPEST} deep")
