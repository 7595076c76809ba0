"""Tiny models, a tokenizer and preferences for tests, here and in code that builds on this package.

Everything is made in memory in well under a second; nothing is downloaded.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from pargs_jax.data.preferences import Preference
from pargs_jax.demo import task as demo
from pargs_jax.models.causal import CausalModel
from pargs_jax.models.deberta import DebertaConfig
from pargs_jax.models.gemma2 import Gemma2Config
from pargs_jax.models.gemma3 import Gemma3Config
from pargs_jax.models.gpt2 import GPT2Config
from pargs_jax.models.gpt_neox import GPTNeoXConfig
from pargs_jax.models.llama import LlamaConfig
from pargs_jax.models.mistral import MistralConfig
from pargs_jax.models.model import HeadName, Model, Params
from pargs_jax.models.modernbert import ModernBertConfig
from pargs_jax.models.opt import OPTConfig
from pargs_jax.models.phi3 import Phi3Config
from pargs_jax.models.qwen2 import Qwen2Config
from pargs_jax.models.qwen3 import Qwen3Config
from pargs_jax.models.rotary import Rotary
from pargs_jax.text.tokenization import TextTokenizer

Family = Literal["gemma3", "gpt2", "gpt_neox", "llama", "mistral", "opt"]
Relative = Literal["gemma2", "phi3", "qwen2", "qwen3"]

TINY_CONFIGS: dict[Family, Any] = {
    # A sliding window in one of two layers.
    "gemma3": Gemma3Config(
        vocab_size=61, context_length=64, width=32, layers=2, heads=4, kv_heads=2, head_dim=8, feedforward=48,
        activation="gelu_pytorch_tanh", rotary=Rotary(theta=100.0), local_rotary=Rotary(theta=30.0), query_scalar=12,
        windows=(5, None), logit_cap=5.0, tied_embeddings=True,
    ),
    "gpt2": GPT2Config(vocab_size=61, context_length=64, width=32, layers=2, heads=4, feedforward=64),
    "llama": LlamaConfig(
        vocab_size=61, context_length=64, width=32, layers=2, heads=4, kv_heads=2, head_dim=8, feedforward=48,
        rotary=Rotary(theta=100.0),
    ),
    "gpt_neox": GPTNeoXConfig(
        vocab_size=61, context_length=64, width=32, layers=2, heads=4, feedforward=64,
        rotary=Rotary(theta=100.0, share=0.5),
    ),
    "mistral": MistralConfig(
        vocab_size=61, context_length=64, width=32, layers=2, heads=4, kv_heads=2, head_dim=8, feedforward=48,
        rotary=Rotary(theta=100.0), windows=(5, 5),
    ),
    # Like OPT-350m, which has everything that the others lack.
    "opt": OPTConfig(
        vocab_size=61, context_length=64, width=32, embedding_width=24, layers=2, heads=4, feedforward=64,
        norm_first=False,
    ),
}  # fmt: skip

_SHAPE = {
    "vocab_size": 61, "context_length": 64, "width": 32, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 8,
    "feedforward": 48, "rotary": Rotary(theta=100.0),
}  # fmt: skip

TINY_RELATIVES: dict[Relative, Any] = {
    "gemma2": Gemma2Config(
        **_SHAPE, activation="gelu_pytorch_tanh", windows=(5, None), tied_embeddings=True, query_scalar=12,
        attention_cap=2.0, logit_cap=5.0,
    ),
    "phi3": Phi3Config(**{**_SHAPE, "rotary": Rotary(theta=100.0, share=0.5)}, windows=(5, 5)),
    "qwen2": Qwen2Config(**_SHAPE, windows=(None, 5)),
    "qwen3": Qwen3Config(**_SHAPE, tied_embeddings=True),
}  # fmt: skip
"""Families whose parts the others have too."""

TINY_DEBERTA = DebertaConfig(
    vocab_size=61, context_length=512, width=32, layers=2, heads=4, feedforward=64, position_buckets=8,
    max_relative_positions=24,
)  # fmt: skip

TINY_MODERNBERT = ModernBertConfig(
    vocab_size=61, context_length=16, width=32, layers=3, heads=4, feedforward=48, rotary=Rotary(theta=100.0),
    local_rotary=Rotary(theta=30.0), windows=(None, 3, 3),
)  # fmt: skip


def tiny_model(
    family: Family | Relative = "llama",
    head: HeadName = "vocabulary",
    *,
    seed: int = 0,
    std: float = 0.1,
    vocab_size: int = 61,
) -> tuple[CausalModel, Params]:
    """A random two-layer model with stacked layers and context 64.

    `std` is the standard deviation of every matrix: five times the usual, so that outputs differ clearly.
    """
    config = dataclasses.replace({**TINY_CONFIGS, **TINY_RELATIVES}[family], vocab_size=vocab_size)
    model = CausalModel(config, head)
    return model, random_params(model, seed, std)


def random_params(model: Model, seed: int = 0, std: float = 0.1) -> Params:
    """Random parameters of any model: matrices with this standard deviation, zero biases, and identity norms."""
    draws = np.random.default_rng(seed)

    def draw(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if path[-1].key in ("kernel", "embedding"):
            return jnp.asarray(std * draws.standard_normal(leaf.shape), jnp.float32)
        return jnp.ones(leaf.shape) if path[-1].key == "scale" else jnp.zeros(leaf.shape)

    return jax.tree_util.tree_map_with_path(draw, model.abstract_params())


def tiny_tokenizer() -> TextTokenizer:
    """The demo task's tokenizer: a few hundred pieces, byte fallback, BOS 1, EOS 2."""
    return TextTokenizer.load(demo.DEMO_LM)


def tiny_preferences(count: int = 32, seed: int = 0) -> list[Preference]:
    """Pairs of the demo task."""
    return [Preference(**row) for row in demo.preferences(count, seed=seed)]
