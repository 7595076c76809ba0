"""Tiny models on disk, shared by the tests of this folder."""

import pytest

from pargs_jax.models.hf import save_model
from pargs_jax.testing import tiny_model, tiny_tokenizer


@pytest.fixture(scope="session")
def save_tiny(tmp_path_factory):
    """Saves a random model with the demo's tokenizer and returns its folder."""

    def save(head, *, family="llama", seed=0, vocab_size=None):
        folder = tmp_path_factory.mktemp(head)
        vocab_size = vocab_size or tiny_tokenizer().vocab_size
        model, params = tiny_model(family, head, seed=seed, vocab_size=vocab_size)
        save_model(folder, model, params, special_tokens={"bos_token_id": 1, "eos_token_id": 2})
        tiny_tokenizer().save(folder)
        return str(folder)

    return save


@pytest.fixture(scope="session")
def lm(save_tiny):
    return save_tiny("vocabulary")


@pytest.fixture(scope="session")
def rm(save_tiny):
    return save_tiny("reward", seed=1)
