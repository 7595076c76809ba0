"""Requests made from the schemas of their fields, right and wrong, never give a status of 500.

PARGS_FUZZ=2000 makes so many; the suite makes fewer.
"""

import asyncio
import json
import os

import httpx
import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from pargs_jax.serving.app import Limits, make_app
from pargs_jax.serving.fields import Chat, Completion
from pargs_jax.serving.metrics import Metrics

EXAMPLES = int(os.environ.get("PARGS_FUZZ", "120"))
TEXTS = st.one_of(
    st.text(max_size=30),
    st.sampled_from(["", "tiny", "tiny+pargs", "pargs", "kind", "\ud800", "\x00", "a" * 3000, "日本語🙂", "</s>", "0"]),
)
NUMBERS = st.one_of(
    st.integers(-3, 30), st.floats(-3, 3), st.sampled_from([2**31, 2**32, 2**63, 1e308, -1e308, 10**200, 0.0])
)
ODD = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, st.sampled_from([float("nan"), float("inf")]), TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(TEXTS, inner, max_size=3)),
    max_leaves=6,
)


def from_schema(schema, definitions):
    """Values of a JSON schema, within its limits and a little beyond."""
    if "$ref" in schema:
        return from_schema(definitions[schema["$ref"].rpartition("/")[2]], definitions)
    if "anyOf" in schema:
        return st.one_of(*(from_schema(each, definitions) for each in schema["anyOf"]))
    if "const" in schema or "enum" in schema:
        return st.sampled_from(schema.get("enum", [schema.get("const")]))
    match schema.get("type"):
        case "string":
            return TEXTS
        case "integer":
            low, high = schema.get("minimum", 0), schema.get("maximum", 30)
            return st.one_of(st.integers(low, min(high, low + 30)), st.sampled_from([low - 1, high + 1]))
        case "number":
            return st.floats(schema.get("minimum", -3), schema.get("maximum", 3), allow_nan=False)
        case "boolean":
            return st.booleans()
        case "null":
            return st.none()
        case "array":
            return st.lists(from_schema(schema["items"], definitions), max_size=4)
        case "object" if "properties" in schema:
            needed = set(schema.get("required", ()))
            parts = {name: from_schema(each, definitions) for name, each in schema["properties"].items()}
            return st.fixed_dictionaries(
                {name: part for name, part in parts.items() if name in needed},
                optional={name: part for name, part in parts.items() if name not in needed},
            )
        case "object":
            return st.dictionaries(TEXTS, from_schema(schema.get("additionalProperties", {}), definitions), max_size=3)
    return ODD


def bodies(kind, usual):
    """Requests of which most fields are usual, and a few are from the schema, odd, or of no schema at all."""
    schema = kind.model_json_schema()
    each = {name: from_schema(part, schema["$defs"]) for name, part in schema["properties"].items()}
    field = st.sampled_from(sorted(each))
    right = st.lists(field.flatmap(lambda name: st.tuples(st.just(name), each[name])), max_size=3)
    wrong = st.lists(st.tuples(st.one_of(field, TEXTS), ODD), max_size=2)
    whole = st.builds(lambda *parts: usual | dict(parts[0]) | dict(parts[1]), right, wrong)
    return st.one_of(whole, whole, whole, ODD).map(lambda body: (kind, body))


REQUESTS = st.one_of(
    bodies(Completion, {"model": "tiny", "prompt": "Hi", "max_tokens": 3}),
    bodies(Chat, {"model": "tiny+pargs", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}),
)


@pytest.fixture(scope="module")
def post(service, engine):
    app = make_app(service, engine, Metrics(), limits=Limits(50_000, 60), key=None)
    loop = asyncio.new_event_loop()
    client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test", timeout=60)

    def post(path, content):
        return loop.run_until_complete(client.post(f"/v1/{path}", content=content))

    yield post
    loop.run_until_complete(client.aclose())
    loop.close()


@seed(0)
@settings(
    max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None
)
@given(request=REQUESTS)
def test_no_request_gives_a_500(post, engine, request):
    kind, body = request
    reply = post("chat/completions" if kind is Chat else "completions", json.dumps(body))
    assert reply.status_code in (200, 400, 404, 413), (body, reply.text)
    if reply.status_code != 200:
        assert set(reply.json()["error"]) == {"message", "type", "param", "code"}
        assert len(reply.text) < 5000
    elif isinstance(body, dict) and body.get("stream"):
        assert reply.text.endswith("data: [DONE]\n\n")
    else:
        assert all(choice["finish_reason"] in ("stop", "length") for choice in reply.json()["choices"])
    assert engine.failure is None
