"""`decode.py`: files of prompts and answers, going on after an interruption, and what it refuses."""

import importlib.util
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pargs_jax.commands import doors
from pargs_jax.commands.comparison import COMPARED
from pargs_jax.commands.comparison_file import ComparisonFile
from pargs_jax.config import DecodeConfig
from pargs_jax.data.preferences import Prompt
from pargs_jax.decoding.methods import METHODS
from pargs_jax.demo import task as demo
from pargs_jax.errors import InputError
from pargs_jax.generation.answers import Answer
from pargs_jax.testing import tiny_tokenizer

REPOSITORY = Path(__file__).parents[2]
SHARED = REPOSITORY.parent / "shared"


@pytest.fixture
def decode(monkeypatch, capsys):
    """Runs the front door in this process; returns exit code, standard output and standard error."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["decode.py", *map(str, arguments)])
        code = 0
        try:
            doors.decode()
        except SystemExit as end:
            code = end.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"id": f"p{i}", "prompt": f"My lamp {i} broke."}) + "\n" for i in range(5)))
    return path


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def common(lm, rm, prompts, out):
    options = ("--method", "pargs", "--max-new-tokens", 8, "--batch-size", 2, "--k", 4)
    return "--lm", lm, "--rm", rm, "--prompts", prompts, "--out", out, *options


def test_a_second_run_goes_on_after_the_rows_that_are_there(decode, lm, rm, prompts, tmp_path):
    out = tmp_path / "answers.jsonl"
    options = common(lm, rm, prompts, out)
    assert decode(*options)[0] == 0
    whole = rows(out)
    assert [row["id"] for row in whole] == [f"p{i}" for i in range(5)]
    assert set(whole[0]) == {
        "id", "prompt", "response", "finish_reason", "log_probability", "kl", "guide_reward", "tokens", "seconds",
        "sample", "options", "lm_tokens", "rm_tokens", "kl_is",
    }  # fmt: skip

    # Killed in the middle of writing the fourth row.
    lines = out.read_text().splitlines(keepends=True)
    out.write_text("".join(lines[:3]) + lines[3][:17])
    code, _, err = decode(*options)
    assert code == 0 and "3 of 5 answers are already there" in " ".join(err.split())
    again = rows(out)
    assert again[:3] == whole[:3]
    assert {row["id"]: row["response"] for row in again} == {row["id"]: row["response"] for row in whole}
    assert len(again) == 5

    before = out.read_bytes()
    assert decode(*options)[0] == 0
    assert out.read_bytes() == before

    code, _, err = decode(*options, "--seed", 1)
    assert code == 2 and "other options" in err
    assert out.read_bytes() == before


def test_answers_end_up_in_the_order_of_the_prompts(decode, lm, rm, tmp_path):
    """Also in files whose names look like the markup of a terminal."""
    path, out, trace = (tmp_path / name for name in ("prompts.jsonl", "answers[b].jsonl", "trace.jsonl"))
    prompts = [{"id": f"p{i}", "prompt": "Help " * (5 - i)} for i in range(5)]
    path.write_text("".join(json.dumps(row) + "\n" for row in prompts))
    options = (*common(lm, rm, path, out), "--n", 2, "--trace", trace)
    code, _, err = decode(*options)
    assert code == 0 and f"wrote 10 answers to {out}" in " ".join(err.split())
    files = [file.read_bytes() for file in (out, trace)]
    for file in (out, trace):
        assert [(row["id"], row["sample"]) for row in rows(file)] == [(f"p{i}", n) for i in range(5) for n in range(2)]

    # A run that is killed between the two files has only one of them in order.
    for file, content in zip((out, trace), files, strict=True):
        file.write_bytes(b"".join(reversed(content.splitlines(keepends=True))))
        assert decode(*options)[0] == 0
        assert [file.read_bytes() for file in (out, trace)] == files

    # What answers other prompts comes first.
    path.write_text(json.dumps({"id": "new", "prompt": "Hi"}) + "\n" + path.read_text().splitlines()[4] + "\n")
    assert decode(*options)[0] == 0
    expected = [(f"p{i}", n) for i in range(4) for n in range(2)] + [("new", 0), ("new", 1), ("p4", 0), ("p4", 1)]
    for file in (out, trace):
        assert [(row["id"], row["sample"]) for row in rows(file)] == expected


def test_prompts_are_cut_on_the_left_where_that_is_asked_for(decode, lm, prompts, tmp_path):
    """The answers are those of transformers to the prompt's last tokens, after BOS."""
    import torch
    from transformers import AutoModelForCausalLM

    texts = ["My lamp broke. " * 30, "My lamp broke."]
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    out = tmp_path / "answers.jsonl"
    options = ("--lm", lm, "--method", "greedy", "--prompts", prompts, "--out", out, "--max-new-tokens", 10)
    code, _, err = decode(*options)
    assert code == 2 and "context of 64 tokens; the option cut_prompts cuts it" in err
    code, _, err = decode(*options, "--cut-prompts")
    tokenizer = tiny_tokenizer()
    ids = tokenizer.encode_prompt(texts[0])
    assert code == 0
    assert f"1 of 2 prompts were cut on the left to fit, by at most {len(ids) - 54} tokens" in " ".join(err.split())
    kept = [ids[0], *ids[-53:]]
    with torch.inference_mode():
        model = AutoModelForCausalLM.from_pretrained(lm)
        answer = model.generate(torch.tensor([kept]), max_new_tokens=10, do_sample=False, pad_token_id=0)[0][54:]
    first, second = rows(out)
    assert first["response"] == tokenizer.decode_answer(kept, answer.tolist()) and first["prompt"] == texts[0]
    out.unlink()
    prompts.write_text(json.dumps({"prompt": texts[1]}) + "\n")
    assert decode(*options)[0] == 0
    assert rows(out)[0]["response"] == second["response"]


def test_an_answer_is_not_taken_for_that_of_another_prompt(decode, lm, rm, tmp_path):
    """Where no row has an id, line numbers are the ids, and another file has the same."""
    out = tmp_path / "answers.jsonl"
    for name, texts in {"a.jsonl": ("Hi", "My lamp broke."), "b.jsonl": ("Bye", "My lamp broke.")}.items():
        (tmp_path / name).write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    assert decode(*common(lm, rm, tmp_path / "a.jsonl", out))[0] == 0
    before = out.read_bytes()
    code, _, err = decode(*common(lm, rm, tmp_path / "b.jsonl", out))
    assert code == 2 and f"{out}: the row with the id '1' answers another prompt" in err.splitlines()[-1]
    assert out.read_bytes() == before

    # The same of a row from a file that was made with other options.
    made = [json.loads(line) for line in before.splitlines()]
    out.write_text("".join(json.dumps(row | {"options": "0123456789abcdef"}) + "\n" for row in made))
    code, _, err = decode(*common(lm, rm, tmp_path / "a.jsonl", out))
    assert code == 2 and "line 1 was not made with the options in" in err.splitlines()[-1]


@pytest.mark.parametrize(
    ("method", "words", "reason"),
    [
        ("greedy", ("--k", 5), "k: is not an option of greedy decoding, which takes the most likely token"),
        ("greedy", ("--temperature", 0.5), "temperature: is not an option of greedy decoding, which does not sample"),
        (
            "top_k",
            ("--weight", 2),
            "weight: is not an option of top-k sampling (Fan et al., 2018), which is not guided",
        ),
        ("pargs_greedy", ("--temperature", 2), "temperature: is not an option of PARGS-G"),
    ],
)
def test_a_number_that_does_not_apply_to_the_method_is_refused(decode, rm, method, words, reason):
    code, _, err = decode("--lm", "nowhere", "--rm", rm, "--method", method, "--prompt", "Hi", *words)
    assert code == 2 and err.splitlines()[-1].startswith(f"error: {reason}")


def test_one_prompt_is_answered_on_standard_output(decode, lm):
    """With what transformers answers, and nothing else."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(lm), AutoTokenizer.from_pretrained(lm)
    prompt = tokenizer("a b c", return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        ids = model.generate(prompt, max_new_tokens=10, do_sample=False, pad_token_id=0)[0]
    expected = tokenizer.decode(ids[prompt.shape[1] :])
    code, out, _ = decode("--lm", lm, "--method", "greedy", "--prompt", "a b c", "--max-new-tokens", 10)
    assert code == 0 and out == f"{expected}\n" and len(expected) > 12


def test_weights_in_int8_give_nearly_the_same_rewards(decode, lm, rm, prompts, tmp_path):
    """The reward model only judges here, so both runs have the same answers."""
    found = []
    for number, formats in enumerate([(), ("--rm-dtype", "int8")]):
        out = tmp_path / f"{number}.jsonl"
        assert decode(*common(lm, rm, prompts, out), "--method", "top_k", *formats)[0] == 0
        found.append({row["id"]: row for row in rows(out)})
    plain, int8 = ([found[i][f"p{n}"]["guide_reward"] for n in range(5)] for i in range(2))
    assert [row["response"] for row in found[0].values()] == [row["response"] for row in found[1].values()]
    assert plain != int8
    np.testing.assert_allclose(int8, plain, atol=0.05 * np.ptp(plain))


def test_answers_on_standard_output_come_in_the_order_of_the_prompts(decode, lm, rm, prompts, tmp_path):
    """Also those of several samples; more of them than an answers file has are added to it."""
    options = ("--lm", lm, "--rm", rm, "--prompts", prompts, "--method", "pargs", "--max-new-tokens", 6, "--limit", 2)
    written = tmp_path / "answers.jsonl"
    assert decode(*options, "--out", written)[0] == 0
    first = rows(written)
    assert decode(*options, "--out", written, "--n", 3, "--temperature", 1)[0] == 2  # another temperature
    code, _, err = decode(*options, "--out", written, "--n", 3)
    assert code == 0 and "2 of 6 answers are already there" in " ".join(err.split())
    assert rows(written)[::3] == first
    answers = {(row["id"], row["sample"]): row["response"] for row in rows(written)}
    assert len(set(answers.values())) == 6
    code, out, _ = decode(*options, "--n", 3)
    assert code == 0 and out == "".join(f"{answers[key]}\n" for key in sorted(answers))
    code, _, err = decode("--lm", lm, "--method", "greedy", "--prompt", "Hi", "--n", 2)
    assert code == 2 and "n: got 2, but greedy decoding does not sample, so all answers would be the same" in err


def test_without_arguments_methods_are_compared_on_the_demo(decode, rm, tmp_path):
    """With a given reward model and fewer prompts, the table shows the answers that were written."""
    out = tmp_path / "answers.jsonl"
    code, shown, _ = decode("--rm", rm, "--limit", 4, "--max-new-tokens", 12, "--out", out)
    assert code == 0
    written = rows(out)
    compared = {
        name: weight for name, weight in COMPARED.items() if name != "genarm"
    }  # the given model cannot guide it
    assert [row["method"] for row in written[::4]] == list(compared) and len(written) == 4 * len(compared)
    assert len({row["id"] for row in written}) == 4 == len({row["prompt"] for row in written})
    cells = {line.split()[0]: line.split() for line in shown.splitlines() if " ± " in line}
    for name, weight in compared.items():
        found = [row for row in written if row["method"] == name]
        truth = [demo.oracle(row["prompt"], row["response"]) for row in found]
        assert [row["true_reward"] for row in found] == truth
        expected = [name, Path(rm).name if METHODS[name].guided else "-", "-" if weight is None else f"{weight:g}"]
        expected += [f"{np.mean(truth):.2f}", "±", f"{np.std(truth, ddof=1) / 2:.2f}"]
        assert cells[name][:7] == [*expected, f"{np.mean([row['kl'] for row in found]):.1f}"]
    assert max(map(len, shown.splitlines())) <= 80
    if importlib.util.find_spec("matplotlib"):
        assert out.with_suffix(".png").stat().st_size > 10_000
    else:
        assert "it needs matplotlib" in shown
    assert {row["response"] for row in written if row["method"] == "greedy"} != {
        row["response"] for row in written if row["method"] == "pargs_greedy"
    }
    in_words = " ".join(shown.split())
    assert sum(" ".join(row["prompt"].split()) in in_words for row in written[:4]) == 2  # examples


def test_a_real_model_continues_a_story(decode):
    lm = SHARED / "models" / "stories260k"
    if not lm.is_dir():
        pytest.skip("needs ../shared/models/stories260k")
    code, out, _ = decode("--lm", lm, "--method", "greedy", "--prompt", "", "--max-new-tokens", 24)
    assert code == 0
    assert out.strip().startswith("Once upon a time, there was a little girl named Lily.")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--prompts", "{tmp}/nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["--prompts", "{tmp}/malformed.jsonl"], "malformed.jsonl"),
        (["--prompts", "{tmp}/empty.jsonl"], "empty.jsonl"),
        (["--max-new-tokens", "60"], "it exceeds the language model's context of 64 tokens"),
        (["--k", "9999"], "k: got 9999"),
        (["--rm", "{lm}"], "no reward head"),
        (["--rm", "{tmp}"], "no config.json"),
        (["--lm", "{tmp}/strange"], "architecture 'rwkv' is not known"),
        (["--out", "/proc/answers.jsonl"], "cannot be written"),
        (["--out", "{tmp}/foreign.jsonl"], "was not written by decode.py"),
        (["--weight", "1", "2"], "weight: got 2 weights for 1"),
        (["--mesh", "gpu-77"], "gpu-77"),
    ],
)
def test_unusable_input_is_refused_in_one_line(decode, lm, rm, prompts, tmp_path, changes, message):
    (tmp_path / "malformed.jsonl").write_text('{"prompt": \n')
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "strange").mkdir()
    (tmp_path / "strange" / "config.json").write_text('{"model_type": "rwkv"}')
    (tmp_path / "foreign.jsonl").write_text('{"mine": 1}\n')
    changes = [part.format(tmp=tmp_path, lm=lm) for part in changes]
    code, _, err = decode(*common(lm, rm, prompts, tmp_path / "out.jsonl"), *changes)
    last = err.splitlines()[-1]
    assert code == 2 and last.startswith("error: ") and message in last
    assert (tmp_path / "foreign.jsonl").read_text() == '{"mine": 1}\n'
    assert not (tmp_path / "out.jsonl").exists() or not (tmp_path / "out.jsonl").read_text()


def test_a_guided_method_needs_a_reward_model(decode, lm):
    code, _, err = decode("--lm", lm, "--method", "pargs", "--prompt", "Hi")
    assert code == 2 and "needs a reward model; give --rm PATH" in err


def test_a_page_explains_the_answers_beside_those_without_guidance(decode, lm, rm, prompts, tmp_path):
    page = tmp_path / "page.html"
    words = ("--lm", lm, "--rm", rm, "--prompts", prompts, "--max-new-tokens", 6, "--k", 4, "--limit", 2)
    code, printed, _ = decode(*words, "--method", "pargs", "--explain", page)
    assert code == 0
    data = page.read_text().split('id="trace">')[1].split("</script>")[0]
    answers = json.loads(data)["answers"]
    assert "".join(answer["guided"]["response"] + "\n" for answer in answers) == printed
    # The unguided answers are those of top-k sampling with the same seed, and have the guide's rewards all the same.
    code, unguided, _ = decode(*words, "--method", "top_k")
    assert code == 0 and unguided != printed
    assert "".join(answer["unguided"]["response"] + "\n" for answer in answers) == unguided
    assert all(len(token["rewards"]) == 1 for answer in answers for token in answer["unguided"]["tokens"])

    page.unlink()
    code, _, err = decode(*words, "--method", "pargs", "--explain", page, "--out", tmp_path / "out.jsonl")
    assert code == 2 and "--explain: cannot be used with --out" in err and not page.exists()
    code, _, err = decode("--explain", page)
    assert code == 2 and "--explain: needs --method NAME" in err


def test_one_method_on_the_demo_is_summed_up(decode):
    code, out, err = decode("--method", "greedy", "--limit", 3, "--max-new-tokens", 4)
    assert code == 0 and len(out.splitlines()) >= 3
    *config, summary = err.splitlines()
    # Greedy answers of four tokens are all the beginning of a plain sentence.
    assert re.fullmatch(r"3 answers: true reward -?\d+\.\d\d ± \d+\.\d\d, KL \d+\.\d nats, [\d,]+ tokens/s", summary)
    shown = "\n".join(config)
    assert "method: greedy" in shown and "max_new_tokens: 4" in shown and "batch_size" not in shown


def test_the_numbers_in_effect_are_shown_and_saved(decode, lm, rm, prompts, tmp_path):
    out = tmp_path / "answers.jsonl"
    words = ("--lm", lm, "--rm", rm, "--prompts", prompts, "--out", out, "--max-new-tokens", 2, "--limit", 1)
    code, _, err = decode(*words, "--method", "pargs", "--weight", 3)
    assert code == 0 and "in effect: k 10, weight 3, temperature 1" in err
    assert "# in effect: k 10, weight 3, temperature 1" in (tmp_path / "answers.jsonl.config.yaml").read_text()
    assert decode(*words, "--method", "pargs", "--weight", 3)[0] == 0


def comparison_answer(number, method):
    prompt = "Customer: Hi, this is Maria. My kettle arrived broken. What can I do?\nAgent:"
    return Answer(f"p{number}", prompt, f"{method} {number}", "stop", -1.0, 0.5, (), 3, 0.5)


def test_a_stopped_comparison_goes_on_after_its_last_whole_method(tmp_path):
    path, config = tmp_path / "answers.jsonl", DecodeConfig(out="answers.jsonl")
    prompts = [Prompt(f"p{number}", "My lamp broke.") for number in range(3)]
    made = {method: [comparison_answer(number, method) for number in range(3)] for method in ("greedy", "top_k")}
    with ComparisonFile(path, config, prompts) as file:
        assert file.found == {}
        for method, answers in made.items():
            file.write(method, answers)
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    for kept, found in ((6, ["greedy", "top_k"]), (5, ["greedy"]), (3, ["greedy"]), (2, [])):
        path.write_bytes(b"".join(lines[:kept]) + b'{"method": "cut o')
        with ComparisonFile(path, config, prompts) as file:
            assert file.found == {method: made[method] for method in found}
            assert path.read_bytes() == b"".join(lines[: 3 * len(found)])
            for method in made.keys() - set(found):
                file.write(method, made[method])
        path.write_bytes(whole)
    for other, words in ((replace(config, seed=1), "with other options"), (config, "answer other prompts")):
        with pytest.raises(InputError, match=words):
            ComparisonFile(path, other, prompts[1:])
    path.write_bytes(whole + b"{}\n")
    with pytest.raises(InputError, match="line 7: is not an answer of a comparison"):
        ComparisonFile(path, config, prompts)
    (tmp_path / "answers.jsonl.config.yaml").unlink()
    with pytest.raises(InputError, match="was not written by decode"):
        ComparisonFile(path, config, prompts)


def test_a_comparison_that_cannot_be_written_decodes_nothing(decode, rm):
    code, _, err = decode("--rm", rm, "--out", "/proc/answers.jsonl")
    assert code == 2 and err.splitlines() == [
        "error: /proc/answers.jsonl: cannot be written (No such file or directory); give another --out"
    ]
