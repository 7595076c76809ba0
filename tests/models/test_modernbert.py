"""ModernBERT against torch: rewards, gradients, export, and what a text may not see."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from pargs_jax.errors import InputError
from pargs_jax.models.families import FAMILIES
from pargs_jax.models.hf import describe_model, load_model, save_model
from pargs_jax.models.model import unstack_layers
from pargs_jax.models.modernbert import ModernBertModel
from pargs_jax.models.rotary import Rotary
from pargs_jax.models.weights import export_tensors
from pargs_jax.testing import TINY_MODERNBERT, random_params

VARIANTS = {
    "windows in two of three layers": TINY_MODERNBERT,
    "biases, mean of all tokens": dataclasses.replace(
        TINY_MODERNBERT, attention_bias=True, mlp_bias=True, norm_bias=True, pooler_bias=True, pooling="mean"
    ),
    "full attention, other activations and rotation": dataclasses.replace(
        TINY_MODERNBERT, windows=(), activation="relu", pooler_activation="tanh",
        rotary=Rotary(theta=200.0, kind="linear", numbers=(("factor", 2.0),)),
    ),
}  # fmt: skip
# Prompt and answer; the windows reach 3 tokens to either side, and the last text is longer than the training context.
LENGTHS = np.array([[5, 4], [3, 9], [8, 13]])
PROMPT_WIDTH, ANSWER_WIDTH = 8, 13
CLS, SEP = 1, 2

answer_rewards = jax.jit(ModernBertModel.answer_rewards, static_argnums=0)


@pytest.fixture(scope="module", params=VARIANTS)
def encoder(request):
    model = ModernBertModel(VARIANTS[request.param])
    rng = np.random.default_rng(0)
    shaken = jax.tree.map(lambda x: x + 0.1 * rng.standard_normal(x.shape).astype(np.float32), random_params(model))
    norm = shaken["backbone"]["layers"]["norm1"]  # that of the first layer does nothing and is not stored
    for name, value in norm.items():
        norm[name] = value.at[0].set(float(name == "scale"))
    return model, shaken


def pairs():
    """`[CLS] prompt [SEP]` and answer, as ids; what pads them is ids too."""
    rng = np.random.default_rng(0)
    prompts = rng.integers(3, 61, (len(LENGTHS), PROMPT_WIDTH), np.int32)
    answers = rng.integers(3, 61, (len(LENGTHS), ANSWER_WIDTH), np.int32)
    for row, length in enumerate(LENGTHS[:, 0]):
        prompts[row, PROMPT_WIDTH - length], prompts[row, -1] = CLS, SEP
    return prompts, LENGTHS[:, 0], answers, LENGTHS[:, 1]


def test_rewards_and_gradients_equal_those_of_torch_and_the_round_trip_is_exact(encoder, tmp_path):
    torch = pytest.importorskip("torch", reason="the reference is transformers on torch")
    from transformers import AutoModelForSequenceClassification

    model, params = encoder
    save_model(tmp_path, model, params, special_tokens={"pad_token_id": 0})
    twin = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    prompts, prompt_lengths, answers, lengths = pairs()
    rewards = answer_rewards(model, params, *pairs(), SEP)
    total = 0
    for row in range(len(LENGTHS)):
        prompt, answer = prompts[row, PROMPT_WIDTH - prompt_lengths[row] :], answers[row, : lengths[row]]
        expected = twin(torch.tensor([[*prompt.tolist(), *answer.tolist(), SEP]])).logits[0, 0]
        assert float(rewards[row]) == pytest.approx(float(expected.detach()), abs=1e-4)
        total = total + expected
    assert np.std(rewards) > 0.01
    loaded = load_model(tmp_path, "reward")
    assert loaded.model == model and not loaded.new_head
    jax.tree.map(np.testing.assert_array_equal, loaded.params, params)
    if model.config.pooling == "cls":
        return

    total.backward()
    theirs = {name: parameter.grad.numpy() for name, parameter in twin.named_parameters()}
    gradients = jax.jit(jax.grad(lambda params: model.answer_rewards(params, *pairs(), SEP).sum()))(params)
    for name, gradient in export_tensors(model, FAMILIES["modernbert"], gradients):
        expected = theirs.pop(name)
        np.testing.assert_allclose(gradient, expected, atol=1e-4 * max(1, np.abs(expected).max()), err_msg=name)
    assert not theirs


def test_unrolled_layers_give_the_same():
    """They read one token alone in the last layer."""
    model = ModernBertModel(TINY_MODERNBERT)
    params = random_params(model)
    expected = answer_rewards(model, params, *pairs(), SEP)
    np.testing.assert_allclose(answer_rewards(*unstack_layers(model, params), *pairs(), SEP), expected, atol=1e-5)


def test_it_sees_neither_padding_nor_what_follows(encoder):
    model, params = encoder
    prompts, prompt_lengths, answers, lengths = pairs()
    rewards = answer_rewards(model, params, *pairs(), SEP)
    prompts = np.where(np.arange(PROMPT_WIDTH) < PROMPT_WIDTH - prompt_lengths[:, None], 7, prompts)
    answers = np.where(np.arange(ANSWER_WIDTH) >= lengths[:, None], 7, answers)
    others = answer_rewards(model, params, prompts, prompt_lengths, answers, lengths, SEP)
    np.testing.assert_array_equal(others, rewards)


def test_a_model_that_guesses_masked_words_gives_the_dense_layer_of_its_head(tmp_path):
    torch = pytest.importorskip("torch", reason="the reference is transformers on torch")
    import transformers

    fields = {**TINY_MODERNBERT.to_hf(), "pad_token_id": 0}
    torch.manual_seed(0)
    masked = transformers.ModernBertForMaskedLM(transformers.AutoConfig.for_model(**fields))
    masked.save_pretrained(tmp_path)
    loaded = load_model(tmp_path, "reward")
    assert loaded.new_head
    dense = loaded.params["head"]["dense"]["kernel"]
    np.testing.assert_array_equal(dense.T, masked.head.dense.weight.detach().numpy())
    np.testing.assert_array_equal(loaded.params["head"]["norm"]["scale"], 1)
    with pytest.raises(InputError, match="modernbert is not a language model"):
        load_model(tmp_path, "vocabulary")


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"local_attention": 1}, "local_attention is 1, must be a whole number of at least 2"),
        ({"layer_types": ["full_attention"]}, "layer_types has 1 entries for 3 layers|layer_types"),
        ({"classifier_pooling": "max"}, "classifier_pooling"),
        ({"classifier_activation": "mish"}, "classifier_activation 'mish' is not known"),
        ({"pargs_attention": "full", "new_windows": 3}, r"not known for modernbert.*: new_windows \(3\)"),
    ],
)
def test_configs_that_cannot_be_read_are_one_line(fields, told, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**TINY_MODERNBERT.to_hf(), **fields}))
    with pytest.raises(InputError, match=told) as error:
        load_model(tmp_path, "reward")
    assert "\n" not in str(error.value)


def test_older_fields_are_read(tmp_path):
    new = ("layer_types", "rope_parameters")
    fields = {name: value for name, value in TINY_MODERNBERT.to_hf().items() if name not in new}
    old = {"global_attn_every_n_layers": 3, "global_rope_theta": 100.0, "local_rope_theta": 30.0}
    (tmp_path / "config.json").write_text(json.dumps({**fields, **old, "reference_compile": True}))
    assert describe_model(tmp_path, "reward").config == TINY_MODERNBERT
