"""Serves a language model and its reward models over HTTP."""

import contextlib
import logging
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import uvicorn
from rich.console import Console

from pargs_jax.commands.command_line import show_config
from pargs_jax.commands.demo import REWARD_MODELS, model_source
from pargs_jax.data_config import DEMO
from pargs_jax.decoding.methods import METHODS
from pargs_jax.errors import InputError
from pargs_jax.generation.session import Session
from pargs_jax.models.hf import stored_head
from pargs_jax.models.model import unrolls_by_default
from pargs_jax.serving.app import Limits, make_app
from pargs_jax.serving.config import API_KEY, ServeConfig
from pargs_jax.serving.engine import Engine
from pargs_jax.serving.metrics import Metrics
from pargs_jax.serving.service import Service
from pargs_jax.sharding import row_shards
from pargs_jax.signals import ERRORS, StopRequest, signals_wait
from pargs_jax.text.prompts import choose_form, get_form

_METHOD_OF_HEAD = {"reward": "pargs", "table": "farma"}
KEEP_ALIVE = 30
"""Seconds that an idle connection stays open."""


def run(config: ServeConfig) -> None:
    """Loads the models, compiles, and serves until the process is asked to end. Raises InputError for what cannot be
    served."""
    console = Console(stderr=True, soft_wrap=True)
    listener = _listen(config)  # before models are loaded, so that a port in use is found at once
    service = open_service(config, console)
    shards = row_shards(jax.sharding.get_mesh())
    places = -(-config.batch_size // shards) * shards
    engine = Engine(
        lambda: service.make_scheduler(places, config.steps),
        service.session.answers,
        jax.sharding.get_mesh(),
        places=places,
        most_waiting=config.queue,
        warm_up=service.warm_up,
    )
    console.print("compiling ...", highlight=False)
    engine.wait_until_ready()
    metrics = Metrics()
    metrics.watch(engine)
    key = os.environ.get(API_KEY) or None
    app = make_app(
        service,
        engine,
        metrics,
        limits=Limits(config.max_body, config.timeout),
        key=key,
        logs_prompts=config.log_prompts,
    )
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    host, port = listener.getsockname()[:2]
    console.print(
        f"models: {', '.join(service.models)}\n"
        f"listening at http://{host}:{port} (OpenAI's API at /v1, a playground at /)", highlight=False,
    )  # fmt: skip
    if key is None and host not in ("127.0.0.1", "::1"):
        console.print(f"warning: everybody who reaches this machine is let in; set {API_KEY}", highlight=False)
    # uvloop, which uvicorn takes if it is there, would keep signals from those who watch them.
    uvicorn_config = uvicorn.Config(
        app,
        loop="asyncio",
        log_level="warning",
        access_log=False,
        timeout_keep_alive=KEEP_ALIVE,
        server_header=False,
    )
    with signals_wait(f"shutting down; running answers have {config.grace:g} seconds to end") as request:
        server = _QuietServer(uvicorn_config)
        closing = threading.Thread(target=_close_on_signal, args=(request, server, engine, config.grace), daemon=True)
        closing.start()
        server.run(sockets=[listener])
        server.should_exit = True
        closing.join()
    if request.number is not None:
        raise ERRORS[signal.Signals(request.number)]


def open_service(config: ServeConfig, console: Console) -> Service:
    """The models of a config, ready to be served. Raises InputError for what cannot be served."""
    sources = [str(path) for path in config.rm] or _demo_reward_models(config)
    method = config.method or _usual_method(sources)
    name = config.name or re.sub(r"[^\w.-]", "-", Path(config.lm.removesuffix("/model")).name) or DEMO
    show_config(config, console, f"in effect: method {method}, name {name}")
    session = Session(
        model_source(config.lm),
        sources,
        method=METHODS[method],
        dtype=config.dtype,
        lm_dtype=config.lm_dtype,
        rm_dtype=config.rm_dtype,
        rm_format=config.rm_format,
        unroll=unrolls_by_default(jax.default_backend()) if config.unroll == "auto" else config.unroll == "yes",
    )
    form = get_form(choose_form(config.format, session.remembered_forms, "--format"))
    return Service(
        session,
        method,
        form,
        name=name,
        k=config.k,
        max_prompt_tokens=config.max_prompt_tokens,
        max_new_tokens=config.max_new_tokens,
        most_answers=config.max_n,
    )


def _demo_reward_models(config: ServeConfig) -> list[str]:
    """The demo's reward model of all prefixes, if it was trained."""
    path = REWARD_MODELS["partial"]
    is_used = config.lm == DEMO and config.method in (None, "pargs") and path.exists()
    return [str(path)] if is_used else []


def _usual_method(sources: list[str]) -> str:
    """The method for the kind of these reward models."""
    if not sources:
        return "top_k"
    heads = {stored_head(source) for source in sources}
    if len(heads) > 1:
        raise InputError("--rm: the reward models are of several kinds; name the method with --method")
    return _METHOD_OF_HEAD.get(heads.pop(), "genarm")


def _listen(config: ServeConfig) -> socket.socket:
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((config.host, config.port))
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"--host {config.host} --port {config.port}: cannot listen there ({reason})") from error
    return listener


class _QuietServer(uvicorn.Server):
    """Leaves signals to the command."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _close_on_signal(request: StopRequest, server: uvicorn.Server, engine: Engine, grace: float) -> None:
    """When the process is asked to end, lets the engine end first: it takes no more orders and finishes those that it
    has, or hands them back after `grace` seconds. Then no reply is open, and the server can end."""
    while request.number is None and not server.should_exit:
        time.sleep(0.1)
    if request.number is not None:
        engine.close(grace)
    server.should_exit = True
