"""The playground in a browser: what it asks the server for, what it shows of answers, and that nothing leaves it."""

import contextlib
import io
import json
import subprocess

import httpx
import numpy as np
import pytest

from pargs_jax.serving.app import Limits, make_app
from pargs_jax.serving.playground import playground_page

PROMPT = "My lamp's broken."
NUMBERS = {"max_tokens": 12, "temperature": 1, "seed": 1, "k": 4}
HOSTILE = ["</script><script>window.ran = 1</script>", "<img src=x onerror='window.ran = 1'>", "\u202eevil"]


@pytest.fixture
def open_page(browser, served):
    """Opens the playground; its errors, and the bodies that it sent, are `errors` and `sent`."""
    contexts = []

    def open_page(address=served.url, *, width=1400, height=900, colours="light", **options):
        size = {"width": width, "height": height}
        contexts.append(browser.new_context(viewport=size, color_scheme=colours, **options))
        page = contexts[-1].new_page()
        page.set_default_timeout(20_000)
        page.errors, page.sent, page.asked = [], [], []
        page.on("pageerror", lambda error: page.errors.append(str(error)))
        page.on("console", lambda message: page.errors.append(message.text) if message.type == "error" else None)
        page.on("request", lambda request: page.asked.append(request.url))
        page.on("request", lambda request: page.sent.append(request.post_data_json) if request.post_data else None)
        page.goto(address)
        return page

    yield open_page
    for context in contexts:
        context.close()


def write(page, *, kind="Plain completion", **numbers):
    """Fills in the form, and asks for answers."""
    page.locator("#settings").evaluate("settings => { settings.open = true; }")
    page.get_by_label(kind).check()
    page.locator("#prompt").fill(PROMPT)
    for name, value in (NUMBERS | numbers).items():
        page.locator(f"#{name}").fill(str(value))
    page.get_by_role("button", name="Generate").click()
    ended(page)


def ended(page):
    """Waits for the ends of the answers."""
    page.locator("[data-row=guided]").first.wait_for()
    page.locator("#stop:disabled").wait_for()


def text_of(page, row):
    return page.locator(f"[data-row={row}]").evaluate_all("tokens => tokens.map((token) => token.textContent)")


def used(page, row):
    """What is said below an answer."""
    lines = page.locator(".answer").nth(["guided", "plain"].index(row)).locator("dl div").all_inner_texts()
    return dict(line.split("\n") for line in lines)


def answered(served, path="completions", **body):
    """The server's own answer, with its trace."""
    choice = served.post(path, body | {"return_trace": True}).json()["choices"][0]
    return choice, choice["pargs"]["trace"]["tokens"]


def number(x):
    return f"{x:.2f}".replace("-", "−")


@pytest.mark.parametrize("kind", ["Chat", "Plain completion"])
def test_the_guided_and_the_plain_answer_are_written_with_their_numbers(open_page, served, kind):
    page = open_page()
    write(page, kind=kind)
    asked = {"messages": [{"role": "user", "content": PROMPT}]} if kind == "Chat" else {"prompt": PROMPT}
    influence, ids = [], []
    for row, body, weight in zip(("guided", "plain"), page.sent, ([2, 2], [0, 0]), strict=True):
        own = {"model": "tiny+pargs", **asked, **NUMBERS, "weight": weight}
        added = {"stream": True, "stream_options": {"include_usage": True}, "stream_trace": True}
        assert body == own | added
        choice, tokens = answered(served, "chat/completions" if kind == "Chat" else "completions", **own)
        ids.append([token["id"] for token in tokens])
        influence += [token["log_q"] - token["log_p"] for token in tokens]
        shown = text_of(page, row)
        assert len(shown) == len(tokens) > 3
        for text, token in zip(shown, tokens, strict=True):
            if token["text"].isprintable() and token["text"].strip():
                assert text == token["text"].lstrip(" ")
        said = used(page, row)
        assert said["tokens"].startswith(f"{len(tokens)} after a prompt of ")
        assert said["KL"] == number(choice["pargs"]["kl"])
        assert said["log p"] == number(choice["pargs"]["log_probability"])
        rewards = [said["reward 1 (kind)"], said["reward 2 (brief)"]]
        assert rewards == [number(x) for x in choice["pargs"]["guide_reward"]]
        assert said["tokens read"] == f"{choice['pargs']['lm_tokens']}, by guides {choice['pargs']['rm_tokens']}"
        page.locator(f"[data-row={row}][data-index='1']").click()
        panel = page.locator("#inspector").inner_text()
        for value in (tokens[1]["log_p"], tokens[1]["log_q"], tokens[1]["entropy"], *tokens[1]["rewards"]):
            assert number(value) in panel
        assert page.locator("#inspector tbody tr").count() == len(tokens[1]["candidates"]) == 4
    shares = page.locator(".token").evaluate_all(
        "tokens => tokens.map((each) => each.style.getPropertyValue('--share'))"
    )
    influence = np.abs(influence)
    said = page.locator("#parting").inner_text()
    parting = [one == other for one, other in zip(*ids, strict=False)].index(False)
    assert said == f"The answers part at token {parting + 1}."
    most = np.sort(influence)[int(0.98 * (len(influence) - 1))]
    np.testing.assert_allclose(np.array(shares, float), np.minimum(influence / most, 1), atol=2e-3)
    assert page.errors == []


def test_an_answer_goes_on_with_another_token_and_back(open_page, served):
    page = open_page()
    write(page)
    before, plain = text_of(page, "guided"), text_of(page, "plain")
    _, tokens = answered(served, **{name: page.sent[0][name] for name in ("model", "prompt", "weight", *NUMBERS)})
    place = 2
    ends = served.service.session.tokenizer.eos_ids
    other = next(each for each in tokens[place]["candidates"] if each["id"] not in (tokens[place]["id"], *ends))
    page.locator(f"[data-row=guided][data-index='{place}']").click()
    page.locator(f"#inspector button[data-id='{other['id']}']").click()
    ended(page)
    begun = [*(token["id"] for token in tokens[:place]), other["id"]]
    body = page.sent[-1]
    assert body["begin_with"] == begun and body["max_tokens"] == NUMBERS["max_tokens"] - len(begun)
    assert body["prompt"] == PROMPT and len(page.sent) == 3
    own = {name: value for name, value in body.items() if not name.startswith("stream")}
    choice, more = answered(served, **own)
    shown = text_of(page, "guided")
    assert shown[:place] == before[:place] and len(shown) == place + 1 + len(more)
    assert used(page, "guided")["reward 1 (kind)"] == number(choice["pargs"]["guide_reward"][0])
    total = sum(token["kl"] for token in (*tokens[: place + 1], *more))
    assert used(page, "guided")["KL"] == number(total)
    assert page.locator(f"[data-row=guided][data-index='{place}']").get_attribute("aria-selected") == "true"
    assert "You chose this token" in page.locator("#inspector").inner_text()
    assert text_of(page, "plain") == plain
    page.get_by_role("button", name="Back").click()
    assert text_of(page, "guided") == before
    assert page.get_by_role("button", name="Back").count() == 0 and page.errors == []


def test_keys_alone_do_it_all(open_page):
    page = open_page()
    keys = page.keyboard
    assert page.evaluate("document.activeElement.id") == "prompt"
    keys.type("Hello")
    for _ in range(3):  # behind Generate and the summary of the settings, Stop is off
        keys.press("Tab")
    assert page.evaluate("document.activeElement.id") == "method"
    keys.press("Tab")
    keys.press("ArrowRight")
    assert page.locator("#weight-0").input_value() == "2.1"
    page.locator("#seed").press("Control+Enter")
    ended(page)
    assert page.sent[0]["weight"] == [2.1, 2] and page.sent[0]["messages"][0]["content"] == "Hello"
    page.get_by_label("of each").focus()
    keys.press("Tab")
    keys.press("ArrowRight")
    keys.press("ArrowRight")
    focused = "[...document.querySelectorAll('[aria-selected=true]')].map(({dataset}) => [dataset.row, +dataset.index])"
    assert page.evaluate(focused) == [["guided", 2]]
    keys.press("Enter")
    assert page.evaluate("document.activeElement.closest('aside')?.id") == "inspector"
    keys.press("Escape")
    assert page.evaluate("document.activeElement.dataset.index") == "2"
    keys.press("Enter")
    keys.press("Tab")
    keys.press("Enter")
    ended(page)
    assert page.locator(".picked").get_attribute("data-index") == "2"
    assert page.evaluate(focused) == [["guided", 2]]
    page.locator(".picked").press("Escape")
    assert page.evaluate(focused) == [] and page.errors == []


def test_methods_set_the_numbers_that_they_have(open_page):
    page = open_page()
    offered = page.locator("#method option").all_inner_texts()
    assert {"pargs", "args", "pargs_greedy", "greedy", "top_p"} <= set(offered)
    page.locator("#method").select_option("pargs_greedy")
    assert page.locator("#weight-0").input_value() == "1" and page.locator("#temperature").is_disabled()
    page.locator("#method").select_option("top_p")
    assert page.locator("#weight-0").is_disabled() and page.locator("#k").is_disabled()
    assert page.locator("#top_p").input_value() == "0.95"
    page.locator("#stops").fill("one\ntwo")
    page.locator("#prompt").fill(PROMPT)
    page.get_by_role("button", name="Generate").click()
    ended(page)
    assert page.locator(".answer:visible").count() == 1 and len(page.sent) == 1
    body = page.sent[0]
    assert (body["model"], body["method"], body["top_p"], body["stop"]) == ("tiny", "top_p", 0.95, ["one", "two"])
    assert not {"weight", "k", "gate_entropy"} & body.keys() and page.errors == []


def test_errors_are_one_line(open_page, served):
    page = open_page()
    error = page.get_by_role("alert")
    page.get_by_label("Plain completion").check()
    page.locator("#prompt").fill("word " * 100)
    page.get_by_role("button", name="Generate").click()
    page.locator("#error:not(:empty)").wait_for()
    refused = served.post("completions", {"model": "tiny", "prompt": "word " * 100, "max_tokens": 24}).json()["error"][
        "message"
    ]
    assert error.inner_text() == f"{refused[0].upper()}{refused[1:]}."
    answers = iter(
        [
            {"status": 200, "body": 'data: {"error": {"message": "took more than 60 seconds"}}\n\n'},
            {"status": 200, "body": ""},
            {"status": 502, "body": "<html>"},
        ]
    )
    page.locator("#beside").uncheck()
    page.route("**/v1/**", lambda route: route.fulfill(**next(answers)))
    for words in ("Took more than 60 seconds.", "The server ended the answer too early.", "The server answered 502."):
        page.get_by_role("button", name="Generate").click()
        page.locator("#error", has_text=words).wait_for()
        assert "Not finished." in page.locator(".state").first.inner_text()
    page.unroute("**/v1/**")
    page.route("**/v1/**", lambda route: route.abort())
    page.get_by_role("button", name="Generate").click()
    page.locator("#error", has_text="The server cannot be reached.").wait_for()


def test_stopping_ends_the_requests(open_page):
    page = open_page()
    page.route("**/v1/**", lambda route: None)  # never answered
    failed = []
    page.on("requestfailed", lambda request: failed.append(request.failure))
    page.locator("#prompt").fill(PROMPT)
    page.get_by_role("button", name="Generate").click()
    assert page.locator(".state:visible").all_inner_texts() == ["Waiting …", "Waiting …"]
    page.get_by_role("button", name="Stop").click()
    page.locator(".state", has_text="Stopped.").first.wait_for()
    assert page.locator(".state").all_inner_texts() == ["Stopped.", "Stopped."]
    assert failed == ["net::ERR_ABORTED"] * 2 and page.evaluate("document.activeElement.id") == "generate"
    assert page.get_by_role("alert").inner_text() == ""


def test_the_same_request_as_curl_and_as_python(open_page, served):
    page = open_page()
    for kind in ("Chat", "Plain completion"):
        write(page, kind=kind, gate_entropy=0.5)
        body = {name: value for name, value in page.sent[-2].items() if not name.startswith("stream")}
        path = "chat/completions" if kind == "Chat" else "completions"
        reply = served.post(path, body).json()["choices"][0]
        expected = reply["message"]["content"] if kind == "Chat" else reply["text"]
        curl, python = (page.locator(f"#{name}").text_content() for name in ("curl", "python"))
        ran = subprocess.run(["sh", "-c", f"{curl} -s"], capture_output=True, text=True, timeout=60)
        assert json.loads(ran.stdout)["choices"][0] == reply
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(python, {})
        assert printed.getvalue() == f"{expected}\n"


def test_with_a_key_the_browser_asks_for_it(open_page, listening, served):
    app = make_app(served.service, served.engine, served.metrics, limits=Limits(100_000, 60), key="secret")
    with listening(app) as url:
        assert httpx.get(url).status_code == 401
        page = open_page(url, http_credentials={"username": "me", "password": "secret"})
        write(page)
        assert len(text_of(page, "guided")) > 3 and page.errors == []


def test_hostile_texts_stay_texts_and_nothing_else_is_asked_for(open_page, served):
    page = open_page()
    policy = httpx.get(served.url).headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "connect-src 'self'" in policy
    token = {"id": 7, "log_p": -1, "log_q": -1, "rewards": [0, 0], "entropy": 1, "kl": 0}
    rows = [token | {"text": text, "candidates": [token | {"text": text}]} for text in HOSTILE]
    choice = {"index": 0, "text": "".join(HOSTILE), "finish_reason": "stop"}
    said = {"tokens": rows, "lm_tokens": 1, "rm_tokens": 1}
    chunk = json.dumps({"choices": [choice | {"pargs": said}]})
    page.route("**/v1/**", lambda route: route.fulfill(status=200, body=f"data: {chunk}\n\ndata: [DONE]\n\n"))
    write(page)
    assert text_of(page, "guided") == [*HOSTILE[:2], "\\u202eevil"]
    page.locator("[data-row=guided]").first.click()
    assert page.locator("#inspector .name").inner_text() == HOSTILE[0].replace(" ", "␣")
    assert page.evaluate("window.ran") is None and page.locator("img").count() == 0 and page.errors == []
    assert {url.removeprefix(served.url) for url in page.asked} == {"/", "/v1/completions"}
    page.evaluate("document.body.append(Object.assign(new Image(), { src: 'http://127.0.0.1:9/x.png' }))")
    page.wait_for_timeout(100)
    assert "Content Security Policy" in page.errors[0]


def test_names_of_models_are_only_data(served, monkeypatch):
    monkeypatch.setattr(served.service, "guides", ["</script><script>", "<!--"])
    page = playground_page(served.service)
    assert page.html.count("<script") == 2 and "<!--" not in page.html
    assert playground_page(served.service).policy == page.policy


@pytest.mark.parametrize(
    ("width", "colours"), [(360, "light"), (360, "dark"), (1000, "dark"), (1400, "light"), (1400, "dark")]
)
def test_it_fits_is_readable_and_does_not_jump(open_page, contrasts_of, width, colours):
    page = open_page(width=width, height=800, colours=colours)
    page.locator("#settings").evaluate("settings => { settings.open = true; }")
    page.get_by_label("Plain completion").check()
    places = "['ask', 'view', 'texts'].map((id) => document.getElementById(id).getBoundingClientRect().top + scrollY)"
    before = page.evaluate(places)
    write(page)
    assert page.evaluate(places) == before
    columns = [page.locator(f"[data-row={row}][data-index='0']") for row in ("guided", "plain")]
    columns[0].click()
    boxes = [column.bounding_box() for column in columns]
    assert (boxes[0]["y"] == boxes[1]["y"]) == (width > 360), "side by side where there is room"
    assert page.evaluate("document.documentElement.scrollWidth") == width
    panel = page.locator("#inspector").bounding_box()
    assert panel["x"] >= 0 and panel["x"] + panel["width"] <= width and panel["y"] + panel["height"] <= 801
    assert boxes[0]["y"] + boxes[0]["height"] <= panel["y"] or width == 1400, "the panel does not hide the token"
    for measure in ("log q − log p", "entropy"):
        page.get_by_label(measure, exact=True).check()
        contrasts = contrasts_of(page)
        assert min(contrasts) >= 4.5 and len(contrasts) > 60
    page.locator(".text").first.evaluate("box => box.classList.add('writing')")
    for motion, count in (("no-preference", 1), ("reduce", 0)):
        page.emulate_media(reduced_motion=motion)
        assert page.evaluate("document.getAnimations().length") == count
    assert page.errors == []
