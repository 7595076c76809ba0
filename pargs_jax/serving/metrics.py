"""What the server counts, for `/metrics` in Prometheus's text format."""

import jax
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from pargs_jax.serving.engine import Engine

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_COMPILED = "/jax/core/compile/backend_compile_duration"
"""The event that JAX reports for each program that it compiles."""


class Metrics:
    """Counts of one server."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        registry = {"registry": self._registry}
        self.requests = Counter("pargs_requests", "Requests by path and status", ["path", "status"], **registry)
        self.prompt_tokens = Counter("pargs_prompt_tokens", "Tokens of the prompts of answers that ended", **registry)
        self.answer_tokens = Counter("pargs_answer_tokens", "Tokens drawn for answers", **registry)
        self.answers = Counter("pargs_answers", "Answers by how they ended", ["reason"], **registry)
        self.first_token = Histogram(
            "pargs_time_to_first_token_seconds", "From a request to its first text", buckets=_SECONDS, **registry
        )
        self.request_seconds = Histogram(
            "pargs_request_seconds", "From a request to the end of its reply", buckets=_SECONDS, **registry
        )
        self.step_seconds = Histogram("pargs_step_seconds", "Of a call of the device", buckets=_SECONDS, **registry)
        self.compilations = Counter("pargs_compilations", "Programs compiled after the warm-up", **registry)
        self._running = Gauge("pargs_answers_running", "Answers in the running batch", **registry)
        self._waiting = Gauge("pargs_answers_waiting", "Answers that wait for a place", **registry)

    def watch(self, engine: Engine) -> None:
        """Counts the engine's steps and, from now on, what is compiled."""
        engine.on_step = self._count_step
        self._running.set_function(lambda: engine.counts.running)
        self._waiting.set_function(lambda: engine.counts.waiting)
        jax.monitoring.register_event_duration_secs_listener(self._count_compilation)

    def text(self) -> bytes:
        return generate_latest(self._registry)

    def _count_step(self, seconds: float, tokens: int) -> None:
        self.step_seconds.observe(seconds)
        self.answer_tokens.inc(tokens)

    def _count_compilation(self, event: str, *_: object, **__: object) -> None:
        if event == _COMPILED:
            self.compilations.inc()
