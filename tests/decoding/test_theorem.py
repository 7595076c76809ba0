"""Theorem 2 of PARGS by enumeration: the decoder samples from the ratio of two RLHF policies.

With a vocabulary of 4 tokens and answers of 3, every policy over answers is a small table, computed exactly. Tables
over prefixes y_1..y_i have one axis a token.
"""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pargs_jax.decoding.guides import CausalGuide
from pargs_jax.decoding.loop import Decoder, advance, decode, row_keys, start
from pargs_jax.decoding.proposals import TopK
from pargs_jax.decoding.state import RowSettings
from pargs_jax.testing import tiny_model

VOCABULARY = 4
LENGTH = 3
BETA = 3.0
PROMPT = (1, 3, 0)
ANSWERS = np.array(list(itertools.product(range(VOCABULARY), repeat=LENGTH)))


@dataclasses.dataclass(frozen=True)
class Exact:
    """The models, and what full passes of them say of every answer: `conditionals[i]` is pi_ref(y_i | y_<i) and
    `rewards[i]` is r(y_1:i), both with one axis for each of y_1..y_i."""

    decoder: Decoder
    params: tuple[Any, tuple[Any, ...]]
    conditionals: list[np.ndarray]
    rewards: list[np.ndarray]

    def rlhf_policy(self, length: int) -> np.ndarray:
        """pi_RLHF,i over the prefixes of this length: pi_ref(y_1:i) exp(beta r(y_1:i)), normalised over all of them."""
        policy = np.exp(BETA * self.rewards[length - 1])
        for i in range(length):
            policy = policy * self.conditionals[i].reshape(*[VOCABULARY] * (i + 1), *[1] * (length - i - 1))
        return policy / policy.sum()

    def ratio_policy(self, length: int) -> np.ndarray:
        """Eq. 7: the ratio of the RLHF policies of this length and of one less, normalised over the last token."""
        shorter = self.rlhf_policy(length - 1)[..., None] if length > 1 else 1.0
        return normalised(self.rlhf_policy(length) / shorter)


def normalised(table):
    return table / table.sum(axis=-1, keepdims=True)


def joint(conditionals):
    """The probability of every whole answer."""
    first, second, third = conditionals
    return (first[:, None, None] * second[:, :, None] * third).ravel()


@pytest.fixture(scope="module")
def exact():
    lm, lm_params = tiny_model("gpt2", vocab_size=VOCABULARY)
    rm, rm_params = tiny_model("llama", "reward", vocab_size=VOCABULARY, seed=1)
    texts = np.concatenate([np.tile(PROMPT, (len(ANSWERS), 1)), ANSWERS], axis=1)
    log_probs = jax.nn.log_softmax(lm.logits(lm_params, lm.encode(lm_params, texts)))
    rewards = rm.rewards(rm_params, rm.encode(rm_params, texts))
    # Row [a b c] says of prefix [a b] what every row beginning with a, b does: take the first.
    rows = [slice(None, None, VOCABULARY ** (LENGTH - i)) for i in range(LENGTH + 1)]
    conditionals, prefix_rewards = [], []
    for i in range(LENGTH):
        at = len(PROMPT) + i
        conditional = np.asarray(log_probs[rows[i], at - 1], np.float64)
        conditionals.append(np.exp(conditional).reshape([VOCABULARY] * (i + 1)))
        prefix_rewards.append(np.asarray(rewards[rows[i + 1], at], np.float64).reshape([VOCABULARY] * (i + 1)))
    decoder = Decoder(lm, (CausalGuide(rm),), TopK(VOCABULARY))
    return Exact(decoder, (lm_params, (rm_params,)), conditionals, prefix_rewards)


def repeated_prompt(rows):
    """The prompt in each of `rows` rows, with one token of padding, and their keys."""
    prompts = np.tile((2, *PROMPT), (rows, 1))
    return prompts, np.full(rows, len(PROMPT)), row_keys(0, jnp.arange(rows))


def settings(rows, temperature=1.0):
    return RowSettings.alike(
        rows, weights=[BETA], temperature=temperature, candidates=VOCABULARY, max_new_tokens=LENGTH
    )


@dataclasses.dataclass(frozen=True)
class Forced:
    """Takes the candidate of a given rank in each row, and hands out the fused scores."""

    ranks: tuple[int, ...]
    seen: Callable[[Any], None]
    is_random: ClassVar[bool] = False

    def __call__(self, proposal, temperature):
        jax.debug.callback(self.seen, proposal.scores)
        return jnp.where(jnp.arange(VOCABULARY) == jnp.asarray(self.ranks)[:, None], 0.0, -jnp.inf)


def decoder_conditionals(exact):
    """softmax of the decoder's fused scores for the next token after every prefix, walking all answers at once."""
    seen = []
    rows = len(ANSWERS)
    state = start(exact.decoder, exact.params, *repeated_prompt(rows), settings(rows), LENGTH)
    conditionals = []
    for i in range(LENGTH):
        prefixes = tuple(ANSWERS[:, :i].T)
        likelihoods = np.broadcast_to(exact.conditionals[i][prefixes], (len(ANSWERS), VOCABULARY))
        rank_of = np.argsort(np.argsort(-likelihoods, axis=1), axis=1)
        ranks = np.take_along_axis(rank_of, ANSWERS[:, i : i + 1], axis=1)[:, 0]
        rule = Forced(tuple(ranks.tolist()), seen.append)
        state = advance(dataclasses.replace(exact.decoder, rule=rule), exact.params, state, 1)
        np.testing.assert_array_equal(state.last_tokens, ANSWERS[:, i])  # so the ranks are the decoder's
        jax.effects_barrier()
        scores = np.take_along_axis(np.asarray(seen[-1], np.float64), rank_of, axis=1)
        first = slice(None, None, VOCABULARY ** (LENGTH - i))
        conditionals.append(normalised(np.exp(scores[first])).reshape([VOCABULARY] * (i + 1)))
    return conditionals


def test_decoder_conditionals_are_ratios_of_two_rlhf_policies(exact):
    found = decoder_conditionals(exact)
    for length in range(1, LENGTH + 1):
        np.testing.assert_allclose(found[length - 1], exact.ratio_policy(length), atol=1e-5)

    # They are not the conditionals of the one RLHF policy over whole answers, save for the last token.
    whole = exact.rlhf_policy(LENGTH)
    np.testing.assert_allclose(found[2], normalised(whole), atol=1e-5)
    assert np.abs(found[1] - normalised(whole.sum(axis=2))).max() > 0.02
    assert np.abs(found[0] - normalised(whole.sum(axis=(1, 2)))).max() > 0.02


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_samples_have_the_frequencies_of_the_ratio_policies(exact, temperature):
    rows = 8192
    lm_params, guide_params = exact.params
    wanted = settings(rows, temperature)
    decoded = decode(exact.decoder, lm_params, guide_params, *repeated_prompt(rows), wanted, LENGTH)
    place_values = VOCABULARY ** np.arange(LENGTH)[::-1]
    counts = np.bincount(np.asarray(decoded.tokens) @ place_values, minlength=len(ANSWERS))

    def chi_square(conditionals):
        sharpened = [normalised(table ** (1 / temperature)) for table in conditionals]
        expected = rows * joint(sharpened)
        common = expected >= 5  # the rest are pooled, since chi-square wants counts that are not tiny
        seen = np.append(counts[common], counts[~common].sum())
        wanted = np.append(expected[common], expected[~common].sum() + 1e-9)
        return ((seen - wanted) ** 2 / wanted).sum()

    # At most 63 degrees of freedom: 110 is exceeded once in about 5000 seeds.
    assert chi_square([exact.ratio_policy(length) for length in range(1, LENGTH + 1)]) < 110
    assert chi_square(exact.conditionals) > 1000
    whole = exact.rlhf_policy(LENGTH)
    single = [normalised(whole.sum(axis=tuple(range(length, LENGTH)))) for length in range(1, LENGTH + 1)]
    assert chi_square(single) > 150
