"""Prompts are written in the form that the models remember, and their columns are mapped."""

import json
import shutil
import warnings
from pathlib import Path

import pytest
import yaml

from pargs_jax.commands.generate import generate
from pargs_jax.config import DecodeConfig
from pargs_jax.errors import InputError, InputWarning

HH, PLAIN = "\n\nHuman: Why?\n\nAssistant:", "Why?"


@pytest.fixture(scope="module")
def remembering(lm, rm, tmp_path_factory):
    """Makes a copy of the language model or the reward model that remembers a form."""

    def copy(head, form):
        folder = tmp_path_factory.mktemp(f"{head}_{form}")
        shutil.copytree({"lm": lm, "rm": rm}[head], folder, dirs_exist_ok=True)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "pargs_prompt_form": form}))
        return str(folder)

    return copy


def decoded(lm, *reward_models, **changes):
    """The prompts as the language model read them, and the warnings."""
    options = {"prompt": "Why?", "method": "pargs" if reward_models else "greedy", "max_new_tokens": 2} | changes
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", InputWarning)
        answers = generate(DecodeConfig(lm=lm, rm=reward_models, **options))
    return [answer.prompt for answer in answers], [str(w.message) for w in caught if w.category is InputWarning]


def test_the_reward_models_form_is_used_or_else_the_language_models(lm, rm, remembering):
    tuned, hh, tldr = remembering("lm", "hh"), remembering("rm", "hh"), remembering("rm", "tldr")
    assert decoded(lm, rm) == ([PLAIN], [])
    assert decoded(lm, hh) == ([HH], [])
    assert decoded(lm, rm, hh) == ([HH], [])
    assert decoded(tuned, rm) == ([HH], [])
    prompts, (warning,) = decoded(tuned, tldr)
    assert prompts == ["POST: Why?\nTL;DR:"] and f"format 'tldr', but {tuned} was trained with 'hh'" in warning
    prompts, (warning,) = decoded(lm, hh, format="plain")
    assert prompts == [PLAIN] and f"format 'plain', but {hh} was trained with 'hh'" in warning
    assert decoded(lm, hh, format="hh") == ([HH], [])
    with pytest.raises(InputError, match=f"{hh} 'hh', {tldr} 'tldr'; choose one with --format"):
        decoded(lm, hh, tldr)
    assert len(decoded(lm, hh, tldr, format="hh")[1]) == 1
    with pytest.raises(InputError, match="was trained with the unknown prompt format 'xml'"):
        decoded(lm, remembering("rm", "xml"))


def test_the_config_beside_the_answers_has_the_form(lm, rm, remembering, tmp_path):
    """So that a second run goes on with it, and rows that were made in another one are not mixed with its own."""
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    prompts.write_text('{"name": "a", "question": "Why?"}\n')
    options = {"prompt": None, "prompts": str(prompts), "out": str(out), "columns": ("prompt=question", "id=name")}
    assert decoded(lm, rm, **options)[0] == [PLAIN]
    saved = Path(f"{out}.config.yaml")
    assert yaml.safe_load(saved.read_text())["format"] == "plain"
    assert json.loads(out.read_text())["id"] == "a"
    before = yaml.safe_load(saved.read_text())
    del before["columns"]  # as an earlier version left it
    saved.write_text(yaml.safe_dump(before))
    assert decoded(lm, rm, **options)[0] == []
    with pytest.raises(InputError, match="were made with other options"):
        decoded(lm, rm, format="hh", **options)
    with pytest.raises(InputError, match=r"no row has a column 'query'; the columns are name, question"):
        decoded(lm, rm, **options | {"columns": ("prompt=query",)})
    with pytest.raises(InputError, match=r"line 1: prompt is missing; the row has name, question; .*such as prompt="):
        decoded(lm, rm, **options | {"columns": ()})


@pytest.mark.parametrize("head", ["lm", "rm"])
def test_each_model_needs_its_own_whole_tokenizer(lm, rm, remembering, head):
    broken = Path(remembering(head, "plain"))
    for name in ("tokenizer.json", "tokenizer.model"):
        (broken / name).unlink(missing_ok=True)
    with pytest.raises(InputError, match=f"tokenizer '{broken}': its vocabulary is missing: there is no tokenizer.mod"):
        decoded(*{"lm": (str(broken), rm), "rm": (lm, str(broken))}[head])
