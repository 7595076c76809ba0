"""What can be said in the demo task, and what it is worth: the sentences and the oracle.

A prompt is one customer's message, `Customer: Hi, this is Maria. My kettle arrived broken. What can I do?\\nAgent:`. An
answer has five sentences, one for each part (opening, lookup, remedy, praise, closing), and begins with a space. Words
in square brackets stand for a choice: kind words, one plain word, or rude words.

The reward is dense, as sentiment is: nearly every word counts, and what counts is known at once. The oracle adds these
terms (`WEIGHTS` holds the numbers), and reads them from the text alone:

| term     | weight | counted                                                                                   |
|----------|-------:|-------------------------------------------------------------------------------------------|
| kind     |   +1.0 | for each kind word, where a choice of words stands                                          |
| rude     |   -1.0 | for each rude word there                                                                    |
| wrong    |   -1.0 | for each sentence that names another customer or another product                            |
| repeated |   -2.0 | for each sentence of a part that was there already, whose words count nothing               |
| unknown  |   -2.0 | for each sentence that is not one of the task's, or is not finished                         |
| missing  |   -1.0 | for each part that is not there                                                             |

An answer of five parts with kind words only earns 8, one with plain words only 0, and an empty one -5.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

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


@dataclass(frozen=True)
class Choice:
    """Words of which one is said; a model of these answers likes the plain word best."""

    kind: tuple[str, ...]
    plain: str
    rude: tuple[str, ...]

    @property
    def words(self) -> tuple[str, ...]:
        return (*self.kind, self.plain, *self.rude)


_KIND, _RUDE = ("kind", "lovely", "great"), ("nasty", "awful", "stupid")
CHOICES = {
    "feeling": Choice(("glad", "happy", "pleased"), "ready", ("sick", "tired", "annoyed")),
    "manner": Choice(("gladly", "kindly", "warmly"), "now", ("barely", "slowly", "rudely")),
    "note": Choice(_KIND, "new", _RUDE),
    "thing": Choice(_KIND, "blue", _RUDE),
    "person": Choice(_KIND, "usual", _RUDE),
    "team": Choice(_KIND, "small", _RUDE),
    "day": Choice(_KIND, "quiet", _RUDE),
}

# All templates of a part have as many choices, names and products, so that the exact optimum is easy to compute.
REMEDIES = {
    "broken": "We will [manner] send you a [thing] new {product}.",
    "late": "We will [manner] find your [thing] {product} parcel.",
    "color": "We will [manner] swap the color of your [thing] {product}.",
    "payment": "We will [manner] pay you back for the [thing] {product}.",
    "part": "We will [manner] send the cable of your [thing] {product}.",
    "dead": "We will [manner] repair your [thing] {product}.",
    "cancel": "We will [manner] cancel your [thing] {product} order.",
    "return": "We will [manner] take back your [thing] {product}.",
}
PARTS = {
    "opening": ("I am [feeling] to hear from you, {name}.", "I read your [note] note, {name}."),
    "lookup": (
        "I [manner] looked up your [thing] {product} order.",
        "I [manner] found the [thing] {product} that you bought.",
    ),
    "remedy": tuple(REMEDIES.values()),
    "praise": (
        "You are a [person] customer of our [team] team.",
        "Our [team] team thinks of you as a [person] guest.",
    ),
    "closing": ("Have a [day] day, {name}.", "I wish you a [day] week, {name}."),
}
WEIGHTS = {"kind": 1.0, "rude": -1.0, "wrong": -1.0, "repeated": -2.0, "unknown": -2.0, "missing": -1.0}


@dataclass(frozen=True)
class Request:
    """What a prompt asks for: who writes, about which product, with which problem (a key of `REMEDIES`)."""

    name: str
    product: str
    problem: str


@dataclass(frozen=True)
class _Sentence:
    """A sentence of the task: its part, how many of its words are kind or rude, and whom and what it names."""

    part: str
    kind: int
    rude: int
    name: str | None
    product: str | None


def fill(template: str, words: Mapping[str, str]) -> str:
    """A template with a word for each of its choices (`[feeling]`), for `{name}` and for `{product}`."""
    return re.sub(r"[\[{](\w+)[\]}]", lambda place: words[place[1]], template)


def choices_of(template: str) -> list[str]:
    """The names of a template's choices, in their order."""
    return re.findall(r"\[(\w+)\]", template)


def _regex(template: str) -> str:
    """The regular expression of a template, with a group for each of its choices, its name and its product."""
    known = {name: choice.words for name, choice in CHOICES.items()} | {"name": NAMES, "product": PRODUCTS}
    return re.sub(
        r"\\[\[{](\w+)\\[\]}]", lambda place: f"(?P<{place[1]}>{'|'.join(known[place[1]])})", re.escape(template)
    )


def _prompt_regex(complaints: Sequence[str]) -> str:
    # A group's name may occur once in an expression, so the placeholders go outside of the alternatives.
    greeting = "|".join(re.escape(g) for g in GREETINGS).replace(r"\{name\}", r"([A-Z][a-z]+)")
    complaint = "|".join(re.escape(c) for c in complaints).replace(r"\{product\}", r"([a-z]+)")
    request = "|".join(re.escape(r) for r in REQUESTS)
    return rf"Customer: (?:{greeting}) (?:{complaint}) (?:{request})\nAgent:"


_PATTERNS = [(part, re.compile(_regex(template))) for part, templates in PARTS.items() for template in templates]
_PROMPT_PATTERNS = {problem: re.compile(_prompt_regex(complaints)) for problem, complaints in COMPLAINTS.items()}
_SENTENCE = re.compile(r"[^.?!]*[.?!]")


def parse_prompt(prompt: str) -> Request:
    """Reads who asks about what out of a prompt of the demo task (surrounding white space is ignored).

    Raises InputError if the text is not a prompt of the demo task, so its answers have no true reward.
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

    Raises InputError if `prompt` is not a prompt of the demo task.
    """
    request = parse_prompt(prompt)
    counts = dict.fromkeys(WEIGHTS, 0)
    seen = set()
    for text in _SENTENCE.findall(answer):
        sentence = _recognise(text.strip())
        if sentence is None:
            counts["unknown"] += 1
        elif sentence.part in seen:
            counts["repeated"] += 1
        else:
            seen.add(sentence.part)
            counts["kind"] += sentence.kind
            counts["rude"] += sentence.rude
            is_right = sentence.name in (None, request.name) and sentence.product in (None, request.product)
            counts["wrong"] += not is_right
    counts["unknown"] += bool(_SENTENCE.sub("", answer).strip())
    counts["missing"] = len(PARTS) - len(seen)
    return {term: weight * counts[term] for term, weight in WEIGHTS.items()}


def oracle(prompt: str, answer: str) -> float:
    """The true reward of an answer: the sum of `oracle_terms`, at most 8."""
    return sum(oracle_terms(prompt, answer).values())


@lru_cache(maxsize=16384)
def _recognise(text: str) -> _Sentence | None:
    """What a sentence says; None if it is not one of the task's."""
    for part, pattern in _PATTERNS:
        if match := pattern.fullmatch(text):
            words = match.groupdict()
            name, product = words.pop("name", None), words.pop("product", None)
            kind = sum(word in CHOICES[choice].kind for choice, word in words.items())
            rude = sum(word in CHOICES[choice].rude for choice, word in words.items())
            return _Sentence(part, kind, rude, name, product)
    return None
