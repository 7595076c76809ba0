"""Shared beginnings of candidates are read once: rewards equal those of each text alone, however large the tree."""

import jax
import numpy as np
import pytest

from pargs_jax.decoding.guides import Capacity, Prompts, RetokenisedGuide, Text
from pargs_jax.generation.reward_models import answer_rewards
from pargs_jax.models.prefix_causal import PrefixCausalModel
from pargs_jax.testing import TINY_DEBERTA, random_params, tiny_model

ROWS, CANDIDATES, ANSWER_WIDTH, PROMPT_WIDTH = 3, 4, 40, 6


class FixedTexts:
    """Takes the place of a retokeniser: the candidates' tokens are given."""

    def __init__(self, tokens, lengths):
        self.tokens, self.lengths = tokens, lengths

    def candidates(self, tokens, prompt_lengths, lengths, candidates, settled, tail_width, fresh_width):
        fresh = np.zeros((ROWS, fresh_width), np.int32)
        return fresh, np.zeros(ROWS, np.int32), self.tokens, self.lengths, self.lengths.max(axis=1)


@pytest.mark.parametrize("kind", ["causal", "prefix_causal"])
@pytest.mark.parametrize("longest", [2, 4, 12, ANSWER_WIDTH])
def test_rewards_are_those_of_each_text_by_itself(kind, longest):
    rng = np.random.default_rng(longest)
    model = PrefixCausalModel(TINY_DEBERTA, "reward") if kind == "prefix_causal" else tiny_model("llama", "reward")[0]
    params = random_params(model, seed=1)
    # Two tokens only, so that texts often begin alike; one is the beginning of another, one is empty.
    tokens = rng.integers(3, 5, (ROWS, CANDIDATES, ANSWER_WIDTH)).astype(np.int32)
    lengths = np.full((ROWS, CANDIDATES), longest, np.int32)
    tokens[0, 1], lengths[0, 1], lengths[1, 0] = tokens[0, 0], longest - 1, 0
    prompts = rng.integers(3, 20, (ROWS, PROMPT_WIDTH)).astype(np.int32)
    prompt_lengths = np.array([PROMPT_WIDTH, 3, 2], np.int32)

    guide = RetokenisedGuide(model, FixedTexts(tokens, lengths), ANSWER_WIDTH)
    read = Prompts(prompts, prompt_lengths)
    state = jax.jit(guide.prefill, static_argnums=2)(params, read, Capacity(4, CANDIDATES), read)
    text = Text(prompts, prompt_lengths, prompt_lengths)
    rewards, _ = jax.jit(guide.score)(params, state, text, np.zeros((ROWS, CANDIDATES), np.int32))
    for k in range(CANDIDATES):
        alone = answer_rewards(model, params, prompts, prompt_lengths, tokens[:, k], lengths[:, k])
        np.testing.assert_allclose(rewards[:, k], alone, atol=2e-5)
