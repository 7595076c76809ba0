"""DeBERTa against torch, with full and with prefix-causal attention."""

import dataclasses
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pargs_jax.errors import InputError
from pargs_jax.models.deberta import DebertaConfig
from pargs_jax.models.encoder import EncoderModel
from pargs_jax.models.hf import load_model, save_model
from pargs_jax.models.model import unstack_layers
from pargs_jax.models.prefix_causal import PrefixCausalModel
from pargs_jax.testing import TINY_DEBERTA, random_params

VARIANTS = {
    "v3 small": TINY_DEBERTA,
    "v3 base": dataclasses.replace(
        TINY_DEBERTA, layers=3, width=48, heads=6, position_buckets=16, max_relative_positions=64
    ),
    "v3 large": dataclasses.replace(TINY_DEBERTA, layers=4, heads=2, feedforward=96, pooler_activation="gelu"),
    "v2 with a convolution": dataclasses.replace(TINY_DEBERTA, convolution_width=3, convolution_activation="gelu"),
    "own position projections": dataclasses.replace(TINY_DEBERTA, share_attention_key=False, normalise_positions=False),
    "content to position only": dataclasses.replace(TINY_DEBERTA, position_to_content=False, share_attention_key=False),
    "no buckets": dataclasses.replace(TINY_DEBERTA, position_buckets=-1, max_relative_positions=12),
    "beyond the trained length": dataclasses.replace(TINY_DEBERTA, context_length=16),
    "absolute positions and segments": dataclasses.replace(
        TINY_DEBERTA,
        relative_attention=False,
        position_buckets=1,
        normalise_positions=False,
        absolute_positions=True,
        segments=2,
        embedding_width=24,
    ),
}
LENGTHS = ((5, 4), (3, 9), (30, 40))  # prompt and answer; the last go far beyond the buckets
PROMPT_WIDTH, ANSWER_WIDTH = 32, 41
CLS, SEP = 1, 2


def shaken(model, seed=0):
    """Random parameters, with norms and biases that are not trivial."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: x + 0.1 * rng.standard_normal(x.shape).astype(np.float32), random_params(model, seed))


@lru_cache
def encoder(name):
    model = EncoderModel(VARIANTS[name])
    return model, shaken(model)


@lru_cache
def prefix_causal(unrolled=False):
    model = PrefixCausalModel(dataclasses.replace(TINY_DEBERTA, attention="prefix_causal"))
    params = shaken(model)
    return unstack_layers(model, params) if unrolled else (model, params)


def pairs():
    """`[CLS] prompt [SEP]` and answer, as ids; what pads them is ids too."""
    rng = np.random.default_rng(0)
    prompts = rng.integers(3, 61, (len(LENGTHS), PROMPT_WIDTH), np.int32)
    answers = rng.integers(3, 61, (len(LENGTHS), ANSWER_WIDTH), np.int32)
    for row, (length, _) in enumerate(LENGTHS):
        prompts[row, PROMPT_WIDTH - length], prompts[row, -1] = CLS, SEP
    return prompts, np.array([p for p, _ in LENGTHS], np.int32), answers, np.array([a for _, a in LENGTHS], np.int32)


answer_rewards = jax.jit(EncoderModel.answer_rewards, static_argnums=0)


@partial(jax.jit, static_argnums=0)
def prefix_causal_rewards(model, params, prompts, lengths, answers):
    texts = jnp.concatenate([prompts, answers], axis=1)
    width = prompts.shape[1]
    hidden = model.encode(params, texts, width - lengths, prompt_width=width)
    return model.rewards(params, hidden[:, width:])


@pytest.mark.parametrize("name", VARIANTS)
def test_rewards_equal_those_of_torch_after_export_and_the_round_trip_is_exact(name, tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForSequenceClassification

    model, params = encoder(name)
    save_model(tmp_path, model, params)
    twin = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    prompts, prompt_lengths, answers, lengths = pairs()
    rewards = answer_rewards(model, params, prompts, prompt_lengths, answers, lengths, SEP)
    for row in range(len(LENGTHS)):
        prompt, answer = prompts[row, PROMPT_WIDTH - prompt_lengths[row] :], answers[row, : lengths[row]]
        ids = torch.tensor([[*prompt.tolist(), *answer.tolist(), SEP]])
        segments = torch.arange(ids.shape[1])[None] >= len(prompt)
        with torch.inference_mode():
            expected = float(twin(ids, token_type_ids=segments.long()).logits[0, 0])
        assert float(rewards[row]) == pytest.approx(expected, abs=1e-4)
    assert np.std(rewards) > 0.005

    loaded = load_model(tmp_path, "reward")
    assert loaded.model == model and not loaded.new_head
    jax.tree.map(np.testing.assert_array_equal, loaded.params, params)


def test_unrolled_layers_give_the_same():
    for name in ("v3 small", "v2 with a convolution"):
        model, params = encoder(name)
        inputs = (*pairs(), SEP)
        unrolled = answer_rewards(*unstack_layers(model, params), *inputs)
        np.testing.assert_allclose(unrolled, answer_rewards(model, params, *inputs), atol=1e-5)


def test_an_encoder_sees_neither_padding_nor_what_follows():
    model, params = encoder("v2 with a convolution")
    prompts, prompt_lengths, answers, lengths = pairs()
    rewards = answer_rewards(model, params, prompts, prompt_lengths, answers, lengths, SEP)
    others_prompts = np.where(np.arange(PROMPT_WIDTH) < PROMPT_WIDTH - prompt_lengths[:, None], 7, prompts)
    others_answers = np.where(np.arange(ANSWER_WIDTH) >= lengths[:, None], 7, answers)
    others = answer_rewards(model, params, others_prompts, prompt_lengths, others_answers, lengths, SEP)
    np.testing.assert_array_equal(others, rewards)


def test_a_closed_answer_is_not_closed_again_and_an_empty_one_is_closed():
    model, params = encoder("v3 small")
    prompts, prompt_lengths, answers, lengths = pairs()
    rewards = answer_rewards(model, params, prompts, prompt_lengths, answers, lengths, SEP)
    closed = np.where(np.arange(ANSWER_WIDTH) == lengths[:, None], SEP, answers)
    again = answer_rewards(model, params, prompts, prompt_lengths, closed, lengths + 1, SEP)
    np.testing.assert_allclose(again, rewards, atol=1e-6)
    empty = answer_rewards(model, params, prompts, prompt_lengths, answers, np.zeros(3, np.int32), SEP)
    ended = np.where(np.arange(ANSWER_WIDTH) == 0, SEP, answers)
    ended_rewards = answer_rewards(model, params, prompts, prompt_lengths, ended, np.ones(3, np.int32), SEP)
    np.testing.assert_allclose(ended_rewards, empty, atol=1e-6)
    assert np.abs(np.asarray(empty) - rewards).min() > 1e-3


def test_one_prefix_causal_pass_equals_each_prefix_alone():
    model, params = prefix_causal()
    prompts, prompt_lengths, answers, lengths = pairs()
    rewards = prefix_causal_rewards(model, params, prompts, prompt_lengths, answers)
    for row, length in enumerate(lengths):
        for prefix in (1, 2, length // 2 + 1, length):
            hidden = np.where(np.arange(ANSWER_WIDTH) < prefix, answers[row], 9)[None]
            prompt = prompts[row : row + 1], prompt_lengths[row : row + 1]
            alone = prefix_causal_rewards(model, params, *prompt, hidden)
            np.testing.assert_allclose(alone[0, prefix - 1], rewards[row, prefix - 1], atol=2e-5)


def test_prefix_causal_attention_sees_the_prompt_both_ways_and_the_answer_one_way():
    model, params = prefix_causal()
    tokens = np.arange(3, 11)[None]

    def at(position):
        def value(shift):
            moved = jax.tree.map(lambda x: x, params)
            table = params["backbone"]["embed"]["embedding"]
            moved["backbone"] = {**params["backbone"], "embed": {"embedding": table.at[tokens[0]].add(shift)}}
            return model.encode(moved, tokens, prompt_width=4)[0, position].sum()

        return np.abs(jax.grad(value)(jnp.zeros((8, 32)))).sum(axis=1) > 0

    sees = np.array([at(position) for position in (0, 3, 4, 6)])
    np.testing.assert_array_equal(sees[0], np.arange(8) < 4)
    np.testing.assert_array_equal(sees[1], np.arange(8) < 4)
    np.testing.assert_array_equal(sees[2], np.arange(8) < 5)
    np.testing.assert_array_equal(sees[3], np.arange(8) < 7)


@pytest.mark.parametrize("unrolled", [False, True])
@pytest.mark.parametrize("width", [3, 20])
def test_the_cache_grows_row_by_row_and_gives_the_same(unrolled, width):
    model, params = prefix_causal(unrolled)
    prompts, prompt_lengths, answers, lengths = pairs()
    rewards = prefix_causal_rewards(model, params, prompts, prompt_lengths, answers)
    hidden, cache = jax.jit(model.prefill, static_argnums=3)(
        params, prompts, prompt_lengths, PROMPT_WIDTH + ANSWER_WIDTH + width
    )
    offsets = np.broadcast_to(np.arange(width), (3, width))
    causal = np.tril(np.ones((width, width), bool))
    extend = jax.jit(model.extend)
    grown = np.zeros(3, int)
    for counts in ((1, 3, 2), (3, 0, 1), (0, 3, 3)):
        new = np.stack([np.resize(answers[row, grown[row] :], width) for row in range(3)])
        hidden, pending = extend(params, cache, new, offsets, causal)
        found = model.rewards(params, hidden)
        for row in range(3):
            some = min(width, lengths[row] - grown[row])
            expected = rewards[row, grown[row] : grown[row] + some]
            np.testing.assert_allclose(found[row, :some], expected, atol=2e-5)
        cache = cache.append(pending, np.array(counts))
        grown += counts
    np.testing.assert_array_equal(cache.lengths, prompt_lengths + grown)


def test_attention_is_remembered_and_can_be_chosen(tmp_path):
    model, params = prefix_causal()
    save_model(tmp_path, model, params)
    assert load_model(tmp_path, "reward").model == model
    assert isinstance(load_model(tmp_path, "reward", attention="full").model, EncoderModel)
    with pytest.raises(InputError, match="convolution"):
        PrefixCausalModel(DebertaConfig(convolution_width=3))
    with pytest.raises(InputError, match="is not a language model"):
        load_model(tmp_path, "vocabulary")


def test_bfloat16_is_near():
    model, params = encoder("v3 small")
    half = {**params, "backbone": jax.tree.map(lambda x: x.astype(jnp.bfloat16), params["backbone"])}
    rewards = answer_rewards(model, params, *pairs(), SEP)
    found = answer_rewards(model, half, *pairs(), SEP)
    assert found.dtype == jnp.float32 and not np.array_equal(found, rewards)
    np.testing.assert_allclose(found, rewards, atol=0.15 * np.abs(rewards).max())
