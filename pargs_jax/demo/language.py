"""What can be said in the demo task, and what it is worth: the sentences and the oracle.

A prompt is one customer's message, `Customer: Hi, this is Maria. My kettle arrived broken. What can I do?\\nAgent:`; an
answer is a row of whole sentences and begins with a space. Both are made of the templates below and of nothing else,
so the true reward of any text can be computed from the text alone.

The oracle adds these terms; `WEIGHTS` holds the numbers. The best answer earns 4.5 and an empty one -3.

| term          | weight | counted                                                                              |
|---------------|-------:|--------------------------------------------------------------------------------------|
| opening       |    1.0 | once: the first sentence is an apology or thanks                                      |
| product       |    1.0 | once: a sentence of help names the customer's product                                 |
| remedy        |    2.0 | once: the remedy for the customer's problem is offered                                |
| closing       |    0.5 | once: the last sentence is a kind closing                                             |
| rude          |   -1.5 | for each rude sentence, however kindly it begins                                      |
| wrong_remedy  |   -1.0 | for each remedy for another problem                                                   |
| wrong_product |   -1.0 | for each sentence that names another product; it earns nothing                        |
| wrong_name    |   -1.0 | for each sentence that names another customer; it earns nothing                       |
| off_topic     |  -0.75 | for each sentence of chatter                                                          |
| repeated      |   -1.0 | for each sentence said before, word for word; its other penalties count again         |
| unknown       |   -1.5 | for each sentence that is none of the task's                                          |
| unfinished    |   -1.5 | once: text follows the last full stop or question mark                                |
| length        |   -0.1 | for each word beyond 30                                                               |
| empty         |   -3.0 | once: there is no text                                                                |
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from pargs_jax.errors import InputError

# Short words, each a single token of the demo's tokenizer, so that a tiny model learns to copy them.
NAMES = (
    *("Ali", "Anna", "Ben", "Eva", "Ida", "Joe", "Kim", "Lena"),
    *("Leo", "Maria", "Max", "Mia", "Omar", "Rosa", "Sam", "Tom"),
)
PRODUCTS = (
    *("camera", "clock", "drill", "drone", "fan", "heater", "kettle", "lamp"),
    *("laptop", "mixer", "mower", "phone", "radio", "scale", "toaster", "watch"),
)

GREETINGS = ("Hi, this is {name}.", "Hello, I am {name}.", "{name} here.", "Hi, my name is {name}.")
COMPLAINTS = {
    "broken": ("My {product} arrived broken.", "My {product} came with a crack."),
    "late": ("My {product} never arrived.", "My {product} is two weeks late."),
    "color": ("My {product} came in the wrong color.", "My {product} is red, but I ordered blue."),
    "payment": ("I paid twice for my {product}.", "You charged me twice for my {product}."),
    "part": ("My {product} came without a cable.", "The cable of my {product} is missing."),
    "dead": ("My {product} does not turn on.", "My {product} stopped working."),
    "cancel": ("I want to cancel my {product} order.", "Please cancel my {product} order."),
    "return": ("I want to return my {product}.", "I want to send my {product} back."),
}
REQUESTS = ("What can I do?", "Can you help me?", "Please help.", "What now?")

REMEDIES = {
    "broken": ("I will send you a new {product} today.", "A new {product} is on its way to you."),
    "late": ("I will find your {product} parcel today.", "We will find your {product} parcel for you."),
    "color": ("I will swap your {product} for the right color.", "We will swap the color of your {product}."),
    "payment": ("I will refund the second {product} payment.", "You get the second {product} payment back."),
    "part": ("I will send you the missing {product} cable.", "The missing {product} cable is on its way."),
    "dead": ("I will have your {product} repaired for free.", "We will repair your {product} for free."),
    "cancel": ("I will cancel your {product} order today.", "Your {product} order is now cancelled."),
    "return": ("I will send you a {product} return label.", "You get a free {product} return label."),
}

Kind = Literal["opening", "help", "closing", "rude", "off_topic", "plain"]


@dataclass(frozen=True)
class Line:
    """One sentence an agent may say: its template, what the oracle takes it for, and the problem that it remedies."""

    template: str
    kind: Kind
    problem: str | None = None


def _lines(kind: Kind, *templates: str) -> tuple[Line, ...]:
    return tuple(Line(template, kind) for template in templates)


# Courteous, plain and rude lines share their beginnings on purpose: a prefix informs, and does not settle the matter.
COURTEOUS_OPENINGS = _lines(
    "opening", "Sorry to hear that, {name}.", "Thank you for writing, {name}.", "I am sorry about this, {name}."
)
PLAIN_OPENINGS = _lines("plain", "Hello and welcome, {name}.", "I am here now, {name}.", "I got your note, {name}.")
RUDE_OPENINGS = _lines(
    "rude",
    "Sorry to hear that, {name}, but it is your fault.",
    "Thank you for writing, {name}, but I do not care.",
    "I am tired of you, {name}.",
    "What do you want now, {name}?",
    "Not you again, {name}.",
)
CHATTY_OPENINGS = _lines(
    "off_topic", "Sorry to hear that, {name}, my cat is sad too.", "Thank you for writing, {name}, I like notes."
)

PRODUCT_LOOKUPS = _lines("help", "I looked up your {product} order.", "I see your {product} order here.")
PLAIN_LOOKUPS = _lines("plain", "I looked up your order.", "I see your order here.")
RUDE_LOOKUPS = _lines("rude", "I see you cannot use a {product}.", "Your {product} is not my problem.")

REMEDY_LINES = {
    problem: tuple(Line(template, "help", problem) for template in templates) for problem, templates in REMEDIES.items()
}
PLAIN_REMEDIES = _lines("plain", "We will see what we can do.", "I will ask about your order.")
REFUSALS = _lines("rude", "I will send you nothing, {name}.", "You can repair your {product} yourself.")

CHATTER = _lines(
    "off_topic",
    "It is sunny here today.",
    "My cat likes to eat fish.",
    "I had hot soup for lunch.",
    "My bus was late again today.",
    "I see birds on the roof.",
)

COURTEOUS_CLOSINGS = _lines("closing", "Have a nice day, {name}.", "Thank you for your patience.")
PLAIN_CLOSINGS = _lines("plain", "That is all for now.", "This note is now closed.")
RUDE_CLOSINGS = _lines(
    "rude", "Have a nice day somewhere else, {name}.", "Thank you for nothing.", "Do not write to us again."
)

ANSWER_LINES: tuple[Line, ...] = (
    *(*COURTEOUS_OPENINGS, *PLAIN_OPENINGS, *RUDE_OPENINGS, *CHATTY_OPENINGS),
    *(*PRODUCT_LOOKUPS, *PLAIN_LOOKUPS, *RUDE_LOOKUPS),
    *(line for lines in REMEDY_LINES.values() for line in lines),
    *(*PLAIN_REMEDIES, *REFUSALS, *CHATTER, *COURTEOUS_CLOSINGS, *PLAIN_CLOSINGS, *RUDE_CLOSINGS),
)

WEIGHTS = {
    "opening": 1.0,
    "product": 1.0,
    "remedy": 2.0,
    "closing": 0.5,
    "rude": -1.5,
    "wrong_remedy": -1.0,
    "wrong_product": -1.0,
    "wrong_name": -1.0,
    "off_topic": -0.75,
    "repeated": -1.0,
    "unknown": -1.5,
    "unfinished": -1.5,
    "length": -0.1,
    "empty": -3.0,
}
CONCISE_WORDS = 30


@dataclass(frozen=True)
class Request:
    """What a prompt asks for: who writes, about which product, with which problem (a key of `REMEDIES`)."""

    name: str
    product: str
    problem: str


def _regex(template: str) -> str:
    """The regular expression of a template, with groups `name` and `product` that match only the task's own words."""
    return (
        re.escape(template)
        .replace(r"\{name\}", f"(?P<name>{'|'.join(NAMES)})")
        .replace(r"\{product\}", f"(?P<product>{'|'.join(PRODUCTS)})")
    )


def _prompt_regex(complaints: Sequence[str]) -> str:
    # A group's name may occur once in an expression, so the placeholders go outside of the alternatives.
    greeting = "|".join(re.escape(g) for g in GREETINGS).replace(r"\{name\}", r"([A-Z][a-z]+)")
    complaint = "|".join(re.escape(c) for c in complaints).replace(r"\{product\}", r"([a-z]+)")
    request = "|".join(re.escape(r) for r in REQUESTS)
    return rf"Customer: (?:{greeting}) (?:{complaint}) (?:{request})\nAgent:"


_LINE_PATTERNS = tuple((re.compile(_regex(line.template)), line) for line in ANSWER_LINES)
_PROMPT_PATTERNS = {problem: re.compile(_prompt_regex(complaints)) for problem, complaints in COMPLAINTS.items()}
_SENTENCE = re.compile(r"[^.?!]*[.?!]")


def parse_prompt(prompt: str) -> Request:
    """Reads who asks about what out of a prompt of the demo task (surrounding white space is ignored).

    Raises:
        InputError: the text is not a prompt of the demo task, so that no true reward exists for its answers.
    """
    for problem, pattern in _PROMPT_PATTERNS.items():
        if match := pattern.fullmatch(prompt.strip()):
            name, product = (group for group in match.groups() if group)
            if name in NAMES and product in PRODUCTS:
                return Request(name, product, problem)
    raise InputError(
        f"not a prompt of the demo task: {prompt[:80]!r}; one looks like "
        "'Customer: Hi, this is Maria. My kettle arrived broken. What can I do?\\nAgent:'"
    )


def oracle_terms(prompt: str, answer: str) -> dict[str, float]:
    """The true reward of an answer, term by term.

    Args:
        prompt: a prompt of the demo task.
        answer: any text, also garbled, cut off or empty; white space around it and around its sentences is ignored.

    Returns:
        Every key of `WEIGHTS` with its weight times its count; the module's docstring says what is counted.

    Raises:
        InputError: `prompt` is not a prompt of the demo task.
    """
    request = parse_prompt(prompt)
    counts = dict.fromkeys(WEIGHTS, 0)
    sentences = [sentence.strip() for sentence in _SENTENCE.findall(answer)]
    unfinished = bool(_SENTENCE.sub("", answer).strip())
    for position, sentence in enumerate(sentences):
        counts["repeated"] += sentence in sentences[:position]
        is_last = position == len(sentences) - 1 and not unfinished
        _count_sentence(counts, sentence, request, is_first=position == 0, is_last=is_last)
    counts["unfinished"] = int(unfinished)
    counts["length"] = max(0, len(answer.split()) - CONCISE_WORDS)
    counts["empty"] = int(not answer.strip())
    return {term: weight * counts[term] for term, weight in WEIGHTS.items()}


def oracle(prompt: str, answer: str) -> float:
    """The true reward of an answer: the sum of `oracle_terms`, at most 4.5."""
    return sum(oracle_terms(prompt, answer).values())


@lru_cache(maxsize=16384)
def _recognise(sentence: str) -> tuple[Line, str | None, str | None] | None:
    """The line that a sentence is an instance of, with the name and the product in it; None if it is none of them."""
    for pattern, line in _LINE_PATTERNS:
        if match := pattern.fullmatch(sentence):
            named = match.groupdict()
            return line, named.get("name"), named.get("product")
    return None


def _count_sentence(counts: dict[str, int], sentence: str, request: Request, *, is_first: bool, is_last: bool) -> None:
    """Adds to `counts` what one sentence earns and costs. What earns is set, not added, so that it earns once."""
    recognised = _recognise(sentence)
    if recognised is None:
        counts["unknown"] += 1
        return
    line, name, product = recognised
    wrong_name = name not in (None, request.name)
    wrong_product = product not in (None, request.product)
    counts["wrong_name"] += wrong_name
    counts["wrong_product"] += wrong_product
    counts["rude"] += line.kind == "rude"
    counts["off_topic"] += line.kind == "off_topic"
    counts["wrong_remedy"] += line.problem not in (None, request.problem)
    if wrong_name or wrong_product:
        return
    if line.kind == "opening" and is_first:
        counts["opening"] = 1
    if line.kind == "closing" and is_last:
        counts["closing"] = 1
    if line.kind == "help":
        counts["product"] = 1
    if line.problem == request.problem:
        counts["remedy"] = 1
