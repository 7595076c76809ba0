"""The named methods: their published defaults, and one list of names everywhere."""

from typing import get_args

import pytest

from pargs_jax import config
from pargs_jax.data.prompts import PROMPT_FORMS
from pargs_jax.decoding.methods import METHODS
from pargs_jax.decoding.rules import Greedy, Sample

# (k, weight, rule, what rewards are added to, what the reward model is trained on)
PUBLISHED = {
    "greedy": (1, 0.0, Greedy(), "log_probs", None),
    "top_k": (10, 0.0, Sample(1.0), "log_probs", None),
    "args": (10, 1.5, Greedy(), "logits", "full"),
    "args_stochastic": (10, 1.5, Sample(0.7), "logits", "full"),
    "pargs_greedy": (10, 1.0, Greedy(), "log_probs", "partial"),
    "pargs": (10, 2.0, Sample(1.0), "log_probs", "partial"),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_defaults_are_the_published_ones(name):
    method = METHODS[name]
    assert (method.k, method.weight, method.make_rule(), method.base, method.reward_model) == PUBLISHED[name]


def test_a_given_temperature_replaces_that_of_methods_that_sample():
    assert METHODS["args_stochastic"].make_rule(0.3) == Sample(0.3)
    assert METHODS["args"].make_rule(0.3) == Greedy()


def test_options_and_registries_have_the_same_names():
    assert get_args(config.MethodName) == tuple(METHODS) == tuple(PUBLISHED)
    assert get_args(config.PromptFormName) == tuple(PROMPT_FORMS)
    assert tuple(name for name, method in METHODS.items() if not method.guided) == config.UNGUIDED_METHODS
