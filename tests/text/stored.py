"""Tokenizers as their publishers stored them, and the demo's."""

from pathlib import Path

import pytest

from pargs_jax.demo import language as demo_language
from pargs_jax.text.tokenization import TextTokenizer

SHARED = Path(__file__).parents[3] / "shared"
FOLDERS = {
    "stories": SHARED / "models/stories260k",
    "gpt2": SHARED / "tokenizers/gpt2",
    "mistral": SHARED / "tokenizers/mistral_v1",
    "deberta": SHARED / "tokenizers/deberta_v3",
    "demo": Path(demo_language.__file__).parents[1] / "assets/demo_lm",
}


def load_stored(name: str) -> TextTokenizer:
    """Skips the test if the tokenizer is not there."""
    if not FOLDERS[name].is_dir():
        pytest.skip("needs the tokenizers in ../shared")
    return TextTokenizer.load(FOLDERS[name])
