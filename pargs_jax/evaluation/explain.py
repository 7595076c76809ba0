"""The page that explains an answer: one HTML file, which needs no network, made of trace rows.

    python -m pargs_jax.evaluation.explain guided.jsonl unguided.jsonl --out page.html

It shows each token with its numbers and candidates, where guidance changed the likeliest token, running sums, and
beside a guided answer the unguided one of the same id.
"""

import base64
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from pargs_jax.cli import Parser
from pargs_jax.command import command
from pargs_jax.durable_files import write_failures_named, write_whole
from pargs_jax.errors import InputError

Row = Mapping[str, Any]
"""An answer with its trace: a row of `decode.py --trace`."""

SHOWN_CANDIDATES = 40
"""Most candidates of a token that the page holds: the likeliest under p and under q, half each."""

_ROW_FIELDS = ("id", "prompt", "finish_reason", "log_probability", "kl", "guide_reward", "method", "lm", "tokens")
_TOKEN_FIELDS = ("id", "text", "log_p", "log_q", "rewards", "entropy", "kl")
_CANDIDATE_FIELDS = ("id", "text", "log_p", "log_q", "rewards")


def explanation_page(rows: Sequence[Row], unguided: Sequence[Row] = ()) -> str:
    """The page, as HTML.

    Args:
        rows: trace rows, each an answer of the page's list. They may lack candidates, and may be of unguided methods.
        unguided: the unguided answers; each is shown beside the row with its id. Those without one are left out.

    Raises:
        InputError: there are no rows, an id comes twice, or an unguided answer is to another prompt or by another
            language model than the row with its id.
    """
    if not rows:
        raise InputError("the page needs at least one answer; the trace has none")
    beside = _by_id(unguided, "the unguided answers")
    answers = []
    for prompt_id, row in _by_id(rows, "the trace").items():
        other = beside.get(prompt_id)
        for name in ("prompt", "lm") if other is not None else ():
            if other[name] != row[name]:
                raise InputError(
                    f"the unguided answer with the id {prompt_id!r} has another {name} ({other[name]!r}) than the "
                    f"guided one ({row[name]!r}); decode both alike"
                )
        answers.append(
            {"guided": _shown(row), "unguided": None if other is None else _shown(other), "adds_up": _adds_up(row)}
        )
    parts = {name: _asset(name) for name in ("page.html", "page.css", "page.js")}
    style, script = parts["page.css"], parts["page.js"]
    policy = (
        f"default-src 'none'; style-src '{_digest(style)}'; script-src '{_digest(script)}'; base-uri 'none'; "
        "form-action 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    )
    filled = {"policy": policy, "style": style, "data": _json_in_html({"answers": answers}), "script": script}
    # One pass, so that a text that spells a placeholder stays as it is.
    return re.sub(r"\{\{(\w+)\}\}", lambda found: filled[found[1]], parts["page.html"])


def read_trace(path: Path) -> list[dict[str, Any]]:
    """The rows of a trace file (JSONL).

    Raises:
        InputError: the file cannot be read, or a line is not a trace row; the message names it.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as a trace ({error}); give a file of decode.py --trace") from None
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InputError(f"{path}: line {number} is not JSON ({error}); give a file of decode.py --trace") from None
        if (reason := _what_is_missing(row)) is not None:
            raise InputError(f"{path}: line {number} is not a trace row: {reason}; give a file of decode.py --trace")
        rows.append(row)
    return rows


def write_page(path: Path, rows: Sequence[Row], unguided: Sequence[Row] = ()) -> None:
    """Writes `explanation_page` to a file. Raises InputError as that does, or if the file cannot be written."""
    page = explanation_page(rows, unguided)
    with write_failures_named(path, "give another file for the page"):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, page)


def _what_is_missing(row: Any) -> str | None:
    """Why a value is not a trace row, or None."""
    if not isinstance(row, dict):
        return "it is not an object"
    levels = [("the row", [row], _ROW_FIELDS)]
    if isinstance(row.get("tokens"), list):
        levels.append(("a token", row["tokens"], _TOKEN_FIELDS))
        candidates = [each for token in row["tokens"] if isinstance(token, dict) for each in token.get("candidates") or ()]
        levels.append(("a candidate", candidates, _CANDIDATE_FIELDS))
    for name, values, fields in levels:
        for value in values:
            absent = [field for field in fields if not isinstance(value, dict) or field not in value]
            if absent:
                return f"{name} has no {absent[0]!r}"
    return None if isinstance(row["tokens"], list) else "its tokens are not a list"


def _by_id(rows: Sequence[Row], where: str) -> dict[str, Row]:
    found: dict[str, Row] = {}
    for row in rows:
        if row["id"] in found:
            raise InputError(f"the id {row['id']!r} comes twice in {where}; each answer needs an id of its own")
        found[row["id"]] = row
    return found


def _shown(row: Row) -> dict[str, Any]:
    """The row as the page holds it: rounded, and without candidates that are too many to look at."""
    return _rounded({**row, "tokens": [_with_fewer_candidates(token) for token in row["tokens"]]})


def _with_fewer_candidates(token: Row) -> Row:
    candidates = token.get("candidates") or ()
    if len(candidates) <= SHOWN_CANDIDATES:
        return token
    likeliest = {token["id"]}
    for name in ("log_p", "log_q"):
        ordered = sorted(candidates, key=lambda each: -math.inf if each[name] is None else each[name], reverse=True)
        likeliest |= {each["id"] for each in ordered[: SHOWN_CANDIDATES // 2]}
    chosen = [each for each in candidates if each["id"] in likeliest]
    return {**token, "candidates": chosen, "candidate_count": len(candidates)}


def _rounded(value: Any) -> Any:
    """The same with floats of four decimals, which is more than the page shows, and None for those that JSON lacks."""
    if isinstance(value, float):
        return round(value, 4) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: _rounded(each) for name, each in value.items()}
    return [_rounded(each) for each in value] if isinstance(value, list | tuple) else value


def _adds_up(row: Row) -> list[bool]:
    """For each guide whether its rewards add up to that of the answer; a row says so by its numbers alone."""
    final = row["guide_reward"]
    finals = [] if final is None else list(final) if isinstance(final, list | tuple) else [final]
    adds_up = []
    for j, reward in enumerate(finals):
        of_tokens = [token["rewards"][j] for token in row["tokens"] if j < len(token["rewards"])]
        known = [each for each in of_tokens if each is not None]
        is_last = bool(known) and math.isclose(known[-1], reward, rel_tol=1e-3, abs_tol=1e-3)
        adds_up.append(bool(known) and not is_last and math.isclose(sum(known), reward, rel_tol=1e-3, abs_tol=1e-3))
    return adds_up


def _asset(name: str) -> str:
    return (files("pargs_jax") / "assets" / "explain" / name).read_text(encoding="utf-8")


def _digest(content: str) -> str:
    """How a content security policy names the one script or style that it lets in."""
    return "sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()


def _json_in_html(value: Any) -> str:
    """JSON that HTML cannot take for the end of its element, or for a comment."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    # Surrogates without a partner, which bytes that are not text become, have no UTF-8.
    text = re.sub(r"[\ud800-\udfff]", lambda found: f"\\u{ord(found[0]):04x}", text)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def main() -> None:
    parser = Parser(prog="python -m pargs_jax.evaluation.explain", description="Make the page that explains answers.")
    parser.add_argument("trace", metavar="TRACE.jsonl", type=Path, help="trace of the answers (decode.py --trace)")
    parser.add_argument(
        "unguided", metavar="UNGUIDED.jsonl", type=Path, nargs="?", help="trace of the unguided answers, shown beside"
    )
    parser.add_argument("--out", metavar="F.html", type=Path, required=True, help="the page")
    given = parser.parse_args()
    unguided = [] if given.unguided is None else read_trace(given.unguided)
    write_page(given.out, read_trace(given.trace), unguided)


if __name__ == "__main__":
    command(main)
