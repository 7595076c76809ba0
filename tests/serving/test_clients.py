"""Clients that leave, that ask too much, and those of other projects."""

import json
import socket
import threading
import time

import httpx
import pytest

from pargs_jax.serving.engine import Refused

ENDLESS = {"logit_bias": {str(token): -100 for token in (2, *range(5, 500, 25))}, "max_tokens": 24}
"""Keeps the end-of-sequence tokens of the tests' model from being drawn."""
CHAT = {"model": "tiny+pargs", "messages": [{"role": "user", "content": "Hi"}], "temperature": 1.0}


def until(condition, seconds=10):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert condition()


@pytest.fixture
def slow(engine, monkeypatch):
    """An engine whose steps take a while."""
    step = engine._step
    monkeypatch.setattr(engine, "_step", lambda scheduler: (time.sleep(0.2), step(scheduler)))


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_rows(served, slow, stream):
    body = json.dumps(CHAT | ENDLESS | {"stream": stream, "n": 8}).encode()
    host, port = served.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        until(lambda: served.engine.counts.running > 0)
    until(lambda: served.engine.counts == (0, 0))


def test_too_many_requests_are_told_to_come_again(served, monkeypatch):
    def refuse(_):
        raise Refused("64 answers are waiting already, of at most 64")

    monkeypatch.setattr(served.engine, "add", refuse)
    reply = served.post("chat/completions", CHAT)
    assert reply.status_code == 429 and reply.headers["Retry-After"] == "1"
    assert reply.json()["error"]["type"] == "rate_limit_error"


def test_a_request_that_takes_too_long_ends_with_504(served, slow, monkeypatch):
    add = served.engine.add

    def add_with_little_time(order):
        order.seconds = 0.1
        add(order)

    monkeypatch.setattr(served.engine, "add", add_with_little_time)
    reply = served.post("chat/completions", CHAT | ENDLESS)
    assert reply.status_code == 504 and reply.json()["error"]["code"] == "timeout"
    streamed = served.post("chat/completions", CHAT | ENDLESS | {"stream": True})
    assert "took more than 0.1 seconds" in streamed.text and not streamed.text.endswith("[DONE]\n\n")


def test_inspect_ai_evaluates_it(served, tmp_path, monkeypatch):
    inspect_ai = pytest.importorskip("inspect_ai")
    from inspect_ai.dataset import Sample
    from inspect_ai.model import GenerateConfig, get_model
    from inspect_ai.scorer import includes

    monkeypatch.setenv("INSPECT_LOG_DIR", str(tmp_path))
    model = get_model(
        "openai-api/pargs/tiny+pargs",
        base_url=f"{served.url}/v1",
        api_key="none",
        config=GenerateConfig(max_tokens=12, seed=1, temperature=0.9, logprobs=True, top_logprobs=2, stop_seqs=["zz"]),
    )
    samples = [Sample(input=text, target="") for text in ("Hello", "Tea?")]
    [log] = inspect_ai.eval(inspect_ai.Task(dataset=samples, scorer=includes()), model=model, display="none")
    assert log.status == "success", log.error
    assert [bool(sample.output.choices[0].logprobs.content) for sample in log.samples] == [True, True]
    assert {sample.output.stop_reason for sample in log.samples} <= {"stop", "max_tokens"}


def test_many_streams_at_once_are_not_mixed_up(served):
    alone = {
        seed: served.post("chat/completions", CHAT | {"seed": seed}).json()["choices"][0]["message"]["content"]
        for seed in range(4)
    }
    failures = []

    def ask(seed):
        with httpx.stream(
            "POST", f"{served.url}/v1/chat/completions", json=CHAT | {"seed": seed, "stream": True}, timeout=60
        ) as reply:
            lines = [line[6:] for line in reply.iter_lines() if line.startswith("data: {")]
        text = "".join(json.loads(line)["choices"][0]["delta"].get("content", "") for line in lines)
        if text != alone[seed]:
            failures.append((seed, text, alone[seed]))

    threads = [threading.Thread(target=ask, args=(number % 4,)) for number in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
