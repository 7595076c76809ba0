"""Which tensors of a checkpoint are a model's weights, and which cannot be."""

import contextlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pargs_jax.errors import InputError, InputWarning
from pargs_jax.mesh import make_mesh
from pargs_jax.models.causal import CausalModel
from pargs_jax.models.encoder import EncoderModel
from pargs_jax.models.hf import load_model, save_model
from pargs_jax.models.weights import INDEX, SINGLE
from pargs_jax.testing import TINY_CONFIGS, TINY_DEBERTA, random_params

EMBEDDINGS = {
    "gemma3": "model.embed_tokens.weight",
    "gpt2": "transformer.wte.weight",
    "gpt_neox": "gpt_neox.embed_in.weight",
    "llama": "model.embed_tokens.weight",
    "opt": "model.decoder.embed_tokens.weight",
}
HEADS = {family: "embed_out.weight" if family == "gpt_neox" else "lm_head.weight" for family in EMBEDDINGS}


def write(folder, family="gpt2", head="vocabulary", change=lambda tensors: None, **fields):
    """A tiny checkpoint with its tensors changed, and its parameters before that."""
    model = EncoderModel(TINY_DEBERTA) if family == "deberta-v2" else CausalModel(TINY_CONFIGS[family], head)
    params = random_params(model)
    save_model(folder, model, params)
    tensors = load_file(folder / SINGLE)
    change(tensors)
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))
    return params


def shard(folder):
    """Splits the one file in two."""
    tensors = load_file(folder / SINGLE)
    (folder / SINGLE).unlink()
    names = {name: f"model-{number % 2}.safetensors" for number, name in enumerate(tensors)}
    for file in set(names.values()):
        save_file({name: tensors[name] for name in names if names[name] == file}, folder / file, {"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": names}))


def refusal(folder, head="vocabulary", **options):
    with pytest.raises(InputError) as caught:
        load_model(folder, head, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def assert_torch_agrees(folder, model, params):
    import torch
    from transformers import AutoModelForCausalLM

    tokens = np.arange(12)[None] * 5
    with torch.inference_mode():
        expected = AutoModelForCausalLM.from_pretrained(folder).eval()(torch.tensor(tokens)).logits[0].numpy()
    logits = model.logits(params, model.encode(params, tokens))[0]
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("files", ["one file", "shards"])
@pytest.mark.parametrize("family", EMBEDDINGS)
def test_another_head_than_the_embeddings_counts_whatever_the_config_says(family, files, tmp_path):
    pytest.importorskip("torch", reason="the reference is transformers on torch")
    head = np.random.default_rng(1).normal(0, 0.3, (61, TINY_CONFIGS[family].head_width)).astype(np.float32)
    write(tmp_path, family, change=lambda tensors: tensors.update({HEADS[family]: head}), tie_word_embeddings=True)
    if files == "shards":
        shard(tmp_path)
    with pytest.warns(
        InputWarning,
        match=r"config.json ties lm_head.weight to .*, but the checkpoint stores a different one, which is used",
    ):
        model, params, *_ = load_model(tmp_path, "vocabulary")
    assert not model.config.tied_embeddings
    assert_torch_agrees(tmp_path, model, params)

    save_model(tmp_path / "export", model, params)
    assert json.loads((tmp_path / "export" / "config.json").read_text())["tie_word_embeddings"] is False
    assert_torch_agrees(tmp_path / "export", model, params)


@pytest.mark.parametrize("family", EMBEDDINGS)
def test_a_tied_head_that_is_stored_alone_is_the_embeddings_too(family, tmp_path):
    pytest.importorskip("torch", reason="the reference is transformers on torch")

    def change(tensors):
        tensors.pop(HEADS[family], None)
        tensors[HEADS[family]] = tensors.pop(EMBEDDINGS[family])

    write(tmp_path, family, change=change, tie_word_embeddings=True)
    model, params, *_ = load_model(tmp_path, "vocabulary")
    assert model.config.tied_embeddings
    assert_torch_agrees(tmp_path, model, params)


def test_the_one_file_counts_beside_an_index(tmp_path):
    params = write(tmp_path)
    tensors = {name: tensor + 1 for name, tensor in load_file(tmp_path / SINGLE).items()}
    save_file(tensors, tmp_path / "model-0.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "model-0.safetensors")}))
    jax.tree.map(np.testing.assert_array_equal, load_model(tmp_path, "vocabulary").params, params)
    # So does one that was left over, or is there for other readers: nothing in the index is looked at.
    (tmp_path / INDEX).write_text("{")
    jax.tree.map(np.testing.assert_array_equal, load_model(tmp_path, "vocabulary").params, params)


@pytest.mark.parametrize("file", [3, None, ["model-0.safetensors"], {}, "pytorch_model.bin", ""])
def test_an_index_of_other_things_than_files_is_one_line(file, tmp_path):
    write(tmp_path)
    (tmp_path / SINGLE).unlink()
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"transformer.wte.weight": file}}))
    told = f"{tmp_path / INDEX}: transformer.wte.weight is in {file!r}, must be the name of a safetensors file"
    assert refusal(tmp_path) == told


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "not a JSON object"),
        ("{}", "has no weight_map, which says where each tensor is"),
        ('{"weight_map": {"ln_f.bias": "gone.safetensors"}}', "gone.safetensors: not a readable safetensors file"),
    ],
)
def test_an_index_that_leads_nowhere_is_one_line(text, told, tmp_path):
    write(tmp_path)
    (tmp_path / SINGLE).rename(tmp_path / INDEX).write_text(text)
    assert told in refusal(tmp_path)


@pytest.mark.parametrize(
    ("dtype", "told"),
    [(np.int8, "I8"), (np.uint8, "U8"), (np.bool_, "BOOL"), (np.int64, "I64"), (jnp.float8_e4m3fn, "F8_E4M3")],
)
def test_weights_that_are_not_of_floating_point_are_named(dtype, told, tmp_path):
    name = "transformer.h.1.mlp.c_fc.weight"
    write(tmp_path, change=lambda tensors: tensors.update({name: tensors[name].astype(dtype)}))
    assert f"{SINGLE}: {name} is stored as {told}, weights must be F16, BF16, F32, F64" in refusal(tmp_path)


def test_masks_of_older_checkpoints_are_not_weights(tmp_path):
    params = write(tmp_path, change=lambda tensors: tensors.update({"h.0.attn.bias": np.ones((4, 4), bool)}))
    jax.tree.map(np.testing.assert_array_equal, load_model(tmp_path, "vocabulary").params, params)


@pytest.mark.parametrize("dtype", [np.float16, np.float64, jnp.bfloat16])
def test_other_formats_of_floating_point_are_weights(dtype, tmp_path):
    name = "transformer.ln_f.weight"
    write(tmp_path, change=lambda tensors: tensors.update({name: tensors[name].astype(dtype)}))
    assert (load_model(tmp_path, "vocabulary").params["backbone"]["norm"]["scale"] == 1).all()


@pytest.mark.parametrize(
    ("value", "mesh"), [(np.nan, None), (np.inf, None), (-np.inf, None), (np.nan, "cpu-4,fsdp=2,tensor=2")]
)
def test_weights_that_are_not_finite_are_named(value, mesh, tmp_path):
    bad = ["transformer.h.1.attn.c_attn.bias", "transformer.h.0.mlp.c_fc.weight", "transformer.wte.weight"]

    def change(tensors):
        for name in bad:
            tensors[name][(-1,) * tensors[name].ndim] = value

    write(tmp_path, change=change)
    expected = f"{tmp_path}: NaN or infinite numbers, read as float32, in "
    with jax.set_mesh(make_mesh(mesh, "train")) if mesh else contextlib.nullcontext():
        told = refusal(tmp_path)
    assert told.startswith(expected)
    named = told.removeprefix(expected).split("; ")
    assert sorted(named) == sorted(name.removeprefix("transformer.") for name in bad)


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
def test_weights_too_large_for_the_format_they_are_read_in_are_named(tmp_path):
    def change(tensors):
        tensors["transformer.ln_f.bias"][0] = 1e5

    write(tmp_path, change=change)
    load_model(tmp_path, "vocabulary")
    assert "NaN or infinite numbers, read as float16, in ln_f.bias" in refusal(tmp_path, dtype=jnp.float16)


def test_two_tensors_of_one_name_are_one_line(tmp_path):
    write(tmp_path, change=lambda tensors: tensors.update({"wpe.weight": tensors["transformer.wpe.weight"]}))
    assert "are both wpe.weight of the model" in refusal(tmp_path)


def test_deberta_may_store_positions_that_it_does_not_use(tmp_path):
    name = "deberta.embeddings.position_embeddings.weight"
    unused = np.ones((TINY_DEBERTA.context_length, TINY_DEBERTA.width), np.float32)
    params = write(tmp_path, "deberta-v2", "reward", lambda tensors: tensors.update({name: unused}))
    jax.tree.map(np.testing.assert_array_equal, load_model(tmp_path, "reward").params, params)


def test_deberta_without_relative_positions_may_have_their_norm(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch", reason="the reference is transformers on torch")
    sizes = {"vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.DebertaV2Config(**sizes, intermediate_size=24, norm_rel_ebd="layer_norm", num_labels=1)
    transformers.DebertaV2ForSequenceClassification(config).save_pretrained(tmp_path)
    model, params, *_ = load_model(tmp_path, "reward")
    save_model(tmp_path / "again", model, params)
    first, again = (load_file(folder / SINGLE) for folder in (tmp_path, tmp_path / "again"))
    assert first.keys() == again.keys()
