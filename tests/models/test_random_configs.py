"""Random checkpoints of all families give transformers' logits or rewards in torch, or are refused in one line.

A case is drawn from its number alone. Most have values that go together; one in three has two that do not, or that
only some readers follow. As a script, with a seed and a count, this file runs other series.
"""

import collections
import contextlib
import json
import sys
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from pargs_jax.errors import InputError
from pargs_jax.models.families import FAMILIES
from pargs_jax.models.hf import describe_model, load_model

ABSENT = object()
"""The field is left out of config.json."""

ACTIVATIONS = ["gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu", "swish", "tanh"]
BOOLEANS = [True, False]
# One size for all or most, so that few shapes have to be compiled: that is what takes the time.
MOSTLY_13 = [13] * 7 + [11]
WIDTH = [16]
MOSTLY_24 = [24] * 7 + [16]
HEADS = [4] * 6 + [1, 2]
LAYERS = [2] * 7 + [1]

# What any config.json may say and what changes nothing.
HARMLESS: dict[str, list[Any]] = {
    "use_cache": [ABSENT, True, False],
    "torch_dtype": [ABSENT, "float32", "float16"],
    "architectures": [ABSENT, ["SomethingElse"]],
    "pad_token_id": [ABSENT, None, 0, 5],
    "temperature": [ABSENT, 0.3],
    "pargs_prompt_form": [ABSENT, "hh"],
}

GPT2: dict[str, list[Any]] = {
    **HARMLESS,
    "vocab_size": MOSTLY_13,
    "n_positions": [16] * 5 + [9],
    "n_embd": WIDTH,
    "n_layer": LAYERS,
    "n_head": HEADS,
    "n_inner": [ABSENT, None, *MOSTLY_24],
    "activation_function": ACTIVATIONS,
    "layer_norm_epsilon": [ABSENT, 1e-5, 0.1],
    "initializer_range": [ABSENT, 0.1],
    "tie_word_embeddings": [ABSENT, *BOOLEANS],
    "scale_attn_weights": [ABSENT, *BOOLEANS],
    "scale_attn_by_inverse_layer_idx": [ABSENT, *BOOLEANS],
    "reorder_and_upcast_attn": [ABSENT, *BOOLEANS],
    "add_cross_attention": [ABSENT, False],
    "resid_pdrop": [ABSENT, 0.5],
    "embd_pdrop": [ABSENT, 0.5],
    "attn_pdrop": [ABSENT, 0.5],
    "summary_type": [ABSENT, "mean"],
    "is_causal": [ABSENT, True],
}

LLAMA: dict[str, list[Any]] = {
    **HARMLESS,
    "vocab_size": MOSTLY_13,
    "max_position_embeddings": [16, 6, 64],
    "hidden_size": WIDTH,
    "intermediate_size": MOSTLY_24,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": [ABSENT, ABSENT, None, 2, 2, 1],
    "head_dim": [ABSENT, ABSENT, None, 4, 4, 8],
    "hidden_act": ACTIVATIONS,
    "rms_norm_eps": [ABSENT, 1e-5, 0.1],
    "initializer_range": [ABSENT, 0.1],
    "tie_word_embeddings": [ABSENT, *BOOLEANS],
    "attention_bias": [ABSENT, *BOOLEANS],
    "mlp_bias": [ABSENT, *BOOLEANS],
    "attention_dropout": [ABSENT, 0.5],
    "pretraining_tp": [ABSENT, 2],
    "rope_interleaved": [ABSENT, False],
    "original_max_position_embeddings": [ABSENT, ABSENT, 4, 8, 5],
    "sliding_window": [ABSENT, None],
    "layer_types": [ABSENT, None],
}

OPT: dict[str, list[Any]] = {
    **HARMLESS,
    "vocab_size": MOSTLY_13,
    "max_position_embeddings": [16] * 5 + [9],
    "hidden_size": WIDTH,
    "word_embed_proj_dim": [ABSENT, None, 8, 8, 16],
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "ffn_dim": MOSTLY_24,
    "activation_function": ACTIVATIONS,
    "do_layer_norm_before": [ABSENT, *BOOLEANS],
    "_remove_final_layer_norm": [ABSENT, *BOOLEANS],
    "enable_bias": [ABSENT, *BOOLEANS],
    "layer_norm_elementwise_affine": [ABSENT, *BOOLEANS],
    "tie_word_embeddings": [ABSENT, *BOOLEANS],
    "init_std": [ABSENT, 0.1],
    "dropout": [ABSENT, 0.5],
    "attention_dropout": [ABSENT, 0.5],
    "activation_dropout": [ABSENT, 0.5],
    "layerdrop": [ABSENT, 0.5],
    "kv_sharing_modes": [ABSENT, None],
}

DEBERTA: dict[str, list[Any]] = {
    **HARMLESS,
    "vocab_size": MOSTLY_13,
    "max_position_embeddings": [16] * 5 + [9],
    "hidden_size": WIDTH,
    "embedding_size": [ABSENT, ABSENT, 8, 8, 16],
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "attention_head_size": [ABSENT],
    "intermediate_size": MOSTLY_24,
    "pooler_hidden_size": [ABSENT],
    "hidden_act": ACTIVATIONS,
    "pooler_hidden_act": [ABSENT, *ACTIVATIONS],
    "layer_norm_eps": [ABSENT, 1e-5, 0.1],
    "initializer_range": [ABSENT, 0.1],
    "type_vocab_size": [ABSENT, 0, 2, 2, 2, 3],
    "relative_attention": [ABSENT, True, True, False],
    "position_buckets": [ABSENT, -1, 0, 4, 4, 4, 8, 8, 2, 3, 5],
    "max_relative_positions": [ABSENT, ABSENT, -1, 0, 24, 24, 8],
    "pos_att_type": [ABSENT, None, [], ["c2p"], ["p2c"], ["p2c", "c2p"], "p2c|c2p", "C2P | P2C", ["C2P"], ["p2p"]],
    "share_att_key": [ABSENT, *BOOLEANS],
    "norm_rel_ebd": [ABSENT, "none", "layer_norm", "LAYER_NORM", "none | Layer_Norm", "layer_norms"],
    "position_biased_input": [ABSENT, *BOOLEANS],
    "conv_kernel_size": [ABSENT, 0, -1, 3, 3, 5],
    "conv_groups": [ABSENT, 1, 2, 4],
    "conv_act": [ABSENT, *ACTIVATIONS],
    "hidden_dropout_prob": [ABSENT, 0.5],
    "attention_probs_dropout_prob": [ABSENT, 0.5],
    "pooler_dropout": [ABSENT, 0.5],
    "cls_dropout": [ABSENT, 0.5],
    "legacy": [ABSENT, *BOOLEANS],
    "tie_word_embeddings": [ABSENT, *BOOLEANS],
}  # fmt: skip

FIELDS = {"gpt2": GPT2, "llama": LLAMA, "opt": OPT, "deberta-v2": DEBERTA}

# Values that no model can have, that change the computation, or that nobody knows. One or two go into an odd case.
ODD_ANYWHERE: dict[str, list[Any]] = {
    "is_encoder_decoder": [True],
    "quantization_config": [{"quant_method": "gptq", "bits": 4}, {}],
    "per_layer_config": [{"0": {"num_attention_heads": 1}}, {}],
    "a_field_of_tomorrow": [1],
    "auto_map": [{"AutoModel": "modeling_own.Own"}],
    "is_decoder": [True],
}
ODD_CAUSAL: dict[str, list[Any]] = {
    **ODD_ANYWHERE,
    "is_causal": [False, None],
    "sliding_window": [4],
    "attention_chunk_size": [4],
    "layer_types": [["full_attention"], ["sliding_attention"], ["full_attention", "full_attention"]],
    "kv_sharing_modes": [["reuse", "reuse"]],
}
ODD: dict[str, dict[str, list[Any]]] = {
    "gpt2": {
        **ODD_CAUSAL,
        **{name: [0, -1, 3] for name in ("n_head", "n_embd", "num_attention_heads")},
        **{name: [0, -1] for name in ("vocab_size", "n_positions", "n_layer", "n_inner")},
        "hidden_size": [16, 12],
        "num_hidden_layers": [1, 0],
        "max_position_embeddings": [12],
        "activation_function": ["quick_gelu", "no such thing", "linear"],
        "add_cross_attention": [True],
    },
    "llama": {
        **ODD_CAUSAL,
        **{name: [0, -1, 3] for name in ("num_attention_heads", "num_key_value_heads", "hidden_size")},
        **{name: [0, -1] for name in ("vocab_size", "max_position_embeddings", "num_hidden_layers")},
        "intermediate_size": [0],
        "head_dim": [0, 1, 2, 3, 5, 7],
        "hidden_act": ["quick_gelu", "no such thing", "relu2"],
        "partial_rotary_factor": [0.5, 1.0, None],
        "original_max_position_embeddings": [None, 0, -4, "4"],
        "rope_theta": [0.0, -1.0, 1.0, 0.5],
    },
    "opt": {
        **ODD_CAUSAL,
        **{name: [0, -1, 3] for name in ("num_attention_heads", "hidden_size")},
        **{name: [0, -1] for name in ("vocab_size", "max_position_embeddings", "num_hidden_layers", "ffn_dim")},
        "word_embed_proj_dim": [0],
        "activation_function": ["quick_gelu", "no such thing", "sigmoid"],
    },
    "deberta-v2": {
        **ODD_ANYWHERE,
        **{name: [0, -1, 3] for name in ("num_attention_heads", "hidden_size")},
        **{name: [0, -1] for name in ("vocab_size", "max_position_embeddings", "num_hidden_layers", "embedding_size")},
        "attention_head_size": [0, 4, 8, None],
        "pooler_hidden_size": [4, 16, 8],
        "intermediate_size": [0],
        "type_vocab_size": [1, -1],
        "position_buckets": [1, 64, None, 4.0],
        "max_relative_positions": [1, 2, 3],
        "norm_rel_ebd": [None, ["layer_norm"]],
        "conv_kernel_size": [2, 4, None],
        "conv_groups": [3, 0, 16],
        "conv_act": ["no such thing", "sigmoid"],
        "pooler_hidden_act": ["no such thing", "mish"],
        "hidden_act": ["no such thing"],
        "pargs_attention": ["full", "backwards"],
    },
}

ROPE: dict[str, dict[str, list[Any]]] = {
    "default": {},
    "linear": {"factor": [2.0, 1, 4.0]},
    "dynamic": {"factor": [2.0, 4.0]},
    "llama3": {
        "factor": [2.0, 8.0],
        "low_freq_factor": [1.0, 0.5],
        "high_freq_factor": [4.0, 2],
        "original_max_position_embeddings": [ABSENT, 4, 8],
    },
    "yarn": {
        "factor": [2.0, 4.0, 1.0, None],
        "original_max_position_embeddings": [ABSENT, 4, 8, 16, 64],
        "attention_factor": [ABSENT, ABSENT, None, 0.7],
        "beta_fast": [ABSENT, None, 16.0, 0, 2],
        "beta_slow": [ABSENT, None, 2.0, 4],
        "mscale": [ABSENT, 1.5, 0],
        "mscale_all_dim": [ABSENT, 0.5],
        "truncate": [ABSENT, None, True, False],
    },
    "longrope": {
        "short_factor": [[1.0, 1.5]],
        "long_factor": [[2.0, 3]],
        "original_max_position_embeddings": [ABSENT, 4, 8],
        "factor": [ABSENT, None, 4.0],
        "attention_factor": [ABSENT, None, 0.7],
    },
    "proportional": {"factor": [ABSENT, 2.0], "partial_rotary_factor": [ABSENT, 0.5, 1.0]},
}
ODD_ROPE: dict[str, list[Any]] = {
    "rope_type": ["longrope", "proportional", "axial", "spiral", None],
    "factor": [0, -1.0, None, "2", 0.5, ABSENT],
    "low_freq_factor": [8.0, 4.0, 0, ABSENT],
    "partial_rotary_factor": [0.5, 1.0],
    "rope_theta": [None, 0.0, 1.0],
    "original_max_position_embeddings": [None, 0, 1, 2],
    "beta_slow": [64.0],
    "attention_factor": [-1.0, 0],
    "mrope_section": [[1, 1, 2]],
    "full_attention": [{"rope_type": "default", "rope_theta": 10.0}],
}


class Case(NamedTuple):
    """One checkpoint: its config.json, its kind of head, and how its weights are stored."""

    number: int
    head: str
    config: dict[str, Any]
    drawn: dict[str, Any]
    is_odd: bool
    head_stored: str
    is_sharded: bool


def draw(seed: int, number: int) -> Case:
    """Case `number` of the series with this seed."""
    rng = np.random.default_rng([seed, number])

    def pick(values: list[Any]) -> Any:
        return values[rng.integers(len(values))]

    turn, place = divmod(number, len(FIELDS))
    family = list(FIELDS)[place]
    is_odd = turn % 3 == 0
    drawn = {name: pick(values) for name, values in FIELDS[family].items()}
    if family == "llama":
        drawn |= _rope(pick, is_odd and rng.random() < 0.4)
    if is_odd:
        # Two after two, so that every odd field has its turn.
        names = [str(name) for name in np.random.default_rng(seed).permutation(list(ODD[family]))]
        for name in (names[(2 * (turn // 3) + i) % len(names)] for i in range(2)):
            drawn[name] = pick(ODD[family][name])
    config = {name: value for name, value in drawn.items() if value is not ABSENT}
    head = "reward" if family == "deberta-v2" else pick(["vocabulary", "reward"])
    config = {"model_type": family, **config, **({"num_labels": 1} if head == "reward" else {})}
    head_stored = pick(["as transformers does", "as transformers does", "equal", "another", "alone"])
    return Case(number, head, config, drawn, is_odd, head_stored, rng.random() < 0.3)


def _rope(pick: Any, is_odd: bool) -> dict[str, Any]:
    """Rotary positions in one of the ways in which configs have them."""
    kind = pick([*ROPE, *ROPE, "yarn", "llama3"])
    numbers = {name: pick(values) for name, values in ROPE[kind].items()}
    numbers |= {"rope_type": kind}
    theta = pick([ABSENT, 100.0, 10000, 5.0])
    form = pick(["rope_parameters", "rope_scaling", "both", "theta inside", "type"])
    if form == "type":
        numbers["type"] = numbers.pop("rope_type")
    if is_odd:
        name = pick(list(ODD_ROPE))
        numbers[name] = pick(ODD_ROPE[name])
    if form == "theta inside":
        numbers["rope_theta"] = pick([50.0, 1000.0])
    rope = {name: value for name, value in numbers.items() if value is not ABSENT}
    field = "rope_scaling" if form in ("rope_scaling", "type") else "rope_parameters"
    both = {"rope_parameters": rope, "rope_scaling": {"rope_type": "linear", "factor": 3.0}}
    return {"rope_theta": theta, **(both if form == "both" else {field: rope})}


LENGTH = 8
STARTS = np.array([3, 0])  # left padding; the shorter text first, since torch's dynamic RoPE remembers longer ones
PROMPT = 5


def checkpoint(case: Case, folder: Path) -> Any:
    """Writes the case's checkpoint and reads it again with transformers: the model in torch."""
    import torch
    import transformers
    from safetensors.torch import load_file, save_file

    kinds = {"vocabulary": "AutoModelForCausalLM", "reward": "AutoModelForSequenceClassification"}
    auto = getattr(transformers, kinds[case.head])
    torch.manual_seed(case.number)
    model = auto.from_config(transformers.AutoConfig.for_model(**json.loads(json.dumps(case.config))))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
            else:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder, max_shard_size="4KB" if case.is_sharded else "5GB")
    single = folder / "model.safetensors"
    if single.exists() and case.head == "vocabulary" and case.head_stored != "as transformers does":
        tensors = load_file(single)
        embed = next(name for name in tensors if name.endswith(("wte.weight", "embed_tokens.weight")))
        tensors["lm_head.weight"] = tensors[embed].clone()
        if case.head_stored == "another":
            tensors["lm_head.weight"] += 0.1
        if case.head_stored == "alone" and model.config.tie_word_embeddings:
            del tensors[embed]
        save_file(tensors, single, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(case.config))
    return auto.from_pretrained(folder, dtype=torch.float32).eval()


def torch_outputs(case: Case, model: Any, tokens: np.ndarray) -> list[np.ndarray]:
    """Logits, or rewards of every prefix, or an encoder's reward, of each row without its padding."""
    import torch

    outputs = []
    with torch.inference_mode():
        for row, start in zip(tokens, STARTS, strict=True):
            ids = torch.tensor(row[None, start:])
            if case.head == "vocabulary":
                outputs.append(model(ids).logits[0].numpy())
            elif case.config["model_type"] == "deberta-v2":
                segments = torch.arange(start, LENGTH)[None] >= PROMPT
                outputs.append(model(ids, token_type_ids=segments.long()).logits[0, 0].numpy())
            else:
                outputs.append(model.score(model.base_model(ids).last_hidden_state)[0, :, 0].numpy())
    return outputs


def jax_outputs(case: Case, folder: Path, tokens: np.ndarray) -> list[np.ndarray]:
    model, params, new_head, *_ = load_model(folder, case.head)
    assert not new_head
    if case.config["model_type"] == "deberta-v2":
        ends = np.full(len(STARTS), LENGTH)
        return list(np.asarray(model.text_rewards(params, tokens, STARTS, ends, prompt_width=PROMPT)))
    hidden = model.encode(params, tokens, STARTS)
    read = model.logits if case.head == "vocabulary" else model.rewards
    return [row[start:] for row, start in zip(np.asarray(read(params, hidden)), STARTS, strict=True)]


def examine(case: Case, folder: Path) -> str:
    """ "compared" or "refused"; anything else that may happen is raised."""
    tokens = np.random.default_rng(case.number).integers(0, 11, (len(STARTS), LENGTH))
    expected, error = None, None
    try:
        expected = torch_outputs(case, checkpoint(case, folder), tokens)
    except Exception as raised:
        error = raised
    try:
        if error is not None and not (folder / "config.json").exists():
            (folder / "config.json").write_text(json.dumps(case.config))
            describe_model(folder, case.head)
        else:
            ours = jax_outputs(case, folder, tokens)
            if error is None:
                for mine, theirs in zip(ours, expected, strict=True):
                    np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-4)
                return "compared"
    except InputError as refusal:
        assert "\n" not in str(refusal)
        return "refused"
    raise AssertionError(f"transformers cannot use it ({error!r}) and it is read without a word")


@contextlib.contextmanager
def quiet_reference() -> Iterator[None]:
    """transformers without progress bars and warnings, and torch on one thread: these models are too small for more."""
    import torch
    from transformers import logging

    verbosity, threads = logging.get_verbosity(), torch.get_num_threads()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    logging.enable_progress_bar()
    logging.set_verbosity(verbosity)


def run(seed: int, count: int) -> tuple[collections.Counter, list[str], dict[str, dict[str, set[str]]]]:
    """Counts of outcomes, the failed cases, and the values of each field in the compared cases."""
    ends: collections.Counter = collections.Counter()
    wrong: list[str] = []
    values: dict[str, dict[str, set[str]]] = {}
    # Compiling one of these models takes far longer than running it operation by operation: the shapes are few.
    with quiet_reference(), jax.disable_jit():
        for number in range(count):
            case = draw(seed, number)
            with tempfile.TemporaryDirectory() as folder:
                try:
                    end = examine(case, Path(folder))
                except Exception:
                    end = "wrong"
                    wrong.append(f"seed {seed}, case {number}: {case}\n{traceback.format_exc(limit=-3)}")
                    print(wrong[-1], flush=True)
            ends[end] += 1
            for name, value in case.drawn.items():
                seen = values.setdefault(case.config["model_type"], {}).setdefault(name, set())
                if end == "compared":
                    seen.add("absent" if value is ABSENT else json.dumps(value))
    return ends, wrong, values


@pytest.mark.filterwarnings("ignore")
def test_random_configs_give_the_same_as_torch_or_are_refused():
    pytest.importorskip("torch", reason="the reference is transformers on torch")
    ends, wrong, values = run(0, 200)
    assert not wrong, "\n".join(wrong)
    assert ends["compared"] >= 120, ends
    for family, fields in FIELDS.items():
        known = FAMILIES[family].config.HF_FIELDS
        assert {*known.names.values(), *known.read, *known.sizes, *known.must} - values[family].keys() == set()
        varied = {name for name, choices in fields.items() if len(choices) > 1}
        assert {name for name in varied if len(values[family][name]) < 2} == set()


if __name__ == "__main__":
    seed, count = map(int, sys.argv[1:])
    ends, *_ = run(seed, count)
    print(ends)
