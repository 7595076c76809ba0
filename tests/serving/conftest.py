"""A server of tiny models, in a thread of the tests' process."""

import contextlib
import socket
import threading
import time
from typing import Any, NamedTuple

import httpx
import jax
import openai
import pytest
import uvicorn
from jax.sharding import AxisType

from pargs_jax.decoding.methods import METHODS
from pargs_jax.generation.session import Session
from pargs_jax.mesh import AXES
from pargs_jax.serving.app import Limits, make_app
from pargs_jax.serving.engine import Engine
from pargs_jax.serving.metrics import Metrics
from pargs_jax.serving.service import Service
from pargs_jax.text.prompts import get_form

PLACES, TOKENS, PROMPT, K = 8, 24, 40, 5
MESH = jax.make_mesh((1, 1, 1), AXES, axis_types=(AxisType.Auto,) * 3, devices=jax.devices()[:1])


class Served(NamedTuple):
    """A running server and its parts."""

    url: str
    service: Service
    engine: Engine
    metrics: Metrics

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        return httpx.post(f"{self.url}/v1/{path}", json=body, timeout=60, **options)


@pytest.fixture(scope="session")
def listening():
    """Makes a server that runs while a block does; the block gets its address."""
    return _listening


@contextlib.contextmanager
def _listening(app):
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def start_engine(service, **options):
    settings = {"places": PLACES, "most_waiting": 64, "warm_up": service.warm_up} | options
    engine = Engine(
        lambda: service.make_scheduler(settings["places"], 3),
        service.session.answers,
        MESH,
        **settings,
    )
    engine.wait_until_ready()
    return engine


@pytest.fixture(scope="session")
def lm(save_tiny):
    """A language model of which many tokens end an answer, so that some answers are short."""
    return save_tiny("vocabulary", eos=[2, *range(5, 500, 25)])


@pytest.fixture(scope="session")
def service(lm, save_tiny):
    guides = [
        save_tiny("reward", family=family, seed=seed, name=name)
        for seed, (name, family) in enumerate((("kind", "llama"), ("brief", "gpt2")), start=1)
    ]
    session = Session(lm, guides, method=METHODS["pargs"])
    return Service(
        session,
        "pargs",
        get_form("hh"),
        name="tiny",
        k=K,
        max_prompt_tokens=PROMPT,
        max_new_tokens=TOKENS,
        most_answers=8,
    )


@pytest.fixture(scope="session")
def engine(service):
    engine = start_engine(service)
    yield engine
    engine.close(5)


@pytest.fixture(scope="session")
def served(service, engine, listening):
    metrics = Metrics()
    metrics.watch(engine)
    app = make_app(service, engine, metrics, limits=Limits(100_000, 60), key=None)
    with listening(app) as url:
        yield Served(url, service, engine, metrics)
