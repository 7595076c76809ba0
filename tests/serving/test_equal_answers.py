"""Answers through the server equal those of a session in Python, whatever else is in the batch."""

import dataclasses
import random
from concurrent.futures import ThreadPoolExecutor

import pytest

from pargs_jax.data.preferences import Prompt
from pargs_jax.decoding.methods import METHODS
from pargs_jax.generation.plan import Settings
from pargs_jax.generation.session import Session
from pargs_jax.serving.fields import Completion
from pargs_jax.serving.service import Service
from pargs_jax.text.prompts import get_form

K, TOKENS = 5, 24

PROMPTS = ("My lamp broke.", "Hello", "Why?", "Tea?")


def requests(count):
    """Bodies of mixed settings, each with the same settings for a session."""
    draw = random.Random(0)
    for number in range(count):
        method = draw.choice(["plain", "greedy", "pargs", "pargs_greedy", "args_stochastic"])
        known = METHODS["top_p" if method == "plain" else method]
        body = {"model": "tiny", "prompt": draw.choice(PROMPTS), "id": str(number), "seed": draw.randrange(3)}
        own = {"max_new_tokens": TOKENS, "seed": body["seed"]}
        body |= {"max_tokens": TOKENS} if method == "plain" else {"max_tokens": TOKENS, "method": method}
        if known.guided:
            body["weight"] = [draw.uniform(0, 3), draw.uniform(-1, 1)]
            own |= {"weights": tuple(body["weight"]), "k": K}
            if draw.random() < 0.3:
                body["gate_entropy"] = own["gate_entropy"] = 5.0
        if method == "plain":
            body["top_p"] = own["top_p"] = 0.9
        if known.draws == "sample":
            body["temperature"] = own["temperature"] = draw.uniform(0.3, 2)
        yield body, Prompt(str(number), body["prompt"]), Settings(known, **own)


def test_fifty_concurrent_requests_of_mixed_settings_equal_a_session(served):
    every = list(requests(50))
    compiled = served.metrics.compilations._value.get()
    with ThreadPoolExecutor(50) as pool:
        replies = list(pool.map(lambda each: served.post("completions", each[0]), every))
    assert served.metrics.compilations._value.get() == compiled
    session = served.service.session
    for reply, (body, prompt, settings) in zip(replies, every, strict=True):
        assert reply.status_code == 200, reply.text
        [[answer]] = session.answer([prompt], settings)
        choice = reply.json()["choices"][0]
        assert choice["text"] == answer.response, body
        assert choice["finish_reason"] == answer.finish_reason
        assert reply.json()["usage"]["completion_tokens"] == answer.tokens
        assert choice["pargs"]["kl"] == pytest.approx(answer.kl, rel=1e-3, abs=1e-4)
        assert choice["pargs"]["log_probability"] == pytest.approx(answer.log_probability, rel=1e-4, abs=1e-4)
        if METHODS[body.get("method", "top_p")].guided:
            assert choice["pargs"]["guide_reward"] == pytest.approx(list(answer.guide_rewards), abs=1e-3)


def tokens_of(session, settings):
    """The tokens of each prompt's answer, with a seed of its own, by its id."""
    own = dataclasses.replace(settings, temperature=1.5, max_new_tokens=8, batch_size=4, trace="tokens")
    found = {}
    for seed, prompt in enumerate(PROMPTS):
        [[answer]] = session.answer([Prompt(str(seed), prompt)], dataclasses.replace(own, seed=seed))
        found[str(seed)] = [token.id for token in answer.trace.tokens]
    return found


@pytest.fixture(scope="module")
def plain_tokens(lm):
    """Of the language model without a guide."""
    return tokens_of(Session(lm), Settings(METHODS["top_p"], top_p=1.0))


@pytest.mark.parametrize(
    ("method", "heads"),
    {"genarm": ("vocabulary",), "farma": ("table",), "expert_ratio": ("vocabulary",) * 2}.items(),
)
def test_servers_of_other_methods_answer_as_a_session_does(method, heads, lm, save_tiny, plain_tokens):
    """Guided, and the language model itself, in one batch."""
    guides = [save_tiny(head, seed=seed) for seed, head in enumerate(heads, start=1)]
    session = Session(lm, guides, method=METHODS[method])
    lengths = {"max_prompt_tokens": 16, "max_new_tokens": 8}
    service = Service(session, method, get_form("plain"), name="tiny", k=None, most_answers=1, **lengths)
    bodies = [
        {"model": model, "prompt": prompt, "id": str(seed), "seed": seed, "temperature": 1.5, "max_tokens": 8}
        for seed, prompt in enumerate(PROMPTS)
        for model in ("tiny", f"tiny+{method}")
    ]
    scheduler = service.make_scheduler(4, 4)
    scheduler.add(request for body in bodies for request in service.requests(Completion(**body)))
    found = {}
    while not scheduler.is_idle:
        for batch, decoded, _ in scheduler.step():
            for row, request in enumerate(batch.requests):
                key = request.prompt.id, request.settings.weights
                found[key] = decoded.tokens[row, : decoded.lengths[row]].tolist()
    settings = Settings(METHODS[method])
    for weights, expected in (
        ((0.0,) * len(service.guides), plain_tokens),
        (settings.guide_weights(len(heads)), tokens_of(session, settings)),
    ):
        assert {key: found[key, weights] for key in expected} == expected
