"""A trained model remembers its prompt form, columns are mapped, and rows of other splits are left out."""

import dataclasses
import io
import json
import re
import warnings
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from pargs_jax.commands import train as command
from pargs_jax.config import DataConfig, ModelConfig, TrainConfig
from pargs_jax.errors import InputError, InputWarning
from pargs_jax.models.hf import load_model

pytestmark = pytest.mark.usefixtures("compiled_steps_are_reused")

ROWS = [
    {"prompt": f"Why {i}?", "chosen": f"As {i}.", "rejected": f"No {i}.", "split": "test" if i > 3 else "train"}
    for i in range(6)
]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def settings(lm, tmp_path):
    """Makes a config of a run of one step into tmp_path/NAME."""
    pairs = write_rows(tmp_path / "pairs.jsonl", ROWS)

    def make(name, *, init=lm, train=pairs, steps=1, resume=False, **data):
        return TrainConfig(
            out=str(tmp_path / name), steps=steps, batch_size=4, max_length=48, resume=resume,
            model=ModelConfig(init=str(init)), data=DataConfig(train=train, **data),
        )  # fmt: skip

    return make


def train(config):
    """What a run printed and what it warned of."""
    printed = io.StringIO()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", InputWarning)
        command.train(config, Console(file=printed, width=10_000))
    return printed.getvalue(), [str(each.message) for each in caught if each.category is InputWarning]


def saved_form(config):
    return yaml.safe_load((Path(config.out) / "config.yaml").read_text())["data"]["format"]


def test_a_model_remembers_its_form_and_hands_it_on(settings, lm):
    """A run that starts from it uses its form; a resumed run keeps its own."""
    assert load_model(lm, "reward").prompt_form is None
    first = settings("first", format="hh")
    assert not train(first)[1]
    exported = load_model(first.out, "reward")
    assert exported.prompt_form == "hh"
    kept = json.loads((Path(first.out) / "model" / "config.json").read_text())
    assert kept["pargs_prompt_form"] == "hh"

    second = settings("second", init=first.out)
    printed, warned = train(second)
    assert "format: hh" in printed and not warned
    assert (saved_form(second), load_model(second.out, "reward").prompt_form) == ("hh", "hh")

    third = settings("third", init=first.out, format="plain")
    printed, (warning,) = train(third)
    assert "'plain'" in warning and f"{first.out} was trained with 'hh'" in warning
    assert (saved_form(third), load_model(third.out, "reward").prompt_form) == ("plain", "plain")
    for form in (None, "plain"):
        resumed = settings("third", init=first.out, format=form, steps=2, resume=True)
        assert "format: plain" in train(resumed)[0]
        assert saved_form(resumed) == "plain"
    with pytest.raises(InputError, match=r'has --data.format "plain", but this one has "hh"'):
        command.train(settings("third", init=first.out, format="hh", resume=True))


def test_without_a_memory_the_form_is_plain(settings):
    config = settings("run")
    assert train(config) and saved_form(config) == "plain"
    # As an earlier version left it, which had no other default.
    saved = Path(config.out) / "config.yaml"
    content = yaml.safe_load(saved.read_text())
    del content["data"]["columns"]
    saved.write_text(yaml.safe_dump(content))
    assert not train(dataclasses.replace(config, resume=True))[1]
    assert saved_form(config) == "plain"


def test_a_form_that_is_not_known_is_one_line(settings, tmp_path):
    first = settings("first", format="hh")
    train(first)
    config = Path(first.out) / "model" / "config.json"
    config.write_text(config.read_text().replace('"pargs_prompt_form": "hh"', '"pargs_prompt_form": "hj"'))
    with pytest.raises(InputError, match=re.escape(f"{first.out}: was trained with the unknown prompt format 'hj'")):
        command.train(settings("second", init=first.out))
    assert "'hj'" in train(settings("third", init=first.out, format="hh"))[1][0]


def test_splits_and_columns_of_a_file(settings, tmp_path):
    printed, _ = train(settings("run", eval=str(tmp_path / "pairs.jsonl")))
    assert "pairs.jsonl (train): skipped 2 rows of other splits" in printed
    assert "pairs.jsonl (eval): skipped 4 rows of other splits" in printed
    assert "(train): 4 of 4 rows" in printed and "(eval): 2 of 2 rows" in printed
    questions = write_rows(
        tmp_path / "questions.jsonl", [{"q" if name == "prompt" else name: row[name] for name in row} for row in ROWS]
    )
    with pytest.raises(InputError, match=r"none of its 4 rows .*such as prompt=question"):
        command.train(settings("other", train=questions))
    assert "(train): 4 of 4 rows" in train(settings("other", train=questions, columns=("prompt=q",)))[0]


def test_the_tokenizer_of_the_model_has_to_be_whole(settings, lm, tmp_path):
    folder = tmp_path / "broken"
    folder.mkdir()
    for file in Path(lm).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    for name in ("tokenizer.json", "tokenizer.model"):
        (folder / name).unlink(missing_ok=True)
    with pytest.raises(InputError, match=r"its vocabulary is missing: there is no tokenizer.model or tokenizer.json"):
        command.train(settings("run", init=folder))
