"""Who may come in, and a count of all requests by path and status."""

import base64
import binascii
import hmac
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from prometheus_client import Counter
from starlette.datastructures import Headers

Message = MutableMapping[str, Any]
_OPEN = "/health"
_PATHS = ("/", "/health", "/metrics", "/v1/models", "/v1/completions", "/v1/chat/completions")
"""Paths that are counted by their names; clients could make up any number of others."""


class Access:
    """Lets in requests that know the key, as a bearer token or, for browsers, as the password of basic authentication.
    Everybody may ask for `/health`."""

    def __init__(self, app: Callable[..., Awaitable[None]], key: str | None, requests: Counter) -> None:
        self._app, self._key, self._requests = app, key, requests

    async def __call__(
        self,
        scope: Message,
        receive: Callable[[], Awaitable[Message]],
        send: Callable[[Message], Awaitable[None]],
    ) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        path = scope["path"] if scope["path"] in _PATHS else "other"

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._requests.labels(path, str(message["status"])).inc()
            await send(message)

        if scope["path"] != _OPEN and not self._knows_key(Headers(scope=scope)):
            return await _refuse(counted)
        await self._app(scope, receive, counted)

    def _knows_key(self, headers: Headers) -> bool:
        if self._key is None:
            return True
        kind, _, given = headers.get("authorization", "").encode("latin-1").partition(b" ")
        if kind.lower() == b"basic":
            try:
                given = base64.b64decode(given.strip(), validate=True).partition(b":")[2]
            except binascii.Error:
                return False
        elif kind.lower() != b"bearer":
            return False
        return hmac.compare_digest(given.strip(), self._key.encode())


async def _refuse(send: Callable[[Message], Awaitable[None]]) -> None:
    error = {"message": "the API key is missing or wrong", "type": "authentication_error", "param": None}
    body = json.dumps({"error": error | {"code": "invalid_api_key"}}).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"www-authenticate", b'Basic realm="pargs_jax", charset="UTF-8"'),
    ]
    await send({"type": "http.response.start", "status": 401, "headers": headers})
    await send({"type": "http.response.body", "body": body})
