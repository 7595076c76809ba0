"""The named methods: their published defaults, and one list of names everywhere."""

from typing import get_args

import pytest

from pargs_jax import config
from pargs_jax.decoding.methods import METHODS
from pargs_jax.decoding.proposals import TopK
from pargs_jax.decoding.rules import Greedy, Sample
from pargs_jax.text.prompts import PROMPT_FORMS

# (k, weight, temperature, rule, what the reward model is trained on)
PUBLISHED = {
    "greedy": (1, 0.0, 1.0, Greedy(), None),
    "top_k": (10, 0.0, 1.0, Sample(), None),
    "args": (10, 1.5, 1.0, Greedy(), "full"),
    "args_stochastic": (10, 1.5, 0.7, Sample(), "full"),
    "pargs_greedy": (10, 1.0, 1.0, Greedy(), "partial"),
    "pargs": (10, 2.0, 1.0, Sample(), "partial"),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_defaults_are_the_published_ones(name):
    method = METHODS[name]
    assert (method.k, method.weight, method.temperature, method.rule, method.reward_model) == PUBLISHED[name]
    assert (method.proposer(), method.proposer(3)) == (TopK(method.k), TopK(3))


def test_options_and_registries_have_the_same_names():
    assert get_args(config.MethodName) == tuple(METHODS) == tuple(PUBLISHED)
    assert get_args(config.PromptFormName) == tuple(PROMPT_FORMS)
    assert tuple(name for name, method in METHODS.items() if not method.guided) == config.UNGUIDED_METHODS
