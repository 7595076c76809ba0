"""Objectives whose models guide a method: from the command's options to answers that the exported model guides."""

import dataclasses
import io
import json
import sys
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from rich.console import Console

from pargs_jax.commands import doors
from pargs_jax.commands import train as command
from pargs_jax.config import DataConfig, LoraConfig, ModelConfig, ObjectiveConfig, OptimConfig, TrainConfig
from pargs_jax.errors import InputError
from pargs_jax.models.hf import load_model
from pargs_jax.models.preference_lora import with_preferences
from pargs_jax.testing import tiny_tokenizer

pytestmark = pytest.mark.usefixtures("compiled_steps_are_reused")

WORDS = ("lamp", "kettle", "chair", "phone", "table", "radio", "clock", "fan")
GOOD, BAD = " Sorry, sent.", " No, never."


def prompt_about(word):
    return f"Customer: my {word} broke\nAgent:"


def make_config(folder, lm, rows, **changes):
    """The config of a short run in a folder, which also gets the file of rows."""
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {
        "steps": 40,
        "batch_size": 4,
        "max_length": 48,
        "log_every": 1,
        "model": ModelConfig(init=str(lm)),
        "data": DataConfig(train=str(path), eval=str(path)),
        "optim": OptimConfig(lr=1e-2, schedule="constant", warmup=0.0),
        "out": str(folder / "run"),
    }
    return TrainConfig(**options | changes)


@pytest.fixture
def settings(lm, tmp_path):
    """Makes a config of a short run on rows, with what the arguments change."""
    return partial(make_config, tmp_path, lm)


@pytest.fixture(scope="module")
def speaker(lm, tmp_path_factory):
    """A language model that learned to give either answer."""
    config = make_config(
        tmp_path_factory.mktemp("speaker"), lm, answers(), objective=ObjectiveConfig(name="sft"), steps=60
    )
    train(config)
    return f"{config.out}/model"


@pytest.fixture(scope="module")
def judge(speaker, tmp_path_factory):
    """A scalar reward model that prefers one of them."""
    config = make_config(tmp_path_factory.mktemp("judge"), speaker, pairs())
    train(config)
    return f"{config.out}/model"


def train(config, printed=None):
    """Runs it, and returns the losses of its steps and what was last evaluated."""
    command.train(config, Console(file=printed or io.StringIO(), width=999))
    lines = [json.loads(line) for line in (Path(config.out) / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["split"] == "train"], lines[-1]


def check_that_it_resumes(config, losses):
    """A run that is stopped and resumed has the losses of one that was not."""
    first = dataclasses.replace(config, steps=3, out=f"{config.out}-stopped")
    train(first)
    resumed, _ = train(dataclasses.replace(first, steps=6, resume=True))
    assert resumed == losses[:6]


@pytest.fixture
def decode(lm, tmp_path, monkeypatch):
    """Answers the prompts from the command line with a run's model as the reward model."""

    def run(method, rm, *words, lm=lm):
        prompts, out = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
        rows = [{"id": word, "prompt": prompt_about(word)} for word in WORDS]
        prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
        out.unlink(missing_ok=True)
        options = ("--max-new-tokens", 8, "--prompts", prompts, "--out", out, *words)
        monkeypatch.setattr(
            sys, "argv", ["decode.py", *map(str, ("--lm", lm, "--rm", rm, "--method", method, *options))]
        )
        doors.decode()
        return [json.loads(line) for line in out.read_text().splitlines()]

    return run


def log_probs(model, params, answers):
    """The log-probability of the answers to the first prompt under a language model."""
    tokenizer = tiny_tokenizer()
    prompt = tokenizer.encode_prompt(prompt_about(WORDS[0]))
    found = []
    for answer in answers:
        ids = [*tokenizer.encode_answer(answer), tokenizer.eos_id]
        text = np.asarray([[*prompt, *ids]], np.int32)
        scores = jax.nn.log_softmax(model.logits(params, model.encode(params, text)))[0, len(prompt) - 1 : -1]
        found.append(float(scores[np.arange(len(ids)), ids].sum()))
    return np.array(found)


def labelled_pairs():
    """The first objective wants one of the answers, the second the other one."""
    for index, word in enumerate(WORDS):
        chosen, rejected = (GOOD, BAD) if index % 2 else (BAD, GOOD)
        yield {
            "prompt": prompt_about(word), "chosen": chosen, "rejected": rejected, "labels": [index % 2, 1 - index % 2]
        }  # fmt: skip


def test_parm_follows_the_preference_vector(settings, decode, lm):
    objective = ObjectiveConfig(name="parm", beta=0.5)
    config = settings(labelled_pairs(), objective=objective, steps=60)
    losses, evaluation = train(config)
    assert np.mean(losses[-10:]) < 0.8 * losses[0] and evaluation["accuracy"] > 0.65

    found = load_model(f"{config.out}/model", "vocabulary")
    base = load_model(lm, "vocabulary").params["backbone"]["layers"]
    trained = found.params["backbone"]["layers"]
    np.testing.assert_array_equal(trained["query"]["kernel"], base["query"]["kernel"])
    assert "addition" not in trained["down"]
    gains = {}
    for name, vector in {"first": [1.0, 0.0], "second": [0.0, 1.0]}.items():
        params = with_preferences(found.params, np.array([vector], np.float32))
        good, bad = log_probs(found.model, params, (GOOD, BAD))
        gains[name] = good - bad
    assert gains["first"] > 1 and gains["second"] < -1

    rows = {name: decode("parm", config.out, "--preference", *vector, "--weight", 1) for name, vector in
            {"first": (1, 0), "second": (0, 1)}.items()}  # fmt: skip
    assert all(row["kl"] > 0 and row["guide_reward"] < 0 for found in rows.values() for row in found)
    assert rows["first"][0]["response"] != rows["second"][0]["response"]
    check_that_it_resumes(config, losses)


def test_parm_refuses_rows_without_its_labels(settings, tmp_path):
    rows = [*labelled_pairs()]
    bad = [rows[0] | {"labels": [1]}, rows[1] | {"labels": [1, 1.5]}, {**rows[2], "labels": None}]
    config = settings([*rows, *bad], objective=ObjectiveConfig(name="parm"), steps=1)
    folder = command.train(config, Console(file=io.StringIO()))
    refused = [json.loads(line)["reason"] for line in (folder / "bad_rows.train.jsonl").read_text().splitlines()]
    assert refused == [
        "labels: got 1, must be 2, one for each objective (objective.labels)",
        "labels: got [1.0, 1.5], each must be from 0 to 1",
        "labels is missing; the row has prompt, chosen, rejected, labels",
    ]
    model = settings(rows, model=ModelConfig(init=f"{folder}/model"), objective=ObjectiveConfig(name="sft"))
    with pytest.raises(InputError, match=r"--model.init: .* takes a preference vector; start from a language model"):
        command.train(dataclasses.replace(model, out=str(tmp_path / "other")), Console(file=io.StringIO()))
    relabelled = [{**row, "labels": row["labels"][::-1]} for row in rows]
    other = settings([*relabelled, *bad], objective=ObjectiveConfig(name="parm"), steps=2, resume=True)
    with pytest.raises(InputError, match="its tokenised rows differ"):
        command.train(other, Console(file=io.StringIO()))


def pairs():
    for word in WORDS:
        yield {"prompt": prompt_about(word), "chosen": GOOD, "rejected": BAD}


def test_farma_learns_a_table_that_guides(settings, decode):
    """And its two losses alternate by the number of the step, before and after a restart."""
    config = settings(pairs(), objective=ObjectiveConfig(name="farma", phase_steps=2), steps=80)
    losses, evaluation = train(config)
    assert evaluation["accuracy"] == 1 and evaluation["full_loss"] < 0.1
    logged = [json.loads(line) for line in (Path(config.out) / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in logged if line["split"] == "train"]
    for number, line in enumerate(steps):
        assert line["loss"] == pytest.approx(line[("full_loss", "consistency")[number // 2 % 2]], rel=1e-5)
    assert steps[-1]["consistency"] < steps[0]["consistency"] / 4 and evaluation["spread"] > 0.1
    guided, unguided = (decode("farma", config.out, "--weight", weight, "--k", 640) for weight in (30, 0))
    for with_guide, without in zip(guided, unguided, strict=True):
        assert with_guide["kl"] > 1 and without["kl"] == pytest.approx(0, abs=1e-3)
        assert with_guide["guide_reward"] > without["guide_reward"]
    check_that_it_resumes(config, losses)


def answers():
    for word in WORDS:
        for text in (GOOD, BAD):
            yield {"prompt": prompt_about(word), "response": text}


def share_of_good(rows):
    return np.mean([row["response"] == GOOD for row in rows])


def test_a_table_learns_from_a_reward_model_and_guides(speaker, judge, decode, tmp_path):
    objective = ObjectiveConfig(name="distill", teacher=judge, k=4)
    config = make_config(tmp_path, speaker, answers(), objective=objective, steps=60)
    losses, evaluation = train(config)
    assert np.mean(losses[-5:]) < losses[0] / 10 and evaluation["accuracy"] > 0.6
    guided, unguided = (decode("farma", config.out, "--weight", w, "--k", 4, lm=speaker) for w in (2, 0))
    assert share_of_good(guided) > 0.9 > share_of_good(unguided)

    def refused(source, message, **changes):
        objective = ObjectiveConfig(name="distill", teacher=str(source))
        with pytest.raises(InputError, match=message):
            train(dataclasses.replace(config, objective=objective, out=str(tmp_path / "refused"), **changes))

    refused(speaker, "--objective.teacher: .* has a vocabulary head, must be a reward model with a scalar head")
    refused(tmp_path / "no", "no such folder")
    refused(judge, "--max-length: got 65, but .* reads at most 64 tokens", max_length=65)


def test_a_twist_learns_from_samples_and_guides_particles(speaker, judge, decode, tmp_path):
    samples = decode("top_p", judge, "--top-p", 1, "--n", 9, lm=speaker)
    assert 0.2 < share_of_good(samples) < 0.8
    objective = ObjectiveConfig(name="ctl", n=4)
    config = make_config(tmp_path, speaker, samples, objective=objective, lora=LoraConfig(rank=4), steps=60)
    printed = io.StringIO()
    losses, evaluation = train(config, printed)
    assert "8 left out because their prompts have too few others" in printed.getvalue()
    assert np.mean(losses[-5:]) < losses[0] and evaluation["effective_samples"] < 4
    guided = decode("smc", config.out, "--search.particles", 4, lm=speaker)
    assert share_of_good(guided) > 0.9
    more = dataclasses.replace(config, objective=ObjectiveConfig(name="ctl", n=10), out=f"{config.out}-10")
    with pytest.raises(InputError, match=r"no prompt has 10 scored answers \(objective.n\), the most are 9"):
        train(more)


@pytest.mark.parametrize(
    ("objective", "changes", "expected"),
    [
        (
            ObjectiveConfig(name="parm"),
            {"data": DataConfig(train="f.jsonl"), "lora": LoraConfig(rank=4)},
            "--lora.rank: got 4, but parm trains low-rank additions of its own; leave it out (--objective.rank is "
            "their rank)",
        ),
        (
            ObjectiveConfig(name="parm", labels=3),
            {},
            "--data.train: parm needs pairs with 3 labels, but the demo's have none; give a file whose rows have "
            "prompt, chosen, rejected and labels",
        ),
        (
            ObjectiveConfig(name="ctl", n=4),
            {},
            "--data.train: ctl needs 4 scored answers to each prompt, but the demo has one; write some (decode.py "
            "--method top_p --top-p 1 --n 4 --rm ... --out F.jsonl)",
        ),
    ],
)
def test_what_does_not_go_together_is_refused_before_a_folder_is_made(objective, changes, expected, tmp_path):
    with pytest.raises(InputError) as refused:
        command.train(TrainConfig(objective=objective, out=str(tmp_path / "run"), **changes))
    assert str(refused.value) == expected and not (tmp_path / "run").exists()
