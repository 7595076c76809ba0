"""The models that the benchmarks run: their shapes, random weights, and what a pass of one must read and compute."""

import importlib.util
import tempfile
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
from jaxtyping import DTypeLike

from pargs_jax.models.causal import CausalModel
from pargs_jax.models.deberta import DebertaConfig
from pargs_jax.models.gpt2 import GPT2Config
from pargs_jax.models.hf import save_model
from pargs_jax.models.llama import LlamaConfig
from pargs_jax.models.model import Params, unstack_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SHAPES: Mapping[str, Any] = {
    "tiny": GPT2Config(vocab_size=512, context_length=256, width=64, layers=2, heads=4, feedforward=256),
    "small": GPT2Config(vocab_size=1024, context_length=256, width=256, layers=4, heads=4, feedforward=1024),
    "width-384": GPT2Config(width=384, layers=4, heads=6, feedforward=1536),
    "gpt2": GPT2Config(),
    "gpt2-large": GPT2Config(width=1280, layers=36, heads=20, feedforward=5120),
    "llama-2-7b": LlamaConfig(),
}


def random_params(model: CausalModel, seed: int, dtype: DTypeLike) -> Params:
    """Random parameters in the host's memory, so that copies for two frameworks never share the device's."""

    def make(key: jax.Array) -> Params:
        return jax.tree.map(lambda x: x.astype(dtype), model.init(key))

    with jax.default_device(jax.devices("cpu")[0]):
        return jax.jit(make)(jax.random.key(seed))


def on_device(model: CausalModel, params: Params, *, unrolled: bool) -> tuple[CausalModel, Params]:
    """A stacked model of `random_params` on JAX's default device, its layers one by one if `unrolled`."""
    if unrolled:
        with jax.default_device(jax.devices("cpu")[0]):
            model, params = unstack_layers(model, params)
    return model, jax.device_put(params, jax.devices()[0])


class Work(NamedTuple):
    """What any program for a task must at least read from memory, and compute (a multiply-add is two)."""

    bytes_read: float
    operations: float


def causal_pass(
    model: CausalModel, itemsize: int, *, queries: int, seen: float, cached: int = 0, logits: int = 0
) -> Work:
    """The work of one pass through a causal model, with weights and caches of `itemsize` bytes a number.

    Norms, biases, activations and the embedding lookup are left out, so what follows from it is a lower bound.

    Args:
        model: the model, of either head; a scalar head is left out.
        itemsize: bytes of one number.
        queries: tokens that go through the layers, of all rows together.
        seen: tokens that each of them attends to, itself included, on average.
        cached: tokens, of all rows together, whose keys and values are read from the cache.
        logits: positions, of all rows together, whose next-token logits are computed.
    """
    config = model.config
    matrices = matrix_parameters(model)
    head = config.vocab_size * config.head_width if logits else 0
    cache = 2 * cached * config.layers * config.kv_heads * config.head_dim
    attention = 4 * queries * seen * config.layers * config.heads * config.head_dim
    return Work(itemsize * (matrices + head + cache), 2 * queries * matrices + 2 * logits * head + attention)


def matrix_parameters(model: CausalModel) -> int:
    """Entries of the layers' matrices, which every token is multiplied with."""
    leaves = jax.tree_util.tree_leaves_with_path(model.abstract_params()["backbone"]["layers"])
    return sum(leaf.size for path, leaf in leaves if path[-1].key == "kernel")


def torch_device() -> str:
    """PyTorch's name for the device that JAX uses."""
    return "cuda" if jax.default_backend() == "gpu" else "cpu"


def reason_without_torch() -> str | None:
    """Why PyTorch cannot run beside JAX here, or None if it can."""
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        return f"{' and '.join(missing)} not installed"
    import torch

    usable = {"cpu": True, "gpu": torch.cuda.is_available()}
    if usable.get(jax.default_backend(), False):
        return None
    return f"torch cannot use JAX's device ({jax.devices()[0].device_kind})"


def torch_twin(model: CausalModel, params: Params) -> "PreTrainedModel":
    """The same model in PyTorch, by way of a Hugging Face folder: in evaluation mode, parameters of the same dtype, on
    the device that JAX uses, with PyTorch's fused attention."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    # JAX multiplies fp32 as TF32 on a GPU by default.
    torch.set_float32_matmul_precision("high")
    automatic = AutoModelForCausalLM if model.head == "vocabulary" else AutoModelForSequenceClassification
    dtype = getattr(torch, str(jax.tree.leaves(params)[0].dtype))
    with tempfile.TemporaryDirectory() as folder:
        save_model(folder, model, params)
        attention = "eager" if isinstance(model.config, DebertaConfig) else "sdpa"  # DeBERTa has no other
        twin = automatic.from_pretrained(folder, dtype=dtype, attn_implementation=attention)
    return twin.to(torch_device()).eval()
