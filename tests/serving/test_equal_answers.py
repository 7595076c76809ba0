"""Answers through the server equal those of a session in Python, whatever else is in the batch."""

import random
from concurrent.futures import ThreadPoolExecutor

import pytest

from pargs_jax.data.preferences import Prompt
from pargs_jax.decoding.methods import METHODS
from pargs_jax.generation.plan import Settings

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
