"""Averages of exported models."""

import dataclasses

import jax
import numpy as np
import pytest

from pargs_jax.commands.soup import soup
from pargs_jax.errors import InputError
from pargs_jax.models.hf import load_model, save_model
from pargs_jax.testing import tiny_model, tiny_tokenizer
from pargs_jax.text.tokenization import TextTokenizer

SPECIAL = {"bos_token_id": 1, "eos_token_id": 2}


def save(folder, model, params, tokenizer=None, **options):
    save_model(folder, model, params, special_tokens=SPECIAL, **options)
    (tokenizer or tiny_tokenizer()).save(folder)
    return str(folder)


@pytest.fixture
def models(tmp_path):
    """Two models of one shape, and what is not of it."""
    size = tiny_tokenizer().vocab_size
    first, second = (tiny_model("llama", seed=seed, vocab_size=size) for seed in (0, 1))
    longer = dataclasses.replace(first[0], config=dataclasses.replace(first[0].config, context_length=32))
    found = {
        "a": save(tmp_path / "a", *first),
        "b": save(tmp_path / "b", *second),
        "reward": save(tmp_path / "reward", *tiny_model("llama", "reward", vocab_size=size)),
        "gpt2": save(tmp_path / "gpt2", *tiny_model("gpt2", vocab_size=size)),
        "shorter": save(tmp_path / "shorter", longer, first[1]),
        "hh": save(tmp_path / "hh", *first, prompt_form="hh"),
        "other": save(tmp_path / "other", *second),
    }
    path = tmp_path / "other"
    (path / "generation_config.json").write_text('{"eos_token_id": [2, 3]}')
    return found


def test_weights_are_averaged(models, tmp_path):
    out = tmp_path / "soup"
    soup([models["a"], models["b"]], [0.25, 0.75], out)
    a, b, both = (load_model(path, "vocabulary").params for path in (models["a"], models["b"], out))
    jax.tree.map(lambda x, y, z: np.testing.assert_allclose(z, 0.25 * x + 0.75 * y, atol=1e-7), a, b, both)
    assert TextTokenizer.load(out).same_vocabulary(tiny_tokenizer())
    ends = tmp_path / "ends"
    soup([models["a"], models["b"]], [1.0, 0.0], ends)
    jax.tree.map(np.testing.assert_array_equal, a, load_model(ends, "vocabulary").params)


@pytest.mark.parametrize(
    ("names", "weights", "message"),
    [
        (["a"], [1.0], "got 1 model; an average needs at least 2"),
        (["a", "b"], [1.0], "--weights: got 1 for 2 models; give one for each"),
        (["a", "b"], [0.7, 0.7], "--weights: got 0.7 0.7, must be at least 0 and add up to 1"),
        (["a", "b"], [1.5, -0.5], "add up to 1"),
        (["a", "b"], [float("nan"), 1.0], "add up to 1"),
        (["a", "reward"], [0.5, 0.5], "its head is reward, not vocabulary"),
        (["a", "gpt2"], [0.5, 0.5], "its kind is GPT2, not Llama"),
        (["a", "shorter"], [0.5, 0.5], "its context_length is 32, not 64"),
        (["a", "hh"], [0.5, 0.5], "its prompt form is hh, not None"),
        (["a", "other"], [0.5, 0.5], "its tokenizer differs from"),
    ],
)
def test_what_cannot_be_averaged_is_refused(models, tmp_path, names, weights, message):
    with pytest.raises(InputError) as caught:
        soup([models[name] for name in names], weights, tmp_path / "soup")
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "soup").exists()


def test_nothing_is_written_over(models, tmp_path):
    with pytest.raises(InputError, match=r"--out: .*a already holds something; give another folder"):
        soup([models["a"], models["b"]], [0.5, 0.5], tmp_path / "a")
