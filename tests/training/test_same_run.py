"""A resumed run reads the rows that it began with, and warns if its schedule changes."""

import dataclasses
import io
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from pargs_jax.commands import demo
from pargs_jax.commands import train as command
from pargs_jax.config import DataConfig, ModelConfig, OptimConfig, TrainConfig
from pargs_jax.data.examples import Example, digest_of
from pargs_jax.demo import task
from pargs_jax.errors import InputError, InputWarning
from pargs_jax.training.same_run import warn_of_another_schedule

pytestmark = pytest.mark.usefixtures("compiled_steps_are_reused")


@pytest.fixture
def pairs(tmp_path):
    path = tmp_path / "pairs.jsonl"

    def write(*words):
        rows = [
            {"prompt": f"My {word} broke.", "chosen": f" Sorry, {word} sent.", "rejected": " No."} for word in words
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


@pytest.fixture
def config(lm, pairs, tmp_path):
    """A run of three steps on four pairs."""
    return TrainConfig(
        out=str(tmp_path / "run"), steps=3, batch_size=4, max_length=48, model=ModelConfig(init=str(lm)),
        data=DataConfig(train=str(pairs("lamp", "kettle", "chair", "phone"))),
    )  # fmt: skip


def train(config):
    """Runs it, and returns what it warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", InputWarning)
        command.train(config, Console(file=io.StringIO()))
    return [str(warning.message) for warning in caught if warning.category is InputWarning]


def test_a_longer_run_is_told_of_its_other_schedule_and_the_same_one_of_nothing(config):
    resumed = dataclasses.replace(config, resume=True)
    assert train(config) == train(resumed) == []
    (warning,) = train(dataclasses.replace(resumed, steps=6))
    assert warning == (
        "steps, epochs: the run was planned with 3 steps and now has 6, which changes its cosine schedule: "
        "the learning rate of step 4 is now 0.001 instead of 0"
    )
    assert train(dataclasses.replace(resumed, steps=None, epochs=6.0)) == []  # which are six steps too


def test_a_run_is_not_resumed_on_other_rows(config, pairs):
    train(config)
    resumed = dataclasses.replace(config, resume=True)
    out, data = Path(config.out), config.data.train
    noted = (out / "data.json").read_bytes()
    for words in (("lamp", "kettle", "chair", "radio"), ("kettle", "lamp", "chair", "phone"), ("lamp", "kettle")):
        pairs(*words)
        with pytest.raises(InputError) as caught:
            train(resumed)
        assert str(caught.value) == (
            f"{data}: its tokenised rows differ from those that the run in {out} began with (4 then, "
            f"{len(words)} now); resume with the original data and tokenizer, or use another output folder"
        )
    pairs("lamp", "kettle", "chair", "phone")
    assert train(resumed) == []

    (out / "data.json").unlink()  # as a version before this one left it
    (warning,) = train(resumed)
    assert warning.startswith(f"{out}: has no data.json, so it is not checked that {data} is the data")
    assert train(resumed) == [] and (out / "data.json").read_bytes() == noted

    (out / "data.json").write_text("{")
    with pytest.raises(InputError, match=r"data\.json: cannot be read; restore it, or remove it"):
        train(resumed)


def test_the_demo_is_checked_like_a_file(config, monkeypatch):
    monkeypatch.setattr(demo, "HELD_OUT_PAIRS", 4)
    config = dataclasses.replace(config, max_length=64, data=DataConfig(demo_pairs=4))
    train(config)
    made = task.preferences
    monkeypatch.setattr(task, "preferences", lambda *args, **options: made(*args, **options)[::-1])
    with pytest.raises(InputError, match=r"^demo: its tokenised rows differ from those"):
        train(dataclasses.replace(config, resume=True))


def example(prompt, *answers, prefixes=None):
    def ids(tokens):
        return np.array(tokens, np.int32)

    of_answers = prefixes and tuple(tuple(map(ids, of_answer)) for of_answer in prefixes)
    return Example(ids(prompt), tuple(map(ids, answers)), of_answers)


def test_the_digest_covers_everything_that_training_reads():
    rows = [
        [],
        [example([1, 2], [3], [4, 5])],
        [example([1], [2, 3], [4, 5])],
        [example([1, 2], [4, 5], [3])],
        [example([1, 2], [3], [4, 5]), example([1, 2], [3], [4, 6])],
        [example([1, 2], [3], [4, 6]), example([1, 2], [3], [4, 5])],
        [example([1, 2], [3], [4, 5], prefixes=[[[3]], [[4], [4, 5]]])],
        [example([1, 2], [3], [4, 5], prefixes=[[[3], [4]], [[4, 5]]])],
        [dataclasses.replace(example([1, 2], [3]), rewards=(0.5,))],
        [dataclasses.replace(example([1, 2], [3]), rewards=(0.25,))],
    ]
    assert len({digest_of(some) for some in rows}) == len(rows)
    assert digest_of(rows[1]) == digest_of([example([1, 2], [3], [4, 5])])


@pytest.mark.parametrize(
    ("schedule", "before", "now", "step", "numbers"),
    [
        ("cosine", 100, 200, 50, ("100 steps and now has 200", "step 51 is now 0.00179 instead of 0.00108")),
        ("linear", 200, 100, 50, ("200 steps and now has 100", "step 51 is now 0.00105 instead of 0.00158")),
        ("constant", 100, 200, 4, ("step 5 is now 0.0008 instead of 0.0016",)),
        ("constant", 100, 200, 10, None),
        ("cosine", 100, 100, 50, None),
        ("cosine", 100, 50, 50, None),
    ],
)
def test_a_warning_has_both_learning_rates_where_they_differ(schedule, before, now, step, numbers):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_another_schedule(OptimConfig(schedule=schedule), before, now, step)
    said = [str(warning.message) for warning in caught if warning.category is InputWarning]
    assert len(said) == (numbers is not None)
    assert all(words in said[0] for words in numbers or ()), said
