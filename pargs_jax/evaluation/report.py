"""The report: every system's values, how it compares with the baseline, and how sure that is."""

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from pargs_jax.evaluation.answers import NUMBERS, System
from pargs_jax.evaluation.endpoint import Comparison, flip_rate
from pargs_jax.evaluation.prefixes import RewardModelReport
from pargs_jax.evaluation.statistics import (
    Difference,
    Estimate,
    Interval,
    holm,
    length_controlled_win_rate,
    paired_difference,
    wilson,
    win_scores,
)
from pargs_jax.evaluation.text_metrics import args_diversity, distinct, repetition, rouge_between_samples, words

Kind = Literal["judge", "guide", "likelihood", "text", "cost"]

_GIVEN: dict[str, tuple[Kind, str]] = {
    "kl": (
        "likelihood",
        "KL(q || p) of an answer from the language model, in nats: exact except for searches",
    ),
    "log_probability": ("likelihood", "log-probability of an answer under the language model, in nats (decode.py)"),
    "tokens": ("text", "tokens of an answer, with its end-of-sequence token (decode.py)"),
    "lm_tokens": ("cost", "tokens that the language model read and wrote for an answer (decode.py)"),
    "rm_tokens": ("cost", "tokens that the reward models read for an answer (decode.py)"),
    "seconds": ("cost", "seconds per answer: the batch's time divided by its answers (decode.py)"),
}


@dataclass(frozen=True)
class Metric:
    """A number for each answer or each prompt of every system.

    Attributes:
        name, meaning: what the report calls it, and what it is.
        kind: what it tells about; only judges are tested against the baseline.
        is_guide: whether it is a judge that guided some of the answers.
        values: for each system, one number a prompt: the mean over its answers that have one.
        missing: for each system, how many of its answers have none.
        problems: why, with counts.
        by_answer: for each system, one number an answer, or None; empty for what is measured of prompts.
    """

    name: str
    meaning: str
    kind: Kind
    values: Mapping[str, Mapping[str, float]]
    missing: Mapping[str, int]
    is_guide: bool = False
    problems: Mapping[str, int] = field(default_factory=dict)
    by_answer: Mapping[str, Sequence[float | None]] = field(default_factory=dict)


@dataclass(frozen=True)
class WinRate:
    """How often a system beats the baseline; ties count half.

    `interval` is Wilson's with the prompt as unit; `length_controlled` is `length_controlled_win_rate`'s.
    """

    rate: float
    interval: Interval
    ties: float
    prompts: int
    length_controlled: float
    length_controlled_interval: Interval


@dataclass(frozen=True)
class Versus:
    """A system against the baseline by one metric. `p_holm` is None for what is not tested."""

    difference: Difference
    p_holm: float | None = None
    win: WinRate | None = None


@dataclass(frozen=True)
class Pairwise:
    """What an endpoint said of a system's answers beside the baseline's.

    `pairs` were to be compared; `unparsable` and `missing` of these have no result, because a reply held no verdict or
    did not come. `flips` is the share, of those with a result, where the orders contradict each other; `first_place` is
    the share of verdicts, ties aside, for what stood first.
    """

    win: WinRate | None
    p: float
    p_holm: float | None
    pairs: int
    unparsable: int
    missing: int
    flips: float | None
    first_place: float | None


@dataclass(frozen=True)
class Report:
    """All that is reported. `problems` are lines on what could not be done."""

    baseline: str
    systems: Sequence[System]
    metrics: Sequence[Metric]
    versus: Mapping[str, Mapping[str, Versus]]
    pairwise: Mapping[str, Mapping[str, Pairwise]]
    reward_models: Sequence[RewardModelReport]
    problems: Sequence[str] = ()

    def estimate(self, metric: Metric, system: str) -> tuple[Estimate, Interval] | None:
        """A metric's mean over a system's prompts with its interval; None where it has no values."""
        values = list(metric.values.get(system, {}).values())
        if not values:
            return None
        estimate = Estimate.of(values)
        return estimate, estimate.interval(len(values))

    def to_json(self) -> str:
        """The report as JSON; numbers that are unknown are null."""
        systems = [
            {name: getattr(system, name) for name in ("name", "source", "guides", "options")}
            | {"answers": len(system.answers), "prompts": len(system.by_prompt)}
            for system in self.systems
        ]
        metrics = [
            {name: getattr(metric, name) for name in ("name", "meaning", "kind", "is_guide", "problems")}
            | {"systems": {name: self._value(metric, name) for name in metric.values}}
            for metric in self.metrics
        ]
        content = {
            "version": 1,
            "baseline": self.baseline,
            "systems": systems,
            "metrics": metrics,
            "versus_baseline": self.versus,
            "pairwise": self.pairwise,
            "reward_models": self.reward_models,
            "problems": self.problems,
        }
        return json.dumps(_plain(content), ensure_ascii=False, indent=1, allow_nan=False) + "\n"

    def _value(self, metric: Metric, system: str) -> dict[str, Any]:
        found = self.estimate(metric, system)
        count = {"prompts": len(metric.values[system]), "missing": metric.missing.get(system, 0)}
        if found is None:
            return count
        estimate, interval = found
        value = {**estimate._asdict(), "interval": interval, **count}
        if metric.name == "nats_per_token":
            value["perplexity"] = math.exp(estimate.mean)
            value["perplexity_interval"] = Interval(*map(math.exp, interval))
        return value


def make_report(
    systems: Sequence[System],
    baseline: str,
    metrics: Sequence[Metric],
    comparisons: Mapping[str, Mapping[str, Mapping[str, Sequence[Comparison]]]],
    reward_models: Sequence[RewardModelReport] = (),
    problems: Sequence[str] = (),
    seed: int = 0,
) -> Report:
    """Compares every system with the baseline.

    Holm's correction is over all tests of the report: every judge's difference of every system, and every endpoint's
    win rate. What guided the answers, and what is no judge, is not tested.

    Args:
        systems: at least one.
        baseline: the name of one of them.
        metrics: what was measured of them.
        comparisons: an endpoint's by its name, then by system, then by prompt.
        reward_models: reports on reward models alone.
        problems: lines on what could not be done.
        seed: of the bootstrap.
    """
    by_name = {system.name: system for system in systems}
    versus: dict[str, dict[str, Versus]] = {name: {} for name in by_name if name != baseline}
    for name, found in versus.items():
        for metric in metrics:
            compared = _versus(metric, by_name[name], by_name[baseline], seed)
            if compared is not None:
                found[metric.name] = compared
    pairwise = {
        judge: {name: _pairwise(found, by_name[name], by_name[baseline], seed) for name, found in by_system.items()}
        for judge, by_system in comparisons.items()
    }
    is_tested = {metric.name for metric in metrics if metric.kind == "judge" and not metric.is_guide}
    places = [(name, metric) for name, found in versus.items() for metric in found if metric in is_tested]
    asked = [(judge, name) for judge, found in pairwise.items() for name in found]
    adjusted = iter(
        holm(
            [versus[name][metric].difference.p for name, metric in places]
            + [pairwise[judge][name].p for judge, name in asked]
        )
    )
    for name, metric in places:
        versus[name][metric] = dataclasses.replace(versus[name][metric], p_holm=next(adjusted))
    for judge, name in asked:
        pairwise[judge][name] = dataclasses.replace(pairwise[judge][name], p_holm=next(adjusted))
    return Report(baseline, systems, metrics, versus, pairwise, reward_models, problems)


def _versus(metric: Metric, system: System, baseline: System, seed: int) -> Versus | None:
    mine, other = metric.values.get(system.name, {}), metric.values.get(baseline.name, {})
    shared = [prompt_id for prompt_id in mine if prompt_id in other]
    if not shared:
        return None
    difference = paired_difference([mine[i] for i in shared], [other[i] for i in shared])
    if metric.kind != "judge":
        return Versus(difference)
    scored = [_by_prompt(each, metric.by_answer[each.name]) for each in (system, baseline)]
    wins = {i: win_scores(scored[0][i], scored[1][i]) for i in shared}
    ties = float(np.mean([np.mean(np.equal.outer(scored[0][i], scored[1][i])) for i in shared]))
    return Versus(difference, win=_win_rate(wins, ties, system, baseline, seed))


def _pairwise(comparisons: Mapping[str, Sequence[Comparison]], system: System, baseline: System, seed: int) -> Pairwise:
    every = [comparison for found in comparisons.values() for comparison in found]
    scores = {i: [c.score for c in found if c.score is not None] for i, found in comparisons.items()}
    wins = {i: float(np.mean(found)) for i, found in scores.items() if found}
    ties = [score == 0.5 for found in scores.values() for score in found]
    win = _win_rate(wins, float(np.mean(ties)), system, baseline, seed) if wins else None
    p = paired_difference(list(wins.values()), [0.5] * len(wins)).p if wins else math.nan
    first = [verdict == "A" for c in every for verdict in (c.first, c.second) if verdict in ("A", "B")]
    return Pairwise(
        win,
        p,
        None,
        len(every),
        sum(comparison.is_unparsable for comparison in every),
        sum(comparison.is_missing and not comparison.is_unparsable for comparison in every),
        flip_rate(every),
        float(np.mean(first)) if first else None,
    )


def _win_rate(wins: Mapping[str, float], ties: float, system: System, baseline: System, seed: int) -> WinRate:
    scores = np.array(list(wins.values()))
    lengths = np.array([_length(system, i) - _length(baseline, i) for i in wins])
    rate = float(scores.mean())
    return WinRate(
        rate, wilson(rate, len(scores)), ties, len(scores), *length_controlled_win_rate(scores, lengths, seed)
    )


def _length(system: System, prompt_id: str) -> float:
    """The mean length of a prompt's answers, in characters, as AlpacaEval counts it."""
    return float(np.mean([len(answer.response) for answer in system.by_prompt[prompt_id]]))


def _by_prompt(system: System, scores: Iterable[float | None]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for answer, score in zip(system.answers, scores, strict=True):
        if score is not None:
            found.setdefault(answer.id, []).append(score)
    return found


def metric_of_answers(
    name: str,
    meaning: str,
    kind: Kind,
    systems: Sequence[System],
    scores: Mapping[str, Sequence[float | None]],
    *,
    is_guide: bool = False,
    problems: Mapping[str, int] | None = None,
) -> Metric:
    """A metric with a number for each answer; `scores` has a list for each system that has any."""
    chosen = [system for system in systems if system.name in scores]
    means = {
        system.name: {i: float(np.mean(found)) for i, found in _by_prompt(system, scores[system.name]).items()}
        for system in chosen
    }
    missing = {system.name: sum(score is None for score in scores[system.name]) for system in chosen}
    return Metric(name, meaning, kind, means, missing, is_guide, problems or {}, scores)


def given_metrics(systems: Sequence[System]) -> list[Metric]:
    """Metrics of the numbers that answers files hold; a system none of whose answers has one is left out of it."""
    guides = sorted({name for system in systems for a in system.answers for name in a.numbers if name not in NUMBERS})
    known = {name: ("guide", "reward of the answer by its own guide (decode.py)") for name in guides} | _GIVEN
    metrics = []
    for name, (kind, meaning) in known.items():
        scores = {
            system.name: [answer.numbers.get(name) for answer in system.answers]
            for system in systems
            if any(name in answer.numbers for answer in system.answers)
        }
        if scores:
            metrics.append(metric_of_answers(name, meaning, kind, systems, scores, is_guide=kind == "guide"))
    return metrics


def text_metrics(systems: Sequence[System]) -> list[Metric]:
    """What the words of the answers tell."""
    of_answers: dict[str, tuple[str, Callable[[str], float | None]]] = {
        "words": ("words of an answer", lambda text: float(len(words(text)))),
        "repetition": ("share of an answer's 4-grams that are repeats", repetition),
        "diversity": ("unique / all n-grams of an answer, multiplied for n = 2, 3, 4 (ARGS)", args_diversity),
    }
    metrics = [
        metric_of_answers(
            name,
            meaning,
            "text",
            systems,
            {system.name: [measure(answer.response) for answer in system.answers] for system in systems},
        )
        for name, (meaning, measure) in of_answers.items()
    ]
    samples = min(len(found) for system in systems for found in system.by_prompt.values())
    together = "an answer" if samples == 1 else f"{samples} samples of a prompt"
    of_prompts: dict[str, tuple[str, Callable[[list[str]], float | None]]] = {
        f"distinct_{n}": (
            f"different {n}-grams over words, in {together}",
            lambda texts, n=n: distinct(texts[:samples], n),
        )
        for n in (1, 2, 3)
    }
    of_prompts["rouge_between"] = (
        "mean ROUGE-L between the samples of a prompt; 1: all the same",
        rouge_between_samples,
    )
    for name, (meaning, measure) in of_prompts.items():
        values = {
            system.name: {
                i: value
                for i, found in system.by_prompt.items()
                if (value := measure([answer.response for answer in found])) is not None
            }
            for system in systems
        }
        values = {system: found for system, found in values.items() if found}
        if values:
            metrics.append(Metric(name, meaning, "text", values, {}))
    return metrics


def _plain(value: Any) -> Any:
    """A value as JSON has it: dataclasses and named tuples are dictionaries, and unknown numbers None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if dataclasses.is_dataclass(value):
        return {each.name: _plain(getattr(value, each.name)) for each in dataclasses.fields(value)}
    if hasattr(value, "_asdict"):
        return {name: _plain(each) for name, each in value._asdict().items()}
    if isinstance(value, Mapping):
        return {name: _plain(each) for name, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value
