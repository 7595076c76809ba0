"""The decode loop: equal to a naive loop that re-runs everything, and the identities of guided decoding."""

import dataclasses
from collections.abc import Callable
from functools import cache, partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pargs_jax.decoding.guides import CausalGuide
from pargs_jax.decoding.loop import Decoded, Decoder, advance, decode, row_keys, start
from pargs_jax.decoding.proposals import AllTokens, TopK
from pargs_jax.decoding.rules import Greedy, Sample
from pargs_jax.decoding.state import RowSettings
from pargs_jax.errors import InputError
from pargs_jax.mesh import make_mesh
from pargs_jax.models.causal import CausalModel
from pargs_jax.models.model import unstack_layers
from pargs_jax.sharding import place_params
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
    scores_vocabulary: ClassVar[bool] = False
    adds_up: ClassVar[bool] = True

    def prefill(self, params, prompts, capacity, own_prompts):
        return self.inner.prefill(params["inner"], prompts, capacity, own_prompts)

    def score(self, params, state, text, candidates):
        rewards, pending = self.inner.score(params["inner"], state, text, candidates)
        return rewards + params["offset"], pending

    def commit(self, params, state, pending, chosen):
        return self.inner.commit(params["inner"], state, pending, chosen)


@dataclasses.dataclass(frozen=True)
class Counted:
    """A rule that reports its calls, so that skipped steps can be counted."""

    rule: Sample
    called: Callable[[Any], None]
    is_random: ClassVar[bool] = True

    def __call__(self, proposal, temperature):
        jax.debug.callback(self.called, proposal.scores)
        return self.rule(proposal, temperature)


@dataclasses.dataclass(frozen=True)
class Pair:
    """A language model and the reward model that guides it."""

    lm: tuple[str, bool] = ("gpt2", False)
    rm: tuple[str, bool] = ("llama", True)

    @property
    def decoder(self):
        guide = CausalGuide(loaded(self.rm[0], "reward", self.rm[1])[0])
        lm = loaded(self.lm[0], "vocabulary", self.lm[1])[0]
        return Decoder(lm, (guide,), TopK(5), eos_ids=EOS_IDS, pad_id=PAD)

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
    """Left-padded with a real token's id, because masks must not depend on ids."""
    width = width or max(map(len, prompts))
    ids = np.full((len(prompts), width), 7, np.int32)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = prompt
    return ids, np.array([len(prompt) for prompt in prompts], np.int32)


def alike(rows, *, weights=(WEIGHT,), temperature=1.0, k=VOCABULARY):
    return RowSettings.alike(rows, weights=weights, temperature=temperature, candidates=k, max_new_tokens=STEPS)


def run(
    pair, prompts, *, decoder=None, guide_params=None, weights=(WEIGHT,), temperature=1.0, numbers=KEY_NUMBERS,
    width=None, settings=None,
):  # fmt: skip
    """A decode on the pair's models, by default guided by its reward model and sampling at temperature 1."""
    guide_params = (pair.rm_params,) if guide_params is None else guide_params
    decoded = decode(
        decoder or pair.decoder,
        pair.lm_params,
        guide_params,
        *padded(prompts, width),
        row_keys(0, jnp.array(numbers, jnp.uint32)),
        settings or alike(len(prompts), weights=weights, temperature=temperature),
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

    Returns each row's tokens with what the trace has of them.
    """
    rows = []
    for prompt, number in zip(prompts, numbers, strict=True):
        row = []
        key = jax.random.fold_in(jax.random.key(0), number)
        while prompt and len(row) < STEPS and not (row and row[-1][0] in EOS_IDS):
            text = prompt + [step[0] for step in row]
            log_probs = whole_pass(pair.lm[0], "vocabulary", [text])[0]
            candidates = np.argsort(-log_probs)[:k].tolist()
            rewards = whole_pass(pair.rm[0], "reward", [[*text, candidate] for candidate in candidates])
            scores = log_probs[candidates] + weight * rewards
            if temperature is None:
                choice = int(scores.argmax())
                q = np.eye(k)[choice]
            else:
                # Drawn from the whole vocabulary: a token's noise does not depend on what the candidates are.
                every = np.full(VOCABULARY, -np.inf, np.float32)
                every[candidates] = scores / temperature
                token = int(jax.random.categorical(jax.random.fold_in(key, len(row)), every))
                choice = candidates.index(token)
                q = np.exp(scores / temperature)
                q = q / q.sum()
            kl = sum(q[i] * (np.log(q[i]) - log_probs[candidates[i]]) for i in range(k) if q[i] > 0)
            entropy = -(np.exp(log_probs) * log_probs).sum()
            token = candidates[choice]
            row.append((token, log_probs[token], np.log(q[choice]), entropy, kl, rewards[choice]))
        rows.append(row)
    return rows


def assert_equal_to_naive(decoded: Decoded, rows):
    assert decoded.lengths.tolist() == [len(row) for row in rows]
    assert decoded.finished.tolist() == [bool(row) and row[-1][0] in EOS_IDS for row in rows]
    blank = (PAD, 0.0, 0.0, 0.0, 0.0, 0.0)  # beyond a row's end, and all of a filler row
    full = [row + [blank] * (STEPS - len(row)) for row in rows]
    tokens, *numbers = (np.array([[step[part] for step in row] for row in full]) for part in range(6))
    np.testing.assert_array_equal(decoded.tokens, tokens)
    trace = decoded.trace
    found = (trace.log_probs, trace.guided_log_probs, trace.entropies, trace.kls, trace.rewards[..., 0])
    for ours, expected in zip(found, numbers, strict=True):
        np.testing.assert_allclose(ours, expected, atol=1e-4)
    assert (trace.kls >= -1e-6).all()
    last = [row[-1][-1] if row else 0.0 for row in rows]
    np.testing.assert_allclose(decoded.rewards[:, 0], last, atol=1e-4)
    beyond = np.arange(STEPS) >= decoded.lengths[:, None]
    assert not any(x[beyond].any() for x in found)


MAIN = Pair()


@pytest.fixture(scope="module")
def main():
    """The decode that the identities are compared with."""
    return run(MAIN, make_prompts())


@pytest.mark.parametrize(
    ("pair", "k", "temperature", "lengths"),
    [
        pytest.param(MAIN, 5, 1.0, LENGTHS, id="gpt2-guided-by-unrolled-llama"),
        pytest.param(Pair(("llama", True), ("gpt2", False)), 5, 0.7, LENGTHS, id="unrolled-llama"),
        pytest.param(Pair(("gpt2", True), ("llama", False)), VOCABULARY, None, LENGTHS, id="unrolled-gpt2-k=V"),
        pytest.param(Pair(("llama", False), ("gpt2", True)), 5, 1.0, (1,) * 8, id="llama-prompts-of-one-token"),
        pytest.param(Pair(("gpt_neox", False), ("gemma3", True)), 5, 1.0, LENGTHS, id="neox-guided-by-unrolled-gemma"),
        pytest.param(Pair(("gemma3", False), ("mistral", False)), 5, 1.0, LENGTHS, id="gemma-guided-by-mistral"),
        pytest.param(
            Pair(("mistral", True), ("gpt_neox", True)), 5, 1.0, LENGTHS, id="unrolled-mistral-guided-by-neox"
        ),
    ],
)
def test_scan_equals_a_loop_that_reruns_everything(pair, k, temperature, lengths):
    rule = Greedy() if temperature is None else Sample()
    decoder = dataclasses.replace(pair.decoder, proposer=TopK(k), rule=rule)
    prompts = make_prompts(lengths)
    decoded = run(pair, prompts, decoder=decoder, temperature=temperature or 1.0)
    assert_equal_to_naive(decoded, naive(pair, prompts, k=k, temperature=temperature))
    assert decoded.finished.any() and (decoded.lengths == STEPS).any()  # both kinds of rows are in the test


@pytest.mark.parametrize(
    ("lm", "rm"),
    [("qwen2", "qwen3"), ("qwen3", "phi3"), ("phi3", "gemma2"), ("gemma2", "opt"), ("opt", "qwen2")],
)
def test_scan_on_four_devices_equals_the_loop_on_one(lm, rm):
    """For the families that no other case has."""
    pair = Pair((lm, False), (rm, False))
    prompts = make_prompts()
    with jax.set_mesh(make_mesh("cpu-4,fsdp=2,tensor=2", "decode")):
        params = place_params(pair.lm_params), (place_params(pair.rm_params),)
        rows = padded(prompts), row_keys(0, jnp.array(KEY_NUMBERS, jnp.uint32)), alike(len(prompts))
        decoded = jax.device_get(decode(pair.decoder, *params, *rows[0], *rows[1:], STEPS))
    assert_equal_to_naive(decoded, naive(pair, prompts, k=5, temperature=1.0))


@pytest.mark.parametrize("temperature", [0.0, 1e-6])
def test_sampling_at_temperature_zero_is_greedy(temperature):
    prompts = make_prompts()
    decoded = run(MAIN, prompts, temperature=temperature)
    greedy = run(MAIN, prompts, decoder=dataclasses.replace(MAIN.decoder, rule=Greedy()))
    np.testing.assert_array_equal(decoded.tokens, greedy.tokens)


def test_rows_with_settings_of_their_own_equal_runs_with_these_settings():
    """In one compiled program: weights, temperatures, fewer candidates than places, shorter answers."""
    prompts = make_prompts()
    weights, temperatures = np.linspace(0.0, 4.0, 8), [1.0, 0.0, 0.5, 2.0, 1.0, 0.7, 0.0, 1.0]
    counts, limits = [5, 3, 1, 2, 4, 5, 5, 5], [10, 4, 10, 1, 7, 10, 10, 10]
    settings = RowSettings(
        jnp.asarray(weights[:, None], jnp.float32), jnp.asarray(temperatures, jnp.float32),
        jnp.asarray(counts, jnp.int32), jnp.asarray(limits, jnp.int32),
    )  # fmt: skip
    mixed = run(MAIN, prompts, settings=settings)
    for row in range(8):
        decoder = dataclasses.replace(MAIN.decoder, proposer=TopK(counts[row]))
        same = alike(1, weights=[weights[row]], temperature=temperatures[row])._replace(
            max_new_tokens=jnp.asarray(limits[row : row + 1])
        )
        numbers = KEY_NUMBERS[row : row + 1]
        alone = run(MAIN, prompts[row : row + 1], decoder=decoder, settings=same, numbers=numbers, width=9)
        assert alone.lengths[0] == mixed.lengths[row] <= limits[row]
        np.testing.assert_array_equal(alone.tokens[0], mixed.tokens[row])
        np.testing.assert_allclose(alone.trace.rewards[0], mixed.trace.rewards[row], atol=1e-5)


def test_all_tokens_as_candidates_give_what_top_k_of_the_whole_vocabulary_gives():
    prompts = make_prompts()
    decoders = [
        dataclasses.replace(MAIN.decoder, proposer=proposer, rule=Greedy())
        for proposer in (AllTokens(), TopK(VOCABULARY))
    ]
    every, top = (run(MAIN, prompts, decoder=decoder) for decoder in decoders)
    np.testing.assert_array_equal(every.tokens, top.tokens)
    np.testing.assert_allclose(every.trace.kls, top.trace.kls, atol=1e-5)


def test_the_trace_of_candidates_has_all_of_them():
    decoder = dataclasses.replace(MAIN.decoder, keeps_candidates=True)
    settings = alike(8)._replace(candidates=jnp.asarray([5, 3, 5, 5, 5, 5, 5, 5]))
    decoded = run(MAIN, make_prompts(), decoder=decoder, settings=settings)
    trace, candidates = decoded.trace, decoded.trace.candidates
    assert candidates.tokens.shape == (8, STEPS, 5) and candidates.rewards.shape == (8, STEPS, 5, 1)
    for row, length in enumerate(decoded.lengths):
        for step in range(length):
            k = int(np.flatnonzero(candidates.tokens[row, step] == decoded.tokens[row, step])[0])
            assert candidates.log_probs[row, step, k] == trace.log_probs[row, step]
            assert candidates.guided_log_probs[row, step, k] == trace.guided_log_probs[row, step]
            assert candidates.rewards[row, step, k] == trace.rewards[row, step]
    assert (candidates.tokens[1, : decoded.lengths[1], 3:] == -1).all()
    assert np.exp(candidates.guided_log_probs[0, 0]).sum() == pytest.approx(1.0, abs=1e-5)


def test_weight_zero_is_the_unguided_sampler(main):
    unguided = dataclasses.replace(MAIN.decoder, guides=())
    expected = run(MAIN, make_prompts(), decoder=unguided, guide_params=(), weights=())
    found = run(MAIN, make_prompts(), weights=(0.0,))
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_allclose(found.trace.log_probs, expected.trace.log_probs, atol=1e-5)
    assert expected.trace.rewards.shape == (len(LENGTHS), STEPS, 0)
    assert (found.tokens != main.tokens).any()  # else the weight does nothing at all


@pytest.mark.parametrize("offset", [0.0, 3.0])
def test_weights_of_two_guides_add_up_and_a_constant_reward_changes_nothing(main, offset):
    guide = MAIN.decoder.guides[0]
    decoder = dataclasses.replace(MAIN.decoder, guides=(guide, OffsetGuide(guide)))
    guide_params = (MAIN.rm_params, {"inner": MAIN.rm_params, "offset": jnp.float32(offset)})
    both = run(MAIN, make_prompts(), decoder=decoder, guide_params=guide_params, weights=(0.25 * WEIGHT, 0.75 * WEIGHT))
    np.testing.assert_array_equal(both.tokens, main.tokens)
    real = np.arange(STEPS) < main.lengths[:, None]
    np.testing.assert_allclose(both.trace.rewards[..., 0], main.trace.rewards[..., 0], atol=1e-5)
    np.testing.assert_allclose(both.trace.rewards[..., 1], main.trace.rewards[..., 0] + offset * real, atol=1e-5)
    # The second guide adds its rewards up.
    expected = np.stack([main.rewards[:, 0], (main.trace.rewards[..., 0] + offset * real).sum(axis=1)], axis=1)
    np.testing.assert_allclose(both.rewards, expected, atol=1e-4)


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
        np.testing.assert_allclose(alone.trace.log_probs[0], main.trace.log_probs[row], atol=1e-5)
        np.testing.assert_allclose(alone.trace.rewards[0], main.trace.rewards[row], atol=1e-5)


def test_equal_rows_differ_by_their_key_alone():
    twins = run(MAIN, [make_prompts()[0]] * 8, numbers=(11, 11, 12, 13, 14, 15, 16, 17))
    np.testing.assert_array_equal(twins.tokens[0], twins.tokens[1])
    assert len({row.tobytes() for row in twins.tokens}) == 7


def test_chunks_equal_one_call_and_steps_after_the_last_row_finished_are_skipped(main):
    params = (MAIN.lm_params, (MAIN.rm_params,))
    calls = []
    decoder = dataclasses.replace(MAIN.decoder, rule=Counted(Sample(), calls.append))
    keys = row_keys(0, jnp.array(KEY_NUMBERS, jnp.uint32))
    state = start(decoder, params, *padded(make_prompts()), keys, alike(8), STEPS)
    for _ in range(2):
        state = advance(decoder, params, state, STEPS // 2)
    chunked = jax.device_get(decoder.read(state))
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), chunked, main)
    jax.effects_barrier()
    assert len(calls) == STEPS

    finished = state._replace(done=jnp.ones_like(state.done))
    after = advance(decoder, params, finished, STEPS // 2)
    jax.effects_barrier()
    assert len(calls) == STEPS
    np.testing.assert_array_equal(decoder.read(after).tokens, main.tokens)


@pytest.mark.parametrize("k", [0, VOCABULARY + 1])
def test_k_outside_the_vocabulary_is_refused(k):
    with pytest.raises(InputError, match=f"k: got {k}, must be from 1 to {VOCABULARY}, the size of the vocabulary"):
        dataclasses.replace(MAIN.decoder, proposer=TopK(k))
