"""Answers files: what is read, and how what cannot be used is refused."""

import json

import pytest

from pargs_jax.errors import InputError
from pargs_jax.evaluation.answers import check_prompts, load_systems, name_and_file

ROW = {"id": "p1", "prompt": "Hi", "response": " there"}


def load(words, **options):
    return load_systems([name_and_file(word) for word in words], **options)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_all_but_id_prompt_and_response_may_be_missing(tmp_path):
    rows = [
        ROW,
        ROW | {"id": 2, "sample": 1, "finish_reason": "length", "kl": 0.5, "guide_reward": [1, 2], "tokens": 3},
    ]
    (system,) = load([write(tmp_path / "top_k.jsonl", rows)])
    assert (system.name, system.guides, system.options) == ("top_k", None, {})
    first, second = system.answers
    assert (first.sample, first.is_whole, first.numbers) == (0, None, {})
    assert (second.id, second.is_whole) == ("2", False)
    assert second.numbers == {"kl": 0.5, "tokens": 3, "guide_reward_1": 1, "guide_reward_2": 2}


def test_names_methods_and_options(tmp_path):
    path = write(tmp_path / "demo.jsonl", [ROW | {"method": "greedy"}, ROW | {"method": "pargs"}])
    assert [system.name for system in load([path])] == ["greedy", "pargs"]
    (tmp_path / "demo.jsonl.config.yaml").write_text("rm: [runs/rm]\nformat: hh\n")
    named = load([f"mine={path}"], guides_of=lambda options: (options["method"], *options["rm"]))
    assert [(system.name, system.guides) for system in named] == [
        ("mine greedy", ("greedy", "runs/rm")),
        ("mine pargs", ("pargs", "runs/rm")),
    ]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([ROW, {"id": "p2", "prompt": "Hi"}], "line 2: field 'response' is missing"),
        ([ROW | {"id": None}], "line 1: field 'id' is missing"),
        ([ROW | {"prompt": ["Hi"]}], "line 1: field 'prompt' is of type list"),
        ([ROW | {"kl": "much"}], "line 1: field 'kl' is 'much', must be a finite number"),
        ([ROW | {"guide_reward": [1, None]}], "line 1: field 'guide_reward' is None"),
        ([ROW | {"sample": 1.5}], "line 1: field 'sample' is 1.5"),
        ([ROW, ROW], "line 2: has the same id and sample as line 1"),
        ([[1]], "line 1: is of type list"),
        ([], "no answers in it"),
    ],
)
def test_unusable_rows_are_refused_with_file_line_and_field(tmp_path, rows, message):
    path = write(tmp_path / "answers.jsonl", rows)
    with pytest.raises(InputError) as refused:
        load([path])
    assert str(refused.value).startswith(path) and message in str(refused.value)


def test_a_line_that_is_cut_off_is_refused(tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_text(json.dumps(ROW) + '\n{"id": "p2", "pro')
    with pytest.raises(InputError, match="line 2: the line is not JSON"):
        load([str(path)])


def test_two_files_of_one_name_are_told_apart_by_names(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / "x.jsonl", [ROW])
    paths = [str(tmp_path / folder / "x.jsonl") for folder in ("a", "b")]
    with pytest.raises(InputError, match="two systems are called 'x'"):
        load(paths)
    assert [system.name for system in load([paths[0], f"other={paths[1]}"])] == ["x", "other"]


def test_answers_to_other_prompts_are_not_compared(tmp_path):
    a = write(tmp_path / "a.jsonl", [ROW])
    b = write(tmp_path / "b.jsonl", [ROW | {"prompt": "Bye"}])
    c = write(tmp_path / "c.jsonl", [ROW | {"id": "p9"}])
    systems = load([a, b, c])
    with pytest.raises(InputError, match="the id 'p1' belongs to a different prompt"):
        check_prompts(systems[:2], systems[0])
    with pytest.raises(InputError, match="shares no prompt with the baseline"):
        check_prompts(systems[2:], systems[0])
    # Another language model may write the same prompt in another template.
    (tmp_path / "b.jsonl.config.yaml").write_text("lm: other\n")
    check_prompts(load([b]), systems[0])
