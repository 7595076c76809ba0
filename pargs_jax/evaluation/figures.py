"""The report's figures, by matplotlib (the extra `report`), each as PNG, as SVG, and as SVG for the page.

In the page's form what is ink takes the colour of the text around it, so that it can be read on light and on dark
ground.
"""

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pargs_jax.decoding.search.order_statistics import best_of_n_curve, best_of_n_kl
from pargs_jax.durable_files import write_errors_named_after, write_whole
from pargs_jax.errors import InputError
from pargs_jax.evaluation.report import Metric, Report
from pargs_jax.evaluation.statistics import RESAMPLES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#a6761d", "#56b4e9", "#8c6bb1", "#808080")
"""Okabe and Ito's, which colour-blind readers tell apart too, in shades that show on white and on near-black."""
MARKERS = "osD^vPX*"
_INK = "#1a1b1c"  # a black that nothing else has, so that the page can put its own in its place


@dataclass(frozen=True)
class Drawn:
    """A figure: the name of its files, what it shows, and its SVG for the page."""

    name: str
    caption: str
    svg: str


def check_matplotlib() -> None:
    """Raises InputError if figures cannot be drawn."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise InputError(
            "figures need matplotlib: run pip install 'pargs-jax[report]', or leave figures out"
        ) from error


def draw(report: Report, folder: Path) -> list[Drawn]:
    """Draws what the report has numbers for, and writes `NAME.png` and `NAME.svg`. Raises InputError if they cannot be
    written."""
    import matplotlib

    style = {
        "font.size": 9,
        "font.family": "sans-serif",
        "svg.fonttype": "none",
        "svg.hashsalt": "pargs_jax",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
        **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _INK),
    }
    judges = [metric for metric in report.metrics if metric.kind == "judge"]
    found = []
    with matplotlib.rc_context(style), write_errors_named_after(folder, "use another output folder"):
        folder.mkdir(parents=True, exist_ok=True)
        if judges and len(report.systems) > 1:
            caption = "Mean score by each judge, with 95 % intervals over prompts."
            found.append(_save(_scores(report, judges), folder, "scores", caption))
        if report.versus and (judges or report.pairwise):
            caption = f"Wins against {report.baseline}, with 95 % intervals; hollow: at equal lengths."
            found.append(_save(_wins(report, judges), folder, "wins", caption))
        if any(metric.name == "kl" for metric in report.metrics):
            for metric in judges:
                figure, caption = _frontier(report, metric)
                found.append(_save(figure, folder, f"frontier_{_file_name(metric.name)}", caption))
        if report.reward_models:
            caption = (
                "Reward models on preference pairs, by how much of the answer they see, with 95 % bands; and how often "
                "they are right on whole answers, by how sure they are."
            )
            found.append(_save(_reward_models(report), folder, "reward_models", caption))
    return found


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: "Figure", folder: Path, name: str, caption: str) -> Drawn:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    figure.savefig(folder / f"{name}.png", dpi=150, facecolor="white")
    write_whole(folder / f"{name}.svg", buffer.getvalue())
    svg = buffer.getvalue()[buffer.getvalue().index("<svg") :].replace(_INK, "currentColor")
    # Identifiers must differ between the figures of one page.
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    return Drawn(name, caption, svg)


def _scores(report: Report, judges: Sequence[Metric]) -> "Figure":
    names = [system.name for system in report.systems]
    figure = _figure(1.5 + 3.2 * len(judges), 0.9 + 0.28 * len(names))
    for axis, metric in zip(figure.subplots(1, len(judges), sharey=True, squeeze=False)[0], judges, strict=True):
        for place, name in enumerate(names):
            found = report.estimate(metric, name)
            if found is not None:
                _point(axis, found[0].mean, found[1], place, COLOURS[0], filled=True)
        axis.set_yticks(range(len(names)), map(_literal, names))
        axis.set_xlabel(_literal(_short(metric.name)) + (" (a guide)" if metric.is_guide else ""))
        axis.grid(axis="x", alpha=0.25)
    figure.axes[0].set_ylim(len(names) - 0.5, -0.5)
    return figure


def _wins(report: Report, judges: Sequence[Metric]) -> "Figure":
    names = list(report.versus)
    rows = [(metric.name, [report.versus[n].get(metric.name) for n in names], metric.is_guide) for metric in judges]
    rows += [(judge, [found.get(n) for n in names], False) for judge, found in report.pairwise.items()]
    figure = _figure(7, 1.0 + 0.3 * len(names) * max(1, 0.6 * len(rows)) + 0.2 * len(rows))
    axis = figure.subplots()
    for number, (judge, found, is_guide) in enumerate(rows):
        colour = COLOURS[number % len(COLOURS)]
        offset = 0.6 * ((number + 0.5) / len(rows) - 0.5)
        for place, each in enumerate(found):
            if each is not None and each.win is not None:
                win = each.win
                _point(axis, 100 * win.rate, [100 * x for x in win.interval], place + offset, colour, filled=True)
                axis.plot(
                    100 * win.length_controlled, place + offset, "o", color=colour, fillstyle="none", markersize=9
                )
        axis.plot([], [], "o", color=colour, label=_literal(_short(judge)) + (" (a guide)" if is_guide else ""))
    axis.axvline(50, color=_INK, linewidth=0.8, linestyle=":")
    axis.set_yticks(range(len(names)), map(_literal, names))
    axis.set_xlim(0, 100)
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.set_xlabel(_literal(f"wins against {report.baseline}, %"))
    axis.grid(axis="x", alpha=0.25)
    figure.legend(loc="outside lower center", ncols=min(3, len(rows)))
    return figure


def _frontier(report: Report, judge: Metric) -> tuple["Figure", str]:
    """A judge's score against the exact KL: a curve for each way to decode over its weight, or its k."""
    kl = next(metric for metric in report.metrics if metric.name == "kl")
    figure = _figure(7, 4.6)
    axis = figure.subplots()
    curves: dict[str, list[tuple[float, str, Any, Any]]] = {}
    for system in report.systems:
        x, y = report.estimate(kl, system.name), report.estimate(judge, system.name)
        if x is not None and y is not None:
            label, value, word = _place_on_curve(system.name)
            curves.setdefault(label, []).append((value, word, x, y))
    reached = [x[0].mean for points in curves.values() for *_, x, _ in points]
    for number, (label, points) in enumerate(curves.items()):
        colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number // len(COLOURS) % len(MARKERS)]
        points.sort(key=lambda point: point[0])
        xs, ys = [x[0].mean for *_, x, _ in points], [y[0].mean for *_, y in points]
        reach = [max(0.0, y[1].high - y[0].mean) if not math.isnan(y[1].high) else 0.0 for *_, y in points]
        axis.errorbar(xs, ys, reach, fmt=f"{marker}-", color=colour, label=_literal(label), markersize=5, capsize=2)
        for (_, word, *_), x, y in zip(points, xs, ys, strict=True):
            axis.annotate(
                _literal(word.partition("=")[2]),
                (x, y),
                xytext=(4, 4),
                textcoords="offset points",
                fontsize=7,
                color=colour,
            )
    drawn = _best_of_n(axis, report, judge, kl)
    scale = "logarithmic"
    if min(reached) > 0 and max(reached) > 30 * min(reached):
        axis.set_xscale("log")
    else:
        scale = "square-root"
        axis.set_xscale("function", functions=(lambda x: abs(x) ** 0.5, lambda x: x**2))
        axis.set_xlim(left=0)
    axis.set_xlabel(f"KL from the language model, nats an answer ({scale} scale)")
    axis.set_ylabel(_literal(_short(judge.name)) + (" (a guide)" if judge.is_guide else ""))
    axis.grid(alpha=0.25)
    figure.legend(loc="outside lower center", ncols=min(2, len(curves) + drawn))
    options = sorted({word.partition("=")[0] for points in curves.values() for _, word, *_ in points if word})
    caption = f"{judge.name} against the distance from the language model; bars are 95 % intervals."
    if options:
        caption += f" Numbers at the points: {' or '.join(options)}."
    if drawn:
        caption += (
            " Best of n: computed from the samples of one system and its guide's rewards, at log n - (n - 1) / n nats "
            "more than these, which is the most that it can be."
        )
    return figure, caption


def _best_of_n(axis: "Axes", report: Report, judge: Metric, kl: Metric) -> int:
    """Draws best-of-n for systems with several samples a prompt and a reward for each; returns how many."""
    drawn = 0
    for system in report.systems:
        found, start = _best_of_n_curve(report, judge, system.name), report.estimate(kl, system.name)
        if found is None or start is None:
            continue
        sizes, means = found
        xs = [start[0].mean + best_of_n_kl(n) for n in sizes]
        axis.plot(
            xs, np.mean(means, axis=0), "--", color=_INK, linewidth=1, label=_literal(f"best of n of {system.name}")
        )
        for x, y, n in list(zip(xs, np.mean(means, axis=0), sizes, strict=True))[1:]:
            axis.annotate(f"n={n}", (x, y), xytext=(2, -9), textcoords="offset points", fontsize=7, color=_INK)
        drawn += 1
    return drawn


def _best_of_n_curve(report: Report, judge: Metric, name: str) -> tuple[list[int], list[Any]] | None:
    """The sizes n, and for each prompt the expected score of the best of n by the guide's reward."""
    system = next(system for system in report.systems if system.name == name)
    scores = judge.by_answer.get(name)
    if scores is None:
        return None
    samples: dict[str, list[tuple[float, float]]] = {}
    for answer, score in zip(system.answers, scores, strict=True):
        if score is not None and "guide_reward" in answer.numbers:
            samples.setdefault(answer.id, []).append((answer.numbers["guide_reward"], score))
    fewest = min((len(found) for found in samples.values()), default=0)
    if fewest < 2 or len(samples) < len(system.by_prompt):
        return None
    sizes = [n for n in (2**i for i in range(RESAMPLES.bit_length())) if n <= fewest]
    curves = [best_of_n_curve(*np.array(found).T) for found in samples.values()]
    return sizes, [curve[np.array(sizes) - 1] for curve in curves]


def _reward_models(report: Report) -> "Figure":
    figure = _figure(9, 3.6)
    accuracy, agreement, calibration = figure.subplots(1, 3)
    for number, model in enumerate(report.reward_models):
        colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
        percents = [row.percent for row in model.rows]
        rows = np.array(
            [(row.accuracy, *row.accuracy_interval, row.spearman, *row.spearman_interval) for row in model.rows]
        )
        label = _literal(_short(model.name))
        for axis, (means, lows, highs) in ((accuracy, 100 * rows.T[:3]), (agreement, rows.T[3:])):
            in_legend = {"label": label} if axis is agreement else {}
            axis.plot(percents, means, f"{marker}-", color=colour, markersize=4, **in_legend)
            axis.fill_between(percents, lows, highs, color=colour, alpha=0.18, linewidth=0)
        confidences, right = zip(*((100 * b.confidence, 100 * b.accuracy) for b in model.reliability), strict=True)
        reach = [
            [max(0.0, right[i] - 100 * b.interval.low) for i, b in enumerate(model.reliability)],
            [max(0.0, 100 * b.interval.high - right[i]) for i, b in enumerate(model.reliability)],
        ]
        calibration.errorbar(confidences, right, reach, fmt=marker, color=colour, markersize=4, elinewidth=0.8)
    accuracy.axhline(50, color=_INK, linewidth=0.8, linestyle=":")
    calibration.plot([50, 100], [50, 100], ":", color=_INK, linewidth=0.8)
    accuracy.set(xlabel="% of the answer seen", ylabel="pairs told apart, %")
    agreement.set(xlabel="% of the answer seen", ylabel="Spearman with the final reward")
    calibration.set(xlabel="confidence in the choice, %", ylabel="right, %")
    for axis in (accuracy, agreement, calibration):
        axis.grid(alpha=0.25)
    figure.legend(loc="outside lower center", ncols=min(3, len(report.reward_models)))
    return figure


def _point(axis: "Axes", x: float, interval: Sequence[float], y: float, colour: str, *, filled: bool) -> None:
    if not math.isnan(interval[0]):
        axis.plot(interval, [y, y], "-", color=colour, linewidth=1.5)
    axis.plot(x, y, "o", color=colour, fillstyle="full" if filled else "none", markersize=5)


def _place_on_curve(name: str) -> tuple[str, float, str]:
    """The curve that a system lies on, where on it, and the words for that: `pargs k=10`, 2.0, `weight=2`."""
    words = name.split(" ")
    for option in ("weight=", "k=", "temperature="):
        for word in words:
            try:
                value = float(word.removeprefix(option)) if word.startswith(option) else None
            except ValueError:
                value = None
            if value is not None:
                return " ".join(other for other in words if other != word), value, word
    return name, 0.0, ""


def _literal(text: str) -> str:
    """Text that matplotlib shows as it is: a pair of dollar signs would be mathematics."""
    return text.replace("$", r"\$")


def _short(name: str) -> str:
    return name if len(name) <= 40 else "…" + name[-39:]


def _file_name(name: str) -> str:
    return re.sub(r"\W+", "_", name).strip("_") or "judge"
