"""The named methods: their published defaults, and one list of names everywhere."""

from typing import get_args

import pytest

from pargs_jax import config
from pargs_jax.decoding.methods import METHODS
from pargs_jax.decoding.proposals import AllTokens, TopK, TopKOfSum, TopP
from pargs_jax.decoding.rules import Contrastive, Greedy, Sample
from pargs_jax.decoding.search import BestOfN, Cards, ChunkBeam, SpeculativeRejection, TwistedSmc
from pargs_jax.options import options
from pargs_jax.text.prompts import PROMPT_FORMS

# (k, weight, temperature, rule, kind of reward model)
PUBLISHED = {
    "greedy": (1, 0.0, 1.0, Greedy(), None),
    "top_k": (10, 0.0, 1.0, Sample(), None),
    "top_p": (10, 0.0, 1.0, Sample(), None),
    "contrastive": (8, 0.6, 1.0, Contrastive(), None),
    "args": (10, 1.5, 1.0, Greedy(), "full"),
    "args_stochastic": (10, 1.5, 0.7, Sample(), "full"),
    "pargs_greedy": (10, 1.0, 1.0, Greedy(), "partial"),
    "pargs": (10, 2.0, 1.0, Sample(), "partial"),
    "rad": (20, 30.0, 1.0, Sample(), "partial"),
    "farma": (10, 1.0, 1.0, Sample(), "partial"),
    "cd": (20, 1.0, 1.0, Sample(), "partial"),
    "vas": (20, 3.0, 1.0, Sample(), "partial"),
    "genarm": (10, 1.0, 1.0, Sample(), "autoregressive"),
    "parm": (10, 1.0, 1.0, Sample(), "preference"),
    "expert_ratio": (10, 1.0, 1.0, Sample(), "ratio"),
    "transfer_q": (10, 1.0, 1.0, Greedy(), "look_ahead"),
    "best_of_n": (10, 1.0, 1.0, Sample(), "full"),
    "blockwise": (10, 1.0, 1.0, Sample(), "partial"),
    "chunk_beam": (50, 1.0, 0.7, Sample(), "partial"),
    "weak_to_strong": (50, 1.0, 0.7, Sample(), "ratio"),
    "cards": (40, 1.0, 0.7, Sample(), "partial"),
    "speculative_rejection": (10, 1.0, 1.0, Sample(), "partial"),
    "smc": (10, 1.0, 1.0, Sample(), "partial"),
}
PROPOSERS = {
    "top_p": TopP(0.95), "farma": TopKOfSum(10),
    "best_of_n": AllTokens(), "blockwise": AllTokens(), "speculative_rejection": AllTokens(),
    "cd": AllTokens(), "genarm": AllTokens(), "parm": AllTokens(), "expert_ratio": AllTokens(),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_defaults_are_the_published_ones(name):
    method = METHODS[name]
    assert (method.k, method.weight, method.temperature, method.rule, method.reward_model) == PUBLISHED[name]
    assert method.proposer() == PROPOSERS.get(name, TopK(method.k))
    if type(method.proposer()) is TopK:
        assert method.proposer(3) == TopK(3)


SEARCHES = {
    "best_of_n": BestOfN(16, 0.0, "last"),
    "blockwise": ChunkBeam(1, 6, 32),
    "chunk_beam": ChunkBeam(4, 4, 10),
    "weak_to_strong": ChunkBeam(4, 4, 10),
    "cards": Cards(1.0, 0.0, 1.0, 0.7, 0.5, 3.0, 4, 64, 20, False),
    "speculative_rejection": SpeculativeRejection(16, 0.5, 32),
    "smc": TwistedSmc(16, 0.5),
}


def test_searches_have_their_published_numbers_and_take_others():
    assert {name: method.make_search({}) for name, method in METHODS.items() if method.search} == SEARCHES
    assert METHODS["chunk_beam"].make_search({"beams": 2, "chunk": 30}) == ChunkBeam(2, 4, 30)
    names = {option.key for option in options(config.DecodeConfig) if option.key.startswith("search.")}
    assert names == {f"search.{name}" for method in METHODS.values() for name, _ in method.search_options}


def test_methods_with_special_candidates_and_reward_forms():
    assert [name for name, method in METHODS.items() if method.keeps_rest] == ["vas"]
    forms = {name: method.reward_form for name, method in METHODS.items() if method.reward_form != "plain"}
    assert forms == {"rad": "clipped", "vas": "centred"}
    # A reward model of whole texts scores the likeliest tokens of a method whose candidates are all.
    assert METHODS["cd"].proposer(scores_vocabulary=False) == TopK(20)
    assert METHODS["top_p"].proposer(top_p=0.5) == TopP(0.5)
    assert METHODS["transfer_q"].look_ahead == 20


def test_numbers_that_do_not_apply_to_a_method_are_not_among_its_defaults():
    assert {name: METHODS[name].numbers() for name in ("greedy", "top_p", "contrastive", "rad", "genarm")} == {
        "greedy": "", "top_p": "temperature 1, top p 0.95", "contrastive": "k 8, weight 0.6",
        "rad": "k 20, weight 30, temperature 1", "genarm": "weight 1, temperature 1",
    }  # fmt: skip


def test_options_and_registries_have_the_same_names():
    assert get_args(config.MethodName) == tuple(METHODS) == tuple(PUBLISHED)
    assert get_args(config.PromptFormName) == tuple(PROMPT_FORMS)
    assert config.UNGUIDED_METHODS == ("greedy", "top_k", "top_p", "contrastive")
    assert config.GROUPED_METHODS == ("expert_ratio", "transfer_q", "weak_to_strong")
