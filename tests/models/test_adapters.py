"""Adapters of PEFT: merged as PEFT merges them, and written so that PEFT loads them."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pargs_jax.errors import InputError
from pargs_jax.models.adapters import FIELDS, export_adapter
from pargs_jax.models.encoder import EncoderModel
from pargs_jax.models.hf import load_model, save_model, stored_head
from pargs_jax.models.lora import Lora, merge_lora
from pargs_jax.models.phi3 import Phi3Config
from pargs_jax.models.sources import find, split_source, tokenizer_folder
from pargs_jax.testing import TINY_CONFIGS, TINY_DEBERTA, random_params, tiny_model

TOKENS = np.arange(3, 12)[None]
PHI3 = Phi3Config(
    **{name: value for name, value in vars(TINY_CONFIGS["llama"]).items() if name != "windows"}, windows=()
)


@pytest.fixture(autouse=True)
def operation_by_operation():
    """Compiling takes far longer than running these once."""
    with jax.disable_jit():
        yield


@pytest.fixture(scope="session")
def peft():
    pytest.importorskip("torch", reason="the reference is PEFT on torch")
    return pytest.importorskip("peft", reason="the reference is PEFT")


def tiny(family, head="reward"):
    """A model and its parameters, of the kinds whose checkpoints differ in form."""
    if family == "deberta":
        model = EncoderModel(TINY_DEBERTA)
    elif family == "phi3":
        model = dataclasses.replace(tiny_model("llama", head)[0], config=PHI3)
    else:
        model = tiny_model(family, head)[0]
    return model, random_params(model, 1)


def outputs(model, params):
    """Logits or rewards of one text."""
    if isinstance(model, EncoderModel):
        return np.asarray(model.text_rewards(params, TOKENS, np.zeros(1, np.int32), np.full(1, TOKENS.shape[1])))
    hidden = model.encode(params, TOKENS)[0]
    return np.asarray(
        model.logits(params, hidden) if model.head == "vocabulary" else model.rewards(params, hidden)[-1:]
    )


def torch_outputs(model):
    import torch

    with torch.no_grad():
        return model(input_ids=torch.tensor(TOKENS)).logits[0].numpy()


CASES = {
    "llama": ("llama", "reward", {"target_modules": ["q_proj", "down_proj"], "modules_to_save": ["score"]}),
    "llama, one rank and scale for each": (
        "llama", "vocabulary", {
            "target_modules": "all-linear", "use_rslora": True, "rank_pattern": {"layers.1.mlp.up_proj": 2},
            "alpha_pattern": {"q_proj": 5, r"layers\.0\..*v_proj": 3},
        },
    ),
    "gpt2": ("gpt2", "vocabulary", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "llama, embeddings and head": (
        "llama", "vocabulary", {
            "target_modules": ["embed_tokens", "lm_head", "v_proj"], "rank_pattern": {"embed_tokens": 2},
            "alpha_pattern": {"lm_head": 3},
        },
    ),
    "gpt_neox, embeddings and head": ("gpt_neox", "vocabulary", {"target_modules": ["embed_in", "lm_head"]}),
    "gpt_neox, embeddings": ("gpt_neox", "reward", {"target_modules": ["embed_in"], "modules_to_save": ["score"]}),
    "tied, embeddings alone": ("gpt2", "vocabulary", {"target_modules": ["wte", "c_proj"], "fan_in_fan_out": True}),
    "tied, head alone": ("qwen3", "vocabulary", {"target_modules": ["lm_head"]}),
    "tied, each by itself": ("gemma3", "vocabulary", {"target_modules": ["embed_tokens", "lm_head"]}),
    "tied, both as one": ("qwen3", "vocabulary", {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}),
    "tied, embeddings whole": (
        "qwen3", "vocabulary", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    ),
    "phi3": ("phi3", "reward", {"target_modules": ["qkv_proj", "gate_up_proj"], "layers_to_transform": [1]}),
    "deberta": ("deberta", "reward", {
        "target_modules": ["query_proj", "dense"], "modules_to_save": ["classifier", "pooler"],
        "exclude_modules": ["deberta.pooler.dense", "pooler.dense"],
    }),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore")
def test_an_adapter_gives_what_peft_gives(case, peft, tmp_path):
    import torch
    import transformers

    family, head, options = CASES[case]
    save_model(tmp_path / "base", *tiny(family, head), special_tokens={"pad_token_id": None})
    is_reward = head == "reward"
    auto = transformers.AutoModelForSequenceClassification if is_reward else transformers.AutoModelForCausalLM
    torch.manual_seed(0)
    base = auto.from_pretrained(tmp_path / "base")
    config = peft.LoraConfig(
        r=4, lora_alpha=6, init_lora_weights=False, task_type="SEQ_CLS" if is_reward else "CAUSAL_LM", **options
    )
    adapted = peft.get_peft_model(base, config).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter) / 10)
    adapted.save_pretrained(tmp_path / "adapter")

    loaded = load_model(tmp_path / "adapter", head)
    expected = torch_outputs(adapted)
    np.testing.assert_allclose(outputs(loaded.model, loaded.params), expected, atol=1e-4)
    assert np.abs(outputs(*load_model(tmp_path / "base", head)[:2]) - expected).max() > 1e-3
    assert not loaded.new_head and stored_head(tmp_path / "adapter") == head


def drawn(family, head, layers):
    """A model with random additions."""
    model, _ = tiny(family, head)
    adapted = dataclasses.replace(model, lora=Lora(rank=3, alpha=5.0, layers=layers))
    rng = np.random.default_rng(0)
    abstract = adapted.abstract_params()
    noise = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.2, x.shape), jnp.float32), abstract)
    return adapted, noise


WRITTEN = [
    ("llama", "reward", ".*"),
    ("gpt2", "vocabulary", "query|key|up"),
    ("phi3", "vocabulary", "query|value|gate|out"),
    ("gpt_neox", "reward", "query_key_value|down"),
    ("deberta", "reward", "query|out|up|down"),
    ("llama", "vocabulary", "query|embed|head"),
    ("llama", "vocabulary", "head"),
    ("gpt_neox", "vocabulary", "embed|head"),
    ("gpt2", "reward", ".*|embed"),
    ("opt", "reward", "embed"),
    ("gemma3", "reward", "embed"),
    ("deberta", "reward", "query|embed"),
]


@pytest.mark.parametrize(("family", "head", "layers"), WRITTEN)
@pytest.mark.filterwarnings("ignore")
def test_an_exported_adapter_is_read_here_and_by_peft(family, head, layers, tmp_path):
    adapted, params = drawn(family, head, layers)
    plain = dataclasses.replace(adapted, lora=None)
    base = without_additions(params)
    if head == "reward":  # it is trained in full
        base |= {"head": random_params(plain, 2)["head"]}
    save_model(tmp_path / "base", plain, base, special_tokens={"pad_token_id": None})
    export_adapter(tmp_path / "adapter", adapted, params, base=str(tmp_path / "base"), prompt_form="hh")

    expected = outputs(plain, merge_lora(adapted.lora, params))
    loaded = load_model(tmp_path / "adapter", head)
    np.testing.assert_allclose(outputs(loaded.model, loaded.params), expected, atol=1e-5)
    assert loaded.prompt_form == "hh"

    peft = pytest.importorskip("peft", reason="the reference is PEFT")
    auto = peft.AutoPeftModelForSequenceClassification if head == "reward" else peft.AutoPeftModelForCausalLM
    options = {"num_labels": 1} if head == "reward" else {}
    adapted = auto.from_pretrained(tmp_path / "adapter", **options).eval()
    np.testing.assert_allclose(torch_outputs(adapted), expected, atol=1e-4)
    np.testing.assert_allclose(torch_outputs(adapted.merge_and_unload()), expected, atol=1e-4)


def test_an_addition_to_a_tied_table_is_not_exported(tmp_path):
    """PEFT would merge it twice."""
    with pytest.raises(ValueError, match="twice"):
        export_adapter(tmp_path / "adapter", *drawn("gpt2", "vocabulary", "embed"), base="base")
    assert not (tmp_path / "adapter").exists()


def without_additions(params):
    if not isinstance(params, dict):
        return params
    return {name: without_additions(part) for name, part in params.items() if not name.startswith("lora_")}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A base and an adapter on its query layers; never written to."""
    folder = tmp_path_factory.mktemp("llama")
    adapted, params = drawn("llama", "reward", "query")
    save_model(folder / "base", dataclasses.replace(adapted, lora=None), without_additions(params))
    export_adapter(folder / "adapter", adapted, params, base=str(folder / "base"))
    return folder


@pytest.fixture
def copy(llama, tmp_path):
    """A copy of the adapter, with changes to its config and tensors."""

    def make(change=lambda tensors: tensors, **fields):
        config = json.loads((llama / "adapter" / "adapter_config.json").read_text()) | fields
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        tensors = load_file(llama / "adapter" / "adapter_model.safetensors")
        save_file(change(tensors), tmp_path / "adapter_model.safetensors")
        return tmp_path

    return make


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3', must be LORA"),
        ({"peft_type": "ADALORA"}, "peft_type is 'ADALORA', must be LORA"),
        ({"use_dora": True}, "use_dora is True, must be false"),
        ({"bias": "lora_only"}, "bias is 'lora_only', must be none"),
        ({"lora_bias": True}, "lora_bias is True, must be false"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', must be true, false, gaussian"),
        ({"trainable_token_indices": [1]}, r"trainable_token_indices is \[1\], must be left out or empty"),
        ({"layer_replication": [[0, 2]]}, "layer_replication is"),
        ({"use_tomorrow": 1}, r"has fields that are not known for LORA, .*: use_tomorrow \(1\)"),
        ({"alpha_pattern": {"(": 2}}, r"alpha_pattern has '\(', must be a regular expression"),
        ({"lora_alpha": "x"}, "lora_alpha is 'x', must be a number above 0"),
        ({"base_model_name_or_path": None}, "does not say which model it was made for; give it as MODEL+"),
        ({"base_model_name_or_path": "/no/such"}, "its model /no/such was not found; give it as MODEL+"),
    ],
)
def test_adapters_that_cannot_be_merged_are_refused_by_name(fields, told, copy):
    with pytest.raises(InputError, match=told) as error:
        load_model(copy(**fields), "reward")
    assert "\n" not in str(error.value)


LAYER = "base_model.model.model.layers.0.self_attn.q_proj"
TABLE = "base_model.model.model.embed_tokens"


@pytest.mark.parametrize(
    ("added", "told"),
    [
        ({f"{LAYER}.lora_magnitude_vector": 32}, r"lora_magnitude_vector is not a part of a LoRA adapter"),
        ({f"{LAYER}.lora_embedding_B.weight": 32}, r"lora_embedding_B.weight is not a part"),
        ({f"{TABLE}.lora_embedding_A": 32}, r"model.embed_tokens has lora_embedding_A alone"),
        (
            {f"{TABLE}.lora_A.weight": (3, 32), f"{TABLE}.lora_B.weight": (61, 3)},
            r"embed_tokens has lora_A and lora_B; token embeddings must have lora_embedding_A and lora_embedding_B",
        ),
        (
            {f"{TABLE}.lora_embedding_A": (3, 32), f"{TABLE}.lora_embedding_B": (61, 3)},
            r"embed_tokens have shapes \(61, 3\) and \(3, 32\), that of the model \(61, 32\)",
        ),
        (
            {f"{LAYER}.lora_embedding_A": (3, 32), f"{LAYER}.lora_embedding_B": (32, 3)},
            r"q_proj has lora_A and lora_B and lora_embedding_A and lora_embedding_B; token embeddings must have",
        ),
        ({LAYER.replace("q_proj", "x_proj") + ".lora_A.weight": 32}, r"x_proj has lora_A alone"),
        ({f"{LAYER}.lora_B.weight": ()}, r"q_proj have shapes \(\) and \(3, 32\), that of the model \(32, 32\)"),
        ({f"{LAYER}.lora_B.weight": 32}, r"q_proj have shapes \(32,\) and \(3, 32\), that of the model \(32, 32\)"),
        ({f"{LAYER}.lora_B.weight": (5, 3)}, r"q_proj have shapes \(5, 3\) and \(3, 32\), that of the model"),
        ({"model.norm.weight": 32}, r"model.norm.weight is not a part of a LoRA adapter"),
        ({"base_model.model.other.weight": 32}, r"other.weight is not part of this architecture"),
    ],
)
def test_tensors_that_cannot_be_merged_are_refused_by_name(added, told, copy):
    arrays = {name: np.zeros(size, np.float32) for name, size in added.items()}
    with pytest.raises(InputError, match=told) as error:
        load_model(copy(lambda tensors: tensors | arrays), "reward")
    assert "\n" not in str(error.value)


def test_every_field_of_peft_is_known(peft):
    assert [name for name in peft.LoraConfig().to_dict() if not FIELDS.knows(name)] == []


def test_a_model_is_chosen_by_name_and_an_adapter_names_its_own(llama, copy):
    base, adapter = llama / "base", copy(base_model_name_or_path="/no/such")
    assert split_source(f"{base}+{adapter}#0") == (str(base), str(adapter), "0")
    assert find(f"{base}+{adapter}") == (base, adapter)
    assert find(llama / "adapter") == (base, llama / "adapter")
    chosen, own = (load_model(source, "reward") for source in (f"{base}+{adapter}#0", llama / "adapter"))
    jax.tree.map(np.testing.assert_array_equal, chosen.params, own.params)
    assert tokenizer_folder(f"{base}+{adapter}") == base
    (adapter / "tokenizer_config.json").write_text("{}")
    assert tokenizer_folder(f"{base}+{adapter}") == adapter
    with pytest.raises(InputError, match=r"base: has no adapter_config.json, so it is not a PEFT adapter"):
        find(f"{base}+{base}")
    with pytest.raises(InputError, match="is an adapter itself"):
        find(f"{llama / 'adapter'}+{adapter}")
