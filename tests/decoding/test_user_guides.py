"""Guides that a user writes against the public API, one of each kind."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

import pargs_jax as pj
from pargs_jax.testing import tiny_model

EOS, STEPS = 3, 12


@dataclasses.dataclass(frozen=True)
class LongAnswers:
    """A candidate guide: every token is worth 1, the one that ends the answer nothing."""

    eos_id: int
    scores_vocabulary = False
    adds_up = True

    def prefill(self, params, prompts, capacity, own_prompts):
        return ()

    def score(self, params, state, text, candidates):
        return jnp.where(candidates == self.eos_id, 0.0, 1.0), ()

    def commit(self, params, state, pending, chosen):
        return state

    def rewind(self, state, text, dropped):
        return state


@dataclasses.dataclass(frozen=True)
class NoRepeats:
    """A vocabulary guide: a token that the answer has already costs 1. Its state says which these are."""

    vocab_size: int
    scores_vocabulary = True
    adds_up = True

    def prefill(self, params, prompts, capacity, own_prompts):
        return jnp.zeros((len(prompts.lengths), self.vocab_size))

    def score(self, params, state, text):
        return -jnp.minimum(state, 1.0), ()

    def commit(self, params, state, pending, chosen):
        return state.at[jnp.arange(len(state)), chosen.token].add(chosen.live.astype(state.dtype))

    def rewind(self, state, text, dropped):
        slots = jnp.arange(text.tokens.shape[1])
        is_answer = (slots >= text.prompt_lengths[:, None]) & (slots < text.lengths[:, None])
        return (jax.nn.one_hot(text.tokens, self.vocab_size) * is_answer[..., None]).sum(axis=1)


def decode(guide, weight, proposer, eos_ids=()):
    lm, params = tiny_model("gpt2")
    prompts = np.random.default_rng(0).integers(4, 61, (6, 5))
    decoder = pj.Decoder(lm, (guide,), proposer, pj.Greedy(), eos_ids=eos_ids)
    settings = pj.RowSettings.alike(6, weights=[weight], candidates=61, max_new_tokens=STEPS)
    keys = pj.row_keys(0, jnp.arange(6))
    return pj.decode(decoder, params, ((),), prompts, np.full(6, 5), keys, settings, STEPS)


def test_a_candidate_guide_of_a_user():
    guided = decode(LongAnswers(EOS), 100.0, pj.TopK(5), (EOS,))
    assert (guided.lengths == STEPS).all() and not (guided.tokens == EOS).any()
    np.testing.assert_array_equal(guided.trace.rewards, 1.0)
    np.testing.assert_array_equal(guided.rewards, STEPS)


def test_a_vocabulary_guide_of_a_user():
    for proposer in (pj.AllTokens(), pj.TopK(20)):
        answers = [np.asarray(decode(NoRepeats(61), weight, proposer).tokens) for weight in (0.0, 100.0)]
        plain, guided = ([len(set(row.tolist())) for row in tokens] for tokens in answers)
        assert guided == [STEPS] * 6 and min(plain) < STEPS


def test_a_users_guide_state_is_rewound_with_the_tokens():
    guide = NoRepeats(61)
    text = pj.Text(jnp.asarray([[4, 4, 5, 6, 7], [8, 5, 5, 9, 9]]), jnp.asarray([2, 1]), jnp.asarray([4, 3]))
    state = guide.rewind(None, text, None)
    np.testing.assert_array_equal(state[:, 4:10], [[0, 1, 1, 0, 0, 0], [0, 2, 0, 0, 0, 0]])
