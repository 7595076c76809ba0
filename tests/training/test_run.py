"""Whole training runs on a tiny checkpoint: what they leave behind, how they resume, and what they refuse."""

import dataclasses
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from pargs_jax.commands import demo
from pargs_jax.commands import train as command
from pargs_jax.config import DataConfig, LoraConfig, ModelConfig, ObjectiveConfig, OptimConfig, TrainConfig
from pargs_jax.config_files import from_mapping, read_yaml, to_short_yaml
from pargs_jax.data.batches import Batches
from pargs_jax.errors import InputError
from pargs_jax.models.hf import load_model, save_model
from pargs_jax.testing import tiny_model, tiny_tokenizer
from pargs_jax.training import program
from pargs_jax.training.checkpoint import Checkpoints
from pargs_jax.training.metrics_log import MetricsFile
from pargs_jax.training.step import TrainState

pytestmark = pytest.mark.usefixtures("compiled_steps_are_reused")

REPOSITORY = Path(__file__).parents[2]
SHARED = REPOSITORY.parent / "shared"
STEPS = 24
PREFERENCE_METRICS = {
    "loss", "accuracy", "margin", "reward_mean", "reward_min", "reward_max",
    "accuracy_10", "accuracy_25", "accuracy_50", "accuracy_75", "accuracy_100",
}  # fmt: skip
TRAIN_METRICS = PREFERENCE_METRICS | {
    "gradient_norm", "learning_rate", "tokens_per_second", "data_wait_share", "padding_share",
}  # fmt: skip
WORDS = ("lamp", "kettle", "chair", "phone", "table", "radio", "clock", "fan")
PAIRS = [
    {"prompt": f"Customer: my {word} broke\nAgent:", "chosen": f" Sorry, {word} sent.", "rejected": f" No {word}."}
    for word in WORDS
]
BAD_ROWS = [{"prompt": "no answers"}, {"prompt": "alike", "chosen": "a", "rejected": "a"}]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Eight pairs, and two rows that are not pairs."""
    return write_rows(tmp_path_factory.mktemp("data") / "pairs.jsonl", PAIRS[:4] + BAD_ROWS + PAIRS[4:])


@pytest.fixture
def settings(lm, pairs, tmp_path):
    """Makes a config of a run into tmp_path/run, with all that the arguments do not change."""
    return partial(settings_of, lm, pairs, out=str(tmp_path / "run"))


def settings_of(lm, pairs, **changes):
    defaults = {
        "steps": STEPS,
        "batch_size": 4,
        "max_length": 48,
        "eval_every": 12,
        "save_every": 3,
        "log_every": 1,
        "model": ModelConfig(init=str(lm)),
        "data": DataConfig(train=pairs, eval=pairs),
        "optim": OptimConfig(lr=3e-3, weight_decay=0.1),
    }
    return TrainConfig(**defaults | changes)


def train(config):
    """Runs it, and returns what it printed."""
    printed = io.StringIO()
    assert command.train(config, Console(file=printed, width=10_000)) == Path(config.out)
    return printed.getvalue()


def refused(config):
    with pytest.raises(InputError) as caught:
        train(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def metrics_of(folder, split="train"):
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["split"] == split]


def saved_steps(folder):
    return sorted(int(path.name) for path in (Path(folder) / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def finished(lm, pairs, tmp_path_factory):
    """The config of a run that went from start to end, and what it printed."""
    config = settings_of(lm, pairs, out=str(tmp_path_factory.mktemp("runs") / "finished"))
    return config, train(config)


def test_a_run_leaves_its_config_metrics_checkpoints_and_model(finished):
    config, printed = finished
    out = Path(config.out)
    entries = {
        ".lock",
        "config.yaml",
        "data.json",
        "metrics.jsonl",
        "checkpoints",
        "model",
        "bad_rows.train.jsonl",
        "bad_rows.eval.jsonl",
    }
    assert {path.name for path in out.iterdir()} == entries
    used = dataclasses.replace(config, data=dataclasses.replace(config.data, format="plain"))
    assert from_mapping(TrainConfig, read_yaml(out / "config.yaml"), "config.yaml") == used
    assert saved_steps(out) == [STEPS - 3, STEPS]
    assert printed.startswith(f"{to_short_yaml(used)}(all options are in {out / 'config.yaml'})\n")
    os.umask(umask := os.umask(0))
    assert (out / "model" / "model.safetensors").stat().st_mode & 0o777 == 0o666 & ~umask

    lines = metrics_of(out)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert all(line.keys() == TRAIN_METRICS | {"step", "split"} for line in lines)
    assert all(math.isfinite(line[name]) for line in lines for name in TRAIN_METRICS)
    held_out = metrics_of(out, "eval")
    assert [line["step"] for line in held_out] == [12, STEPS]
    assert all(line.keys() == PREFERENCE_METRICS | {"step", "split"} for line in held_out)
    rates = [line["learning_rate"] for line in lines]
    assert rates[0] == 0 and max(rates) == pytest.approx(3e-3) and rates.index(max(rates)) == 1  # 5 % of 24 steps


def test_rows_that_cannot_be_used_are_written_beside_the_run(finished):
    config, printed = finished
    for split in ("train", "eval"):
        path = Path(config.out) / f"bad_rows.{split}.jsonl"
        bad = [json.loads(line) for line in path.read_text().splitlines()]
        assert [(row["line"], row["row"]) for row in bad] == [(5, BAD_ROWS[0]), (6, BAD_ROWS[1])]
        assert "chosen is missing" in bad[0]["reason"] and "are the same" in bad[1]["reason"]
        assert f"({split}): 2 of 10 rows cannot be used; see {path}" in printed


def test_a_share_of_the_pairs_is_held_out(settings, pairs):
    printed = train(settings(steps=1, data=DataConfig(train=pairs, held_out=0.3)))
    (train_rows, held_out) = (int(n) for n in re.findall(r"\((?:train|eval)\): (\d) of \1 rows are used", printed))
    assert train_rows + held_out == len(PAIRS) and held_out > 0 and "step 1: held out: loss" in printed


def test_a_model_learns_eight_pairs_by_heart_at_every_prefix(finished):
    config, _ = finished
    losses = [line["loss"] for line in metrics_of(config.out)]
    assert losses[0] == pytest.approx(math.log(2), abs=0.2)
    before, after = metrics_of(config.out, "eval")
    assert after["loss"] < before["loss"] < losses[0]
    assert after["loss"] < 0.1 and after["accuracy"] == after["accuracy_25"] == 1.0


def answers_of_pairs():
    tokenizer = tiny_tokenizer()
    for pair in PAIRS:
        for answer in (pair["chosen"], pair["rejected"]):
            yield [*tokenizer.encode_prompt(pair["prompt"]), *tokenizer.encode_answer(answer), tokenizer.eos_id]


def test_the_exported_model_gives_the_rewards_of_the_run_here_and_in_torch(finished):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config, _ = finished
    folder = Path(config.out) / "model"
    loaded = load_model(folder, "reward")
    assert not loaded.new_head
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    texts = list(answers_of_pairs())
    length = max(map(len, texts))
    tokens = np.array([text + [0] * (length - len(text)) for text in texts])
    hidden = jax.jit(loaded.model.encode)(loaded.params, tokens)
    last = hidden[jnp.arange(len(texts)), jnp.array(list(map(len, texts))) - 1]
    rewards = np.asarray(loaded.model.rewards(loaded.params, last))
    with torch.no_grad():
        expected = [theirs(torch.tensor([text])).logits.item() for text in texts]
    np.testing.assert_allclose(rewards, expected, atol=2e-4)
    evaluated = metrics_of(config.out, "eval")[-1]
    assert evaluated["reward_mean"] == pytest.approx(rewards.mean(), abs=1e-4)
    assert evaluated["margin"] == pytest.approx((rewards[::2] - rewards[1::2]).mean(), abs=1e-4)


def stop_before(monkeypatch, step, error):
    """The run ends by `error` when it asks for the batch of `step` (from 1)."""
    batch = Batches.batch

    def failing(self, index):
        if index == step - 1:
            raise error
        return batch(self, index)

    monkeypatch.setattr(Batches, "batch", failing)


@pytest.mark.parametrize(
    ("error", "saved", "changes"),
    [
        (KeyboardInterrupt(), 4, {}),
        (MemoryError("killed"), 3, {}),
        (MemoryError("killed"), 3, {"pack": 64, "optim": OptimConfig(accumulation=2)}),
    ],
    ids=["stopped", "killed", "packed and killed"],
)
def test_a_resumed_run_ends_as_one_that_never_stopped(finished, settings, monkeypatch, tmp_path, error, saved, changes):
    config, whole = settings(**changes), Path(finished[0].out)
    if changes:
        whole = tmp_path / "whole"
        train(dataclasses.replace(config, out=str(whole)))
    with monkeypatch.context() as patch:
        stop_before(patch, 5, error)
        with pytest.raises(type(error)):
            train(config)
    assert max(saved_steps(config.out)) == saved
    assert [line["step"] for line in metrics_of(config.out)] == [1, 2, 3, 4]
    assert not (Path(config.out) / "model").exists()

    printed = train(dataclasses.replace(config, resume=True))
    assert f"resuming after step {saved} of {STEPS}" in printed
    weights = [(folder / "model" / "model.safetensors").read_bytes() for folder in (Path(config.out), whole)]
    assert weights[0] == weights[1]
    for split in ("train", "eval"):
        resumed, uninterrupted = (
            [{**line, "tokens_per_second": None, "data_wait_share": None} for line in metrics_of(folder, split)]
            for folder in (config.out, whole)
        )
        assert resumed == uninterrupted


def test_additions_to_a_frozen_model_are_resumed_and_exported_in_it(settings, lm, tmp_path):
    lora = LoraConfig(rank=2, layers="query|value")
    config = settings(steps=6, lora=lora, optim=OptimConfig(lr=3e-2, schedule="constant"))
    train(dataclasses.replace(config, steps=3))
    train(dataclasses.replace(config, resume=True))
    whole = dataclasses.replace(config, out=str(tmp_path / "whole"))
    train(whole)
    exported = [load_model(Path(folder) / "model", "reward").params for folder in (config.out, whole.out)]
    jax.tree.map(np.testing.assert_array_equal, *exported)
    before = load_model(lm, "reward").params
    changed = jax.tree.map(lambda a, b: bool(jnp.abs(a - b).max() > 0), exported[0], before)
    layers = changed["backbone"]["layers"]
    assert [name for name, part in layers.items() if part.get("kernel")] == ["query", "value"]
    assert not changed["backbone"]["embed"]["embedding"]
    assert metrics_of(whole.out)[-1]["loss"] < metrics_of(whole.out)[0]["loss"]


def test_ctrl_c_in_the_middle_of_a_step_loses_nothing(settings, monkeypatch):
    make = program.make_train_step

    def make_interrupted(*args, **options):
        step = make(*args, **options)

        def interrupted(state, *rest):
            number = int(state.step) + 1
            result = step(state, *rest)
            if number == 5:
                signal.raise_signal(signal.SIGINT)
            return result

        return interrupted

    monkeypatch.setattr(program, "make_train_step", make_interrupted)
    config = settings()
    with pytest.raises(KeyboardInterrupt):
        train(config)
    assert max(saved_steps(config.out)) == 5


def test_resuming_a_finished_run_only_exports_it_again(finished):
    config, _ = finished
    exported = Path(config.out) / "model" / "model.safetensors"
    before, lines = exported.read_bytes(), metrics_of(config.out)
    exported.unlink()
    train(dataclasses.replace(config, resume=True))
    assert exported.read_bytes() == before
    assert metrics_of(config.out) == lines


def test_metrics_after_the_checkpoint_and_torn_lines_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, 0)
    for step in (1, 2, 3):
        file.write(step, "train", {"loss": 0.5})
    with path.open("a") as torn:
        torn.write('{"step": 4, "spl')
    MetricsFile(path, 2).write(3, "train", {"loss": 0.25})
    assert [(line["step"], line["loss"]) for line in metrics_of(tmp_path)] == [(1, 0.5), (2, 0.5), (3, 0.25)]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 1}, ["--seed 0", "this one has 1"]),
        ({"optim": OptimConfig(lr=1e-3, weight_decay=0.1)}, ["--optim.lr 0.003", "this one has 0.001"]),
        ({"objective": ObjectiveConfig(name="bt")}, ['--objective.name "partial_bt"', 'this one has "bt"']),
        ({"pack": 64}, ["--pack 0", "this one has 64"]),
    ],
)
def test_a_run_is_not_resumed_with_other_options(finished, changes, named):
    message = refused(dataclasses.replace(finished[0], resume=True, **changes))
    assert all(words in message for words in named), message


def test_existing_files_are_not_overwritten(finished, settings, tmp_path):
    config, _ = finished
    before = {path: path.stat().st_mtime_ns for path in Path(config.out).rglob("*")}
    assert "resume it" in refused(config)
    assert before == {path: path.stat().st_mtime_ns for path in Path(config.out).rglob("*")}

    foreign = tmp_path / "papers"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("years of work")
    for resume in (False, True):
        assert "does not hold a run" in refused(settings(out=str(foreign), resume=resume))
    assert [path.name for path in foreign.iterdir()] == ["thesis.tex"]

    thesis = foreign / "thesis.tex"
    assert str(thesis) in refused(settings(out=str(thesis)))
    assert "cannot be written (Not a directory)" in refused(settings(out=str(thesis / "run")))
    assert thesis.read_text() == "years of work"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_length": 65}, "--max-length: got 65, but {lm} reads at most 64 tokens"),
        ({"data": DataConfig(train="nowhere.jsonl")}, "nowhere.jsonl: no such file"),
        ({"data": DataConfig(train="{tmp}/empty.jsonl")}, "empty.jsonl: no rows in it"),
        ({"data": DataConfig(train="{tmp}/bad.jsonl")}, "none of its 2 rows can be used; line 1: chosen is missing"),
        ({"data": DataConfig(train="{pairs}", eval="{tmp}/empty.jsonl")}, "empty.jsonl: no rows in it"),
        ({"data": DataConfig(train="{pairs}", format="xml")}, '--data.format: got "xml", must be one of hh, tldr'),
        ({"data": DataConfig(train="{pairs}", format="chat")}, "has no chat template"),
        ({"model": ModelConfig(init="{tmp}")}, "no config.json"),
        ({"batch_size": 4, "optim": OptimConfig(accumulation=3)}, "--batch-size: got 4, must be a multiple"),
        ({"pack": 40}, "--pack: got 40, must be at least --max-length (48)"),
        (
            {"pack": 64, "objective": ObjectiveConfig(name="rloo", max_new_tokens=8)},
            "--pack: got 64, but rloo trains on answers that it samples",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_unusable_input_is_refused_in_one_line(settings, lm, pairs, tmp_path, changes, message):
    write_rows(tmp_path / "empty.jsonl", [])
    write_rows(tmp_path / "bad.jsonl", BAD_ROWS)

    def filled(value):
        if dataclasses.is_dataclass(value):
            names = [field.name for field in dataclasses.fields(value)]
            return dataclasses.replace(value, **{name: filled(getattr(value, name)) for name in names})
        return value.format(lm=lm, pairs=pairs, tmp=tmp_path) if isinstance(value, str) else value

    config = settings(**{name: filled(value) for name, value in changes.items()})
    assert filled(message) in refused(config)
    # The folder is not spent: the same command with the mistake mended must work.
    assert filled(message) in refused(config)
    assert not (Path(config.out) / "config.yaml").exists()


def test_a_tokenizer_larger_than_the_model_is_refused(settings, tmp_path):
    model, params = tiny_model("llama")
    save_model(tmp_path / "small", model, params)
    tiny_tokenizer().save(tmp_path / "small")
    message = refused(settings(model=ModelConfig(init=str(tmp_path / "small"))))
    assert str(tiny_tokenizer().vocab_size) in message and "61" in message


def test_a_nan_loss_ends_the_run_and_keeps_the_previous_checkpoint(settings):
    config = settings(
        save_every=1, keep=5, optim=OptimConfig(lr=1e38, clip=0.0, warmup=0.1), objective=ObjectiveConfig()
    )
    message = refused(config)
    steps = saved_steps(config.out)
    assert f"the checkpoint of step {steps[-1]} is safe" in message
    assert message.startswith(f"step {steps[-1] + 1}: the loss is")
    assert len(metrics_of(config.out)) == steps[-1]
    assert not (Path(config.out) / "model").exists()


def test_a_language_model_is_tuned_on_the_demo(settings, monkeypatch):
    monkeypatch.setattr(demo, "HELD_OUT_PAIRS", 4)
    config = settings(
        steps=None,
        epochs=1.5,
        max_length=64,
        data=DataConfig(demo_pairs=8),
        objective=ObjectiveConfig(name="sft"),
        dtype="bfloat16",
    )
    printed = train(config)
    assert [line["step"] for line in metrics_of(config.out)] == [1, 2, 3]
    assert [line["step"] for line in metrics_of(config.out, "eval")] == [3]
    assert "demo (train): 8 of 8 rows" in printed and "demo (eval): 4 of 4 rows" in printed
    exported = load_model(Path(config.out) / "model", "vocabulary")
    start = load_model(config.model.init, "vocabulary")
    assert {x.dtype for x in jax.tree.leaves(exported.params)} == {jnp.dtype("float32")}
    assert not np.allclose(exported.params["head"]["linear"]["kernel"], start.params["head"]["linear"]["kernel"])
    assert exported.eos_ids == start.eos_ids == (2,)


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the model and the data in ../shared")
def test_hh_trains_end_to_end(settings):
    pairs = str(SHARED / "data" / "hh_harmless.test.jsonl.gz")
    config = settings(
        model=ModelConfig(init=str(SHARED / "models" / "stories260k")),
        data=DataConfig(train=pairs, format="hh"),
        steps=2,
    )
    printed = train(config)
    assert "475 rows" in printed
    assert all(math.isfinite(line["loss"]) for line in metrics_of(config.out))
    assert len(metrics_of(config.out)) == 2 and not metrics_of(config.out, "eval")
    assert not load_model(config.out, "reward").new_head


def test_a_checkpoint_of_another_model_is_not_restored(finished):
    out = Path(finished[0].out)
    other = TrainState({"w": jnp.zeros(())}, (), jnp.zeros((), jnp.int32))
    with Checkpoints(out / "checkpoints", 2) as checkpoints, pytest.raises(InputError) as caught:
        checkpoints.restore(other, print)
    assert str(caught.value).startswith(f"{out}/checkpoints/{STEPS}: not a checkpoint of this run's model")


def test_the_command_ends_with_one_line_and_code_2_for_a_bad_option(tmp_path):
    ended = subprocess.run(
        [sys.executable, str(REPOSITORY / "train.py"), "--optim.lr", "-1", "--out", "run"],
        capture_output=True, text=True, cwd=tmp_path, timeout=120, env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    assert ended.returncode == 2
    assert ended.stderr == "error: --optim.lr: got -1.0, must be a finite number, above 0\n"
    assert ended.stdout == "" and not list(tmp_path.iterdir())
