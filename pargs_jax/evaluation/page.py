"""The report as one HTML file that needs nothing else: no script, no request, light and dark."""

from collections.abc import Sequence
from html import escape
from importlib.resources import files

from pargs_jax.evaluation.figures import Drawn
from pargs_jax.evaluation.report import Report
from pargs_jax.evaluation.tables import Table, tables

_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def page(report: Report, figures: Sequence[Drawn], examples: int) -> str:
    """The page. All text is escaped; `examples` is how many prompts are shown with every system's first answer."""
    parts = [_opening(report)]
    parts += [f'<p class="problem">{escape(line)}</p>' for line in report.problems]
    if figures:
        parts.append("<h2>Figures</h2>")
        parts += [f"<figure>{each.svg}<figcaption>{escape(each.caption)}</figcaption></figure>" for each in figures]
    parts.append("<h2>Tables</h2>")
    parts += map(_table, tables(report))
    if report.systems and examples:
        parts.append("<h2>Answers</h2>")
        parts += _examples(report, examples)
    parts.append("<h2>What the numbers are</h2>")
    parts.append(_definitions(report))
    style = (files("pargs_jax") / "assets" / "report" / "page.css").read_text(encoding="utf-8")
    head = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Evaluation</title><style>\n{style}</style></head><body>\n"
    )
    return head + "\n".join(parts) + "\n</body></html>\n"


def _opening(report: Report) -> str:
    systems = len(report.systems)
    said = []
    if systems:
        prompts = len({i for system in report.systems for i in system.by_prompt})
        said.append(f"{systems} systems on {prompts} prompts, compared with <b>{escape(report.baseline)}</b>.")
    if report.reward_models:
        said.append(f"{len(report.reward_models)} reward models on preference pairs.")
    return f"<h1>Evaluation</h1>\n<p>{' '.join(said)}</p>"


def _table(table: Table) -> str:
    head = "".join(f"<th>{escape(heading)}</th>" for heading in table.headings)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>\n" for row in table.rows)
    note = f'<p class="note">{escape(table.note)}</p>' if table.note else ""
    return (
        f'<h3>{escape(table.title)}</h3><div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>{note}"
    )


def _examples(report: Report, count: int) -> list[str]:
    first = next(system for system in report.systems if system.name == report.baseline)
    parts = []
    for prompt_id, answers in list(first.by_prompt.items())[:count]:
        rows = [
            f'<tr><td>{escape(system.name)}</td><td class="text">{escape(found[0].response)}</td></tr>'
            for system in report.systems
            if (found := system.by_prompt.get(prompt_id))
        ]
        parts.append(
            f"<details><summary><pre>{escape(answers[0].prompt)}</pre></summary>"
            f"<table><tbody>{''.join(rows)}</tbody></table></details>"
        )
    return parts


def _definitions(report: Report) -> str:
    told = {metric.name: metric.meaning for metric in report.metrics}
    if report.versus:
        told |= {
            "± and intervals": "one standard error over prompts; 95 % intervals. Samples of one prompt count as one.",
            "difference": "the mean over prompts of the difference from the baseline",
            "p": "of the paired t-test, after Holm's correction over all tests of this report",
            "wins": "share of prompts on which the judge prefers this system; a tie counts half; Wilson's interval",
            "LC wins": "wins if answers were as long as the baseline's: AlpacaEval 2's logistic model without its "
            "term for an instruction's difficulty; bootstrap interval",
        }
    if report.reward_models:
        told |= {
            "accuracy": "pairs whose chosen answer has the higher reward, both cut at this share of the longer "
            "one's length",
            "Spearman with final": "rank correlation between rewards of this share of an answer and of all of it",
            "calibration error": "expected calibration error of the confidence sigmoid(|difference of rewards|)",
        }
    return f"<dl>{''.join(f'<dt>{escape(name)}</dt><dd>{escape(text)}</dd>' for name, text in told.items())}</dl>"
