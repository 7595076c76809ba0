"""Fixtures for whole runs: a tiny checkpoint to start from, and steps that are compiled once."""

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from pargs_jax.models.hf import save_model
from pargs_jax.testing import tiny_model, tiny_tokenizer


@pytest.fixture(scope="package")
def compiled_steps_are_reused(tmp_path_factory):
    """A run compiles its own step; equal runs need not compile an equal one again."""
    options = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in options}
    for values in (options, before):
        for name, value in values.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        if values is options:
            yield


@pytest.fixture(scope="package")
def lm(tmp_path_factory):
    """A random Llama with the demo's tokenizer, on disk."""
    folder = tmp_path_factory.mktemp("lm")
    model, params = tiny_model("llama", vocab_size=640)
    save_model(folder, model, params, special_tokens={"bos_token_id": 1, "eos_token_id": 2})
    tiny_tokenizer().save(folder)
    return folder
