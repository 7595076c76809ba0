"""Equality with Hugging Face's models in torch, for every causal family and its variants."""

import dataclasses
import json
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from pargs_jax.models.families import FAMILIES
from pargs_jax.models.hf import load_model, save_model
from pargs_jax.models.model import unstack_layers
from pargs_jax.models.weights import SINGLE, export_tensors

pytestmark = pytest.mark.filterwarnings("ignore:.*rotates all tokens anew")
SIZES = {"vocab_size": 97, "max_position_embeddings": 64, "hidden_size": 32, "num_hidden_layers": 2}
GPT2 = {
    "model_type": "gpt2",
    "vocab_size": 97,
    "n_positions": 64,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_inner": 48,
}
LLAMA = {"model_type": "llama", **SIZES, "intermediate_size": 48, "num_attention_heads": 4}
OPT = {"model_type": "opt", **SIZES, "ffn_dim": 48, "num_attention_heads": 4}
NEOX = {**LLAMA, "model_type": "gpt_neox"}
QWEN2 = {**LLAMA, "model_type": "qwen2", "num_key_value_heads": 2}
QWEN3 = {**QWEN2, "model_type": "qwen3", "head_dim": 16}
MISTRAL = {**QWEN2, "model_type": "mistral", "sliding_window": 5}
PHI3 = {**QWEN2, "model_type": "phi3", "pad_token_id": None}
GEMMA2 = {**QWEN3, "model_type": "gemma2", "sliding_window": 5, "query_pre_attn_scalar": 12, "pad_token_id": None}
GEMMA3 = {**GEMMA2, "model_type": "gemma3_text"}
WINDOWS = {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}


def rope(kind, **numbers):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 500.0, **numbers}}


LLAMA3 = rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)
YARN = {"factor": 4.0, "original_max_position_embeddings": 16}
LONGROPE = rope(
    "longrope", short_factor=[1.0, 1.1, 1.2, 1.3], long_factor=[2.0, 3.0, 4.0, 5.0], original_max_position_embeddings=8
)
UNUSUAL_GPT2 = {
    "activation_function": "relu",
    "layer_norm_epsilon": 0.01,
    "scale_attn_by_inverse_layer_idx": True,
    "tie_word_embeddings": False,
}
UNUSUAL_LLAMA = {
    "num_key_value_heads": 2,
    "attention_bias": True,
    "mlp_bias": True,
    "hidden_act": "gelu",
    "rms_norm_eps": 0.01,
}
UNUSUAL_OPT = {
    "enable_bias": False,
    "layer_norm_elementwise_affine": False,
    "_remove_final_layer_norm": True,
    "activation_function": "gelu",
    "tie_word_embeddings": False,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "gpt2": GPT2,
    "gpt2 scaled by layer, untied": {**GPT2, **UNUSUAL_GPT2},
    "gpt2 unscaled": {**GPT2, "scale_attn_weights": False, "n_inner": None},
    "llama": LLAMA,
    "llama grouped queries, biases": {**LLAMA, **UNUSUAL_LLAMA},
    "llama tied, wide heads, llama3": {**LLAMA, "head_dim": 16, "tie_word_embeddings": True, **LLAMA3},
    "llama linear": {**LLAMA, **rope("linear", factor=4.0)},
    "llama dynamic": {**LLAMA, "max_position_embeddings": 8, **rope("dynamic", factor=4.0)},
    "llama one key head, yarn": {**LLAMA, "num_key_value_heads": 1, **rope("yarn", **YARN)},
    "llama yarn with mscale": {**LLAMA, **rope("yarn", **YARN, mscale=1.5, mscale_all_dim=0.5)},
    "llama longrope": {**LLAMA, **LONGROPE},
    "llama proportional": {**LLAMA, **rope("proportional", partial_rotary_factor=0.5, factor=2.0)},
    "opt": OPT,
    "opt 350m": {**OPT, "word_embed_proj_dim": 24, "do_layer_norm_before": False},
    "opt without biases, learned norms and final norm, untied": {**OPT, **UNUSUAL_OPT},
    "qwen2": QWEN2,
    "qwen2 tied, yarn": {**QWEN2, "tie_word_embeddings": True, **rope("yarn", **YARN)},
    "qwen2 windows in some layers": {**QWEN2, **WINDOWS},
    "qwen3": QWEN3,
    "qwen3 biases, tied": {**QWEN3, "attention_bias": True, "tie_word_embeddings": True},
    "qwen3 windows in some layers": {**QWEN3, **WINDOWS},
    "mistral": MISTRAL,
    "mistral without a window": {**MISTRAL, "sliding_window": None},
    "mistral wide heads, tied": {**MISTRAL, "head_dim": 16, "tie_word_embeddings": True},
    "gemma2": GEMMA2,
    "gemma2 biases, untied, without caps": {
        **GEMMA2, "attention_bias": True, "tie_word_embeddings": False, "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
    },
    "gemma2 low caps, other layers": {
        **GEMMA2, "attn_logit_softcapping": 0.5, "final_logit_softcapping": 2.0,
        "layer_types": ["full_attention", "sliding_attention"],
    },
    "gemma3": GEMMA3,
    "gemma3 local and global rotations": {
        **GEMMA3, "rope_theta": 500.0, "rope_local_base_freq": 30.0, "sliding_window_pattern": 2,
        "rope_scaling": {"rope_type": "linear", "factor": 4.0},
    },
    "gemma3 full attention, capped logits": {
        **GEMMA3, "layer_types": ["full_attention"] * 2, "final_logit_softcapping": 2.0,
    },
    "gpt_neox": NEOX,
    "gpt_neox one after the other, all rotated": {**NEOX, "use_parallel_residual": False, "rotary_pct": 1.0},
    "gpt_neox without biases, tied, linear": {
        **NEOX, "attention_bias": False, "tie_word_embeddings": True,
        "rope_scaling": {"type": "linear", "factor": 4.0}, "rotary_pct": 0.5, "hidden_act": "gelu_new",
    },
    "phi3": PHI3,
    "phi3 window, half rotated": {**PHI3, "sliding_window": 5, "partial_rotary_factor": 0.5},
    "phi3 longrope": {**PHI3, "original_max_position_embeddings": 8, **LONGROPE},
}  # fmt: skip
CHANGING = ("llama dynamic", "llama longrope", "phi3 longrope")
"""Beyond 8 positions these rotate all tokens anew with each longer pass, which a cache cannot."""
# Operations are compiled one by one, each for its shapes: as many candidates as tokens, and a prefill as wide as a full
# pass, share most of them.
PROMPT, TOTAL = 10, 12
# Left padding of the two texts. The second stays below the 8 positions that no scaling here changes.
STARTS = np.array([0, 5])
RANDOM = np.random.default_rng(0)
TOKENS = RANDOM.integers(4, 97, (2, TOTAL))  # torch gives the embedding of padding no gradient
CHOICES = np.array([2, 0])
CANDIDATES = RANDOM.integers(4, 97, (TOTAL - PROMPT, 2, TOTAL))
CANDIDATES[:, [0, 1], CHOICES] = TOKENS[:, PROMPT:].T


@dataclasses.dataclass(frozen=True)
class Reference:
    """A language model and a reward model with one backbone, in torch, and their checkpoints."""

    name: str
    lm: Any
    rm: Any
    lm_folder: Any
    rm_folder: Any

    @cached_property
    def loaded(self):
        """Both models as they are read here."""
        return {"vocabulary": load_model(self.lm_folder, "vocabulary"), "reward": load_model(self.rm_folder, "reward")}

    @cached_property
    def outputs(self):
        """For each text, its logits `[T V]` and the rewards `[T]` of its prefixes."""
        return [self.read(self.lm, self.rm, row) for row in range(2)]

    @staticmethod
    def read(lm, rm, row):
        import torch

        with torch.no_grad():
            read = lm(torch.tensor(TOKENS[row : row + 1, STARTS[row] :]), output_hidden_states=True)
            return read.logits[0].numpy(), rm.score(read.hidden_states[-1])[0, :, 0].numpy()


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch", reason="the reference is transformers on torch")


@pytest.fixture(scope="module", params=VARIANTS)
def reference(request, torch, tmp_path_factory):
    """One variant with random weights, larger than fresh ones, so that every part of it shows in the outputs."""
    import transformers

    config = transformers.AutoConfig.for_model(**VARIANTS[request.param], num_labels=1)
    torch.manual_seed(0)
    lm = transformers.AutoModelForCausalLM.from_config(config).eval()
    rm = transformers.AutoModelForSequenceClassification.from_config(config).eval()
    with torch.no_grad():
        for parameter in [*lm.parameters(), *rm.score.parameters()]:
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    rm.base_model.load_state_dict(lm.base_model.state_dict())
    folder = tmp_path_factory.mktemp("reference")
    lm.save_pretrained(folder / "lm")
    rm.save_pretrained(folder / "rm")
    return Reference(request.param, lm, rm, folder / "lm", folder / "rm")


@pytest.fixture(autouse=True)
def operation_by_operation():
    """Compiling one of these models takes far longer than running it operation by operation; all have the same
    shapes."""
    with jax.disable_jit():
        yield


# The full pass has stacked layers, the cached ones unrolled.
def hidden_states(model, params):
    """Uncached and cached hidden states; of each step's candidates, one continues the text."""
    uncached = model.encode(params, TOKENS, STARTS)
    unrolled, layers = unstack_layers(model, params)
    prompts = np.roll(TOKENS, TOTAL - PROMPT, axis=1)
    last, cache = unrolled.prefill(layers, prompts, PROMPT - STARTS, 2 * TOTAL)

    def step(cache, candidates):
        hidden, pending = unrolled.siblings(layers, cache, candidates)
        chosen = jnp.take_along_axis(hidden, CHOICES[:, None, None], axis=1)[:, 0]
        return unrolled.keep(cache, pending, jnp.ones(2, bool), CHOICES), chosen

    _, answer = jax.lax.scan(step, cache, CANDIDATES)
    prompt = uncached[:, : PROMPT - 1]
    return uncached, jnp.concatenate([prompt, last[:, None], answer.transpose(1, 0, 2)], axis=1)


def test_logits_and_rewards_equal_torch(reference):
    lm, rm = reference.loaded["vocabulary"], reference.loaded["reward"]
    assert not lm.new_head and not rm.new_head
    jax.tree.map(np.testing.assert_array_equal, rm.params["backbone"], lm.params["backbone"])
    passes = hidden_states(lm.model, lm.params)
    logits = [lm.model.logits(lm.params, hidden) for hidden in passes]
    rewards = [rm.model.rewards(rm.params, hidden) for hidden in passes]
    for found, expected in ((logits, 0), (rewards, 1)):
        for row, start in enumerate(STARTS):
            uncached, cached = (np.asarray(output[row, start:]) for output in found)
            np.testing.assert_allclose(uncached, reference.outputs[row][expected], rtol=0, atol=1e-4)
            if reference.name not in CHANGING or start > 0:
                np.testing.assert_allclose(cached, reference.outputs[row][expected], rtol=0, atol=1e-4)


def test_export_holds_the_same_bits_and_torch_reads_it(reference, torch, tmp_path):
    again = {}
    for head, (model, folder) in {
        "vocabulary": (reference.lm, reference.lm_folder),
        "reward": (reference.rm, reference.rm_folder),
    }.items():
        loaded, target = reference.loaded[head], tmp_path / head
        # Unrolled layers are exported like stacked ones.
        save_model(target, *unstack_layers(loaded.model, loaded.params), special_tokens=loaded.special_tokens)
        assert contents(target / SINGLE) == contents(folder / SINGLE)
        assert json.loads((target / "config.json").read_text())["architectures"] == [type(model).__name__]
        again[head] = type(model).from_pretrained(target)
    logits, rewards = reference.read(again["vocabulary"], again["reward"], 0)
    np.testing.assert_allclose(logits, reference.outputs[0][0], rtol=0, atol=1e-6)
    np.testing.assert_allclose(rewards, reference.outputs[0][1], rtol=0, atol=1e-6)
    with torch.no_grad():  # which reads the last token
        np.testing.assert_allclose(again["reward"](torch.tensor(TOKENS[:1])).logits.item(), rewards[-1], atol=1e-6)


def contents(path):
    """Each tensor's dtype, shape and bits."""
    return {name: (tensor.dtype, tensor.shape, tensor.tobytes()) for name, tensor in load_file(path).items()}


def gradients(model, params, tokens, weights):
    def value(params):
        return (model.logits(params, model.encode(params, tokens)) * weights).sum()

    return jax.grad(value)(params)


@pytest.mark.parametrize("reference", sorted({name.split()[0] for name in VARIANTS}), indirect=True)
def test_gradients_equal_torch(reference, torch):
    loaded = reference.loaded["vocabulary"]
    weights = np.random.default_rng(0).normal(size=(2, TOTAL, 97)).astype(np.float32)
    found = gradients(loaded.model, loaded.params, TOKENS, weights)
    family = FAMILIES[loaded.model.config.to_hf()["model_type"]]
    logits = reference.lm(torch.tensor(TOKENS)).logits
    (logits * torch.tensor(weights)).sum().backward()
    expected = {name: parameter.grad.numpy() for name, parameter in reference.lm.named_parameters()}
    for stored, gradient in export_tensors(loaded.model, family, found):
        name = "lm_head.weight" if stored in family.head_names.values() else stored
        theirs = expected.pop(name)
        np.testing.assert_allclose(gradient, theirs, rtol=0, atol=1e-4 * max(1.0, np.abs(theirs).max()), err_msg=name)
    assert not expected
