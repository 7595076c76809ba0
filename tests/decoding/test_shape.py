"""Rows with a shape of their own: equal to a naive loop, token by token, with its log-probabilities, KL and trace."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pargs_jax.decoding.guides import CausalGuide
from pargs_jax.decoding.loop import Decoder, advance, decode, row_keys, start
from pargs_jax.decoding.proposals import TopK
from pargs_jax.decoding.shape import Shape
from pargs_jax.decoding.state import RowSettings
from pargs_jax.testing import tiny_model

V, K, STEPS, EOS = 61, 4, 6, (0, 1, 2)
NOWHERE = 2**31 - 1
PROMPT = [7, 9, 30]
ROWS = {
    # top_p, keeps_rest, bias, presence, frequency, temperature, weight, candidates
    "plain": (1.0, True, {}, 0.0, 0.0, 1.0, 0.0, K),
    "nucleus": (0.6, True, {}, 0.0, 0.0, 1.3, 0.0, K),
    "top_k": (1.0, False, {}, 0.0, 0.0, 0.8, 0.0, 3),
    "guided": (1.0, False, {}, 0.0, 0.0, 1.0, 2.0, K),
    "guided in a nucleus": (0.05, False, {}, 0.0, 0.0, 1.0, 2.0, K),
    "biased": (0.9, True, {5: 4.0, 11: -100.0, 60: 3.0}, 0.0, 0.0, 1.5, 0.0, K),
    "penalised": (1.0, True, {8: 9.0, 9: 9.0}, 1.0, 1.5, 1.0, 1.0, K),
    "greedy": (1.0, True, {8: 2.0}, 2.0, 0.0, 0.0, 1.0, K),
}  # fmt: skip


@pytest.fixture(scope="module")
def models():
    return tiny_model("llama", "vocabulary"), tiny_model("llama", "reward", seed=1)


@pytest.fixture(scope="module")
def inputs(models):
    """The decoder, and what `decode` takes."""
    (lm, lm_params), (rm, rm_params) = models
    decoder = Decoder(
        lm, (CausalGuide(rm),), TopK(K), eos_ids=EOS, keeps_candidates=True, keeps_rest=True, alternatives=8
    )
    top_p, rest, bias, presence, frequency, temperature, weight, candidates = zip(*ROWS.values(), strict=True)
    tokens = np.full((len(ROWS), 3), NOWHERE, np.int32)
    values = np.zeros((len(ROWS), 3), np.float32)
    for row, pairs in enumerate(bias):
        tokens[row, : len(pairs)], values[row, : len(pairs)] = list(pairs), list(pairs.values())
    shape = Shape(*map(jnp.asarray, (top_p, rest, tokens, values, presence, frequency)))
    count = len(ROWS)
    settings = RowSettings(
        jnp.asarray(weight)[:, None],
        jnp.asarray(temperature),
        jnp.asarray(candidates),
        jnp.full(count, STEPS),
        None,
        shape,
    )
    prompts = jnp.tile(jnp.array(PROMPT), (count, 1))
    keys = row_keys(0, jnp.arange(count))
    return decoder, (lm_params, (rm_params,)), prompts, jnp.full(count, len(PROMPT)), keys, settings


@pytest.fixture(scope="module")
def decoded(inputs):
    decoder, params, *rows = inputs
    return decode(decoder, *params, *rows, STEPS)


def test_bare_steps_draw_the_same_tokens_for_rows_that_do_not_keep_the_rest(inputs, decoded):
    decoder, params, *rows = inputs
    state = start(decoder, params, *rows, STEPS)
    for decoder_of_steps in (decoder.bare, decoder, decoder.bare):
        state = advance(decoder_of_steps, params, state, STEPS // 3)
    found = decoder.read(state)
    alike = np.array([not keeps_rest for _, keeps_rest, *_ in ROWS.values()])
    assert alike.sum() == 3
    np.testing.assert_array_equal(found.tokens[alike], decoded.tokens[alike])
    for name in ("log_probs", "guided_log_probs", "entropies", "kls", "rewards"):
        ours, expected = (np.asarray(getattr(each.trace, name))[alike] for each in (found, decoded))
        np.testing.assert_allclose(ours, expected, atol=1e-5)
    # Only the steps in the middle recorded their candidates.
    candidates = np.asarray(found.trace.candidates.log_probs)[alike]
    middle = slice(STEPS // 3, 2 * STEPS // 3)
    expected = np.asarray(decoded.trace.candidates.log_probs)[alike, middle]
    np.testing.assert_allclose(candidates[:, middle], expected, atol=1e-5)
    assert not candidates[:, : STEPS // 3].any()


@partial(jax.jit, static_argnums=0)
def read_end(model, params, ids, length):
    hidden = model.encode(params, ids[None])[0, length - 1]
    return (
        jax.nn.log_softmax(model.logits(params, hidden))
        if model.head == "vocabulary"
        else model.rewards(params, hidden)
    )


def read(model, params, text):
    """What a model says after a text, from a pass over all of it."""
    ids = np.zeros(len(PROMPT) + STEPS + 1, np.int32)
    ids[: len(text)] = text
    return np.array(read_end(model, params, ids, len(text)))


@pytest.mark.parametrize("name", ROWS)
def test_a_row_equals_a_naive_loop(models, decoded, name):
    (lm, lm_params), (rm, rm_params) = models
    top_p, rest, bias, presence, frequency, temperature, weight, candidates = ROWS[name]
    row = list(ROWS).index(name)
    key, answer = jax.random.fold_in(jax.random.key(0), row), []
    for step in range(int(decoded.lengths[row])):
        text = PROMPT + answer
        log_p = read(lm, lm_params, text)
        counts = np.bincount(answer, minlength=V)
        before = log_p - presence * (counts > 0) - frequency * counts
        for token, value in bias.items():
            before[token] += value
        order = np.argsort(-before, kind="stable")
        probabilities = np.exp(before - np.logaddexp.reduce(before))
        nucleus = order[: np.searchsorted(np.cumsum(probabilities[order]), top_p) + 1] if top_p < 1 else order
        proposed = [token for token in order[:candidates] if token in nucleus]
        scores = np.full(V, -np.inf)
        if rest:
            scores[nucleus] = before[nucleus]
        for token in proposed:
            reward = float(read(rm, rm_params, [*text, token])) if weight else 0.0
            scores[token] = before[token] + weight * reward
        if temperature:
            log_q = scores / temperature - np.logaddexp.reduce(scores / temperature)
            drawn = jax.random.categorical(jax.random.fold_in(key, step), jnp.asarray(log_q, jnp.float32))
        else:
            log_q = np.where(np.arange(V) == scores.argmax(), 0.0, -np.inf)
            drawn = scores.argmax()
        token = int(drawn)
        assert int(decoded.tokens[row, step]) == token
        answer.append(token)
        real = log_q > -np.inf
        trace = decoded.trace
        found = [float(each[row, step]) for each in (trace.log_probs, trace.guided_log_probs, trace.kls)]
        kl = (np.exp(log_q[real]) * (log_q[real] - log_p[real])).sum()
        np.testing.assert_allclose(found, [log_p[token], log_q[token], kl], atol=2e-4)
        noted = {
            int(i): (float(q), float(cold))
            for i, q, cold in zip(
                trace.candidates.tokens[row, step],
                trace.candidates.guided_log_probs[row, step],
                trace.candidates.at_temperature_1[row, step],
                strict=True,
            )
            if i >= 0
        }
        assert {*order[:8], token} <= noted.keys()
        cold = scores - np.logaddexp.reduce(scores)
        for i, (q, log_prob) in noted.items():
            np.testing.assert_allclose(log_prob, cold[i], atol=2e-4)
            if temperature:
                np.testing.assert_allclose(q, log_q[i], atol=2e-4)
    assert answer and (len(answer) == STEPS or answer[-1] in EOS)
