"""Equality with Hugging Face's models in torch, and their checkpoints read and written."""

import json
import shutil
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pargs_jax.errors import InputError
from pargs_jax.models import hf, weights
from pargs_jax.models.causal import CausalModel
from pargs_jax.models.hf import load_model, resolve, save_model
from pargs_jax.models.model import unstack_layers
from pargs_jax.models.rotary import Rotary
from pargs_jax.testing import TINY_CONFIGS

GPT2 = {"model_type": "gpt2", "vocab_size": 97, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
LLAMA = {
    "model_type": "llama",
    "vocab_size": 97,
    "max_position_embeddings": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
OPT = {
    "model_type": "opt",
    "vocab_size": 97,
    "max_position_embeddings": 64,
    "hidden_size": 32,
    "ffn_dim": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def rope(kind, **numbers):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 500.0, **numbers}}


LLAMA3 = rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)
YARN = {"factor": 4.0, "original_max_position_embeddings": 16}
UNUSUAL_GPT2 = {
    "n_inner": 48,
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
    "gpt2 unscaled": {**GPT2, "scale_attn_weights": False},
    "llama": LLAMA,
    "llama grouped queries, biases": {**LLAMA, **UNUSUAL_LLAMA},
    "llama tied, wide heads, llama3": {**LLAMA, "head_dim": 16, "tie_word_embeddings": True, **LLAMA3},
    "llama linear": {**LLAMA, **rope("linear", factor=4.0)},
    "llama dynamic": {**LLAMA, "max_position_embeddings": 8, **rope("dynamic", factor=4.0)},
    "llama one key head, yarn": {**LLAMA, "num_key_value_heads": 1, **rope("yarn", **YARN)},
    "llama yarn with mscale": {**LLAMA, **rope("yarn", **YARN, mscale=1.5, mscale_all_dim=0.5)},
    "opt": OPT,
    "opt 350m": {**OPT, "word_embed_proj_dim": 24, "do_layer_norm_before": False},
    "opt without biases, learned norms and final norm, untied": {**OPT, **UNUSUAL_OPT},
}
PROMPT, TOTAL = 8, 12
# Left padding of the two texts. The second stays below the 8 positions that dynamic scaling leaves alone.
STARTS = np.array([0, 5])


class Reference(NamedTuple):
    """A language model and a reward model with one backbone, in torch, and their checkpoints."""

    name: str
    lm: Any
    rm: Any
    lm_folder: Any
    rm_folder: Any

    def outputs(self, model, tokens):
        """Logits `[T V]` of the language model or rewards `[T]` of every prefix under the reward model."""
        import torch

        with torch.no_grad():
            ids = torch.tensor(tokens[None])
            if model is self.lm:
                return model(ids).logits[0].numpy()
            rewards = model.score(model.base_model(ids).last_hidden_state)[0, :, 0].numpy()
            np.testing.assert_allclose(model(ids).logits.item(), rewards[-1], atol=1e-6)
            return rewards


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


# At this size compiling takes far longer than running. The full pass has stacked layers, the cached ones unrolled.
@jax.jit(static_argnums=0, compiler_options={"xla_backend_optimization_level": 0})
def hidden_states(model, params, tokens, candidates, choices):
    """Uncached and cached hidden states; of each step's candidates, `choices` says which continues the text."""
    uncached = model.encode(params, tokens, STARTS)
    unrolled, layers = unstack_layers(model, params)
    last, cache = unrolled.prefill(layers, tokens[:, :PROMPT], PROMPT - STARTS, TOTAL + candidates.shape[-1])

    def step(cache, candidates):
        hidden, pending = unrolled.siblings(layers, cache, candidates)
        chosen = jnp.take_along_axis(hidden, choices[:, None, None], axis=1)[:, 0]
        return unrolled.keep(cache, pending, jnp.ones(2, bool), choices), chosen

    _, answer = jax.lax.scan(step, cache, candidates)
    prompt = uncached[:, : PROMPT - 1]
    return uncached, jnp.concatenate([prompt, last[:, None], answer.transpose(1, 0, 2)], axis=1)


def test_logits_and_rewards_equal_torch(reference):
    lm, rm = load_model(reference.lm_folder, "vocabulary"), load_model(reference.rm_folder, "reward")
    assert not lm.new_head and not rm.new_head
    jax.tree.map(np.testing.assert_array_equal, rm.params["backbone"], lm.params["backbone"])

    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 97, (2, TOTAL))
    choices = np.array([2, 0])
    candidates = rng.integers(0, 97, (TOTAL - PROMPT, 2, 3))
    candidates[:, [0, 1], choices] = tokens[:, PROMPT:].T
    passes = hidden_states(lm.model, lm.params, tokens, candidates, choices)

    for torch_model, outputs in (
        (reference.lm, [lm.model.logits(lm.params, hidden) for hidden in passes]),
        (reference.rm, [rm.model.rewards(rm.params, hidden) for hidden in passes]),
    ):
        for row, start in enumerate(STARTS):
            expected = reference.outputs(torch_model, tokens[row, start:])
            uncached, cached = (np.asarray(output[row, start:]) for output in outputs)
            np.testing.assert_allclose(uncached, expected, rtol=0, atol=1e-4)
            # Beyond the trained length dynamic scaling turns every token anew with each longer pass; a cache cannot.
            if reference.name != "llama dynamic" or start > 0:
                np.testing.assert_allclose(cached, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("head", ["vocabulary", "reward"])
def test_export_holds_the_same_bits_and_torch_reads_it(reference, head, tmp_path):
    torch_model, folder = {
        "vocabulary": (reference.lm, reference.lm_folder),
        "reward": (reference.rm, reference.rm_folder),
    }[head]
    loaded = load_model(folder, head)
    # Unrolled layers are exported like stacked ones.
    save_model(tmp_path, *unstack_layers(loaded.model, loaded.params))
    assert_same_tensors(load_file(tmp_path / weights.SINGLE), load_file(folder / weights.SINGLE))

    again = type(torch_model).from_pretrained(tmp_path)
    tokens = np.arange(TOTAL)
    expected = reference.outputs(torch_model, tokens)
    exported = reference._replace(lm=again, rm=again) if head == "vocabulary" else reference._replace(rm=again)
    np.testing.assert_allclose(exported.outputs(again, tokens), expected, rtol=0, atol=1e-6)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [type(torch_model).__name__]


def assert_same_tensors(ours, expected):
    """The same names, and each tensor's dtype, shape and bits."""
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (ours[name].dtype, ours[name].shape) == (tensor.dtype, tensor.shape), name
        assert ours[name].tobytes() == tensor.tobytes(), name


def random_params(model, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.2, x.shape), dtype), model.abstract_params())


def assert_same_params(ours, expected):
    jax.tree.map(np.testing.assert_array_equal, ours, expected)


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """A checkpoint of each family and head, with its parameters; never written to."""
    made = {}
    for family, config in TINY_CONFIGS.items():
        for head in ("vocabulary", "reward"):
            model = CausalModel(config, head)
            params = random_params(model)
            folder = tmp_path_factory.mktemp(f"{family}-{head}") / "model"
            save_model(folder, model, params, special_tokens={"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3})
            made[family, head] = (folder, model, params)
    return made


@pytest.fixture
def checkpoint(originals, tmp_path):
    """Copies one of the checkpoints to a folder of the test's own."""

    def copy(family="llama", head="vocabulary"):
        folder, model, params = originals[family, head]
        shutil.copytree(folder, tmp_path / "copy")
        return tmp_path / "copy", model, params

    return copy


def edit_config(folder, **changes):
    """Sets fields of config.json; None removes one."""
    path = folder / "config.json"
    fields = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in fields.items() if value is not None}))


def edit_tensors(folder, change):
    tensors = load_file(folder / weights.SINGLE)
    save_file(change(tensors), folder / weights.SINGLE)


def test_shards_go_out_and_come_in(checkpoint, tmp_path):
    folder, model, params = checkpoint()
    whole = load_file(folder / weights.SINGLE)
    save_model(folder, model, params, max_shard_size="20KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 1 and not (folder / weights.SINGLE).exists()
    named = json.loads((folder / weights.INDEX).read_text())["weight_map"]
    stored = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    assert_same_tensors(stored, whole)
    assert all(name in load_file(folder / file) for name, file in named.items()) and named.keys() == whole.keys()
    assert_same_params(load_model(folder, "vocabulary").params, params)

    save_model(folder, model, params)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", weights.SINGLE]


def test_torch_shards_are_read_and_ours_by_torch(torch, checkpoint, tmp_path):
    import transformers

    folder, model, params = checkpoint("gpt2")
    save_model(folder, model, params, max_shard_size="20KB")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert (tmp_path / "theirs" / weights.INDEX).exists()
    assert_same_params(load_model(tmp_path / "theirs", "vocabulary").params, params)


def test_half_precision_checkpoints_keep_their_bits(tmp_path):
    model = CausalModel(TINY_CONFIGS["llama"])
    params = random_params(model, jnp.bfloat16)
    save_model(tmp_path / "first", model, params)
    assert json.loads((tmp_path / "first" / "config.json").read_text())["dtype"] == "bfloat16"
    loaded = load_model(tmp_path / "first", "vocabulary", dtype=jnp.bfloat16)
    save_model(tmp_path / "second", loaded.model, loaded.params)
    first, second = (load_file(tmp_path / name / weights.SINGLE) for name in ("first", "second"))
    assert {tensor.dtype for tensor in first.values()} == {np.dtype(jnp.bfloat16)}
    assert_same_tensors(second, first)
    widened = load_model(tmp_path / "first", "vocabulary").params
    assert_same_params(widened, jax.tree.map(lambda x: x.astype(jnp.float32), params))


@pytest.mark.parametrize(
    ("family", "prefix", "buffers"),
    [
        ("gpt2", "transformer.", ["h.0.attn.bias", "h.1.attn.masked_bias"]),
        ("llama", "model.", ["layers.0.self_attn.rotary_emb.inv_freq"]),
        ("opt", "model.", ["decoder.version"]),
    ],
)
def test_a_bare_backbone_with_old_buffers_is_read(family, prefix, buffers, checkpoint):
    folder, _, params = checkpoint(family, "reward")

    def bare(tensors):
        named = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
        return {**named, **{name: np.ones(1, np.float32) for name in buffers}}

    edit_tensors(folder, bare)
    assert_same_params(load_model(folder, "reward").params, params)


def test_a_tied_checkpoint_may_store_its_head_too(checkpoint):
    folder, _, params = checkpoint("gpt2")
    edit_tensors(folder, lambda tensors: {**tensors, "lm_head.weight": tensors["transformer.wte.weight"].copy()})
    loaded = load_model(folder, "vocabulary")
    assert_same_params(loaded.params, params)
    assert not loaded.new_head


def test_older_rope_fields_are_read(checkpoint):
    folder, _, _ = checkpoint()
    old = {"rope_theta": 123.0, "rope_scaling": {"type": "linear", "factor": 2.0}}
    edit_config(folder, rope_parameters=None, **old)
    assert load_model(folder, "vocabulary").model.config.rotary == Rotary(123.0, "linear", (("factor", 2.0),))


def test_special_tokens_are_kept(checkpoint, tmp_path):
    folder, _, _ = checkpoint(head="reward")
    loaded = load_model(folder, "reward")
    assert loaded.special_tokens == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
    assert loaded.eos_ids == (2,)
    save_model(tmp_path / "again", loaded.model, loaded.params, special_tokens=loaded.special_tokens)
    assert load_model(tmp_path / "again", "reward").special_tokens == loaded.special_tokens


def test_every_end_of_sequence_id_is_found(checkpoint):
    folder, _, _ = checkpoint()
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 2]}))
    assert load_model(folder, "vocabulary").eos_ids == (2, 7)
    edit_config(folder, eos_token_id=[5, 7])
    assert load_model(folder, "vocabulary").eos_ids == (5, 7, 2)


@pytest.mark.parametrize("family", TINY_CONFIGS)
def test_a_language_model_becomes_a_reward_model_with_a_new_head(family, originals):
    folder, _, params = originals[family, "vocabulary"]
    first, same, other = (load_model(folder, "reward", seed=seed) for seed in (0, 0, 1))
    assert first.new_head
    assert_same_params(first.params["backbone"], params["backbone"])
    assert_same_params(first.params, same.params)
    kernels = [np.asarray(loaded.params["head"]["linear"]["kernel"]) for loaded in (first, other)]
    assert (kernels[0] != kernels[1]).all()


def test_from_scratch_reads_the_config_alone(checkpoint):
    folder, model, params = checkpoint("gpt2")
    (folder / weights.SINGLE).unlink()
    scratch = load_model(folder, "vocabulary", from_scratch=True, dtype=jnp.bfloat16)
    assert scratch.model == model and scratch.new_head
    assert jax.tree.map(jnp.shape, scratch.params) == jax.tree.map(jnp.shape, params)
    assert {leaf.dtype for leaf in jax.tree.leaves(scratch.params)} == {jnp.dtype(jnp.bfloat16)}


def test_a_failed_save_leaves_the_old_model(checkpoint, monkeypatch):
    folder, model, params = checkpoint()
    (folder / "tokenizer.json").write_text("{}")
    doubled = jax.tree.map(lambda x: 2 * x, params)

    def full(*_, **__):
        raise OSError("no space left on device")

    # Neither a write that fails nor a stop just before the new files take their names may cost the old weights.
    for step in ("safetensors.numpy.save_file", "os.replace"):
        with monkeypatch.context() as patch, pytest.raises(OSError, match="no space"):
            patch.setattr(step, full)
            save_model(folder, model, doubled)
        assert_same_params(load_model(folder, "vocabulary").params, params)

    save_model(folder, model, doubled)
    assert_same_params(load_model(folder, "vocabulary").params, doubled)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", weights.SINGLE, "tokenizer.json"]


def test_a_run_folder_stands_for_its_exported_model(checkpoint):
    folder, _, _ = checkpoint()
    run = folder.parent / "run"
    shutil.move(folder, run / hf.EXPORTED)
    assert resolve(run) == run / hf.EXPORTED
    assert resolve(run / hf.EXPORTED) == run / hf.EXPORTED


def test_hub_ids_are_downloaded_without_pickles(checkpoint, monkeypatch):
    folder, _, params = checkpoint()
    asked = {}

    def snapshot_download(name, allow_patterns):
        asked.update(name=name, patterns=allow_patterns)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert_same_params(load_model("someone/some-model", "vocabulary").params, params)
    assert asked["name"] == "someone/some-model"
    assert "*.safetensors" in asked["patterns"] and not any("bin" in pattern for pattern in asked["patterns"])


def test_an_unknown_hub_id_is_one_line(monkeypatch):
    def snapshot_download(*_, **__):
        raise OSError("404 Client Error\nmany\nlines")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(InputError) as error:
        load_model("someone/no-model", "vocabulary")
    assert str(error.value).startswith("someone/no-model: not a local folder") and "\n" not in str(error.value)


def without(name):
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if key != name}


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def two_labels(folder):
    edit_config(folder, id2label={"0": "A", "1": "B"}, label2id={"A": 0, "B": 1})
    edit_tensors(folder, lambda tensors: {**tensors, "score.weight": np.zeros((2, 32), np.float32)})


DAMAGE = {
    "no folder": (shutil.rmtree, "no such folder"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "no config.json"),
    "config not JSON": (lambda folder: truncate(folder / "config.json"), "config.json: not a JSON object"),
    "config a list": (lambda folder: (folder / "config.json").write_text("[]"), "config.json: not a JSON object"),
    "other architecture": (
        lambda folder: edit_config(folder, model_type="bert"),
        "architecture 'bert' is not known; known are .*gpt2, llama, opt",
    ),
    "other activation": (lambda folder: edit_config(folder, hidden_act="quick_gelu"), "quick_gelu"),
    "other RoPE scaling": (
        lambda folder: edit_config(folder, rope_parameters={"rope_type": "spiral", "rope_theta": 1.0}),
        "RoPE scaling 'spiral' is not known",
    ),
    "incomplete RoPE scaling": (
        lambda folder: edit_config(folder, rope_parameters={"rope_type": "llama3", "rope_theta": 1.0}),
        "factor",
    ),
    "pickle only": (
        lambda folder: (folder / weights.SINGLE).rename(folder / "pytorch_model.bin"),
        "weights are read from safetensors only",
    ),
    "truncated weights": (lambda folder: truncate(folder / weights.SINGLE), "not a readable safetensors file"),
    "weights not safetensors": (
        lambda folder: (folder / weights.SINGLE).write_bytes(b"version https://git-lfs.github.com/spec/v1"),
        "not a readable safetensors file",
    ),
    "generation config not JSON": (
        lambda folder: (folder / "generation_config.json").write_text("{"),
        "generation_config.json",
    ),
    "generation config with a text for a token": (
        lambda folder: (folder / "generation_config.json").write_text('{"eos_token_id": ["</s>"]}'),
        r"generation_config.json: eos_token_id is \['</s>'\], must be a token's number",
    ),
    "missing tensor": (
        lambda folder: edit_tensors(folder, without("model.layers.1.mlp.up_proj.weight")),
        "layers.1.mlp.up_proj.weight is missing",
    ),
    "wrong shape": (
        lambda folder: edit_config(folder, intermediate_size=40),
        r"layers.0.mlp.gate_proj.weight has shape \(32, 48\), the config needs \(32, 40\).* \(and 3 more\)",
    ),
    "unexpected tensor": (
        lambda folder: edit_tensors(folder, lambda tensors: {**tensors, "model.extra": np.ones(1, np.float32)}),
        "extra is not part of this architecture",
    ),
    "two labels": (two_labels, "this classifier has 2 labels, a reward model must have 1"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_unusable_checkpoints_are_one_clear_line(damage, checkpoint):
    folder, _, _ = checkpoint(head="reward")
    break_it, told = DAMAGE[damage]
    break_it(folder)
    with pytest.raises(InputError, match=told) as error:
        load_model(folder, "reward")
    assert "\n" not in str(error.value)


def test_an_untied_reward_model_is_not_a_language_model(originals):
    with pytest.raises(InputError, match=r"lm_head.weight is missing"):
        load_model(originals["llama", "reward"][0], "vocabulary")
