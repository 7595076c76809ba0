"""The report: numbers against scipy's on the same answers, tables that fit, figures, and a page that stands alone."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from rich.console import Console
from scipy import stats

from pargs_jax.evaluation.answers import GivenAnswer, System
from pargs_jax.evaluation.endpoint import Comparison
from pargs_jax.evaluation.figures import draw
from pargs_jax.evaluation.page import page
from pargs_jax.evaluation.prefixes import function_prefix_rewards, report_on
from pargs_jax.evaluation.report import given_metrics, make_report, metric_of_answers, text_metrics
from pargs_jax.evaluation.statistics import holm, wilson
from pargs_jax.evaluation.tables import plus_minus, print_tables, tables
from pargs_jax.testing import tiny_preferences

HOSTILE = "</pre></td><script>alert('$x$ & \"y\"')</script>"
NAMES = (
    "top_k",
    "pargs weight=1 k=10 temperature=0.7 of <b>us</b> $a$",
    "pargs weight=4 k=10 temperature=0.7 of <b>us</b> $a$",
)


@pytest.fixture(scope="module")
def scores():
    """Two samples of 30 prompts by three systems; of one answer there is no score."""
    draws = np.random.default_rng(0)
    found = {name: list(draws.normal(0.4 * i, 1, 60)) for i, name in enumerate(NAMES)}
    found[NAMES[1]][7] = None
    return found


@pytest.fixture(scope="module")
def report(scores):
    draws = np.random.default_rng(1)
    systems = []
    for s, name in enumerate(NAMES):
        answers = [
            GivenAnswer(f"p{i}", j, f"Say <i>hi</i> {i}", f"{HOSTILE} {'word ' * (3 + (i * 7 + j + s) % 9)}", True,
                        {"kl": 0.5 * s + 0.1, "seconds": 0.1, "guide_reward": float(draws.normal())})
            for i in range(30) for j in range(2)
        ]  # fmt: skip
        systems.append(System(name, f"{s}.jsonl", tuple(answers)))
    judged = metric_of_answers("length", "a judge", "judge", systems, scores, problems={"ValueError: <b>": 1})
    guide = metric_of_answers("runs/rm", "the guide", "judge", systems, scores, is_guide=True)
    comparisons = {
        "asked": {
            NAMES[1]: {
                "p0": [Comparison(1.0, "A", "B")],
                "p1": [Comparison(0.5, "A", "A")],
                "p2": [Comparison(None, "unparsable", "B")],
                "p3": [Comparison(None, None, None)],
                "p4": [Comparison(1.0, "A", "B")],
            }
        }
    }
    pairs = tiny_preferences(12)
    tested = report_on(
        "words <x>", function_prefix_rewards(lambda _, text: len(text.split()), pairs, lambda note: None)
    )
    metrics = [judged, guide, *given_metrics(systems), *text_metrics(systems)]
    return make_report(systems, NAMES[0], metrics, comparisons, [tested], ["judge x: failed <b>"])


def test_differences_are_paired_by_prompt_and_corrected_over_all_tests(report, scores):
    def means(name):
        grid = np.array([np.nan if score is None else score for score in scores[name]]).reshape(30, 2)
        return np.nanmean(grid, axis=1)

    expected = [stats.ttest_rel(means(name), means(NAMES[0])) for name in NAMES[1:]]
    found = [report.versus[name]["length"] for name in NAMES[1:]]
    assert [each.difference.p for each in found] == pytest.approx([each.pvalue for each in expected])
    asked = report.pairwise["asked"][NAMES[1]]
    assert asked.p == pytest.approx(stats.ttest_1samp([1, 0.5, 1], 0.5).pvalue)
    adjusted = holm([*(each.pvalue for each in expected), asked.p])
    assert [*(each.p_holm for each in found), asked.p_holm] == pytest.approx(adjusted)
    # What guided the answers is compared, but not tested.
    assert report.versus[NAMES[1]]["runs/rm"].p_holm is None

    mean, error = report.estimate(report.metrics[0], NAMES[1])[0]
    assert mean == pytest.approx(means(NAMES[1]).mean()) and error == pytest.approx(stats.sem(means(NAMES[1])))
    drawn = stats.bootstrap((means(NAMES[1]),), np.mean, n_resamples=2000, rng=np.random.default_rng(3))
    assert error == pytest.approx(drawn.standard_error, rel=0.08)
    assert report.metrics[0].missing == {NAMES[0]: 0, NAMES[1]: 1, NAMES[2]: 0}


def test_win_rates_are_of_prompts_with_wilsons_interval(report, scores):
    def share(i):
        mine, other = ([s for s in scores[name][2 * i : 2 * i + 2] if s is not None] for name in (NAMES[2], NAMES[0]))
        return np.mean([(a > b) + 0.5 * (a == b) for a in mine for b in other])

    rate = np.mean([share(i) for i in range(30)])
    win = report.versus[NAMES[2]]["length"].win
    assert win.rate == pytest.approx(rate) and win.interval == pytest.approx(wilson(rate, 30)) and win.prompts == 30


def test_an_endpoints_verdicts_are_reported_separately(report):
    asked = report.pairwise["asked"][NAMES[1]]
    assert (asked.pairs, asked.unparsable, asked.missing, asked.win.prompts) == (5, 1, 1, 3)
    assert asked.flips == pytest.approx(1 / 3) and asked.win.rate == pytest.approx(2.5 / 3)
    assert asked.first_place == pytest.approx(4 / 7)


def test_the_json_is_plain_and_whole(report):
    content = json.loads(report.to_json())
    assert content["baseline"] == "top_k" and content["problems"] == ["judge x: failed <b>"]
    assert {metric["name"] for metric in content["metrics"]} >= {
        "length", "kl", "guide_reward", "seconds", "words", "repetition", "diversity", "distinct_2", "rouge_between",
    }  # fmt: skip
    assert content["versus_baseline"][NAMES[1]]["length"]["win"]["interval"].keys() == {"low", "high"}
    assert len(content["reward_models"][0]["rows"]) == 10


def test_tables_fit_a_terminal_of_80_columns_and_cut_no_name(report):
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115 (closed with the test)
    print_tables(tables(report), console)
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80 and "…" not in text
    assert all(name in text for name in (*NAMES, "top_k (baseline)", "LC wins %"))
    assert "not evidence" in text and "unparsable" in text


def test_numbers_have_the_digits_that_their_size_needs():
    assert plus_minus(0.1234, 0.0456) == "0.123 ± 0.046"
    assert plus_minus(1.234, 0.0456, signed=True) == "+1.23 ± 0.05"
    assert plus_minus(-1234.5, 45.6) == "-1,234 ± 46"
    assert plus_minus(2.0, float("nan")) == "2.00"


class Page(HTMLParser):
    """What a page has: its tags, the addresses in it, and its text."""

    def __init__(self):
        super().__init__()
        self.tags, self.addresses, self.text = set(), [], ""

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.addresses += [v for k, v in attributes if k in ("src", "href", "xlink:href", "srcset", "data", "action")]

    def handle_data(self, data):
        self.text += data


def test_the_page_stands_alone_and_shows_hostile_text_as_text(report, tmp_path):
    drawn = draw(report, tmp_path / "figures")
    assert [each.name for each in drawn] == ["scores", "wins", "frontier_length", "frontier_runs_rm", "reward_models"]
    for each in drawn:
        for ending, start in ((".png", b"\x89PNG"), (".svg", b"<?xml")):
            content = (tmp_path / "figures" / (each.name + ending)).read_bytes()
            assert content.startswith(start) and len(content) > 2000
        assert "<svg" in each.svg and "currentColor" in each.svg
    found = Page()
    text = page(report, drawn, examples=2)
    found.feed(text)
    assert not {"script", "i"} & found.tags and HOSTILE in found.text
    assert all(address.startswith("#") for address in found.addresses)
    assert re.findall(r"url\((?!#)", text) == [] and "@import" not in text
    identifiers = re.findall(r'\bid="([^"]+)"', text)
    assert len(identifiers) == len(set(identifiers))
    assert "judge x: failed <b>" in found.text and "rouge_between" in found.text and NAMES[1] in found.text


def test_a_report_on_reward_models_alone(report, tmp_path):
    alone = make_report([], "", [], {}, report.reward_models)
    drawn = draw(alone, tmp_path)
    assert [each.name for each in drawn] == ["reward_models"]
    assert "Spearman" in page(alone, drawn, 5) and len(tables(alone)) == 1 and json.loads(alone.to_json())
