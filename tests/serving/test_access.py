"""Who is let in."""

import base64

import httpx
import pytest

from pargs_jax.serving.app import Limits, make_app
from pargs_jax.serving.metrics import Metrics


@pytest.fixture(scope="module")
def ask(service, engine):
    app = make_app(service, engine, Metrics(), limits=Limits(1000, 60), key="geheim-ü")
    transport = httpx.ASGITransport(app)

    async def ask(path, authorization=None, method="GET"):
        headers = {} if authorization is None else {"Authorization": authorization}
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return (await client.request(method, path, headers=headers)).status_code

    import asyncio

    return lambda *given: asyncio.run(ask(*given))


def test_the_key_protects_every_route_but_health(ask):
    assert ask("/health") == 200
    for path in ("/", "/metrics", "/v1/models", "/v1/models/tiny", "/nowhere"):
        assert ask(path) == 401
        assert ask(path, b"Bearer wrong") == 401
        assert ask(path, "Bearer geheim-ü".encode()) in (200, 404)
    for path in ("/v1/completions", "/v1/chat/completions"):
        assert ask(path, None, "POST") == 401
        assert ask(path, "Bearer geheim-ü".encode(), "POST") == 400  # the body is empty


def test_browsers_know_it_as_a_password(ask):
    def basic(text):
        return b"Basic " + base64.b64encode(text.encode())

    assert ask("/v1/models", basic("anybody:geheim-ü")) == 200
    for wrong in (basic("geheim-ü"), basic("geheim-ü:"), b"Basic junk", b"Basic", b"", b"Digest geheim", b"Bearer"):
        assert ask("/v1/models", wrong) == 401
