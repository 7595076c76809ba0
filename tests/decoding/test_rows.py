"""Rows that are copied, taken back and replaced in the middle of a decode go on as if they had always been there."""

import dataclasses
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pargs_jax.decoding import loop
from pargs_jax.decoding.guides import CausalGuide, EncoderGuide, RetokenisedGuide
from pargs_jax.decoding.loop import Decoder, row_keys
from pargs_jax.decoding.proposals import TopK
from pargs_jax.decoding.search import Searcher, SearchInputs
from pargs_jax.decoding.state import RowSettings, insert, take
from pargs_jax.generation.reward_models import answer_rewards, left_pad
from pargs_jax.models.encoder import EncoderModel
from pargs_jax.models.model import unstack_layers
from pargs_jax.models.prefix_causal import PrefixCausalModel
from pargs_jax.testing import TINY_DEBERTA, random_params, tiny_model, tiny_tokenizer
from pargs_jax.text.retokenisation import Retokeniser

ROWS, NEW, K = 4, 2, 4
WIDTH, STEPS = 16, 14
TEXTS = ("Hi", "My lamp broke.", "", "Thank you.", "It is late", "No", "Yes, Eva", "a b c")
WORDS = (" lamp", " Omar", " heater", " fan")
KINDS = ("causal", "stacked causal", "retokenised", "prefix-causal", "encoder")

tokenizer = lru_cache(tiny_tokenizer)
rewind = jax.jit(Decoder.rewind, static_argnums=0)
take, insert = jax.jit(take), jax.jit(insert)


@dataclasses.dataclass(frozen=True)
class OnlyWords:
    """Proposes whole words, so that a reward model with another tokenizer can settle what it has read."""

    tokens: tuple[int, ...]

    def size(self, vocab_size):
        return len(self.tokens)

    def __call__(self, logits, vocabulary_rewards, counts):
        tokens = jnp.broadcast_to(jnp.asarray(self.tokens, jnp.int32), (len(logits), K))
        return tokens, jnp.ones(tokens.shape, bool)


@lru_cache
def parts(kind):
    """A decoder with one guide of this kind, its parameters, and whether the guide goes by the text."""
    lm, lm_params = unstack_layers(*tiny_model("llama", vocab_size=tokenizer().vocab_size))
    text_of = Retokeniser(tokenizer(), tokenizer())
    config = dataclasses.replace(TINY_DEBERTA, vocab_size=tokenizer().vocab_size)
    if kind == "encoder":
        rm = EncoderModel(config)
        guide = EncoderGuide(rm, text_of, 80, tokenizer().eos_id, finest=2)
    elif kind == "prefix-causal":
        rm = PrefixCausalModel(dataclasses.replace(config, attention="prefix_causal"))
        guide = RetokenisedGuide(rm, text_of, 80)
    else:
        rm = tiny_model("gpt2", "reward", vocab_size=tokenizer().vocab_size)[0]
        guide = RetokenisedGuide(rm, text_of, 80) if kind == "retokenised" else CausalGuide(rm)
    rm_params = random_params(rm, seed=1)
    if kind == "causal":
        rm, rm_params = unstack_layers(rm, rm_params)
        guide = CausalGuide(rm)
    words = tuple(token for word in WORDS for token in tokenizer().encode_answer(word))
    proposer = OnlyWords(words) if isinstance(guide, RetokenisedGuide) else TopK(K)
    decoder = Decoder(lm, (guide,), proposer, eos_ids=(tokenizer().eos_id,), pad_id=0)
    return decoder, (lm_params, (rm_params,)), "causal" not in kind.split()


def begin(kind, numbers):
    """A state whose row n is prompt `numbers[n]`, with a key of that number."""
    decoder, params, retokenised = parts(kind)
    prompts = left_pad([tokenizer().encode_prompt(TEXTS[n % len(TEXTS)]) for n in numbers], len(numbers), WIDTH)
    settings = RowSettings.alike(len(numbers), weights=[2.0], temperature=1.5, candidates=K, max_new_tokens=STEPS)
    own = (prompts,) if retokenised else (None,)
    keys = row_keys(0, jnp.asarray(numbers, jnp.uint32))
    return loop.start(decoder, params, *prompts, keys, settings, STEPS, own)


def full_rewards(kind, prompts, answers):
    """Rewards of finished or unfinished answers by the guide's model, each read whole."""
    decoder, (_, (params,)), retokenised = parts(kind)
    model = decoder.guides[0].model
    ids = []
    for prompt, answer in zip(prompts, answers, strict=True):
        if retokenised:
            ended = bool(answer) and answer[-1] == tokenizer().eos_id
            text = tokenizer().decode_answer(prompt, answer[:-1] if ended else answer)
            starts_text = not tokenizer().decode(prompt)
            answer = [*tokenizer().encode_answer(text, starts_text=starts_text), *[tokenizer().eos_id] * ended]
        ids.append(answer)
    padded = np.zeros((len(ids), 80), np.int32)
    for row, answer in enumerate(ids):
        padded[row, : len(answer)] = answer
    texts = *left_pad(prompts, len(prompts), WIDTH), padded, np.array(list(map(len, ids)), np.int32)
    return np.asarray(answer_rewards(model, params, *texts, tokenizer().eos_id))


@partial(jax.jit, static_argnums=0)
def full_log_probs(lm, params, tokens):
    return jax.nn.log_softmax(lm.logits(params, lm.encode(params, tokens)))


def assert_true_to_its_text(kind, state):
    """Checks that a row's numbers are those of full passes over its text."""
    decoder, (lm_params, _), _ = parts(kind)
    decoded = jax.device_get(decoder.read(state))
    text = jax.device_get(state.text)
    log_probs = np.asarray(full_log_probs(decoder.lm, lm_params, text.tokens))
    prompts, answers, places = [], [], []
    for row, length in enumerate(decoded.lengths):
        start = text.prompt_lengths[row]
        prompt = text.tokens[row, :start].tolist()
        for step in range(length):
            token = decoded.tokens[row, step]
            expected = log_probs[row, start + step - 1, token]
            assert decoded.trace.log_probs[row, step] == pytest.approx(expected, abs=1e-4)
            prompts.append(prompt)
            answers.append(decoded.tokens[row, : step + 1].tolist())
            places.append((row, step))
    # Of all prefixes some, and always as many, so that one program reads them.
    chosen = np.random.default_rng(0).choice(len(places), 12)
    rewards = full_rewards(kind, [prompts[i] for i in chosen], [answers[i] for i in chosen])
    for i, expected in zip(chosen, rewards, strict=True):
        row, step = places[i]
        if prompts[i] and (answers[i][:-1] or tokenizer().decode(answers[i])):
            assert decoded.trace.rewards[row, step, 0] == pytest.approx(float(expected), abs=1e-4), (row, step)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_go_on_after_any_sequence_of_moves(kind):
    """Random moves. Each row ends like a decode of that row alone with the same moves."""
    decoder, params, _ = parts(kind)
    rng = np.random.default_rng(KINDS.index(kind))
    state = begin(kind, range(ROWS))
    histories = [[("begin", n)] for n in range(ROWS)]
    keys_of = list(range(ROWS))
    for move in ("advance", "rewind", "advance", "take", "advance", "insert", "advance", "rewind", "take", "advance"):
        if move == "advance":
            state = loop.advance(decoder, params, state, 3)
            histories = [[*history, ("advance", 3)] for history in histories]
        elif move == "take":
            rows = rng.integers(0, ROWS, ROWS)
            state = take(state, rows)
            histories, keys_of = [histories[r] for r in rows], [keys_of[r] for r in rows]
        elif move == "rewind":
            left = rng.integers(0, np.asarray(state.text.answer_lengths) + 1)
            keys_of = rng.integers(100, 1000, ROWS).tolist()
            state = rewind(decoder, state, left, row_keys(0, jnp.asarray(keys_of, jnp.uint32)))
            pairs = zip(histories, left.tolist(), keys_of, strict=True)
            histories = [[*history, ("rewind", length, key)] for history, length, key in pairs]
        else:
            rows, numbers = rng.permutation(ROWS)[:NEW], rng.integers(ROWS, 50, NEW).tolist()
            rows[1] = ROWS  # the second goes nowhere
            state = insert(state, begin(kind, numbers), rows)
            histories[rows[0]] = [("begin", numbers[0])]
    assert_true_to_its_text(kind, state)
    if isinstance(decoder.guides[0], RetokenisedGuide):
        assert (np.asarray(state.guides[0].settled) > 2).any()  # the cache was used, and taken back

    found = jax.device_get(decoder.read(state))
    row = int(rng.integers(ROWS))
    alone = None
    for move, *numbers in histories[row]:
        if move == "begin":
            alone = begin(kind, [numbers[0]] * ROWS)
        elif move == "advance":
            alone = loop.advance(decoder, params, alone, numbers[0])
        else:
            keys = row_keys(0, jnp.asarray([numbers[1]] * ROWS, jnp.uint32))
            alone = rewind(decoder, alone, np.full(ROWS, numbers[0]), keys)
    expected = jax.device_get(decoder.read(alone))
    np.testing.assert_array_equal(found.tokens[row], expected.tokens[ROWS - 1])
    np.testing.assert_allclose(found.trace.rewards[row], expected.trace.rewards[ROWS - 1], atol=1e-4)


def test_rewinding_copies_nothing_and_brings_back_the_same_tokens():
    decoder, params, _ = parts("causal")
    whole = loop.advance(decoder, params, begin("causal", range(ROWS)), 6)
    expected = jax.device_get(decoder.read(whole))
    back = rewind(decoder, whole, np.full(ROWS, 2), None)
    assert np.asarray(back.text.answer_lengths).tolist() == np.minimum(expected.lengths, 2).tolist()
    again = jax.device_get(decoder.read(loop.advance(decoder, params, back, 4)))
    np.testing.assert_array_equal(again.tokens, expected.tokens)
    # More than there is changes nothing.
    state = begin("causal", range(ROWS))
    same = rewind(decoder, state, np.full(ROWS, 99), None)
    jax.tree.map(np.testing.assert_array_equal, same.text, state.text)


@partial(jax.jit, static_argnums=0)
def judge_in_chunks(searcher, inputs, left, keys):
    """Draws, judges, rewinds, draws and judges again; returns the rewards after each judging."""
    rows, tokens, prompt_rewards = searcher.start_judged(inputs, STEPS, 5)
    rewards, counts = [prompt_rewards], [tokens]
    for steps in (5, 4):
        rows, tokens = searcher.draw(inputs, rows, tokens, steps)
        rows, tokens = searcher.judge(inputs, rows, tokens, 5)
        rewards.append(rows.rewards)
        counts.append(tokens)
        kept = rows
        rows = searcher.rewind(rows, jnp.minimum(left, rows.judged), keys)
    return kept, rewards, counts


@pytest.mark.parametrize("kind", KINDS)
def test_a_judge_that_reads_in_chunks_gives_the_rewards_of_whole_texts(kind):
    decoder, params, retokenised = parts(kind)
    searcher = Searcher(dataclasses.replace(decoder, guides=()), decoder.guides)
    state = begin(kind, range(ROWS))
    prompts = left_pad([tokenizer().encode_prompt(TEXTS[n]) for n in range(ROWS)], ROWS, WIDTH)
    settings = state.settings._replace(weights=jnp.zeros((ROWS, 0)))
    own = (prompts,) if retokenised else (None,)
    inputs = SearchInputs((params[0], ()), params[1], *prompts, state.keys, settings, jnp.ones((ROWS, 1)), None, own)
    keys = row_keys(0, jnp.arange(50, 50 + ROWS))
    kept, rewards, counts = judge_in_chunks(searcher, inputs, jnp.asarray([0, 2, 4, 5]), keys)
    decoded = jax.device_get(searcher.found(kept))
    ids = [tokenizer().encode_prompt(TEXTS[n]) for n in range(ROWS)]
    answers = [row[:length].tolist() for row, length in zip(decoded.tokens, decoded.lengths, strict=True)]
    np.testing.assert_allclose(rewards[0][:, 0], full_rewards(kind, ids, [[]] * ROWS), atol=1e-4)
    np.testing.assert_allclose(rewards[2][:, 0], full_rewards(kind, ids, answers), atol=1e-4)
    read = np.asarray(counts[1].rm - counts[0].rm)
    if not retokenised:
        assert read.tolist() == np.asarray(counts[1].lm - counts[0].lm).tolist()
    elif kind == "encoder":  # the prompt and the answer
        assert (read >= np.asarray(prompts.lengths)).all() and (read > np.asarray(prompts.lengths)).any()
