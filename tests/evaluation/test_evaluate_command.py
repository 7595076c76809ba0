"""`evaluate.py` from its command line to its report: what is decoded, judged, refused, and what survives a failure."""

import json
import sys

import pytest

from pargs_jax.commands import doors

TOP_K, PARGS = [" I am sorry.", " Go away."], [" I am very sorry.", " We will help you now."]


@pytest.fixture
def evaluate(monkeypatch, capsys, tmp_path):
    """Runs the command in this process; returns exit code, standard output, standard error, and report.json."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["evaluate.py", "--out", str(tmp_path / "out"), *map(str, arguments)])
        code = 0
        try:
            doors.evaluate()
        except SystemExit as end:
            code = end.code
        captured = capsys.readouterr()
        written = tmp_path / "out" / "report.json"
        return code, captured.out, captured.err, json.loads(written.read_text()) if written.exists() else None

    return run


@pytest.fixture
def judge(tmp_path):
    path = tmp_path / "judge.py"
    path.write_text("def length(prompt, response):\n    return len(response)\n")
    return f"{path}:length"


def metric(report, name):
    return next(each for each in report["metrics"] if each["name"] == name)


def test_a_sweep_decodes_what_is_missing_and_a_second_run_nothing(evaluate, lm, rm, judge, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"id": f"p{i}", "prompt": f"My lamp {i} broke."}) + "\n" for i in range(4)))
    (tmp_path / "base.yaml").write_text(
        f"lm: {lm}\nrm: [{rm}]\nprompts: {prompts}\nmax_new_tokens: 6\nk: 4\nmesh: cpu-4\n"
    )
    words = ("--decode", tmp_path / "base.yaml", "--function", judge, "--guide", rm, "--no-figures")
    code, out, err, report = evaluate(*words, "--sweep", "method=top_k,pargs", "weight=1,4")
    assert code == 0, err
    assert [system["name"] for system in report["systems"]] == ["top_k", "pargs weight=1", "pargs weight=4"]
    assert [system["guides"] for system in report["systems"]] == [[], [rm], [rm]]
    assert "pargs weight=4" in out and metric(report, rm)["is_guide"]
    files = sorted((tmp_path / "out" / "answers").glob("*.jsonl"))
    rows = {(file.stem, row["id"]): row for file in files for row in map(json.loads, file.read_text().splitlines())}
    stems = {"top_k": "top_k", "pargs weight=1": "pargs_weight=1", "pargs weight=4": "pargs_weight=4"}
    values = list(map(json.loads, (tmp_path / "out" / "values.jsonl").read_text().splitlines()))
    assert len(values) == len(rows) == 12 and all(isinstance(each[rm], float) for each in values)
    assert all(each["kl"] == rows[stems[each["system"]], each["id"]]["kl"] for each in values)

    before = {file: file.read_bytes() for file in files}
    files[0].unlink()
    code, _, err, _ = evaluate(*words, "--sweep", "method=top_k,pargs", "weight=1,2,4")
    assert code == 0 and "4 of 4 answers are already there" in " ".join(err.split())
    assert {file: file.read_bytes().count(b"\n") for file in files} == {file: 4 for file in before}
    assert files[1].read_bytes() == before[files[1]]
    assert (tmp_path / "out" / "answers" / "pargs_weight=2.jsonl").exists()


def test_a_reward_model_that_guided_does_not_judge_unless_it_is_marked(evaluate, answers_file, rm):
    paths = answers_file("top_k", TOP_K), answers_file("pargs", PARGS)
    (settings := paths[1] + ".config.yaml")
    with open(settings, "w") as file:
        file.write(f"lm: somewhere\nmethod: pargs\nrm: [{rm}/../{rm.rpartition('/')[2]}]\n")
    code, _, err, report = evaluate("--answers", *paths, "--rm", rm)
    assert code == 2 and report is None
    assert f"--rm {rm}: guided the answers of 'pargs'" in err and "--guide" in err
    code, out, _, report = evaluate("--answers", *paths, "--guide", rm, "--no-figures")
    assert code == 0 and "not evidence" in out and metric(report, rm)["is_guide"]
    # An answers file that does not say what guided it is told of.
    code, out, _, report = evaluate("--answers", paths[0], "--rm", rm, "--no-figures")
    assert code == 0 and "the guides of top_k are unknown" in metric(report, rm)["meaning"]


def test_a_judge_that_fails_costs_nothing_else(evaluate, answers_file, judge, lm, endpoint):
    endpoint.reply = lambda a, b: 503
    words = ("--answers", answers_file("top_k", TOP_K), answers_file("pargs", PARGS), "--function", judge)
    asked = ("--endpoint.url", endpoint.url, "--endpoint.model", "m", "--endpoint.retries", 0, "--endpoint.parallel", 1)
    code, out, err, report = evaluate(*words, *asked, "--rm", lm, "--no-figures")
    assert code == 1 and metric(report, "length")["systems"]["pargs"]["mean"] > 0
    assert len(report["problems"]) == 2 and "not a reward model" in report["problems"][0]
    assert "2 pairs have no verdict" in report["problems"][1] and "warning: judge m" in err
    assert report["pairwise"]["m"]["pargs"]["missing"] == 2

    endpoint.reply = lambda a, b: "[[B]]" if len(a) < len(b) else "no idea"
    code, out, _, report = evaluate(*words, *asked, "--no-figures")
    assert code == 0 and report["problems"] == [] and report["pairwise"]["m"]["pargs"]["unparsable"] == 2
    assert "unparsable" in out


def test_references_perplexity_pairs_and_figures_in_one_report(evaluate, answers_file, judge, lm, rm, tmp_path):
    references = tmp_path / "references.csv"
    references.write_text("id,summary\np0,I am sorry\np1,We will help\n")
    code, _, err, report = evaluate(
        "--answers", answers_file("top_k", TOP_K), f"mine={answers_file('pargs', PARGS)}", "--baseline", "mine",
        "--references.file", references, "--references.columns", "reference=summary", "--perplexity", lm,
        "--function", judge, "--pairs.file", "demo", "--pairs.limit", 6, "--rm", rm, "--pairs.max-length", 60,
        "--rm-dtype", "int8",
    )  # fmt: skip
    assert code == 0, err
    assert report["baseline"] == "mine" and set(report["versus_baseline"]) == {"top_k"}
    assert metric(report, "rouge_1")["systems"]["top_k"]["mean"] == pytest.approx((1 + 0) / 2)
    assert metric(report, "nats_per_token")["systems"]["top_k"]["perplexity"] > 1
    assert [each["name"] for each in report["reward_models"]] == [rm, "length"]
    notes = report["reward_models"][0]["notes"]
    assert "answers cut" in notes and "rank correlation with rewards of float32 weights 0.9" in notes
    assert {path.name for path in (tmp_path / "out" / "figures").iterdir()} >= {"scores.png", "wins.svg"}
    assert "<svg" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "nothing to evaluate"),
        (["--answers", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["--answers", "=x"], "must be FILE or NAME=FILE"),
        (["--sweep", "k=1,2"], "sweep: needs a method"),
        (["--decode", "x.yaml"], "--decode: needs --sweep"),
        (["--endpoint.model", "x"], "--endpoint: needs --endpoint.url"),
        (["--endpoint.url", "http://x"], "needs --endpoint.model"),
        (["--references.columns", "reference=x"], "needs --references.file"),
        (["--pairs.limit", "3"], "--pairs: needs --pairs.file"),
        (["--pairs.file", "demo"], "needs reward models to test"),
        (["--answers", "x.jsonl", "--rm", "a", "--guide", "a"], "--rm and --guide: got a in both"),
        (["--answers", "x.jsonl", "--rm", "./nowhere"], "./nowhere: no such folder"),
        (["--answers", "x.jsonl", "--function", "f"], "must be module:function"),
    ],
)
def test_unusable_input_is_refused_in_one_line_before_any_work(evaluate, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    code, _, err, report = evaluate(*words)
    assert code == 2 and report is None
    assert err.splitlines()[-1].startswith("error: ") and message in err.splitlines()[-1]


@pytest.mark.parametrize(
    ("library", "words"),
    [("openai", ("--endpoint.url", "http://x", "--endpoint.model", "m", "--no-figures")), ("matplotlib", ())],
)
def test_a_missing_library_is_said_before_any_work(evaluate, answers_file, monkeypatch, library, words):
    monkeypatch.setitem(sys.modules, library, None)
    code, _, err, report = evaluate("--answers", answers_file("top_k", TOP_K), *words)
    assert code == 2 and report is None and "pip install 'pargs-jax[" in err


def test_a_baseline_that_is_not_there(evaluate, answers_file):
    code, _, err, _ = evaluate("--answers", answers_file("top_k", TOP_K), "--baseline", "greedy")
    assert code == 2 and "no answers have that name, must be one of top_k" in err
