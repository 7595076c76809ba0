"""The page that explains answers: one HTML file, which needs no network, made of traces (docs/explain.md).

It shows each token with its numbers and candidates, where guidance changed the likeliest token, running sums, and
beside a guided answer the unguided one of the same id.
"""

import dataclasses
import heapq
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pargs_jax.durable_files import write_errors_named_after, write_whole
from pargs_jax.errors import InputError
from pargs_jax.generation.traces import AnswerTrace, TracedCandidate, TracedToken
from pargs_jax.pages import make_page

SHOWN_CANDIDATES = 40
"""Most candidates of a token that the page holds: the likeliest under p and under q, half each."""


def explanation_page(traces: Sequence[AnswerTrace], unguided: Sequence[AnswerTrace] = ()) -> str:
    """The page, as HTML.

    Args:
        traces: the answers that it explains. They may lack candidates, and may be of unguided methods.
        unguided: the unguided answers; each is shown beside the trace with its id and sample. Those without one are
            left out.

    Raises InputError if there are no traces, an answer comes twice, or an unguided answer is to another prompt or by
    another language model than the guided one.
    """
    if not traces:
        raise InputError("the page needs at least one answer; the trace has none")
    beside = _by_identity(unguided, "the unguided answers")
    answers = []
    for identity, trace in _by_identity(traces, "the trace").items():
        other = beside.get(identity)
        for name in ("prompt", "lm") if other is not None else ():
            if getattr(other, name) != getattr(trace, name):
                raise InputError(
                    f"the unguided answer with the id {trace.id!r} has the {name} {getattr(other, name)!r}, but "
                    f"the guided one has {getattr(trace, name)!r}; decode both with the same"
                )
        rows = {"guided": _row(trace), "unguided": None if other is None else _row(other)}
        answers.append(rows | {"adds_up": _adds_up(trace)})
    return make_page("explain", {"answers": answers}).html


def write_page(path: Path, traces: Sequence[AnswerTrace], unguided: Sequence[AnswerTrace] = ()) -> None:
    """Writes `explanation_page` to a file. Raises InputError as that does, or if the file cannot be written."""
    page = explanation_page(traces, unguided)
    if path.is_dir():
        raise InputError(f"{path}: is a folder, must be a file")
    with write_errors_named_after(path, "give another file for the page"):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, page)


def _by_identity(traces: Sequence[AnswerTrace], where: str) -> dict[tuple[str, int], AnswerTrace]:
    found: dict[tuple[str, int], AnswerTrace] = {}
    for trace in traces:
        if (trace.id, trace.sample) in found:
            raise InputError(f"the answer with the id {trace.id!r} appears twice in {where}; give each answer once")
        found[trace.id, trace.sample] = trace
    return found


def _row(trace: AnswerTrace) -> dict[str, Any]:
    """The trace as the page holds it: numbers rounded, and the candidates of a token as short lists."""
    row = dataclasses.asdict(dataclasses.replace(trace, tokens=()))
    return _rounded(row | {"tokens": [_token_row(token) for token in trace.tokens]})


def _token_row(token: TracedToken) -> dict[str, Any]:
    candidates = token.candidates or ()
    row = token._asdict() | {"candidates": _likeliest(candidates, token.id)}
    return row | ({"candidate_count": len(candidates)} if len(candidates) > SHOWN_CANDIDATES else {})


def _likeliest(candidates: Sequence[TracedCandidate], drawn: int) -> list[TracedCandidate]:
    """Those candidates that the page shows, among them the one that was drawn."""
    if len(candidates) <= SHOWN_CANDIDATES:
        return list(candidates)
    half = SHOWN_CANDIDATES // 2
    shown = {drawn}
    for log_probability in (lambda each: each.log_p, lambda each: each.log_q):
        shown |= {each.id for each in heapq.nlargest(half, candidates, key=log_probability)}
    return [each for each in candidates if each.id in shown]


def _rounded(value: Any) -> Any:
    """The same with floats of four decimals, which is more than the page shows, and None for minus infinity."""
    if isinstance(value, float):
        return round(value, 4) if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _rounded(each) for name, each in value.items()}
    return [_rounded(each) for each in value] if isinstance(value, list | tuple) else value


def _adds_up(trace: AnswerTrace) -> list[bool]:
    """For each guide whether its rewards add up to that of the answer, which the numbers say: a trace does not."""
    adds_up = []
    for j, final in enumerate(trace.guide_rewards):
        of_tokens = [token.rewards[j] for token in trace.tokens if j < len(token.rewards)]
        is_last = bool(of_tokens) and math.isclose(of_tokens[-1], final, rel_tol=1e-3, abs_tol=1e-3)
        adds_up.append(not is_last and math.isclose(sum(of_tokens), final, rel_tol=1e-3, abs_tol=1e-3))
    return adds_up
