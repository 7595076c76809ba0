"""Checkpoints of Hugging Face, read and written."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pargs_jax.errors import InputError
from pargs_jax.models import sources, weights
from pargs_jax.models.causal import CausalModel
from pargs_jax.models.encoder import EncoderModel
from pargs_jax.models.hf import load_model, save_model
from pargs_jax.models.rotary import Rotary
from pargs_jax.models.sources import resolve
from pargs_jax.testing import TINY_CONFIGS, TINY_DEBERTA


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


def test_torch_shards_are_read_and_ours_by_torch(checkpoint, tmp_path):
    pytest.importorskip("torch", reason="the reference is transformers on torch")
    import transformers

    folder, model, params = checkpoint("gpt2")
    save_model(folder, model, params, max_shard_size="20KB")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert (tmp_path / "theirs" / weights.INDEX).exists()
    assert_same_params(load_model(tmp_path / "theirs", "vocabulary").params, params)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_checkpoints_keep_their_bits(dtype, tmp_path):
    model = CausalModel(TINY_CONFIGS["llama"])
    params = random_params(model, dtype)
    save_model(tmp_path / "first", model, params)
    assert json.loads((tmp_path / "first" / "config.json").read_text())["dtype"] == jnp.dtype(dtype).name
    loaded = load_model(tmp_path / "first", "vocabulary", dtype=dtype)
    save_model(tmp_path / "second", loaded.model, loaded.params)
    first, second = (load_file(tmp_path / name / weights.SINGLE) for name in ("first", "second"))
    assert {tensor.dtype for tensor in first.values()} == {np.dtype(dtype)}
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
    shutil.move(folder, run / sources.EXPORTED)
    assert resolve(run) == run / sources.EXPORTED
    assert resolve(run / sources.EXPORTED) == run / sources.EXPORTED


def test_hub_ids_are_downloaded_without_pickles(checkpoint, monkeypatch):
    folder, _, params = checkpoint()
    asked = {}

    def snapshot_download(name, allow_patterns, ignore_patterns, revision=None):
        asked.update(name=name, patterns=allow_patterns, ignored=ignore_patterns, revision=revision)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert_same_params(load_model("someone/some-model", "vocabulary").params, params)
    assert asked["name"] == "someone/some-model" and asked["revision"] is None
    assert "consolidated*" in asked["ignored"] and "*/*" in asked["ignored"]
    assert_same_params(load_model("someone/some-model@v1.0", "vocabulary").params, params)
    assert asked["name"] == "someone/some-model" and asked["revision"] == "v1.0"
    assert "*.safetensors" in asked["patterns"] and not any("bin" in pattern for pattern in asked["patterns"])


def test_an_unknown_hub_id_is_one_line(monkeypatch):
    def snapshot_download(*_, **__):
        raise OSError("404 Client Error\nmany\nlines")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(InputError) as error:
        load_model("someone/no-model", "vocabulary")
    assert str(error.value).startswith("someone/no-model: not a local folder") and "\n" not in str(error.value)
    with pytest.raises(InputError, match=r"someone/no-model@v9: .* the hub has no revision v9 of such a model"):
        load_model("someone/no-model@v9", "vocabulary")


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
        "architecture 'bert' is not known; known are deberta-v2, gemma2, .*, qwen3",
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
    "quantised to integers": (
        lambda folder: edit_tensors(
            folder, lambda tensors: tensors | {"model.layers.0.mlp.up_proj.qweight": np.ones((4, 48), np.int32)}
        ),
        "qweight is stored as I32, weights must be F16, .*; quantised checkpoints cannot be read",
    ),
    "quantised by AWQ": (
        lambda folder: edit_config(folder, quantization_config={"quant_method": "awq", "bits": 4}),
        r"quantization_config is \{'quant_method': 'awq', 'bits': 4\}, must be left out, since quantised checkpoints",
    ),
    "quantised by bitsandbytes": (
        lambda folder: edit_config(folder, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
        "quantization_config is .*bitsandbytes.*, must be left out, since quantised checkpoints cannot be read",
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
    "two labels": (two_labels, r"this classifier has 2 labels \(A, B\); choose one, as in .*#A, or mix them"),
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


LABELS = {"#B": [0, 1, 0], "#1": [0, 1, 0], "#A=0.5,C=-2": [0.5, 0, -2], "#a, b = c": [0, 0, 1]}


@pytest.mark.parametrize("kind", ["llama", "deberta"])
@pytest.mark.parametrize("label", LABELS)
def test_a_label_or_a_mix_of_labels_is_the_reward(kind, label, tmp_path):
    model = EncoderModel(TINY_DEBERTA) if kind == "deberta" else CausalModel(TINY_CONFIGS["llama"], "reward")
    save_model(tmp_path, model, random_params(model))
    names = ["A", "B", "a, b = c" if label == "#a, b = c" else "C"]
    edit_config(tmp_path, id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)})
    head = "classifier" if kind == "deberta" else "score"
    weight = np.random.default_rng(1).normal(size=(3, 32)).astype(np.float32)
    bias = {"classifier.bias": np.array([1, 2, 3], np.float32)} if kind == "deberta" else {}
    edit_tensors(tmp_path, lambda tensors: {**tensors, f"{head}.weight": weight, **bias})

    linear = load_model(f"{tmp_path}{label}", "reward").params["head"]["linear"]
    np.testing.assert_allclose(linear["kernel"][:, 0], np.array(LABELS[label]) @ weight, atol=1e-6)
    if bias:
        np.testing.assert_allclose(linear["bias"][0], np.array(LABELS[label]) @ [1, 2, 3], atol=1e-6)


@pytest.mark.parametrize(
    ("label", "head", "told"),
    [
        ("#C", "reward", "#C: has no label 'C'; it has A, B"),
        ("#2", "reward", "#2: has no label '2'; it has A, B"),
        ("#A=x", "reward", "#A=x: the factor of A is 'x', must be a number"),
        ("#A=inf", "reward", "#A=inf: factors must be finite numbers"),
        ("#A", "vocabulary", "#A: only the weights of a classifier have labels; leave out #A"),
    ],
)
def test_labels_that_do_not_exist_are_named(label, head, told, checkpoint):
    folder, _, _ = checkpoint(head="reward")
    two_labels(folder)
    with pytest.raises(InputError) as error:
        load_model(f"{folder}{label}", head)
    assert str(error.value) == f"{folder}{told}"


@pytest.mark.parametrize("layer", ["v_head.summary", "v_head", "value_head", "regression_head", "score"])
@pytest.mark.parametrize("bias", [None, 0.75])
@pytest.mark.parametrize("is_apart", [False, True])
def test_a_value_head_beside_a_language_model_is_a_reward_head(layer, bias, is_apart, checkpoint):
    folder, model, params = checkpoint()
    head = {f"{layer}.weight": np.random.default_rng(1).normal(size=(1, 32)).astype(np.float32)}
    if bias is not None:
        head[f"{layer}.bias"] = np.array([bias], np.float32)
    if is_apart:
        save_file(head, folder / weights.VALUE_HEAD)
    else:
        edit_tensors(folder, lambda tensors: tensors | head)
    loaded = load_model(folder, "reward")
    assert not loaded.new_head
    hidden = model.encode(params, np.arange(5)[None])
    expected = hidden @ head[f"{layer}.weight"][0] + (bias or 0)
    np.testing.assert_allclose(loaded.model.rewards(loaded.params, hidden), expected, atol=1e-5)
    save_model(folder.parent / "again", loaded.model, loaded.params)
    assert_same_params(load_model(folder.parent / "again", "reward").params, loaded.params)


@pytest.mark.parametrize("name", ["score.0.weight", "v_head.summary.0.weight", "reward_head.weight", "gating.w"])
def test_other_heads_are_refused_by_name(name, checkpoint):
    folder, _, _ = checkpoint()
    edit_tensors(folder, lambda tensors: {**tensors, name: np.ones((1, 32), np.float32)})
    with pytest.raises(InputError, match=f"{name} is part of a head that is not known; known are linear layers named "):
        load_model(folder, "reward")


def test_a_language_model_has_no_labels(checkpoint):
    folder, _, _ = checkpoint()
    with pytest.raises(InputError, match="#0: is not a classifier, so it has no labels; leave out #0"):
        load_model(f"{folder}#0", "reward")
