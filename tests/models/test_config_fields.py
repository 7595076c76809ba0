"""Which fields of config.json are read, harmless, not followed, or unknown."""

import dataclasses
import json
import warnings
from pathlib import Path

import pytest

from pargs_jax.demo.task import DEMO_LM
from pargs_jax.errors import InputError, InputWarning
from pargs_jax.models.families import FAMILIES
from pargs_jax.models.hf import describe_model

SHAPES = Path(__file__).parents[2] / "configs" / "shapes"
SIZES = {
    "vocab_size": 61,
    "max_position_embeddings": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
SMALL = {
    "gemma2": {**GROUPED, "head_dim": 4},
    "gemma3_text": {**GROUPED, "head_dim": 4},
    "gpt_neox": {**SIZES, "rotary_pct": 0.5},
    "mistral": GROUPED,
    "phi3": GROUPED,
    "qwen2": GROUPED,
    "qwen3": {**GROUPED, "head_dim": 4},
    "gpt2": {"vocab_size": 61, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 4},
    "llama": SIZES,
    "opt": {
        "vocab_size": 61,
        "max_position_embeddings": 32,
        "hidden_size": 16,
        "ffn_dim": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    },
    "modernbert": {**SIZES, "global_attn_every_n_layers": 2},
    "deberta-v2": {
        **SIZES,
        "relative_attention": True,
        "pos_att_type": ["c2p", "p2c"],
    },
}


def describe(folder, family, **fields):
    (folder / "config.json").write_text(json.dumps({"model_type": family, **SMALL[family], **fields}))
    return describe_model(folder, "reward")


def refusal(folder, family, **fields):
    with pytest.raises(InputError) as caught:
        describe(folder, family, **fields)
    message = str(caught.value)
    assert message.startswith(f"{folder}/config.json: ") and "\n" not in message
    return message.removeprefix(f"{folder}/config.json: ")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_field_that_transformers_knows_is_known_here(family, tmp_path):
    import transformers
    from transformers import GenerationConfig

    config = transformers.CONFIG_MAPPING[family]
    names = {field.name for field in dataclasses.fields(config)} | config.attribute_map.keys()
    names |= vars(GenerationConfig()).keys()
    names |= config(**SMALL[family]).to_dict().keys()
    assert [name for name in names if not FAMILIES[family].config.HF_FIELDS.knows(name)] == []
    describe(tmp_path, family, **{**config(**SMALL[family]).to_dict(), "model_type": family})


@pytest.mark.parametrize("folder", [*sorted(SHAPES.iterdir()), Path(DEMO_LM)], ids=lambda path: path.name)
def test_configs_in_the_package_are_read_without_a_warning(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error", InputWarning)
        describe_model(folder, "reward")


@pytest.mark.parametrize("family", FAMILIES)
def test_unknown_fields_are_refused_in_one_line_that_names_them_all(family, tmp_path):
    harmless = {"pargs_anything": "hh", "torch_dtype": "bfloat16", "top_k": 3, "unsloth_version": "2", "mystery": None}
    assert refusal(tmp_path, family, qk_norm=True, gating_temperature=10, **harmless) == (
        f"has fields that are not known for {family}, so what they change is not computed: qk_norm (True), "
        "gating_temperature (10); delete them from the file if they change nothing"
    )
    describe(tmp_path, family, **harmless)


# Fields that published checkpoints have and that no class of transformers declares.
PUBLISHED = {
    "llama": {
        "rope_interleaved": False, "is_llama_config": True, "transformers.js_config": {"kv_cache_dtype": {}},
        "_flash_attn_2_enabled": False, "max_sequence_length": 2048, "unsloth_fixed": True, "normalize_reward": False,
        "mean": 0.1, "std": 1.2, "value_head_prefix": "score", "rope_scaling": {"finetuned": True, "type": "yarn",
        "factor": 4.0, "original_max_position_embeddings": 8},
    },
    "gemma2": {"sliding_window_size": 4096, "cache_implementation": "hybrid", "hidden_act": "gelu_pytorch_tanh"},
    "gemma3_text": {"sliding_window_pattern": 6, "_sliding_window_pattern": 6, "cache_implementation": "hybrid"},
    "phi3": {"full_attn_mod": 1, "interpolate_factor": 1, "embd_pdrop": 0.0, "lm_head_bias": False},
    "qwen2": {"use_mrope": False, "max_window_layers": 28, "use_sliding_window": False, "sliding_window": 131072},
    "gpt2": {"n_ctx": 1024, "output_past": True, "_num_labels": 1, "gradient_checkpointing": False},
    "opt": {"prefix": "</s>", "activation_dropout": 0.0, "layerdrop": 0.0},
    "gpt_neox": {"rotary_emb_base": 10000, "classifier_dropout": 0.1},
    "modernbert": {
        "repad_logits_with_grad": False, "layer_norm_eps": 1e-5, "position_embedding_type": "absolute",
        "reference_compile": None, "global_rope_theta": 160000.0, "local_rope_theta": 10000.0,
    },
    "deberta-v2": {"pooler_dropout": 0, "padding_idx": 0, "position_embedding_type": "absolute"},
}  # fmt: skip


@pytest.mark.parametrize("family", PUBLISHED)
def test_fields_of_published_checkpoints_are_read(family, tmp_path):
    describe(tmp_path, family, **PUBLISHED[family])


def test_code_that_comes_with_a_checkpoint_and_adapters_are_not_used_in_silence(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.warns(InputWarning) as caught:
        describe(tmp_path, "llama", auto_map={"AutoConfig": "configuration_own.Own"}, architectures=["Own"])
    code, adapter = (str(warning.message) for warning in caught if warning.category is InputWarning)
    assert "has custom code (auto_map), which is not run" in code
    assert "adapter_config.json is not applied" in adapter


EVERYWHERE = {
    "quantization_config": {"quant_method": "fp8"},
    "per_layer_config": {"0": {"intermediate_size": 8}},
    "is_encoder_decoder": True,
    "pruned_heads": {"1": [0]},
    "transformers_weights": "other.safetensors",
    "configuration_files": ["config.4.0.0.json"],
    "quantization": {"group_size": 64, "bits": 4},
    "normalize_reward": True,
}
IN_CAUSAL = {
    "is_causal": False,
    "attention_chunk_size": 8,
    "kv_sharing_modes": ["own", "reuse"],
}
WINDOWS = {"sliding_window": 8, "layer_types": ["full_attention", "sliding_attention"]}
WITHOUT_WINDOWS = ("gpt2", "gpt_neox", "llama", "opt")
CAUSAL = FAMILIES.keys() - {"deberta-v2", "modernbert"}
GEMMA = {"use_bidirectional_attention": True, "attn_logit_softcapping": 50.0}


@pytest.mark.parametrize(
    ("family", "name", "value"),
    [
        *((family, name, value) for family in FAMILIES for name, value in EVERYWHERE.items()),
        *((family, name, value) for family in sorted(CAUSAL) for name, value in IN_CAUSAL.items()),
        *((family, name, value) for family in WITHOUT_WINDOWS for name, value in WINDOWS.items()),
        ("gpt2", "add_cross_attention", True),
        *(("gemma3_text", name, value) for name, value in GEMMA.items()),
        ("gemma2", "use_bidirectional_attention", True),
        *((family, "layer_types", ["full_attention", "full_attention"]) for family in ("mistral", "phi3")),
        *(("phi3", name, True) for name in ("attention_bias", "mlp_bias", "lm_head_bias")),
        *(("phi3", name, 2) for name in ("full_attn_mod", "interpolate_factor")),
        ("qwen2", "use_mrope", True),
        ("llama", "rope_interleaved", True),
    ],
)
def test_a_field_that_would_change_the_computation_is_refused_by_name(family, name, value, tmp_path):
    assert refusal(tmp_path, family, **{name: value}).startswith(f"{name} is ")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_fields_are_read_where_they_change_nothing(family, tmp_path):
    expected = describe(tmp_path, family)
    not_null = ("is_causal", "is_encoder_decoder", "configuration_files")
    harmless = {name: None for name in (*EVERYWHERE, *IN_CAUSAL) if name not in not_null}
    if family in CAUSAL:
        assert describe(tmp_path, family, **harmless, is_causal=True) == expected
    if family in WITHOUT_WINDOWS:
        assert describe(tmp_path, family, sliding_window=None, layer_types=["full_attention"] * 2) == expected
    assert describe(tmp_path, family, is_encoder_decoder=False, quantization_config=None) == expected


IMPOSSIBLE = [
    *((family, {name: value}, f"{name} is {value}, must be a whole number of at least 1")
      for family, name, value in [
          ("gpt2", "n_head", 0), ("gpt2", "n_layer", 0), ("gpt2", "n_inner", 0), ("gpt2", "num_attention_heads", -4),
          ("llama", "num_attention_heads", 0), ("llama", "num_hidden_layers", 0), ("llama", "num_key_value_heads", 0),
          ("llama", "head_dim", 0), ("llama", "vocab_size", 0), ("llama", "hidden_size", 16.0),
          ("opt", "num_attention_heads", 0), ("opt", "num_hidden_layers", 0), ("opt", "word_embed_proj_dim", 0),
          ("deberta-v2", "num_attention_heads", 0), ("deberta-v2", "num_hidden_layers", 0),
          ("deberta-v2", "embedding_size", 0), ("deberta-v2", "max_position_embeddings", True),
      ]),
    ("llama", {"num_hidden_layers": 10_000_000}, "num_hidden_layers is 10000000, must be at most 1024"),
    ("gpt2", {"n_embd": 10**12}, "n_embd is 1000000000000, must be at most 16777216"),
    ("llama", {"layer_types": -1}, "layer_types is -1, must be left out, null or 'full_attention' for every layer"),
    ("llama", {"rope_theta": "x"}, "rope_theta is 'x' in rope_parameters, must be a number above 0"),
    *(("opt", {"eos_token_id": value}, f"eos_token_id is {value!r}, must be a token's number, a list of them, or null")
      for value in ("2", {"a": 1}, [None], 1.5, True)),
    ("gpt2", {"architectures": [1]}, "architectures is [1], must be left out, null or a list of names"),
    ("gpt2", {"num_labels": 10**7}, "num_labels is 10000000, must be left out, null or a whole number from 0 to 65536"),
    ("gpt2", {"num_attention_heads": None}, "n_head is None, must be a whole number"),
    ("gpt2", {"n_head": 3}, "n_head 3 does not divide n_embd 16"),
    ("opt", {"num_attention_heads": 3}, "num_attention_heads 3 does not divide hidden_size 16"),
    ("deberta-v2", {"num_attention_heads": 3}, "num_attention_heads 3 does not divide hidden_size 16"),
    ("llama", {"num_attention_heads": 3}, "The hidden size (16) is not a multiple of"),
    ("llama", {"num_key_value_heads": 3}, "num_key_value_heads 3 does not divide num_attention_heads 4"),
    ("llama", {"num_key_value_heads": 8}, "num_key_value_heads 8 does not divide num_attention_heads 4"),
    ("llama", {"head_dim": 3}, "head_dim is 3, which rotary positions (default) cannot rotate"),
    ("llama", {"head_dim": 2, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
     "head_dim is 2, which rotary positions (dynamic) cannot rotate"),
    ("qwen2", {"layer_types": ["full_attention", "sliding_attention"]},
     "layer_types has sliding_attention, but sliding_window is not set"),
    ("qwen3", {"layer_types": ["full_attention", "chunked_attention"]},
     "layer_types has chunked_attention, must be full_attention or sliding_attention"),
    ("mistral", {"sliding_window": 0}, "sliding_window is 0, must be a whole number of at least 1"),
    ("gpt_neox", {"rotary_pct": 0.1}, "head_dim is 4 with partial_rotary_factor 0.1, which rotary positions"),
    ("deberta-v2", {"pooler_hidden_act": "no such thing"}, "pooler_hidden_act 'no such thing' is not known; known are"),
    ("deberta-v2", {"conv_kernel_size": 3, "conv_act": "mish"}, "conv_act 'mish' is not known; known are"),
    ("deberta-v2", {"conv_kernel_size": 3, "conv_groups": 3}, "conv_groups 3 does not divide hidden_size 16"),
    ("deberta-v2", {"conv_kernel_size": 3, "conv_groups": 0}, "conv_groups 0 does not divide hidden_size 16"),
    ("deberta-v2", {"conv_kernel_size": 4}, "conv_kernel_size is 4, must be odd"),
    ("deberta-v2", {"position_buckets": 1}, "position_buckets is 1 with distances up to 32"),
    ("deberta-v2", {"position_buckets": 62}, "position_buckets is 62 with distances up to 32"),
    ("deberta-v2", {"position_buckets": None}, "position_buckets is None, must be a whole number"),
    ("deberta-v2", {"norm_rel_ebd": ["layer_norm"]}, "norm_rel_ebd is ['layer_norm'], must be 'layer_norm' or 'none'"),
    ("deberta-v2", {"attention_head_size": 8}, "attention_head_size is 8, must be 4 as hidden_size is 16"),
    ("deberta-v2", {"pooler_hidden_size": 8}, "pooler_hidden_size is 8, must be 16 as hidden_size is 16"),
    ("deberta-v2", {"type_vocab_size": 1}, "type_vocab_size is 1, which leaves no row for the second text of a pair"),
    ("deberta-v2", {"pargs_attention": "sideways"}, "pargs_attention is 'sideways', must be"),
]  # fmt: skip


@pytest.mark.parametrize(("family", "fields", "told"), IMPOSSIBLE)
def test_impossible_sizes_and_names_are_one_line(family, fields, told, tmp_path):
    assert told in refusal(tmp_path, family, **fields)


def test_an_architecture_that_is_not_a_name_is_one_line(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": ["llama"]}))
    with pytest.raises(InputError, match=r"architecture \['llama'\] is not known"):
        describe_model(tmp_path, "reward")


def test_convolution_fields_may_have_any_value_without_a_convolution(tmp_path):
    assert describe(tmp_path, "deberta-v2", conv_act="mish", conv_kernel_size=-1) == describe(tmp_path, "deberta-v2")


@pytest.mark.parametrize("norms", ["LAYER_NORM", "none | Layer_Norm", "layer_norm"])
def test_norms_of_relative_positions_are_read_in_capitals_too(norms, tmp_path):
    assert describe(tmp_path, "deberta-v2", norm_rel_ebd=norms).config.normalise_positions
    assert not describe(tmp_path, "deberta-v2", norm_rel_ebd="layer_norms").config.normalise_positions
