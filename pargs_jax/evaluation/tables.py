"""The report as tables of text, which the terminal and the page show alike."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rich.box import SIMPLE
from rich.console import Console, Group
from rich.table import Table as RichTable
from rich.text import Text

from pargs_jax.evaluation.prefixes import RewardModelReport
from pargs_jax.evaluation.report import Metric, Pairwise, Report, Versus, WinRate
from pargs_jax.evaluation.statistics import Interval

_TITLES = {"likelihood": "Likelihood", "text": "Text", "cost": "Cost", "guide": "Reward by each answer's own guide"}


@dataclass(frozen=True)
class Table:
    """Headings and rows of text; the first column names things, the others are numbers."""

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


def tables(report: Report) -> list[Table]:
    """Every table of a report."""
    found = [_judge_table(report, metric) for metric in report.metrics if metric.kind == "judge"]
    found += [_pairwise_table(judge, by_system) for judge, by_system in report.pairwise.items() if by_system]
    for kind, title in _TITLES.items():
        chosen = [metric for metric in report.metrics if metric.kind == kind]
        if chosen:
            found.append(_metrics_table(report, title, chosen))
    return found + [_reward_model_table(each) for each in report.reward_models]


def print_tables(found: Sequence[Table], console: Console) -> None:
    """Prints tables; one that is too wide goes on below itself, with its first column again, so that nothing is cut."""
    for table in found:
        columns = [[heading, *(row[c] for row in table.rows)] for c, heading in enumerate(table.headings)]
        widths = [max(map(len, column)) + 2 for column in columns]
        blocks: list[list[int]] = [[]]
        for c in range(1, len(columns)):
            taken = widths[0] + sum(widths[other] for other in blocks[-1])
            if blocks[-1] and taken + widths[c] > console.width:
                blocks.append([])
            blocks[-1].append(c)
        shown = []
        for block in blocks:
            part = RichTable(box=SIMPLE, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False)
            part.add_column(table.headings[0], overflow="fold")
            for c in block:
                part.add_column(table.headings[c], justify="right", overflow="fold")
            for row in table.rows:
                part.add_row(*(Text(row[c]) for c in [0, *block]))
            shown += [part, ""]
        head = [Text(table.title, style="bold"), *([Text(table.note, style="dim")] if table.note else [])]
        console.print(Group(*head, *shown), highlight=False)


def _judge_table(report: Report, metric: Metric) -> Table:
    rows = []
    for system in report.systems:
        found = report.estimate(metric, system.name)
        versus = report.versus.get(system.name, {}).get(metric.name)
        name = f"{system.name} (baseline)" if system.name == report.baseline else system.name
        rows.append([name, "-" if found is None else plus_minus(*found[0]), *_versus_cells(versus)])
    notes = (
        ["this judge guided some of the answers, so its scores are not evidence and are not tested"]
        if metric.is_guide
        else []
    )
    notes += [f"{count} answers without a score: {reason}" for reason, count in metric.problems.items()]
    headings = ("judge: mean", "difference", "p", "wins %", "LC wins %")
    return Table(f"{metric.name}: {metric.meaning}", ("", *headings), rows, "; ".join(notes))


def _versus_cells(versus: Versus | None) -> list[str]:
    if versus is None or versus.win is None:
        return [""] * 4
    difference = plus_minus(versus.difference.mean, versus.difference.standard_error, signed=True)
    p = "not tested" if versus.p_holm is None else p_value(versus.p_holm)
    return [difference, p, *_win_cells(versus.win)]


def _win_cells(win: WinRate | None) -> list[str]:
    if win is None:
        return ["-", "-"]
    return [percent(win.rate, win.interval), percent(win.length_controlled, win.length_controlled_interval)]


def _pairwise_table(judge: str, by_system: dict[str, Pairwise]) -> Table:
    rows = [
        [
            name,
            *_win_cells(found.win),
            p_value(found.p_holm),
            str(found.pairs),
            _share(found.flips),
            _share(found.first_place),
            str(found.unparsable),
            str(found.missing),
        ]
        for name, found in by_system.items()
    ]
    headings = ("wins %", "LC wins %", "p", "pairs", "flips %", "first %", "unparsable", "missing")
    note = "a win needs both orders; a flip (the two orders disagree) is a tie; first: how often the first "
    return Table(f"{judge}: asked which answer is better", ("", *headings), rows, note + "answer was preferred")


def _metrics_table(report: Report, title: str, metrics: Sequence[Metric]) -> Table:
    rows = []
    for system in report.systems:
        cells = []
        for metric in metrics:
            found = report.estimate(metric, system.name)
            if found is None:
                cells.append("-")
            elif metric.name == "nats_per_token":
                low, high = map(math.exp, found[1])
                cells.append(f"{math.exp(found[0].mean):.1f} ({low:.1f}-{high:.1f})")
            else:
                cells.append(plus_minus(*found[0]))
        rows.append([system.name, *cells])
    names = ["perplexity" if metric.name == "nats_per_token" else metric.name for metric in metrics]
    return Table(title, ("", *names), rows)


def _reward_model_table(report: RewardModelReport) -> Table:
    rows = [
        [
            f"{row.percent} %",
            percent(row.accuracy, row.accuracy_interval),
            number(row.spearman, row.spearman_interval),
            number(row.calibration_error, row.calibration_interval),
        ]
        for row in report.rows
    ]
    title = f"{report.name} on {report.pairs} pairs of {report.prompts} prompts"
    headings = ("of the answer", "accuracy %", "Spearman with final", "calibration error")
    return Table(title, headings, rows, report.notes)


def plus_minus(mean: float, error: float, *, signed: bool = False) -> str:
    """`1.23 ± 0.04`, with digits for the size of the number."""
    size = max(abs(mean), 0 if math.isnan(error) else error)
    digits = 3 if size < 1 else 2 if size < 100 else 1 if size < 1000 else 0
    shown = f"{mean:{'+' if signed else ''},.{digits}f}"
    return shown if math.isnan(error) else f"{shown} ± {error:,.{digits}f}"


def percent(rate: float, interval: Interval) -> str:
    """`62 (55-68)`."""
    return f"{100 * rate:.0f} ({100 * interval.low:.0f}-{100 * interval.high:.0f})"


def number(value: float, interval: Interval) -> str:
    """`0.62 (0.55-0.68)`, `-` where the number is unknown."""
    if math.isnan(value):
        return "-"
    return f"{value:.2f} ({interval.low:.2f} to {interval.high:.2f})"


def p_value(p: float | None) -> str:
    """`0.031`, `<0.001`."""
    if p is None or math.isnan(p):
        return "-"
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f}"
