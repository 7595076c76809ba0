"""Guides with another tokenizer, against a plain loop over decoded texts with Hugging Face's tokenizer and torch."""

import dataclasses
from functools import cache
from pathlib import Path

import jax
import numpy as np
import pytest

from pargs_jax.decoding.guides import Capacity, Chosen, EncoderGuide, RetokenisedGuide, Text
from pargs_jax.demo.task import DEMO_LM
from pargs_jax.generation.reward_models import answer_rewards, left_pad
from pargs_jax.models.causal import CausalModel
from pargs_jax.models.encoder import EncoderModel
from pargs_jax.models.hf import save_model
from pargs_jax.models.modernbert import ModernBertModel
from pargs_jax.models.prefix_causal import PrefixCausalModel
from pargs_jax.testing import TINY_CONFIGS, TINY_DEBERTA, TINY_MODERNBERT, random_params
from pargs_jax.text.retokenisation import Retokeniser
from pargs_jax.text.tokenization import TextTokenizer

torch = pytest.importorskip("torch")
AutoTokenizer = pytest.importorskip("transformers").AutoTokenizer
SHARED = Path(__file__).parents[2].parent / "shared"
TOKENIZERS = {
    "demo": DEMO_LM,
    "gpt2": SHARED / "tokenizers" / "gpt2",
    "deberta": SHARED / "tokenizers" / "deberta_v3",
    "llama": SHARED / "models" / "stories260k",
}
STEPS = 40
CANDIDATES = 4
PROMPTS = ("", "Hello there", "\n\nHuman: write code, 写 🙂\n\nAssistant:", "x")
NASTY = (
    " and", " the", "ing", ".", "\n", "\n\n", "  ", "\t", " def f(x):", "🙂", "👍🏽", " 你好", "世界", "é", "\u0301",
    "'s", "</s>", "<|endoftext|>", "[SEP]", "0", " 1234", "$%^", "\u200d", "\u00a0", "...", " A", "b",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder_of(tokenizer_folder):
    """The folder of a tokenizer; small ones are trained here."""

    def folder(name):
        if name.startswith("small "):
            return tokenizer_folder(name.removeprefix("small "))
        if not Path(TOKENIZERS[name]).is_dir():
            pytest.skip(f"needs ../shared: {TOKENIZERS[name]} is not there")
        return TOKENIZERS[name]

    return folder


@pytest.fixture(scope="module")
def tokenizer(folder_of):
    return cache(lambda name: TextTokenizer.load(folder_of(name)))


def make_model(kind, vocab_size):
    if kind == "causal":
        config = dataclasses.replace(TINY_CONFIGS["llama"], vocab_size=vocab_size, context_length=512)
        return CausalModel(config, "reward")
    if kind == "modernbert":
        return ModernBertModel(dataclasses.replace(TINY_MODERNBERT, vocab_size=vocab_size, context_length=512))
    config = dataclasses.replace(TINY_DEBERTA, vocab_size=vocab_size)
    if kind == "encoder":
        return EncoderModel(config, "reward")
    return PrefixCausalModel(dataclasses.replace(config, attention="prefix_causal"), "reward")


def torch_rewards(model, params, folder):
    """ids -> reward, by the exported model in torch, at the last token or as the classifier does it."""
    from transformers import AutoModelForSequenceClassification

    save_model(folder, model, params, special_tokens={"pad_token_id": 0})
    twin = AutoModelForSequenceClassification.from_pretrained(folder).eval()

    def reward(ids):
        with torch.inference_mode():
            inputs = torch.tensor([ids])
            if isinstance(model, EncoderModel):
                return float(twin(inputs).logits[0, 0])
            return float(twin.score(twin.base_model(inputs).last_hidden_state[:, -1])[0, 0])

    return reward


def own_rewards(model, params, rm):
    """Rewards of texts without a cache, for what torch does not have: prefix-causal attention."""

    def reward(prompt_text, text, *, ends):
        prompt = rm.encode_prompt(prompt_text)
        answer = [*rm.encode_answer(text, starts_text=not prompt_text), *([rm.eos_id] if ends else [])]
        left = np.zeros((1, 64), np.int32)
        left[0, 64 - len(prompt) :] = prompt
        right = np.zeros((1, 256), np.int32)
        right[0, : len(answer)] = answer
        counts = np.array([len(prompt)]), np.array([len(answer)])
        return float(answer_rewards(model, params, left, counts[0], right, counts[1])[0])

    return reward


def draw_candidates(lm, rng):
    """Tokens of difficult texts (whole texts, so characters are split over tokens), random ids, and some EOS."""
    pool = [token for text in NASTY for token in lm.encode_answer(text, starts_text=True)]
    drawn = rng.choice([*pool, *rng.integers(0, lm.vocab_size, len(pool) // 4)], (len(PROMPTS), CANDIDATES))
    drawn[rng.random(drawn.shape) < 0.1] = lm.eos_id
    return drawn.astype(np.int32)


@pytest.mark.parametrize(
    ("lm_name", "rm_name", "kind"),
    [
        ("small llama", "small deberta", "encoder"),
        ("small llama", "small deberta", "modernbert"),
        ("small llama", "small gpt2", "causal"),
        ("demo", "small gpt2", "prefix_causal"),
        ("gpt2", "deberta", "encoder"),
        ("gpt2", "llama", "causal"),
        ("gpt2", "deberta", "prefix_causal"),
    ],
)
def test_rewards_are_those_of_the_decoded_texts(lm_name, rm_name, kind, tmp_path, tokenizer, folder_of):
    lm, rm = tokenizer(lm_name), tokenizer(rm_name)
    model = make_model(kind, rm.vocab_size)
    params = random_params(model, seed=1)
    retokeniser = Retokeniser(lm, rm)
    prompt_ids = [lm.encode_prompt(text) for text in PROMPTS]
    prompts = left_pad(prompt_ids, len(PROMPTS), max(map(len, prompt_ids)))
    own_prompts = left_pad([rm.encode_prompt(text) for text in PROMPTS], len(PROMPTS), 64)
    is_encoder = kind in ("encoder", "modernbert")
    if is_encoder:
        guide = EncoderGuide(model, retokeniser, 256, rm.eos_id, finest=2)
    else:
        guide = RetokenisedGuide(model, retokeniser, 256)
    score, commit = jax.jit(guide.score), jax.jit(guide.commit)
    state = jax.jit(guide.prefill, static_argnums=2)(params, prompts, Capacity(STEPS, CANDIDATES), own_prompts)
    tokens = np.zeros((len(PROMPTS), prompts.tokens.shape[1] + STEPS), np.int32)
    for row, ids in enumerate(prompt_ids):
        tokens[row, : len(ids)] = ids
    text = Text(tokens, prompts.lengths, prompts.lengths.copy())
    live = np.ones(len(PROMPTS), bool)

    if kind == "prefix_causal":
        plain = own_rewards(model, params, rm)
    else:
        by_torch = torch_rewards(model, params, tmp_path)
        original = AutoTokenizer.from_pretrained(folder_of(rm_name))

        def plain(prompt_text, text, *, ends):
            if is_encoder and text and not any(special in text for special in original.all_special_tokens):
                return by_torch(original(prompt_text, text)["input_ids"])
            # Special tokens that are spelled out are text: the original would make an end of the text of them.
            answer = rm.encode_answer(text, starts_text=not prompt_text)
            closing = [rm.eos_id] if ends or is_encoder else []
            return by_torch([*rm.encode_prompt(prompt_text), *answer, *closing])

    rng = np.random.default_rng(0)
    answers = [[] for _ in PROMPTS]
    checked, steps = 0, 12 if kind == "modernbert" else STEPS
    for _ in range(steps):
        candidates = draw_candidates(lm, rng)
        rewards, pending = score(params, state, text, candidates)
        choice = rng.integers(0, CANDIDATES, len(PROMPTS)).astype(np.int32)
        for row, ids in enumerate(prompt_ids):
            if lm.eos_id in answers[row]:
                continue
            prompt_text = lm.decode(ids)
            for k in {int(choice[row]), *rng.integers(0, CANDIDATES, 1).tolist()}:
                token = int(candidates[row, k])
                ends = token == lm.eos_id
                answer = lm.decode_answer(ids, answers[row] if ends else [*answers[row], token])
                expected = plain(prompt_text, answer, ends=ends)
                assert float(rewards[row, k]) == pytest.approx(expected, abs=1e-4), (answer, k)
                checked += 1
            # An answer that ended would end the test of its row: go on with another candidate where there is one.
            going_on = [k for k in range(CANDIDATES) if candidates[row, k] != lm.eos_id]
            choice[row] = rng.choice(going_on) if going_on else choice[row]
            answers[row].append(int(candidates[row, choice[row]]))
        chosen = np.take_along_axis(candidates, choice[:, None], axis=1)[:, 0]
        state = commit(params, state, pending, Chosen(chosen, choice, live))
        tokens[np.arange(len(PROMPTS)), text.lengths] = chosen
        text = text._replace(lengths=text.lengths + 1)
    assert checked > steps * 3
    if not is_encoder and "deberta" not in rm_name:
        assert int(state.settled.max()) > 0  # the cache was used
