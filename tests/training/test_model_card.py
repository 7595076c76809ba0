"""Model cards: what they say of a run, and whose files they replace."""

import json
from dataclasses import replace

import pytest
import yaml

from pargs_jax.commands.model_card import CARD, MARK, last_evaluation, soup_card, training_card, write_card
from pargs_jax.config import DataConfig, LoraConfig, ModelConfig, ObjectiveConfig, TrainConfig
from pargs_jax.objectives import OBJECTIVES
from pargs_jax.testing import tiny_tokenizer

CONFIG = TrainConfig(
    out="runs/mine",
    model=ModelConfig(init="someone/some-lm@v2"),
    data=DataConfig(train="someone/pairs", format="hh"),
    lora=LoraConfig(rank=4),
)
METRICS = {"loss": 0.5123456, "accuracy": 0.75, "accuracy_10": 0.55, "accuracy_100": 0.75}


def test_a_card_says_what_was_trained_how_good_it_is_and_how_to_use_it():
    card = training_card(CONFIG, tiny_tokenizer(), METRICS, rows=1234)
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "transformers", "pipeline_tag": "text-classification",
        "tags": ["pargs_jax", "partial_bt", "reward-model"], "base_model": "someone/some-lm",
    }  # fmt: skip
    for part in (
        MARK, "# mine", "objective `partial_bt`", "From: `someone/some-lm@v2`", "On: `someone/pairs`", "1,234 rows",
        "additions of rank 4", "| loss | 0.5123 |", "| accuracy | 0.75 |", "| 10 % | 100 % |", "| 0.550 | 0.750 |",
        "--lm someone/some-lm@v2 --rm PATH_OF_THIS_FOLDER --method pargs", "--format hh",
        "\n\nHuman: QUESTION\n\nAssistant:", f"`{tiny_tokenizer().token(2)}`",
    ):  # fmt: skip
        assert part in body, part
    options = yaml.safe_load(body.split("```yaml\n")[1].split("```")[0])
    assert options["lora"] == {"rank": 4} and options["data"]["format"] == "hh"
    adapter = training_card(CONFIG, tiny_tokenizer(), {}, rows=1, is_adapter=True)
    assert "library_name: peft" in adapter and "a PEFT adapter" in adapter and "Held-out" not in adapter


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_has_a_command_to_use_its_model(name):
    config = replace(CONFIG, objective=ObjectiveConfig(name=name), lora=LoraConfig(), data=DataConfig(format="chat"))
    card = training_card(config, tiny_tokenizer(), {}, rows=1)
    assert ("--rm PATH" in card) != ("--lm PATH" in card)
    assert "With the format `chat`" in card  # without a template, nothing is rendered


def test_only_our_own_card_is_replaced(tmp_path):
    assert write_card(tmp_path, soup_card(["a/b", "c"], [0.5, 0.5]))
    assert write_card(tmp_path, f"{MARK}\nnew") and (tmp_path / CARD).read_text() == f"{MARK}\nnew"
    (tmp_path / CARD).write_text("mine")
    assert not write_card(tmp_path, f"{MARK}\nother") and (tmp_path / CARD).read_text() == "mine"


def test_the_last_evaluation_is_found(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert last_evaluation(path) == {}
    lines = [{"step": 1, "split": "eval", "loss": 2.0}, {"step": 2, "split": "eval", "loss": 1.0}, {"split": "train"}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3, "sp')
    assert last_evaluation(path) == {"loss": 1.0}
