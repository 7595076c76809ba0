"""Sources and row shapes, and what becomes of bad rows."""

import csv
import gzip
import json
from pathlib import Path

import pytest

from pargs_jax.data.preferences import BadRow, load_preferences, load_prompts, write_bad_rows
from pargs_jax.errors import InputError
from pargs_jax.text.prompts import get_form

SHARED = Path(__file__).parents[3] / "shared" / "data"
HH, PLAIN = get_form("hh"), get_form("plain")
PROMPT = "\n\nHuman: Why?\n\nAssistant:"
ROW = {"prompt": PROMPT, "chosen": "Because.", "rejected": " No."}
USER = {"role": "user", "content": "Why?"}
GOOD, BAD = ({"role": "assistant", "content": text} for text in ("Because.", "No."))


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def load_one(tmp_path, row, form=HH, **options):
    loaded = load_preferences(write_jsonl(tmp_path / "rows.jsonl", [row]), form, **options)
    return loaded.rows[0]


@pytest.mark.parametrize(
    "row",
    [
        ROW,
        {"prompt": "Why?", "chosen": "Because.", "rejected": "No."},
        {"chosen": PROMPT + " Because.", "rejected": PROMPT + " No."},
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": "Why?", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
    ],
)
def test_every_row_shape_becomes_the_same_preference(tmp_path, row):
    preference = load_one(tmp_path, row)
    assert (preference.id, preference.prompt) == ("1", PROMPT)
    assert (preference.chosen, preference.rejected) == (" Because.", " No.")


def test_an_implicit_prompt_ends_at_the_last_shared_marker(tmp_path):
    earlier = "\n\nHuman: A\n\nAssistant: B"
    row = {"chosen": earlier + PROMPT + " No way.", "rejected": earlier + PROMPT + " No."}
    assert load_one(tmp_path, row).prompt == earlier + PROMPT
    for form in (HH, PLAIN):
        preference = load_one(tmp_path, row, form)
        assert (preference.prompt, preference.chosen, preference.rejected) == (earlier + PROMPT, " No way.", " No.")
    row = {name: f"SUBREDDIT: r/cats\nPOST: It sat.\nTL;DR: {name}" for name in ("chosen", "rejected")}
    for form in (get_form("tldr"), PLAIN):
        assert load_one(tmp_path, row, form).prompt.endswith("\nTL;DR:")


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Why?", "response": "Because."},
        {"prompt": "Why?", "completion": "Because."},
        {"prompt": "Why?", "chosen": "Because.", "rejected": ""},
        {"messages": [USER, GOOD]},
        {"chosen": PROMPT + " Because.", "rejected": PROMPT + " No."},
    ],
)
def test_answers_to_imitate_need_no_rejected_one(tmp_path, row):
    preference = load_one(tmp_path, row, require_rejected=False)
    assert (preference.prompt, preference.chosen, preference.rejected) == (PROMPT, " Because.", None)


def test_a_text_alone_answers_the_empty_prompt(tmp_path):
    preference = load_one(tmp_path, {"id": "s", "text": "Once upon a time"}, require_rejected=False)
    assert (preference.id, preference.prompt, preference.chosen) == ("s", "", "Once upon a time")


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".json", ".data.json", ".csv", ".parquet"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path, ending):
    path = tmp_path / f"rows{ending}"
    rows = [{**ROW, "chosen": 'Because,\n"so" é'}, {**ROW, "chosen": "word " * 40_000}]
    if ending == ".csv":
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, ROW)
            writer.writeheader()
            writer.writerows(rows)
    elif ending == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif ending.endswith(".json"):
        path.write_text(json.dumps({"data": rows} if "data" in ending else rows))
    else:
        lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
        path.write_bytes(gzip.compress(lines) if ending.endswith("gz") else lines)
    loaded = load_preferences(path, HH)
    assert [row.chosen for row in loaded.rows] == [" " + row["chosen"] for row in rows]
    assert loaded.bad_rows == []


def test_a_hub_id_goes_to_datasets(monkeypatch):
    import datasets

    def load_dataset(name, split):
        if split != "test":
            raise ValueError(f'Unknown split "{split}".\nmore')
        return datasets.Dataset.from_list([{"chosen": [USER, GOOD], "rejected": [USER, BAD], "id": name}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_preferences("owner/name", HH, split="test").rows[0].id == "owner/name"
    with pytest.raises(InputError, match=r"\Adata set 'owner/name', split 'train': Unknown split \"train\".\Z"):
        load_preferences("owner/name", HH)


def test_bad_rows_are_set_aside_with_line_and_reason(tmp_path):
    bad = [
        (b'{"prompt": "Why?", ', "not JSON"),
        (b'"\xff"', "not UTF-8"),
        (b"[1]", "type list"),
        ({"prompt": "Why?", "chosen": "Because."}, "rejected is missing; the row has prompt, chosen"),
        ({**ROW, "chosen": 3}, "chosen is of type int"),
        ({**ROW, "prompt": {"a": 1}}, "prompt is of type dict"),
        ({**ROW, "chosen": " \n"}, "chosen answer is empty"),
        ({**ROW, "chosen": "No."}, "the same"),
        ({"chosen": "What? Yes", "rejected": "What? No"}, "prompt is missing, and chosen and rejected"),
        ({"chosen": "Human: Yes", "rejected": "Human: No"}, "prompt is missing, and chosen and rejected"),
        ({"chosen": [GOOD], "rejected": [BAD]}, "prompt is missing, and chosen and rejected"),
        ({"chosen": [USER, GOOD], "rejected": [GOOD, USER, BAD]}, "same prompt"),
        ({"chosen": [USER], "rejected": [USER, BAD]}, "ends with an assistant turn"),
        ({**ROW, "prompt": [GOOD]}, "must be the user's"),
        ({**ROW, "chosen": "\ud83d"}, "half a surrogate pair"),
    ]
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row, _ in bad]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join([json.dumps(ROW).encode(), b"", *lines]))
    loaded = load_preferences(path, HH)
    assert len(loaded.rows) == 1
    assert [row.line for row in loaded.bad_rows] == list(range(3, 3 + len(bad)))
    for row, (_, reason) in zip(loaded.bad_rows, bad, strict=True):
        assert reason in row.reason

    write_bad_rows(tmp_path / "bad.jsonl", loaded.bad_rows)
    written = [BadRow(**json.loads(line)) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    assert written == loaded.bad_rows
    with pytest.raises(OSError):
        write_bad_rows(tmp_path, loaded.bad_rows)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("missing.jsonl", None, "no such file"),
        ("no/such/place", None, "no such file"),
        ("rows.text", b"Why?", "must end in .jsonl"),
        ("rows.jsonl", b"\n", "no rows"),
        ("rows.json", b"[]", "no rows"),
        ("rows.json", b'{"rows": []}', "with the list under 'data'"),
        ("rows.json", b'{"a": 1}\n{"a": 2}', "a file with one object per line must end in .jsonl"),
        ("rows.jsonl.gz", b"not gzip", "cannot be read"),
        ("rows.jsonl.gz", gzip.compress(b"{}\n" * 99, mtime=0)[:-9], "cannot be read"),
        ("rows.parquet", b"PAR0", "not a Parquet file"),
        ("rows.csv", b"prompt\n\xff", "cannot be read"),
        ("rows.csv", b"prompt,chosen,rejected\na,b,c,d\n", "more values than the header has columns"),
        ("rows.jsonl", b'{"prompt": "Why?"}\n{}', "none of its 2 rows can be used; line 1: chosen is missing"),
    ],
)
def test_a_source_that_gives_nothing_is_one_line_of_error(tmp_path, name, content, reason):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=reason) as error:
        load_preferences(tmp_path / name, HH)
    assert "\n" not in str(error.value)


def test_prompts_take_their_id_or_their_line(tmp_path):
    rows = [{"prompt": "Why?", "id": "a"}, {"prompt": [USER]}, {"chosen": PROMPT + " A", "rejected": PROMPT + " A"}]
    prompts = load_prompts(write_jsonl(tmp_path / "prompts.jsonl", rows), HH)
    assert [(prompt.id, prompt.text) for prompt in prompts] == [("a", PROMPT), ("2", PROMPT), ("3", PROMPT)]


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([{"prompt": "A", "id": 2}, {"prompt": "B"}], "line 2: an earlier row also has the id '2'"),
        ([{"prompt": "A"}, {"prompt": 3}], "line 2: prompt is of type int"),
        ([{"question": "A"}], "line 1: prompt is missing; the row has question; .* such as prompt=question"),
        ([{"question": "A", "chosen": "B"}], "line 1: prompt is missing; the row has question, chosen; "),
        ([], "no rows"),
    ],
)
def test_prompts_that_cannot_be_used_are_errors(tmp_path, rows, reason):
    with pytest.raises(InputError, match=reason):
        load_prompts(write_jsonl(tmp_path / "prompts.jsonl", rows), HH)


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the data in ../shared")
def test_hh_as_published_gives_the_rows_of_its_explicit_form():
    def texts(*names):
        rows = [row for name in names for row in load_preferences(SHARED / f"{name}.jsonl.gz", HH).rows]
        return {(row.prompt, row.chosen.strip(), row.rejected.strip()) for row in rows}

    published = texts("hh_rlhf_original_format")
    assert len(published) == 2308
    assert published == texts("hh_harmless.train", "hh_harmless.test")


QUESTIONS = [
    {"id": i, "question": f"Why is {i}?", "best": f"It is because of {i} and", "worst": f"It is because of {i} or"}
    for i in range(3)
]


def renamed(row, **names):
    return {names.get(name, name): value for name, value in row.items()}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            {"best": "chosen", "worst": "rejected"},
            "prompt is missing, and chosen and rejected .*; the row has id, question, ",
        ),
        ({"question": "prompt"}, "chosen is missing; the row has id, prompt, best, worst"),
        ({}, "prompt, chosen and rejected are missing; the row has id, question, best, worst"),
        ({"best": "response"}, "prompt, chosen and rejected are missing; the row has id, question, response, worst"),
    ],
)
@pytest.mark.parametrize("form", [HH, PLAIN])
def test_a_file_whose_columns_have_other_names_is_one_error_that_names_them(tmp_path, form, names, message):
    """Answers often begin alike: what they share is not their prompt."""
    path = write_jsonl(tmp_path / "rows.jsonl", [renamed(row, **names) for row in QUESTIONS])
    with pytest.raises(InputError, match=f"none of its 3 rows can be used; line 1: {message}") as error:
        load_preferences(path, form)
    assert str(error.value).endswith("; the option columns maps other names, such as prompt=question")


@pytest.mark.parametrize("names", [{"best": "response"}, {"best": "chosen"}, {"best": "completion"}, {}])
def test_answers_to_imitate_need_their_prompt_by_its_name_too(tmp_path, names):
    path = write_jsonl(tmp_path / "rows.jsonl", [renamed(row, **names) for row in QUESTIONS])
    with pytest.raises(InputError, match=r"line 1: prompt is missing; the row has id, question, .*the option columns"):
        load_preferences(path, PLAIN, require_rejected=False)


def test_columns_are_read_by_the_names_that_are_given(tmp_path):
    columns = {"prompt": "question", "chosen": "best", "rejected": "worst"}
    path = write_jsonl(tmp_path / "rows.jsonl", QUESTIONS)
    rows = load_preferences(path, PLAIN, columns=columns).rows
    assert [(row.id, row.prompt, row.chosen, row.rejected) for row in rows] == [
        tuple(map(str, row.values())) for row in QUESTIONS
    ]
    swapped = load_preferences(path, PLAIN, columns=columns | {"chosen": "worst", "rejected": "best"}).rows
    assert [(row.chosen, row.rejected) for row in swapped] == [(row.rejected, row.chosen) for row in rows]
    sft = load_preferences(path, PLAIN, require_rejected=False, columns={"prompt": "question", "response": "best"}).rows
    assert [(row.prompt, row.chosen) for row in sft] == [(row.prompt, row.chosen) for row in rows]
    prompts = load_prompts(path, PLAIN, columns={"prompt": "question", "id": "best"})
    assert [(prompt.id, prompt.text) for prompt in prompts] == [(row["best"], row["question"]) for row in QUESTIONS]


def test_a_column_that_no_row_has_is_an_error(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{**ROW, "source": "web"}])
    for load in (load_preferences, load_prompts):
        with pytest.raises(
            InputError, match=r"no row has a column 'question'; the columns are chosen, prompt, rejected, source\Z"
        ):
            load(path, PLAIN, columns={"prompt": "question"})


@pytest.mark.parametrize(
    "row",
    [
        # As published: UltraFeedback, HH for TRL, Orca with its columns named, RM-static, summaries, HH, SafeRLHF.
        {"prompt": "Why?", "prompt_id": "a", "chosen": [USER, GOOD], "rejected": [USER, BAD], "messages": [USER, GOOD]},
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"system": "Be kind.", "prompt": "Why?", "chosen": "Because.", "rejected": "No."},
        {"prompt": PROMPT, "response": " Because.", "chosen": " Because.", "rejected": " No."},
        {"prompt": "SUBREDDIT: r/cats\nPOST: It sat.", "chosen": "TL;DR: A cat.", "rejected": "TL;DR: A cow."},
        {"chosen": PROMPT + " Because.", "rejected": PROMPT + " No."},
        {
            "chosen": "BEGINNING OF CONVERSATION: USER: Why? ASSISTANT:Because.",
            "rejected": "BEGINNING OF CONVERSATION: USER: Why? ASSISTANT:No.",
        },
    ],
)
def test_published_rows_are_not_refused(tmp_path, row):
    preference = load_one(tmp_path, row, PLAIN)
    assert preference.prompt.endswith(("Why?", "Assistant:", "It sat.", "ASSISTANT:"))
    assert preference.chosen.strip() in ("Because.", "TL;DR: A cat.")


def test_dialogues_in_another_form_say_which(tmp_path):
    row = {"chosen": PROMPT + " Because.", "rejected": PROMPT + " No."}
    with pytest.raises(InputError, match="are dialogues in the prompt format 'hh', not 'tldr'"):
        load_one(tmp_path, row, get_form("tldr"))


def test_whole_dialogues_in_a_chat_template(tmp_path):
    class Template:
        def render_chat(self, turns):
            return "<s>" + "".join(f"<{turn['role']}>{turn['content']}" for turn in turns) + "<assistant>"

    row = {name: f"<s><system>Be kind.<user>Why?<assistant>{name}" for name in ("chosen", "rejected")}
    preference = load_one(tmp_path, row, get_form("chat"), tokenizer=Template())
    assert (preference.prompt, preference.chosen) == ("<s><system>Be kind.<user>Why?<assistant>", "chosen")
    with pytest.raises(InputError, match="prompt is missing, and chosen and rejected"):
        load_one(tmp_path, {"chosen": "It is so", "rejected": "It is no"}, get_form("chat"), tokenizer=Template())


def with_splits(tmp_path, *splits):
    rows = [{"id": str(i), **ROW} | ({} if split is None else {"split": split}) for i, split in enumerate(splits)]
    return write_jsonl(tmp_path / "rows.jsonl", rows)


def test_rows_of_another_split_are_left_out(tmp_path):
    path = with_splits(tmp_path, "train", "test", "Train", "dev", "validation", "training")
    for split, ids in (("train", ["0", "2", "5"]), ("eval", ["1", "3", "4"])):
        loaded = load_preferences(path, HH, split=split)
        assert ([row.id for row in loaded.rows], loaded.other_splits) == (ids, 3)
    assert [prompt.id for prompt in load_prompts(path, HH)] == list("012345")
    without = load_preferences(with_splits(tmp_path, None, None), HH, split="eval")
    assert (len(without.rows), without.other_splits) == (2, 0)
    path = write_jsonl(tmp_path / "rows.jsonl", [{**ROW, "part": part} for part in ("train", "dev")])
    assert load_preferences(path, HH, columns={"split": "part"}).other_splits == 1


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        (
            ["train", "harmless"],
            "line 2: split is 'harmless', must be train or training, or for evaluation test, valida",
        ),
        (["train", 3], "line 2: split is '3', must be "),
        (["test", "dev"], "no row's split is train or training; the column split has 'test', 'dev'"),
        (["train", None, ""], "2 rows have no split, but others do"),
    ],
)
def test_splits_that_cannot_be_told_are_errors(tmp_path, splits, message):
    with pytest.raises(InputError, match=message):
        load_preferences(with_splits(tmp_path, *splits), HH)


def test_evaluation_takes_the_splits_that_the_hub_has_for_it(monkeypatch):
    import datasets

    asked = []

    def load_dataset(name, split):
        asked.append(split)
        return datasets.Dataset.from_list([{"split": "of another kind", **ROW}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name: ["train", "validation", "test"])
    load_preferences("owner/name", HH, split="eval")
    load_preferences("owner/name", HH)
    assert asked == ["validation+test", "train"]


class Template:
    """A tokenizer with only a chat template."""

    def render_chat(self, turns):
        return "".join(f"<{turn['role'][0]}>{turn['content']}" for turn in turns) + "<a>"


def test_prompts_keep_their_turns_where_each_model_has_a_template_of_its_own(tmp_path):
    question, said = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}
    path = tmp_path / "prompts.jsonl"
    rows = [
        {"prompt": "Why?"},
        {"prompt": [question, said, question]},
        {"prompt": "<u>Why?<a>"},  # in the template already
        {"chosen": [question, said], "rejected": [question, {**said, "content": "No."}]},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = load_prompts(path, get_form("chat"), Template())
    assert [prompt.turns for prompt in found] == [(question,), (question, said, question), (), (question,)]
    assert [prompt.text for prompt in found] == ["<u>Why?<a>", "<u>Why?<a>So.<u>Why?<a>", "<u>Why?<a>", "<u>Why?<a>"]
    path.write_text(json.dumps(rows[0]) + "\n" + json.dumps({"id": "1", "prompt": "Who?"}) + "\n")
    with pytest.raises(InputError, match=r"prompts.jsonl: line 2: an earlier row also has the id '1'"):
        load_prompts(path, get_form("chat"), Template())
    path.write_text(json.dumps({"prompt": "Why?"}) + "\n")
    assert [prompt.turns for prompt in load_prompts(path, get_form("hh"))] == [None]


ANYTHING = (float("-inf"), float("inf"))
SCORED = {"prompt": "Why?", "response": "Because.", "reward": -0.5}


def load_scored(tmp_path, rows, reward_range=ANYTHING):
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    return load_preferences(path, HH, require_rejected=False, reward_range=reward_range)


def test_scored_answers_are_rows_with_a_reward(tmp_path):
    decoded = {"prompt": PROMPT, "response": "Because", "guide_reward": 2, "finish_reason": "length", "options": "ab"}
    rows = load_scored(tmp_path, [SCORED, decoded, {**SCORED, "reward": "1e2"}]).rows
    assert [(row.prompt, row.chosen, row.reward, row.finished) for row in rows] == [
        (PROMPT, " Because.", -0.5, True),
        (PROMPT, "Because", 2.0, False),  # as the language model wrote it
        (PROMPT, " Because.", 100.0, True),
    ]


def test_answers_without_a_usable_reward_are_bad_rows(tmp_path):
    bad = [
        ({**SCORED, "reward": float("nan")}, "reward is nan, must be a finite number"),
        ({**SCORED, "reward": float("inf")}, "reward is inf, must be a finite number"),
        ({**SCORED, "reward": "good"}, "reward is 'good', must be a finite number"),
        ({**SCORED, "reward": True}, "reward is True, must be a finite number"),
        ({**SCORED, "reward": None}, "reward is missing"),
        ({**SCORED, "reward": [1, 2]}, "reward is 2 numbers; a scored answer has one"),
        ({**SCORED, "response": " "}, "the answer is empty"),
        (ROW | {"reward": 1}, "the row is a pair, must be a scored answer"),
    ]
    loaded = load_scored(tmp_path, [SCORED, *(row for row, _ in bad)])
    assert len(loaded.rows) == 1
    for row, (_, reason) in zip(loaded.bad_rows, bad, strict=True):
        assert reason in row.reason
    with pytest.raises(InputError, match=r"line 1: reward is -0.5, must be from 0 to 1"):
        load_scored(tmp_path, [SCORED], (0.0, 1.0))


def test_the_wrong_kind_of_rows_is_one_line(tmp_path):
    with pytest.raises(
        InputError, match="line 1: the row is a pair, must be a scored answer: prompt, response, reward"
    ):
        load_scored(tmp_path, [ROW])
    with pytest.raises(
        InputError, match="line 1: the row is a scored answer, must be a pair: prompt, chosen, rejected"
    ):
        load_preferences(write_jsonl(tmp_path / "rows.jsonl", [SCORED]), HH)
