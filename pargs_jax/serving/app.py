"""The HTTP interface: OpenAI's completions and chat, `/health`, `/metrics`, and the playground."""

import asyncio
import json
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from pargs_jax.errors import InputError
from pargs_jax.json_text import parse_json
from pargs_jax.serving.access import Access
from pargs_jax.serving.engine import Engine, Event, Failed, Finished, Order, Refused
from pargs_jax.serving.fields import Asked, Chat, Completion, RefusedField, read_fields
from pargs_jax.serving.metrics import Metrics
from pargs_jax.serving.playground import playground_page
from pargs_jax.serving.replies import Choice, Reply
from pargs_jax.serving.service import Service

log = logging.getLogger("pargs_jax.serving")

STATUS = {"input": 400, "timeout": 504, "shutdown": 503, "defect": 500}
AT_ONCE = 4096
"""Bytes of a request whose prompts are split into tokens at once, which takes less time than asking another thread."""
RETRY_AFTER = 1
"""Seconds after which a client may ask again when the queue was full."""


@dataclass(frozen=True)
class Limits:
    """What a request may cost: bytes of its body, and seconds until its end."""

    body: int
    seconds: float


class Problem(Exception):
    """An error in OpenAI's form."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    @property
    def body(self) -> dict[str, Any]:
        kind = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}.get(self.status)
        kind = kind or ("server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        headers = {"Retry-After": str(RETRY_AFTER)} if self.status in (429, 503) else {}
        return JSONResponse(self.body, self.status, headers)


def make_app(
    service: Service, engine: Engine, metrics: Metrics, *, limits: Limits, key: str | None, logs_prompts: bool = False
) -> Starlette:
    """The application.

    Args:
        service: what is served.
        engine: answers the requests.
        metrics: counts them.
        limits: of each request.
        key: what clients must know; None lets everybody in.
        logs_prompts: whether prompts are logged.
    """
    handlers = _Handlers(service, engine, metrics, limits, logs_prompts)
    routes = [
        Route("/", handlers.playground),
        Route("/health", handlers.health),
        Route("/metrics", handlers.show_metrics),
        Route("/v1/models", handlers.models),
        Route("/v1/models/{name:path}", handlers.model),
        Route("/v1/completions", handlers.complete, methods=["POST"]),
        Route("/v1/chat/completions", handlers.chat, methods=["POST"]),
    ]

    async def problem(_: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException):
            messages = {404: "there is no such path", 405: "this path does not take this method"}
            error = Problem(error.status_code, messages.get(error.status_code, error.detail))
        if isinstance(error, Problem):
            return error.response()
        log.error("unexpected %s", type(error).__name__, exc_info=error)
        return Problem(500, "the server made a mistake").response()

    app = Starlette(routes=routes, exception_handlers={Problem: problem, HTTPException: problem, Exception: problem})
    app.add_middleware(Access, key=key, requests=metrics.requests)
    return app


_Events = asyncio.Queue[list[Event] | None]
"""What is told of an order; None when its client has left."""


class _Post:
    """Brings events from the engine's thread to their queues: all that were told since the event loop looked last, at
    once, because each call to another thread's loop wakes it up."""

    def __init__(self) -> None:
        self._told: deque[tuple[_Events, list[Event]]] = deque()
        self._is_called = False

    def to(self, events: _Events) -> Callable[[list[Event]], None]:
        """Takes events for a queue of the running loop, from any thread."""
        loop = asyncio.get_running_loop()

        def tell(told: list[Event]) -> None:
            self._told.append((events, told))
            if not self._is_called:
                self._is_called = True
                try:
                    loop.call_soon_threadsafe(self._deliver)
                except RuntimeError:  # the loop has ended
                    self._is_called = False
                    self._told.clear()

        return tell

    def _deliver(self) -> None:
        self._is_called = False  # before the queue is emptied: what comes meanwhile calls again
        while self._told:
            events, told = self._told.popleft()
            events.put_nowait(told)


class _Handlers:
    def __init__(self, service: Service, engine: Engine, metrics: Metrics, limits: Limits, logs_prompts: bool) -> None:
        self._service, self._engine, self._metrics = service, engine, metrics
        self._limits, self._logs_prompts = limits, logs_prompts
        self._post = _Post()
        self._started = int(time.time())

    async def playground(self, _: Request) -> Response:
        page = playground_page(self._service)
        return HTMLResponse(page.html, headers={"Content-Security-Policy": page.policy, "Cache-Control": "no-cache"})

    async def health(self, _: Request) -> Response:
        failure = self._engine.failure
        if failure is None and self._engine.is_ready:
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": failure or "starting"}, 503)

    async def show_metrics(self, _: Request) -> Response:
        return Response(self._metrics.text(), media_type="text/plain; version=0.0.4")

    async def models(self, _: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._model(name) for name in self._service.models]})

    async def model(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name not in self._service.models:
            raise Problem(404, f"model {name!r} is not served", code="model_not_found")
        return JSONResponse(self._model(name))

    def _model(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self._started, "owned_by": "pargs_jax"}

    async def complete(self, request: Request) -> Response:
        return await self._answer(request, Completion)

    async def chat(self, request: Request) -> Response:
        return await self._answer(request, Chat)

    async def _answer(self, request: Request, kind: type[Asked]) -> Response:
        content = await _body(request, self._limits.body)
        asked = _asked(content, kind)
        events: _Events = asyncio.Queue()
        # Long prompts are split into tokens in another thread, so that they do not hold up others.
        plan = partial(self._order, asked, request, self._post.to(events))
        order = plan() if len(content) <= AT_ONCE else await asyncio.to_thread(plan)
        reply = self._reply(asked, order)
        if self._logs_prompts:
            log.info("prompt %r", order.requests[0].prompt.text)
        try:
            self._engine.add(order)
        except Refused as error:
            raise Problem(503 if error.is_ending else 429, str(error), code=None) from error
        exchange = _Exchange(self._engine, self._metrics, order, reply, events)
        if asked.stream:
            usage = asked.stream_options is not None and asked.stream_options.include_usage
            return StreamingResponse(exchange.stream(usage), media_type="text/event-stream", headers=_NO_BUFFERS)
        return await exchange.whole(request)

    def _order(self, asked: Asked, request: Request, tell: Callable[[list[Event]], None]) -> Order:
        try:
            requests = self._service.requests(asked)
        except RefusedField as error:
            status = 404 if error.code == "model_not_found" else 400
            raise Problem(status, str(error), param=error.param, code=error.code) from error
        client = asked.user or (request.client.host if request.client else "")
        follows = asked.stream or asked.alternatives is not None
        return Order(requests, tell, client, self._limits.seconds, asked.return_trace, follows)

    def _reply(self, asked: Asked, order: Order) -> Reply:
        reader = self._service.session.answers.text_reader
        choices = [Choice(each, reader, asked.alternatives, asked.stream_trace) for each in order.requests]
        prompt_tokens = sum(len(each.lm_ids) for each in order.requests[:: asked.n])
        return Reply(choices, asked.model, prompt_tokens, is_chat=isinstance(asked, Chat))


class _Exchange:
    """One request and its reply."""

    def __init__(self, engine: Engine, metrics: Metrics, order: Order, reply: Reply, events: "_Events") -> None:
        self._engine, self._metrics, self._order = engine, metrics, order
        self._reply, self._events = reply, events
        self._began = time.monotonic()
        self._has_text = False

    async def whole(self, request: Request) -> Response:
        """The reply at once, when all answers have ended. A client that leaves meanwhile frees its rows."""
        gone = asyncio.create_task(_until_gone(request))
        gone.add_done_callback(lambda _: self._events.put_nowait(None))
        cut_by = None
        try:
            while cut_by is None and any(choice.answer is None for choice in self._reply.choices):
                news = await self._events.get()
                if news is None:
                    return Response(status_code=499)
                for event in news:
                    if isinstance(event, Failed):
                        if event.reason != "shutdown":
                            raise _problem(event)
                        cut_by = event.reason
                    else:
                        self._take(event)
            return JSONResponse(self._reply.whole(cut_by))
        finally:
            gone.cancel()
            self._end()

    async def stream(self, with_usage: bool) -> AsyncIterator[str]:
        """The reply as server-sent events. A client that leaves frees its rows."""
        reply = self._reply
        try:
            for chunk in reply.opening():
                yield _event(chunk)
            left = {index for index, choice in enumerate(reply.choices) if choice.answer is None}
            while left:
                for event in await self._events.get():
                    if isinstance(event, Failed):
                        if event.reason != "shutdown":
                            yield _event(_problem(event).body)
                            return
                        chunks = [reply.chunk(index, "", event.reason) for index in sorted(left)]
                        left.clear()
                    else:
                        text = self._take(event)
                        chunks = [reply.chunk(event.index, text)]
                        if isinstance(event, Finished):
                            left.discard(event.index)
                    for chunk in filter(None, chunks):
                        yield _event(chunk)
            if with_usage:
                yield _event(reply.last_chunk())
            yield "data: [DONE]\n\n"
        except ValueError:  # NaN has no JSON
            message = (
                "a number of an answer is not finite; a model's weights may be damaged, or too large for the dtype"
            )
            yield _event(Problem(500, message).body)
        finally:
            self._end()

    def _take(self, event: Event) -> str:
        text = self._reply.choices[event.index].take(event)
        if text and not self._has_text:
            self._has_text = True
            self._metrics.first_token.observe(time.monotonic() - self._began)
        if isinstance(event, Finished):
            self._metrics.answers.labels(event.answer.finish_reason).inc()
            self._metrics.prompt_tokens.inc(len(self._order.requests[event.index].lm_ids))
        return text

    def _end(self) -> None:
        self._engine.cancel(self._order)
        self._metrics.request_seconds.observe(time.monotonic() - self._began)


_NO_BUFFERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False, allow_nan=False)}\n\n"


def _problem(event: Failed) -> Problem:
    return Problem(STATUS[event.reason], event.message, code="timeout" if event.reason == "timeout" else None)


def _asked(content: bytes, kind: type[Asked]) -> Asked:
    """The fields of a body. Raises Problem."""
    try:
        body = parse_json(content)
        if b"\\u" in content:
            _check_characters(body)
        return read_fields(kind, body)
    except RefusedField as error:
        raise Problem(400, str(error), param=error.param, code=error.code) from error
    except InputError as error:
        raise Problem(400, f"the body {error}") from error


def _check_characters(body: Any) -> None:
    """Raises InputError for halves of characters, which JSON can spell but no text has."""
    try:
        json.dumps(body, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise InputError("has \\u escapes that are not characters") from None


async def _body(request: Request, most: int) -> bytes:
    """The body. Raises Problem if it is longer than `most` bytes."""
    parts, size = [], 0
    try:
        async for part in request.stream():
            size += len(part)
            if size > most:
                raise Problem(413, f"the body is longer than {most} bytes")
            parts.append(part)
    except ClientDisconnect:
        raise Problem(400, "the body ended too early") from None
    return b"".join(parts)


async def _until_gone(request: Request) -> None:
    """Returns when the client has left."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
