"""The server's form is OpenAI's: its own client reads every reply, stream and error."""

import json
import math

import httpx
import openai
import pytest

from pargs_jax.errors import InputError
from pargs_jax.serving.service import Service
from pargs_jax.text.prompts import get_form

PROMPT = "What is your opinion of tea?"


def chunks(reply):
    """The chunks of a stream, checked for their form."""
    lines = [line for line in reply.text.split("\n\n") if line]
    assert lines.pop() == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def test_models_are_the_language_model_and_it_with_each_guided_method(served):
    names = [model.id for model in served.client.models.list()]
    assert names == ["tiny", "tiny+args", "tiny+args_stochastic", "tiny+pargs_greedy", "tiny+pargs", "tiny+cd"]
    assert served.client.models.retrieve("tiny+pargs").owned_by == "pargs_jax"
    with pytest.raises(openai.NotFoundError, match="'gpt-4' is not served"):
        served.client.models.retrieve("gpt-4")


def test_completions_have_usage_and_a_reproducible_seed(served):
    first = served.client.completions.create(model="tiny", prompt=PROMPT, max_tokens=9)
    seed = first.choices[0].pargs["seed"]
    again = served.client.completions.create(model="tiny", prompt=PROMPT, max_tokens=9, seed=seed)
    assert again.choices[0].text == first.choices[0].text
    assert first.usage.total_tokens == first.usage.prompt_tokens + first.usage.completion_tokens
    assert first.usage.prompt_tokens == len(served.service.session.tokenizer.encode_prompt(PROMPT))
    assert first.id.startswith("cmpl-") and first.object == "text_completion"


def test_several_prompts_and_samples_come_in_their_order(served):
    tokenizer = served.service.session.tokenizer
    texts = ["Hello", PROMPT]
    asked = {"model": "tiny", "n": 2, "seed": 5, "max_tokens": 12}
    together = served.client.completions.create(prompt=texts, **asked)
    by_tokens = served.client.completions.create(prompt=[tokenizer.encode_prompt(text) for text in texts], **asked)
    assert [choice.index for choice in together.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in by_tokens.choices] == [choice.text for choice in together.choices]
    alone = served.client.completions.create(prompt=PROMPT, extra_body={"id": "0/1"}, **asked)
    assert [choice.text for choice in alone.choices] == [choice.text for choice in together.choices[2:]]
    assert together.choices[0].text != together.choices[1].text


def test_chat_writes_turns_in_the_prompt_form(served):
    turns = [
        {"role": "system", "content": "Hm."},
        {"role": "user", "content": [{"type": "text", "text": "A"}]},
        {"role": "assistant", "content": "B"},
        {"role": "user", "content": "T"},
    ]
    text = "Hm.\n\nHuman: A\n\nAssistant: B\n\nHuman: T\n\nAssistant:"
    asked = {"model": "tiny+pargs", "seed": 3, "max_tokens": 15}
    chat = served.client.chat.completions.create(messages=turns, **asked)
    plain = served.client.completions.create(prompt=text, **asked)
    assert chat.choices[0].message.content == plain.choices[0].text
    assert chat.choices[0].message.role == "assistant" and chat.object == "chat.completion"


@pytest.mark.parametrize("model", ["tiny", "tiny+pargs"])
def test_a_stream_says_the_same_as_the_whole_reply(served, model):
    asked = {"model": model, "messages": [{"role": "user", "content": "Hi"}], "seed": 4, "n": 2, "logprobs": True}
    asked |= {"top_logprobs": 3}
    whole = served.client.chat.completions.create(**asked)
    parts = chunks(served.post("chat/completions", asked | {"stream": True, "stream_options": {"include_usage": True}}))
    assert parts[-1]["choices"] == [] and parts[-1]["usage"] == whole.usage.model_dump(exclude_none=True)
    assert [part["choices"][0]["delta"].get("role") for part in parts[:2]] == ["assistant", "assistant"]
    for choice in whole.choices:
        mine = [part["choices"][0] for part in parts[:-1] if part["choices"][0]["index"] == choice.index]
        assert "".join(part["delta"].get("content", "") for part in mine) == choice.message.content
        assert [part["finish_reason"] for part in mine][-1] == choice.finish_reason
        assert {part["finish_reason"] for part in mine[:-1]} == {None}
        noted = [note for part in mine if part["logprobs"] for note in part["logprobs"]["content"]]
        assert noted == [note.model_dump() for note in choice.logprobs.content]


@pytest.mark.parametrize("options", [{}, {"method": "pargs", "weight": [1.0, -0.5]}, {"top_p": 0.7}, {"k": 2}])
def test_log_probabilities_belong_to_their_tokens(served, options):
    """Each is that of the token after the tokens before it: asking for those again, one by one, says the same."""
    asked = {"model": "tiny", "prompt": PROMPT, "seed": 1, "logprobs": 20, "temperature": 1.7} | options
    choice = served.post("completions", asked | {"max_tokens": 6}).json()["choices"][0]
    noted = choice["logprobs"]
    assert "".join(noted["tokens"]) == choice["text"]
    assert noted["text_offset"] == [len("".join(noted["tokens"][:n])) for n in range(len(noted["tokens"]))]
    trace = served.post("completions", asked | {"max_tokens": 6, "return_trace": True}).json()["choices"][0]["pargs"][
        "trace"
    ]
    ids = [token["id"] for token in trace["tokens"]]
    for number in (0, 1, 3):
        if number >= len(noted["tokens"]):
            continue
        after = served.post("completions", asked | {"max_tokens": 1, "begin_with": ids[:number], "seed": 8}).json()
        best = after["choices"][0]["logprobs"]["top_logprobs"]
        known = noted["top_logprobs"][number]
        if best:
            assert sorted(known.values()) == pytest.approx(sorted(best[0].values()), abs=1e-3)
        total = sum(map(math.exp, known.values()))
        assert total <= 1 + 1e-4
        if options.get("k") or options.get("method"):
            assert total == pytest.approx(1, abs=1e-4)  # all candidates are among the alternatives
        assert (
            known.get(noted["tokens"][number], noted["token_logprobs"][number])
            >= noted["token_logprobs"][number] - 1e-6
        )


def test_an_answer_ends_before_a_stop_string_wherever_chunks_end(served):
    asked = {"model": "tiny+pargs", "prompt": PROMPT, "max_tokens": 24}
    for seed in range(4):
        full = served.post("completions", asked | {"seed": seed}).json()["choices"][0]["text"]
        for start, length in ((1, 2), (5, 7), (9, 3)):
            stop = full[start : start + length]
            if len(stop) < length:
                continue
            expected = full[: full.find(stop)]
            body = asked | {"seed": seed, "stop": [stop, "never in there"]}
            choice = served.post("completions", body | {"logprobs": 0}).json()["choices"][0]
            assert (choice["text"], choice["finish_reason"]) == (expected, "stop")
            assert "".join(choice["logprobs"]["tokens"]) == expected
            parts = chunks(served.post("completions", body | {"stream": True}))
            assert "".join(part["choices"][0]["text"] for part in parts) == expected


def test_bias_and_penalties_change_what_is_drawn(served):
    asked = {"model": "tiny+pargs", "prompt": PROMPT, "max_tokens": 8, "temperature": 0, "return_trace": True}
    tokens = served.service.session.tokenizer.encode_answer(" tea")

    def drawn(**options):
        reply = served.post("completions", asked | options).json()
        return [token["id"] for token in reply["choices"][0]["pargs"]["trace"]["tokens"]]

    assert set(drawn(logit_bias={str(tokens[0]): 100})) == {tokens[0]}
    first = drawn()[0]
    assert drawn(logit_bias={str(first): -100})[0] != first
    repeated = drawn(logit_bias={str(tokens[0]): 6.0, str(first): 6.0}, frequency_penalty=2.0, presence_penalty=2.0)
    assert len(set(repeated)) > 1


@pytest.mark.parametrize(
    ("path", "body", "param", "said"),
    [
        ("chat/completions", {"tools": []}, "tools", "'tools' is not supported"),
        ("chat/completions", {"response_format": {"type": "json_object"}}, "response_format", "not supported"),
        ("chat/completions", {"messages": [{"role": "user", "content": "", "name": "E"}]}, "messages.0.name", "not"),
        ("chat/completions", {"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role", "input should be"),
        ("chat/completions", {"messages": [{"role": "assistant", "content": "x"}]}, "messages", "must be the user's"),
        ("chat/completions", {"top_logprobs": 2}, "top_logprobs", "needs logprobs"),
        ("chat/completions", {"stream_options": {"include_usage": True}}, "stream_options", "needs stream"),
        ("chat/completions", {"messages": [{"role": "user", "content": "long " * 99}]}, "messages", "at most 40"),
        ("completions", {"prompt": [999999]}, "prompt", "outside of the model's vocabulary"),
        ("completions", {"prompt": "a\ud800b"}, None, "not characters"),
        ("completions", {"echo": True}, "echo", "not supported"),
        ("completions", {"max_tokens": 25}, "max_tokens", "at most 24"),
        ("completions", {"n": 9}, "n", "at most 8"),
        ("completions", {"temperature": float("nan")}, "temperature", "finite"),
        ("completions", {"seed": 2**32}, "seed", "less than"),
        ("completions", {"stop": ["", "a"]}, "stop.0", "at least 1"),
        ("completions", {"stop": list("abcde")}, "stop", "at most 4"),
        ("completions", {"logit_bias": {"-1": 1}}, "logit_bias", "not a token"),
        ("completions", {"weight": 2, "method": "top_k"}, "weight", "needs a guided method"),
        ("completions", {"method": "best_of_n"}, "method", "not served"),
        ("completions", {"method": "pargs", "k": 6}, "k", "at most 5"),
        ("completions", {"guide": "rude"}, "guide", "choose among kind, brief"),
        ("completions", {"guide": "kind", "weight": [1, 2]}, "weight", "2 weights for 1 guides"),
        ("completions", {"method": "greedy", "temperature": 1.0}, "temperature", "does not sample"),
        ("completions", {"method": "pargs", "preference": [1.0]}, "preference", "takes no preference"),
    ],
)  # fmt: skip
def test_what_cannot_be_honoured_is_refused_by_name(served, path, body, param, said):
    usual = {"messages": [{"role": "user", "content": "Hi"}]} if path.startswith("chat") else {"prompt": "Hi"}
    content = json.dumps({"model": "tiny", **usual, **body})
    reply = httpx.post(f"{served.url}/v1/{path}", content=content)
    assert reply.status_code == 400, reply.text
    error = reply.json()["error"]
    assert error["param"] == param and said in error["message"] and error["type"] == "invalid_request_error"


def test_bodies_that_are_not_requests_are_refused(served):
    for content in (b"", b"junk", b"[1]", b"\xff", b"[" * 100_000, b'{"model": 1' + b"1" * 5000 + b"}"):
        reply = httpx.post(f"{served.url}/v1/completions", content=content)
        assert reply.status_code == 400 and set(reply.json()["error"]) == {"message", "type", "param", "code"}
    assert httpx.post(f"{served.url}/v1/completions", content=b" " * 200_000).status_code == 413
    assert httpx.get(f"{served.url}/v1/completions").status_code == 405
    assert httpx.get(f"{served.url}/v2").json()["error"]["type"] == "not_found_error"


def test_one_guide_of_several_can_be_asked_for(served):
    asked = {"model": "tiny+pargs", "prompt": PROMPT, "seed": 2, "max_tokens": 12}
    named = served.post("completions", asked | {"guide": "brief", "weight": 1.5}).json()["choices"][0]
    weighted = served.post("completions", asked | {"weight": [0, 1.5]}).json()["choices"][0]
    assert named["text"] == weighted["text"]


def test_health_and_metrics(served):
    assert httpx.get(f"{served.url}/health").json() == {"status": "ok"}
    before = httpx.get(f"{served.url}/metrics").text
    assert 'pargs_requests_total{path="/health",status="200"}' in before and "pargs_step_seconds_bucket" in before


def test_lengths_that_are_not_given_follow_from_the_context(served):
    session = served.service.session
    usual = {"name": "tiny", "k": None, "max_prompt_tokens": None, "most_answers": 1}
    service = Service(session, "pargs", get_form("plain"), max_new_tokens=None, **usual)
    assert service.max_new_tokens == service.limits.max_new_tokens == session.context // 2
    assert service.max_prompt_tokens == session.context - service.max_new_tokens
    with pytest.raises(InputError, match="exceed the models' context of 64 tokens"):
        Service(session, "pargs", get_form("plain"), max_new_tokens=64, **usual)
