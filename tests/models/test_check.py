"""What a model can be used for and what it costs: published numbers of weights, and the page that the command made."""

import json
from pathlib import Path

import pytest

from pargs_jax.commands.check import check, table
from pargs_jax.errors import InputError

ROOT = Path(__file__).parents[2]
SHAPES = ROOT / "configs" / "shapes"
# Billions of weights, by the models' cards.
WEIGHTS = {
    "gemma-2-9b": 9.24, "gemma-3-1b": 1.00, "llama-2-7b": 6.74, "llama-3.1-8b": 8.03, "mistral-7b-v0.1": 7.24,
    "phi-3-mini-4k": 3.82, "pythia-1.4b": 1.41, "qwen2.5-7b": 7.62, "qwen3-8b": 8.19,
}  # fmt: skip


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_are_those_of_the_published_model(name):
    (row,) = check([str(SHAPES / name)])
    assert row["weights"] == f"{WEIGHTS[name]:.3g} G"
    assert row["can be"].startswith("language model")


@pytest.mark.parametrize("lm", [None, "qwen2.5-7b"])
def test_the_page_is_what_the_command_says(lm, monkeypatch):
    monkeypatch.chdir(SHAPES)
    lines = (ROOT / "docs" / "models.md").read_text().splitlines()
    header = next(line for line in lines if line.startswith("| model |") and ("overhead" in line) == (lm is not None))
    shown = lines[lines.index(header) :]
    shown = shown[: shown.index("")]
    names = [line.split(" | ")[0].removeprefix("| ") for line in shown[2:]]
    assert table(check(names, lm)).splitlines() == shown


def test_what_cannot_be_used_is_refused_by_name(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(InputError, match=r"architecture 'bert' is not known; known are deberta-v2, gemma2, "):
        check([str(tmp_path)])


def test_labels_are_listed(tmp_path):
    labels = {"0": "good", "1": "bad"}
    config = {"model_type": "opt", "architectures": ["OPTForSequenceClassification"], "id2label": labels}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (row,) = check([str(tmp_path)])
    assert row["can be"] == "reward model by label: good, bad"
