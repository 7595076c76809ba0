"""Python functions and references as judges."""

import json

import pytest

from pargs_jax.errors import InputError
from pargs_jax.evaluation.answers import GivenAnswer, System
from pargs_jax.evaluation.judges import FunctionJudge, RougeJudge, load_function, load_references


def system(*responses):
    return System(
        "mine", "mine.jsonl", tuple(GivenAnswer(f"p{i}", 0, "Q: Hi", text) for i, text in enumerate(responses))
    )


@pytest.fixture
def judges(tmp_path, monkeypatch):
    (tmp_path / "my_judges.py").write_text(
        "def length(prompt, response):\n"
        "    if response == 'raise': raise ValueError('cannot\\nread it')\n"
        "    return {'nan': float('nan'), 'text': 'good'}.get(response, len(prompt + response))\n"
        "number = 3\n"
    )
    (tmp_path / "broken.py").write_text("import not_there_at_all\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_function_that_fails_on_an_answer_scores_the_others(judges):
    for name in (f"{judges}/my_judges.py:length", "my_judges:length"):
        judge = FunctionJudge(name)
        assert judge.scores(system("a", "raise", "nan", "text", "bcd")) == [6, None, None, None, 8]
        assert judge.name == "length" and len(judge.problems) == 3
        assert judge.problems["ValueError: cannot"] == 1 and judge.problems["returned nan"] == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("length", "must be module:function or file.py:function"),
        ("nowhere.py:length", "nowhere.py is not a file"),
        ("my_judges:height", "has no function 'height'"),
        ("my_judges:number", "has no function 'number'"),
        ("broken.py:f", "cannot be imported (ModuleNotFoundError: No module named 'not_there_at_all')"),
    ],
)
def test_a_function_that_is_not_there_is_refused(judges, name, message):
    with pytest.raises(InputError) as refused:
        load_function(name)
    assert message in str(refused.value)


def test_references_are_found_by_id_or_line_and_the_best_one_counts(tmp_path):
    path = tmp_path / "references.jsonl"
    path.write_text(
        "".join(json.dumps({"id": f"p{i}", "summary": text}) + "\n" for i, text in enumerate([["a b", "x y"], "c"]))
    )
    answers = system("x y", "d", "e")
    references = load_references(str(path), {"reference": "summary"}, [answers])
    judge = RougeJudge("rouge_l", references)
    assert judge.scores(answers) == [1.0, 0.0, None] and judge.problems == {"no reference for the prompt": 1}
    assert RougeJudge("rouge_2", references).scores(answers)[0] == 1.0

    numbered = System("n", "n.jsonl", (GivenAnswer("2", 0, "Q", "c d"),))
    path.write_text('{"reference": "z"}\n{"response": "c d"}\n')
    assert load_references(str(path), {}, [numbered])["2"] == ["c d"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"id": "p0", "answer": "x"}, "line 1: no reference"),
        ({"id": "p0", "reference": [1]}, "line 1: field 'reference' must be a text or a list of texts"),
        ({"id": "p0", "prompt": "Bye", "reference": "x"}, "line 1: its prompt differs from the prompt of the answers"),
        ({"id": "q", "reference": "x"}, "no row has the id of an answered prompt"),
    ],
)
def test_references_that_do_not_fit_are_refused(tmp_path, row, message):
    path = tmp_path / "references.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(InputError) as refused:
        load_references(str(path), {}, [system("a")])
    assert message in str(refused.value)
