"""The decode loop: equal to a naive loop that re-runs everything, and the identities of guided decoding."""

import dataclasses
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pargs_jax.decoding.guides import CausalGuide
from pargs_jax.decoding.loop import Decoded, Decoder, advance, decode, gather_records, row_keys, start
from pargs_jax.decoding.rules import Greedy, Sample
from pargs_jax.errors import InputError
from pargs_jax.models.causal import CausalModel
from pargs_jax.models.model import unstack_layers
from pargs_jax.testing import tiny_model

VOCABULARY = 61
PAD = 60
EOS_IDS = (0, 1, 2, 3)  # enough of them that some rows stop early
STEPS = 10
WEIGHT = 2.0
LENGTHS = (9, 4, 1, 6, 1, 2, 7, 0)  # the last row is filler
KEY_NUMBERS = (11, 12, 13, 14, 15, 16, 17, 0)


@cache
def loaded(family, head, unrolled):
    model, params = tiny_model(family, head, seed={"vocabulary": 0, "reward": 1}[head])
    return unstack_layers(model, params) if unrolled else (model, params)


@dataclasses.dataclass(frozen=True)
class OffsetGuide:
    """A causal guide with a constant added to its rewards."""

    inner: CausalGuide

    @property
    def max_positions(self):
        return self.inner.max_positions

    def prefill(self, params, prompts, max_new_tokens, own_prompts):
        return self.inner.prefill(params["inner"], prompts, max_new_tokens, own_prompts)

    def score(self, params, state, candidates):
        rewards, pending = self.inner.score(params["inner"], state, candidates)
        return rewards + params["offset"], pending

    def commit(self, params, state, pending, choice):
        return self.inner.commit(params["inner"], state, pending, choice)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Counted:
    """A rule that reports its calls, so that a step that was not computed shows."""

    rule: Sample
    called: Callable[[Any], None] = dataclasses.field(metadata={"static": True})

    def __call__(self, scores, keys):
        jax.debug.callback(self.called, scores)
        return self.rule(scores, keys)


@dataclasses.dataclass(frozen=True)
class Pair:
    """A language model and the reward model that guides it."""

    lm: tuple[str, bool] = ("gpt2", False)
    rm: tuple[str, bool] = ("llama", True)

    @property
    def decoder(self):
        guide = CausalGuide(loaded(self.rm[0], "reward", self.rm[1])[0])
        lm = loaded(self.lm[0], "vocabulary", self.lm[1])[0]
        return Decoder(lm, (guide,), k=5, eos_ids=EOS_IDS, pad_id=PAD)

    @property
    def lm_params(self):
        return loaded(self.lm[0], "vocabulary", self.lm[1])[1]

    @property
    def rm_params(self):
        return loaded(self.rm[0], "reward", self.rm[1])[1]


def make_prompts(lengths=LENGTHS, seed=0):
    generator = np.random.default_rng(seed)
    return [generator.integers(6, PAD, size=length).tolist() for length in lengths]


def padded(prompts, width=None):
    """Left-padded with a real token's id: no mask may come from an id."""
    width = width or max(map(len, prompts))
    ids = np.full((len(prompts), width), 7, np.int32)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = prompt
    return ids, np.array([len(prompt) for prompt in prompts], np.int32)


def run(
    pair, prompts, *, decoder=None, guide_params=None, weights=(WEIGHT,), rule=None, numbers=KEY_NUMBERS, width=None
):
    """A decode on the pair's models, by default guided by its reward model and sampling at temperature 1."""
    guide_params = (pair.rm_params,) if guide_params is None else guide_params
    decoded = decode(
        decoder or pair.decoder,
        pair.lm_params,
        guide_params,
        *padded(prompts, width),
        row_keys(0, jnp.array(numbers, jnp.uint32)),
        jnp.array(weights, jnp.float32),
        rule or Sample(1.0),
        STEPS,
    )
    return jax.device_get(decoded)


@partial(jax.jit, static_argnums=0)
def read_ends(model: CausalModel, params, texts, lengths):
    """Next-token log-probabilities after each right-padded text, or its reward: a whole pass, without a cache."""
    hidden = model.encode(params, texts)
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    if model.head == "reward":
        return model.rewards(params, last)
    return jax.nn.log_softmax(model.logits(params, last))


def whole_pass(family, head, texts):
    ids = np.zeros((len(texts), max(LENGTHS) + STEPS), np.int32)
    for row, text in enumerate(texts):
        ids[row, : len(text)] = text
    lengths = np.array([len(text) for text in texts])
    return np.asarray(read_ends(*loaded(family, head, False), ids, lengths))


def naive(pair, prompts, *, k, temperature, weight=WEIGHT, numbers=KEY_NUMBERS):
    """PARGS, Algorithm 1, one row and one token at a time; temperature None takes the best candidate.

    Returns each row's tokens, log-probabilities and rewards.
    """
    rows = []
    for prompt, number in zip(prompts, numbers, strict=True):
        row = []
        key = jax.random.fold_in(jax.random.key(0), number)
        while prompt and len(row) < STEPS and not (row and row[-1][0] in EOS_IDS):
            text = prompt + [token for token, _, _ in row]
            log_probs = whole_pass(pair.lm[0], "vocabulary", [text])[0]
            candidates = np.argsort(-log_probs)[:k].tolist()
            rewards = whole_pass(pair.rm[0], "reward", [[*text, candidate] for candidate in candidates])
            scores = log_probs[candidates] + weight * rewards
            if temperature is None:
                choice = int(scores.argmax())
            else:
                choice = int(jax.random.categorical(jax.random.fold_in(key, len(row)), scores / temperature))
            row.append((candidates[choice], log_probs[candidates[choice]], rewards[choice]))
        rows.append(row)
    return rows


def assert_equal_to_naive(decoded: Decoded, rows):
    assert decoded.lengths.tolist() == [len(row) for row in rows]
    assert decoded.finished.tolist() == [bool(row) and row[-1][0] in EOS_IDS for row in rows]
    blank = (PAD, 0.0, 0.0)  # beyond a row's end, and all of a filler row
    full = [row + [blank] * (STEPS - len(row)) for row in rows]
    tokens, log_probs, rewards = (np.array([[step[part] for step in row] for row in full]) for part in range(3))
    np.testing.assert_array_equal(decoded.tokens, tokens)
    np.testing.assert_allclose(decoded.log_probs, log_probs, atol=1e-4)
    np.testing.assert_allclose(decoded.rewards[..., 0], rewards, atol=1e-4)
    beyond = np.arange(STEPS) >= decoded.lengths[:, None]
    assert not decoded.log_probs[beyond].any() and not decoded.rewards[beyond].any()


MAIN = Pair()


@pytest.fixture(scope="module")
def main():
    """The decode that the identities compare with."""
    return run(MAIN, make_prompts())


@pytest.mark.parametrize(
    ("pair", "changes", "temperature", "lengths"),
    [
        pytest.param(MAIN, {}, 1.0, LENGTHS, id="gpt2-guided-by-unrolled-llama"),
        # Rewards added to logits, as in ARGS, choose as rewards added to log-probabilities do.
        pytest.param(
            Pair(("llama", True), ("gpt2", False)), {"base": "logits"}, 0.7, LENGTHS, id="unrolled-llama-logits"
        ),
        pytest.param(Pair(("gpt2", True), ("llama", False)), {"k": VOCABULARY}, None, LENGTHS, id="unrolled-gpt2-k=V"),
        pytest.param(Pair(("llama", False), ("gpt2", True)), {}, 1.0, (1,) * 8, id="llama-prompts-of-one-token"),
    ],
)
def test_scan_equals_a_loop_that_reruns_everything(pair, changes, temperature, lengths):
    decoder = dataclasses.replace(pair.decoder, **changes)
    prompts = make_prompts(lengths)
    rule = Greedy() if temperature is None else Sample(temperature)
    decoded = run(pair, prompts, decoder=decoder, rule=rule)
    assert_equal_to_naive(decoded, naive(pair, prompts, k=decoder.k, temperature=temperature))
    assert decoded.finished.any() and (decoded.lengths == STEPS).any()  # both kinds of rows are in the test


def test_sampling_at_temperature_zero_is_greedy():
    prompts = make_prompts()
    decoded = run(MAIN, prompts, rule=Sample(1e-6))
    assert_equal_to_naive(decoded, naive(MAIN, prompts, k=5, temperature=None))


def test_weight_zero_is_the_unguided_sampler(main):
    unguided = dataclasses.replace(MAIN.decoder, guides=())
    expected = run(MAIN, make_prompts(), decoder=unguided, guide_params=(), weights=())
    found = run(MAIN, make_prompts(), weights=(0.0,))
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_allclose(found.log_probs, expected.log_probs, atol=1e-5)
    assert expected.rewards.shape == (len(LENGTHS), STEPS, 0)
    assert (found.tokens != main.tokens).any()  # else the weight does nothing at all


@pytest.mark.parametrize("offset", [0.0, 3.0])
def test_weights_of_two_guides_add_up_and_a_constant_reward_changes_nothing(main, offset):
    guide = MAIN.decoder.guides[0]
    decoder = dataclasses.replace(MAIN.decoder, guides=(guide, OffsetGuide(guide)))
    guide_params = (MAIN.rm_params, {"inner": MAIN.rm_params, "offset": jnp.float32(offset)})
    both = run(MAIN, make_prompts(), decoder=decoder, guide_params=guide_params, weights=(0.25 * WEIGHT, 0.75 * WEIGHT))
    np.testing.assert_array_equal(both.tokens, main.tokens)
    real = np.arange(STEPS) < main.lengths[:, None]
    np.testing.assert_allclose(both.rewards[..., 0], main.rewards[..., 0], atol=1e-5)
    np.testing.assert_allclose(both.rewards[..., 1], main.rewards[..., 0] + offset * real, atol=1e-5)


def test_a_row_does_not_depend_on_its_batch(main):
    prompts = make_prompts()
    order = [3, 0, 7, 2, 6, 1, 5, 4]
    shuffled = run(MAIN, [prompts[i] for i in order], numbers=[KEY_NUMBERS[i] for i in order])
    np.testing.assert_array_equal(shuffled.tokens, main.tokens[order])

    others = make_prompts(seed=1)
    neighbours = run(MAIN, [prompts[0], *others[1:]], numbers=(KEY_NUMBERS[0], *range(21, 28)))
    np.testing.assert_array_equal(neighbours.tokens[0], main.tokens[0])
    assert (neighbours.tokens[1:] != main.tokens[1:]).any()

    for row, prompt in enumerate(prompts):
        alone = run(MAIN, [prompt], numbers=KEY_NUMBERS[row : row + 1], width=12)  # and with other padding
        np.testing.assert_array_equal(alone.tokens[0], main.tokens[row])
        np.testing.assert_allclose(alone.log_probs[0], main.log_probs[row], atol=1e-5)
        np.testing.assert_allclose(alone.rewards[0], main.rewards[row], atol=1e-5)


def test_equal_rows_differ_by_their_key_alone():
    twins = run(MAIN, [make_prompts()[0]] * 8, numbers=(11, 11, 12, 13, 14, 15, 16, 17))
    np.testing.assert_array_equal(twins.tokens[0], twins.tokens[1])
    assert len({row.tobytes() for row in twins.tokens}) == 7


def test_chunks_equal_one_call_and_steps_after_the_last_row_finished_are_skipped(main):
    params = (MAIN.lm_params, (MAIN.rm_params,))
    weights = jnp.array([WEIGHT])
    calls = []
    rule = Counted(Sample(1.0), calls.append)
    prompts, lengths = padded(make_prompts())
    keys = row_keys(0, jnp.array(KEY_NUMBERS, jnp.uint32))
    state = start(MAIN.decoder, params, prompts, lengths, keys, STEPS)
    records = []
    for _ in range(2):
        state, record = advance(MAIN.decoder, params, state, weights, rule, STEPS // 2)
        records.append(record)
    joined = jax.tree.map(lambda *chunks: jnp.concatenate(chunks), *records)
    chunked = jax.device_get(gather_records(joined, EOS_IDS, lengths))
    for found, expected in zip(chunked, main, strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)
    jax.effects_barrier()
    assert len(calls) == STEPS

    finished = state._replace(done=jnp.ones_like(state.done))
    _, record = advance(MAIN.decoder, params, finished, weights, rule, STEPS // 2)
    jax.effects_barrier()
    assert len(calls) == STEPS
    assert (record.tokens == PAD).all() and not record.log_probs.any() and not record.rewards.any()


@pytest.mark.parametrize("k", [0, VOCABULARY + 1])
def test_k_outside_the_vocabulary_is_refused(k):
    with pytest.raises(InputError, match=f"k is {k}; it must be from 1 to the vocabulary's {VOCABULARY} tokens"):
        dataclasses.replace(MAIN.decoder, k=k)
