"""The entries of a trace in the chunks of a stream."""

import json

import pytest

BODY = {"model": "tiny+pargs", "prompt": "My lamp broke.", "max_tokens": 24, "k": 4, "weight": [2.0, 0.5]}


def chunks_of(reply):
    assert reply.status_code == 200, reply.text
    events = [line.removeprefix("data: ") for line in reply.text.split("\n\n") if line]
    assert events.pop() == "[DONE]"
    return [json.loads(event) for event in events]


def begins_late(text):
    """A text that ends an answer, of two characters in the middle of it."""
    return text[len(text) // 2 :][:2]


@pytest.mark.parametrize("stops", [False, True])
def test_chunks_have_the_tokens_of_their_texts_as_the_trace_has_them(served, stops):
    for seed in range(3):
        body = BODY | {"seed": seed}
        if stops:
            body["stop"] = begins_late(served.post("completions", body).json()["choices"][0]["text"])
        whole = served.post("completions", body | {"return_trace": True}).json()["choices"][0]
        chunks = chunks_of(served.post("completions", body | {"stream": True, "stream_trace": True}))
        tokens = [token for chunk in chunks for token in chunk["choices"][0]["pargs"]["tokens"]]
        assert tokens == whole["pargs"]["trace"]["tokens"]
        assert "".join(token["text"] for token in tokens) == whole["text"]
        for chunk in chunks[:-1]:
            choice = chunk["choices"][0]
            given = "".join(token["text"] for token in choice["pargs"]["tokens"])
            # A text that may become one that ends the answer is held back, and so are all tokens with parts of it.
            assert stops or given == choice["text"]


def test_each_of_several_answers_has_its_tokens(served):
    body = BODY | {"n": 3, "seed": 1, "stream": True, "stream_trace": True, "logprobs": 2}
    texts, tokens = [""] * 3, [[] for _ in range(3)]
    for chunk in chunks_of(served.post("completions", body)):
        choice = chunk["choices"][0]
        texts[choice["index"]] += choice["text"]
        tokens[choice["index"]] += choice["pargs"]["tokens"]
    assert ["".join(token["text"] for token in each) for each in tokens] == texts and len(set(texts)) > 1


def test_it_needs_a_stream(served):
    error = served.post("completions", BODY | {"stream_trace": True}).json()["error"]
    assert (error["param"], error["message"]) == ("stream_trace", "stream_trace: needs stream: true")
