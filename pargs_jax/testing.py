"""Tiny models, a tokenizer and preferences for tests, here and in code that builds on this package.

Everything is made in memory in well under a second; nothing is downloaded.
"""

import dataclasses
from typing import Literal

import jax

from pargs_jax.data import demo
from pargs_jax.data.preferences import Preference
from pargs_jax.data.tokenization import TextTokenizer
from pargs_jax.models.causal import CausalConfig, CausalModel, Head, Params
from pargs_jax.models.gpt2 import GPT2Config
from pargs_jax.models.llama import LlamaConfig
from pargs_jax.models.rotary import Rotary

Family = Literal["gpt2", "llama"]

TINY_CONFIGS: dict[Family, CausalConfig] = {
    "gpt2": GPT2Config(vocab_size=61, context_length=64, width=32, layers=2, heads=4, feedforward=64),
    "llama": LlamaConfig(
        vocab_size=61, context_length=64, width=32, layers=2, heads=4, kv_heads=2, head_dim=8, feedforward=48,
        rotary=Rotary(theta=100.0),
    ),
}  # fmt: skip


def tiny_model(
    family: Family = "llama", head: Head = "vocabulary", *, seed: int = 0, scale: float = 5.0, vocab_size: int = 61
) -> tuple[CausalModel, Params]:
    """A random two-layer model with stacked layers and context 64.

    Fresh weights are near zero, which makes all tokens alike; `scale` multiplies matrices so that outputs differ
    clearly.
    """
    config = dataclasses.replace(TINY_CONFIGS[family], vocab_size=vocab_size)
    model = CausalModel(config, head)
    params = model.init(jax.random.key(seed))
    return model, jax.tree_util.tree_map_with_path(
        lambda path, x: x * scale if getattr(path[-1], "key", "") in ("kernel", "embedding") else x, params
    )


def tiny_tokenizer() -> TextTokenizer:
    """The demo task's tokenizer: 512 pieces, byte fallback, BOS 1, EOS 2."""
    return TextTokenizer.load(demo.DEMO_LM)


def tiny_preferences(count: int = 32, seed: int = 0) -> list[Preference]:
    """Pairs of the demo task."""
    return [Preference(**row) for row in demo.preferences(count, seed=seed)]
