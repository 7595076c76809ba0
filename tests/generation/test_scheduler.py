"""Requests that share a running batch are answered as in a batch of their own: whenever they enter, whatever runs
beside them. The reference is `decode`, which answers all of them in one call."""

import dataclasses
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pargs_jax.data.preferences import Prompt
from pargs_jax.decoding.guides import EncoderGuide, retokenised
from pargs_jax.decoding.loop import decode
from pargs_jax.decoding.methods import METHODS
from pargs_jax.errors import InputError
from pargs_jax.generation import reward_models, scheduler
from pargs_jax.generation.plan import Batch, Request, Settings
from pargs_jax.generation.program import DecodingProgram, Models, Programs, guide_prompts, make_guides
from pargs_jax.generation.reward_models import RewardModel
from pargs_jax.generation.scheduler import Scheduler
from pargs_jax.models.encoder import EncoderModel
from pargs_jax.models.model import unstack_layers
from pargs_jax.models.preference_lora import PreferenceLora
from pargs_jax.models.prefix_causal import PrefixCausalModel
from pargs_jax.testing import TINY_DEBERTA, random_params, tiny_model, tiny_tokenizer
from pargs_jax.text.retokenisation import Retokeniser

TOKENS, K, CONTEXT = 12, 4, 256
tokenizer = lru_cache(tiny_tokenizer)
EOS_IDS = (2, *range(5, 500, 25))  # many, so that answers end early

METHOD_OPTIONS = {
    "pargs": {"trace": "candidates", "k": K},
    "vas": {"k": K},
    "contrastive": {"k": K},
    "top_p": {},
    "farma": {"k": K},
    "expert_ratio": {},
    "parm": {"preference": (0.3, 0.7)},
    "transfer_q": {"k": K, "look_ahead": 2},
}
REWARD_MODELS = {
    "pargs": ("scalar", "retokenised", "encoder"),
    "vas": ("scalar",),
    "farma": ("table",),
    "expert_ratio": ("tuned", "reference"),
    "parm": ("preference",),
    "transfer_q": ("tuned", "scalar"),
}


def long_context(model, params):
    """A model whose positions, if it has a table of them, are repeated."""
    model = dataclasses.replace(model, config=dataclasses.replace(model.config, context_length=CONTEXT))
    if "positions" in params["backbone"]:
        table = params["backbone"]["positions"]["embedding"]
        params["backbone"]["positions"]["embedding"] = jnp.tile(table, (CONTEXT // len(table), 1))
    return model, params


@lru_cache
def reward_model(kind):
    size, role, text_of = tokenizer().vocab_size, "scalar", None
    deberta = dataclasses.replace(TINY_DEBERTA, vocab_size=size)
    if kind == "encoder":
        model = EncoderModel(deberta)
        params = random_params(model)
    elif kind == "prefix-causal":
        model = PrefixCausalModel(dataclasses.replace(deberta, attention="prefix_causal"))
        params = random_params(model, seed=1)
    elif kind == "preference":
        model = dataclasses.replace(long_context(*tiny_model(vocab_size=size))[0], lora=PreferenceLora(2))
        params, role = jax.tree.map(lambda x: 0.1 * jnp.ones(x.shape, x.dtype), random_params(model)), "preference"
    else:
        family, head, role = {
            "scalar": ("llama", "reward", "scalar"),
            "retokenised": ("gpt2", "reward", "scalar"),
            "table": ("llama", "table", "table"),
            "tuned": ("llama", "vocabulary", "log_probs"),
            "reference": ("gpt2", "vocabulary", "log_probs"),
        }[kind]
        model, params = long_context(*tiny_model(family, head, seed=len(kind), vocab_size=size))
    if kind == "scalar":
        model, params = unstack_layers(model, params)
    if kind in ("encoder", "prefix-causal", "retokenised"):
        text_of = Retokeniser(tokenizer(), tokenizer())
    return RewardModel(kind, model, params, tokenizer(), text_of, role=role, lm_vocab_size=size)


@lru_cache
def models(kinds):
    lm, params = unstack_layers(*long_context(*tiny_model(vocab_size=tokenizer().vocab_size)))
    return Models(lm, params, EOS_IDS, 0, [reward_model(kind) for kind in kinds])


def request(number, settings, words, kinds, rng):
    """A request with settings of its own, as far as its method has them."""
    prompt = Prompt(str(number), "My lamp broke. " * words)
    unused = settings.method.unused
    changes = {"seed": int(rng.integers(3)), "max_new_tokens": int(rng.integers(1, TOKENS + 1))}
    if "weight" not in unused:
        changes["weights"] = (float(rng.uniform(0, 1)),)
    if "temperature" not in unused:
        changes["temperature"] = float(rng.uniform(0.5, 3))
    if settings.k:
        changes["k"] = int(rng.integers(2, K + 1))
    if "gate_entropy" not in unused and number % 2:
        changes["gate_entropy"] = 4.0
    if "preference" not in unused:
        share = float(rng.uniform())
        changes["preference"] = (share, 1 - share)
    own = tokenizer().encode_prompt(prompt.text)
    return Request(prompt, number % 3, dataclasses.replace(settings, **changes), own, [own] * len(kinds))


def together(requests, settings, kinds):
    """All requests in one call, with guides that are wide enough."""
    all_models = models(kinds)
    batch = Batch.of(requests, len(requests), all_models.reward_models)
    guides, params = make_guides(all_models, settings, [100] * len(kinds))
    program = DecodingProgram.of(all_models, guides, settings)
    prompts = guide_prompts(settings.method, all_models.reward_models, batch)
    return jax.device_get(
        decode(
            program.decoder, all_models.lm_params, params, *batch.lm_prompts, batch.numbers.keys(),
            batch.settings(len(kinds)), TOKENS, prompts,
        )
    )  # fmt: skip


def finish(running):
    """What a scheduler hands out until it is idle, in this order: the requests with their answers."""
    found = []
    while not running.is_idle:
        for batch, decoded, seconds in running.step():
            assert all(each > 0 for each in seconds) and len(seconds) == len(batch.requests)
            found += [
                (each, jax.tree.map(lambda x, row=row: x[row], decoded)) for row, each in enumerate(batch.requests)
            ]
    return found


def assert_equal_answers(found, requests, expected):
    """Every request has one answer, and it is the expected one with all its numbers."""
    assert len(found) == len(requests)
    for asked, answer in found:
        (row,) = (row for row, each in enumerate(requests) if each is asked)
        wanted = jax.tree.map(lambda x, row=row: x[row], expected)
        np.testing.assert_array_equal(answer.tokens, wanted.tokens)
        assert (answer.lengths, answer.finished) == (wanted.lengths, wanted.finished)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-4), answer.trace, wanted.trace)
        np.testing.assert_allclose(answer.rewards, wanted.rewards, atol=2e-4)


@pytest.fixture(autouse=True)
def small_programs(monkeypatch):
    """Few steps between two looks, and guides with few widths, each of which takes compiling."""
    monkeypatch.setattr(scheduler, "STEPS", 5)
    monkeypatch.setattr(retokenised, "PACKED_WIDTHS", (8,))
    monkeypatch.setattr(reward_models, "EncoderGuide", partial(EncoderGuide, finest=2))


@pytest.mark.parametrize("method", METHOD_OPTIONS)
def test_answers_do_not_depend_on_when_a_request_enters(method):
    """Nor on the width of the prompts before it: the state of `pargs` grows, and shorter prompts enter it after."""
    kinds, rng = REWARD_MODELS.get(method, ()), np.random.default_rng(0)
    settings = Settings(METHODS[method], max_new_tokens=TOKENS, **METHOD_OPTIONS[method])
    words = {"pargs": (0, 1, 0, 1, 14, 0, 14, 1, 14, 0), "top_p": (0, 1) * 11}.get(method, (0, 1) * 6)
    places = 16 if method == "top_p" else 3  # 16 are filled again two at a time
    requests = [request(number, settings, each, kinds, rng) for number, each in enumerate(words)]
    expected = together(requests, settings, kinds)
    assert len(set(expected.lengths.tolist())) > 4
    running = Scheduler(models(kinds), Programs(), settings, places)
    running.add(requests)
    found = finish(running)
    assert_equal_answers(found, requests, expected)
    assert [asked for asked, _ in found] != requests  # those that ended first were handed out first


def test_requests_may_come_and_go_while_others_run():
    settings, rng = Settings(METHODS["top_p"], max_new_tokens=TOKENS), np.random.default_rng(1)
    requests = [request(number, settings, 1, (), rng) for number in range(10)]
    expected = together(requests, settings, ())
    assert expected.finished.any()
    running = Scheduler(models(()), Programs(), settings, 4)
    running.add(requests[:6])
    found = [each for ended in running.step() for each in ended.batch.requests]
    is_there = [any(each is one for one in found) for each in requests[:6]]
    gone = [requests[is_there.index(False)], requests[5]]  # one that runs, and the last, which waits
    for each in gone:
        running.remove(each)
    assert finish(running) and running.is_idle and running.step() == []
    running.add(requests[6:])
    assert_equal_answers(finish(running), requests[6:], jax.tree.map(lambda x: x[6:], expected))


def test_answers_that_do_not_fit_a_guide_start_again_and_disturb_no_other(monkeypatch):
    """The guides' first width suffices for some answers only."""
    kinds, rng = ("prefix-causal", "encoder"), np.random.default_rng(2)
    settings = Settings(METHODS["pargs"], max_new_tokens=TOKENS, k=K)
    requests = [request(number, settings, number % 2, kinds, rng) for number in range(8)]
    expected = together(requests, settings, kinds)
    monkeypatch.setattr(reward_models, "first_answer_width", lambda _: 16)
    begun, batch_of = [], Batch.of
    monkeypatch.setattr(scheduler.Batch, "of", lambda *given: begun.append(len(given[0])) or batch_of(*given))
    running = Scheduler(models(kinds), Programs(), settings, 3)
    running.add(requests)
    assert_equal_answers(finish(running), requests, expected)
    assert len(requests) < sum(begun) - len(requests) < 2 * len(requests)  # of the batches, some were for reading


def test_what_a_running_batch_cannot_do_is_refused():
    settings = Settings(METHODS["top_k"], k=K, max_new_tokens=TOKENS)
    running = Scheduler(models(()), Programs(), settings, 1)
    for changes, message in (
        ({"k": K + 1}, "prompt '0': candidates is 5, must be at most 4 in the running batch"),
        ({"max_new_tokens": 99}, "prompt '0': max_new_tokens is 99, must be at most 12"),
        ({"trace": "candidates"}, "prompt '0': its trace differs from that of the running batch, must be the same"),
    ):
        own = dataclasses.replace(settings, **changes)
        with pytest.raises(InputError, match=message):
            running.add([Request(Prompt("0", ""), 0, own, [1], [])])
    assert running.is_idle
