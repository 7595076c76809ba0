"""The page that explains an answer, in a browser: what it shows, what keys and pointer do, that nothing leaves it."""

import functools
import http.server
import re
import threading
import time

import numpy as np
import pytest

from pargs_jax.evaluation.explanation import explanation_page

STORY = [" The", " dog", " was", " very", " happy", ".", "\n", "It", " sm", "iled", "."]
OTHER = [" The", " dog", " was", " sad", "."]
HOSTILE = [
    "</script><script>window.ran = 1</script>",
    "<img src=x onerror='window.ran = 1'>",
    "<!--<script>",
    "{{script}}",
    "\u202eevil",
    "\x00\x1b[31m",
]
SENDING = "<img src='http://127.0.0.1:9/x.png'>"


@pytest.fixture
def open_page(browser, tmp_path):
    """Opens a page from a file; what it asks for over the network and its errors are `requests` and `errors`."""
    contexts = []

    def open_page(content, *, width=1400, height=900, colours="light", address=None):
        contexts.append(browser.new_context(viewport={"width": width, "height": height}, color_scheme=colours))
        page = contexts[-1].new_page()
        page.requests, page.errors = [], []
        page.on("request", lambda request: page.requests.append(request.url))
        page.on("pageerror", lambda error: page.errors.append(str(error)))
        page.on("console", lambda message: page.errors.append(message.text) if message.type == "error" else None)
        file = tmp_path / "page.html"
        file.write_text(content)
        page.goto(address or file.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()


@pytest.fixture
def story(make_trace):
    """A guided answer, and the unguided one, which begins with the same three tokens."""
    guided = make_trace(STORY, drawn=[0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3])
    unguided = make_trace(OTHER, weights=(0.0,), drawn=[0, 1, 2, 0, 0, 0])
    return guided, unguided


def candidates_of(page):
    """The table of candidates as it is read: its rows of words."""
    return [row.split("\t") for row in page.locator("#inspector tbody").inner_text().split("\n")]


def selected(page):
    return page.evaluate(
        "[...document.querySelectorAll('[aria-selected=true]')].map(({dataset}) => [dataset.row, +dataset.index])"
    )


def number(x):
    return f"{x:.2f}".replace("-", "−")


def changed_places(trace):
    """Where the likeliest candidate before guidance is not the likeliest after it."""
    numbers = np.array([[(each.log_p, each.log_q) for each in token.candidates] for token in trace.tokens])
    return np.flatnonzero(numbers[..., 0].argmax(axis=1) != numbers[..., 1].argmax(axis=1)).tolist()


def test_hover_shows_a_token_and_its_candidates(open_page, story):
    page = open_page(explanation_page([story[0]], [story[1]]))
    page.locator("[data-row=guided][data-index='4']").hover()
    token = story[0].tokens[4]
    shown = page.locator("#inspector").inner_text()
    assert "Token 5 of 12, guided, id 410" in shown and "␣happy" in shown
    for value in (token.log_p, token.log_q, token.entropy, token.kl, *token.rewards):
        assert number(value) in shown
    rows = candidates_of(page)
    assert [row[0] for row in rows] == ["␣happy drawn", "␣other1", "␣other2", "␣other3"]
    for row, candidate in zip(rows, token.candidates, strict=True):
        assert row[3:] == [number(x) for x in (candidate.log_p, candidate.log_q, *candidate.rewards)]
    assert page.errors == []


def test_keys_move_from_token_to_token(open_page, story):
    trace = story[0]
    page = open_page(explanation_page([trace]))
    page.locator("#unit").focus()
    page.keyboard.press("Tab")
    assert selected(page) == [["guided", 0]]
    heading = page.locator("#inspector h2")
    for key, index in (("ArrowRight", 1), ("ArrowRight", 2), ("ArrowLeft", 1), ("End", 11), ("ArrowRight", 11)):
        page.keyboard.press(key)
        assert selected(page) == [["guided", index]] and heading.inner_text().startswith(f"Token {index + 1} of 12")
        assert len(candidates_of(page)) == 4
    page.keyboard.press("Home")
    page.keyboard.press("ArrowDown")
    ((_, below),) = selected(page)
    assert below >= 7, "the first line ends with the seventh token"
    page.keyboard.press("ArrowUp")
    assert selected(page) == [["guided", 0]]
    places = [0] if 0 in changed_places(trace) else []
    for place in [*changed_places(trace)[len(places) :], changed_places(trace)[-1]]:
        page.keyboard.press("n")
        assert selected(page) == [["guided", place]]
    page.keyboard.press("p")
    assert selected(page) == [["guided", changed_places(trace)[-2]]]
    page.keyboard.press("Escape")
    assert selected(page) == [] and page.errors == []


def test_changes_of_the_likeliest_token_are_marked_and_listed(open_page, story):
    page = open_page(explanation_page([story[0]], [story[1]]))
    places = changed_places(story[0])
    assert 1 < len(places) < len(story[0].tokens)
    marked = page.evaluate("[...document.querySelectorAll('.token.changed')].map(({dataset}) => +dataset.index)")
    assert marked == places
    assert f"{len(places)} of 12 places" in page.locator("#changes").inner_text()
    buttons = page.locator("#places button")
    assert buttons.count() == len(places)
    buttons.nth(1).click()
    assert selected(page) == [["guided", places[1]]]
    page.get_by_label("Order of the list").select_option("largest KL first")
    largest = max(places, key=lambda place: story[0].tokens[place].kl)
    assert buttons.first.inner_text().split("\n")[1].startswith(f"token {largest + 1}, KL")


def test_colours_say_the_measure(open_page, story):
    trace = story[0]
    page = open_page(explanation_page([trace]))

    def colours():
        return page.evaluate(
            "[...document.querySelectorAll('.token')].map((span) => [+span.style.getPropertyValue('--share'),"
            " span.classList.contains('up'), span.classList.contains('down')])"
        )

    influence = np.array([token.log_q - token.log_p for token in trace.tokens])
    shown = colours()
    assert [(up, down) for _, up, down in shown] == [(x > 0, x < 0) for x in influence]
    most = np.sort(np.abs(influence))[int(0.98 * (len(influence) - 1))]
    expected = np.minimum(np.abs(influence) / most, 1)
    np.testing.assert_allclose([share for share, _, _ in shown], expected, atol=2e-3)
    page.get_by_label("reward", exact=True).check()
    rewards = np.array([token.rewards[0] for token in trace.tokens])
    expected = (rewards - rewards.min()) / np.ptp(rewards)
    np.testing.assert_allclose([share for share, _, _ in colours()], expected, atol=2e-3)
    page.get_by_label("KL", exact=True).check()
    page.get_by_label("of each").select_option("word")
    shares = [share for share, _, _ in colours()]
    kls = [token.kl for token in trace.tokens]
    # " sm" and "iled" are one word, whose KL is the sum of theirs.
    assert shares[8] == shares[9] and shares[8] / shares[2] == pytest.approx((kls[8] + kls[9]) / kls[2], rel=0.02)
    page.get_by_label("of each").select_option("sentence")
    shares = [share for share, _, _ in colours()]
    assert len(set(shares[:6])) == 1 and len(set(shares[7:11])) == 1 and shares[0] != shares[7]


def test_the_unguided_answer_is_aligned_where_they_part(open_page, story):
    page = open_page(explanation_page([story[0]], [story[1]]))
    boxes = page.get_by_role("listbox")
    assert [boxes.nth(i).get_attribute("aria-label") for i in range(boxes.count())] == [
        "Both answers, their first 3 tokens",
        "Guided, from token 4",
        "Unguided, from token 4",
    ]
    assert boxes.nth(0).inner_text() == "The dog was" and boxes.nth(2).inner_text() == "sad.⟨end⟩"
    guided, unguided = (
        page.locator(f"[data-row={row}][data-index='3']").bounding_box() for row in ("guided", "unguided")
    )
    assert guided["y"] == unguided["y"] and guided["x"] < unguided["x"]
    page.locator("[data-row=guided][data-index='3']").hover()
    assert "Without guidance: “sad” was drawn here" in page.locator("#inspector").inner_text()
    ends = [number(trace.log_probability) for trace in story]
    image = page.get_by_role("img", name="log p of the answer so far")
    assert f"Guided ends at {ends[0]}, Unguided ends at {ends[1]}" in image.get_attribute("aria-label")


def test_a_list_of_answers_to_pick_from_and_traces_that_say_less(open_page, make_trace):
    traces = [
        make_trace(STORY),
        make_trace(OTHER, id="b", keeps_candidates=False),
        make_trace(OTHER, id="c", weights=(), method="top_k", reward_models=()),
        make_trace(OTHER, id="d", weights=(1.0, 0.5), adds_up=True),
        make_trace([], id="e"),
    ]
    page = open_page(explanation_page(traces, [traces[0]]))
    answers = page.get_by_role("navigation").get_by_role("button")
    assert answers.count() == 5 and "Both answers are the same." in page.locator("#texts").inner_text()
    said = {
        1: ("The trace has no candidates, so it does not say which token was likeliest", 3),
        2: ("The tokens of this answer were not guided.", 2),
        3: ("places", 4),
        4: ("places", 3),
    }
    for index, (words, charts) in said.items():
        answers.nth(index).click()
        assert answers.nth(index).get_attribute("aria-current") == "true"
        assert words in page.locator("#changes").inner_text()
        assert page.locator("#curves figure").count() == charts
        page.locator(".token").last.click()
        assert "⟨end⟩" in page.locator("#inspector .name").inner_text()
    answers.nth(1).click()
    page.locator(".token").first.hover()
    assert "The trace has no candidates of this token" in page.locator("#inspector").inner_text()
    answers.nth(3).click()
    sums = [number(reward) for reward in traces[3].guide_rewards]
    captions = page.locator("figcaption").all_inner_texts()
    assert "summed" in captions[2] and sums[0] in captions[2] and sums[1] in captions[3]
    assert page.errors == []


def test_two_thousand_tokens_answer_at_once(open_page, make_trace):
    texts = [f" word{i % 97}" + (".\n" if i % 23 == 22 else "") for i in range(2000)]
    content = explanation_page([make_trace(texts, k=10)], [make_trace(texts, k=10, weights=(0.0,), seed=1)])
    began = time.perf_counter()
    page = open_page(content)
    assert page.locator("[data-row=guided]").count() == 2001
    opened = time.perf_counter() - began
    page.locator("[data-row=guided][data-index='1000']").click()
    began = time.perf_counter()
    for key in ("ArrowRight", "ArrowDown", "n", "ArrowUp", "ArrowLeft") * 10:
        page.keyboard.press(key)
    for measure in ("entropy", "KL", "reward"):
        page.get_by_label(measure, exact=True).check()
    page.get_by_label("of each").select_option("sentence")
    used = time.perf_counter() - began
    assert page.errors == [] and len(selected(page)) == 1
    # A few seconds each; the bounds are for a machine that does other things too.
    assert opened < 20 and used < 20


@pytest.mark.parametrize("has_policy", [True, False])
def test_hostile_texts_are_shown_as_text(open_page, make_trace, has_policy):
    """Also without the content policy, which would block an injected script."""
    hostile = {
        "prompt": HOSTILE[0],
        "lm": HOSTILE[1],
        "method": HOSTILE[0],
        "reward_models": (HOSTILE[1],),
        "id": HOSTILE[0],
    }
    content = explanation_page([make_trace(HOSTILE, **hostile)], [make_trace(HOSTILE[1:], **hostile)])
    if not has_policy:
        content = re.sub(r"<meta http-equiv=.*>\n", "", content)
    page = open_page(content)
    for index in range(len(HOSTILE)):
        page.locator(f"[data-row=guided][data-index='{index}']").click()
    shown = page.locator("[data-row=guided]").all_inner_texts()
    assert shown[:4] == HOSTILE[:4]
    # What is invisible or turns the text around is shown by its number.
    assert shown[4:6] == ["\\u202eevil", "\\u0000\\u001b[31m"]
    assert page.locator("#prompt").inner_text() == HOSTILE[0]
    assert page.evaluate("window.ran") is None and page.locator("img").count() == 0
    assert page.errors == [] and len(page.requests) == 1


def test_nothing_leaves_the_page(open_page, story, tmp_path):
    content = explanation_page([story[0]], [story[1]])
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    )
    asked = []
    server.RequestHandlerClass.func.log_message = lambda handler, *words: asked.append(handler.path)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        page = open_page(content, address=f"http://127.0.0.1:{server.server_port}/page.html")
        page.locator(".token").first.click()
        page.wait_for_timeout(300)
        assert asked == ["/page.html"] and len(page.requests) == 1 and page.errors == []
        # The check sees what is sent: an image is asked for without the policy, and stopped by it.
        sending = content.replace("<main>", "<main>" + SENDING + "<script>window.ran = 1</script>")
        page = open_page(sending)
        assert page.evaluate("window.ran") is None and "Content Security Policy" in page.errors[0]
        page = open_page(re.sub(r"<meta http-equiv=.*>\n", "", sending))
        assert page.evaluate("window.ran") == 1 and len(page.requests) == 2
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("colours", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1000, 1400])
def test_it_fits_and_is_readable(open_page, contrasts_of, story, width, colours):
    page = open_page(explanation_page([story[0]], [story[1]]), width=width, height=800, colours=colours)
    columns = [page.locator(f"[data-row={row}][data-index='3']") for row in ("guided", "unguided")]
    columns[0].click()
    boxes = [column.bounding_box() for column in columns]
    assert (boxes[0]["y"] == boxes[1]["y"]) == (width > 360), "side by side where there is room"
    assert page.evaluate("document.documentElement.scrollWidth") == width
    panel = page.locator("#inspector").bounding_box()
    assert panel["x"] >= 0 and panel["x"] + panel["width"] <= width and panel["y"] + panel["height"] <= 801
    assert boxes[0]["y"] + boxes[0]["height"] <= panel["y"] or width > 360, "the panel does not hide the token"
    for measure in ("log q − log p", "entropy"):
        page.get_by_label(measure, exact=True).check()
        assert "gradient" in page.evaluate("getComputedStyle(document.querySelector('#legend i')).backgroundImage")
        contrasts = contrasts_of(page)
        assert min(contrasts) >= 4.5 and len(contrasts) > 30
