"""A language model behind an OpenAI-compatible endpoint that says which of two answers is better.

Every pair is asked about in both orders (Zheng et al., 2023, arXiv:2306.05685): a model that prefers whatever stands
first is then found out, and such a flip counts as a tie. A reply is kept on disk as soon as it is there, so that a
second run asks only for what is missing.
"""

import hashlib
import json
import os
import re
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pargs_jax.durable_files import append_all, opened_to_append, write_errors_named_after
from pargs_jax.errors import InputError, first_line
from pargs_jax.evaluation.answers import System
from pargs_jax.evaluation.config import EndpointConfig
from pargs_jax.json_text import parse_json

Verdict = Literal["A", "B", "tie", "unparsable"]
GIVE_UP_AFTER = 5
"""So many requests that fail one after the other, with all their retries, end the asking."""

INSTRUCTION = """You compare two answers to the same prompt. Judge which one serves the person who wrote the prompt \
better: more helpful, correct, relevant and harmless. Longer is not better, and neither is coming first."""
_FORM = """Give one or two sentences of reasons, then your verdict on a line of its own: [[A]] if answer A is better, \
[[B]] if answer B is better, [[C]] if they are equally good."""
_VERDICT = re.compile(r"\[\[\s*([ABC])\s*\]\]")


class Comparison(NamedTuple):
    """What the two orders said of one pair of answers.

    Attributes:
        score: 1 if the system's answer is better than the baseline's, 0 if worse, 1/2 for a tie and for a flip; None
            where a reply is missing or unparsable.
        first: the verdict with the system's answer as A; None if the endpoint gave none.
        second: the verdict with the baseline's answer as A.
    """

    score: float | None
    first: Verdict | None
    second: Verdict | None

    @property
    def is_flip(self) -> bool:
        """Whether both orders prefer the same place, and so different answers."""
        return self.first == self.second and self.first in ("A", "B")

    @property
    def is_unparsable(self) -> bool:
        return "unparsable" in (self.first, self.second)

    @property
    def is_missing(self) -> bool:
        return None in (self.first, self.second)


class PairwiseJudge(AbstractContextManager):
    """Asks an endpoint about pairs of answers."""

    def __init__(self, config: EndpointConfig, cache: Path, post: "Callable[..., str] | None" = None) -> None:
        """Opens the file of replies.

        Args:
            config: the endpoint, with `url` and `model`.
            cache: JSONL file of the replies so far; made if it is not there.
            post: sends one request, as `OpenAIRequests` does.

        Raises InputError if the file cannot be used, or the client library is not installed.
        """
        self.name = config.model
        self._config = config
        self._instruction = INSTRUCTION
        if config.instruction is not None:
            try:
                self._instruction = Path(config.instruction).read_text(encoding="utf-8").strip()
            except (OSError, UnicodeDecodeError) as error:
                raise InputError(f"endpoint.instruction {config.instruction}: cannot be read ({error})") from error
        self._post = OpenAIRequests(config) if post is None else post
        self._replies = Replies(cache)
        self._lock = threading.Lock()
        self._failed_in_a_row = 0
        self.failure: str | None = None
        """Why asking was given up, if it was; else the last request that failed."""
        self.asked = 0

    def __exit__(self, *error: object) -> None:
        self._replies.close()

    def compare(
        self, system: System, baseline: System, note: Callable[[int, int], None] = lambda done, total: None
    ) -> dict[str, list[Comparison]]:
        """Compares a system's answers with the baseline's to the same prompts, sample by sample, by prompt id.

        Requests that fail leave their comparisons without a score; `failure` says why.
        """
        pairs = [
            (prompt_id, mine.prompt, mine.response, other.response)
            for prompt_id, answers in system.by_prompt.items()
            for mine, other in zip(answers, baseline.by_prompt.get(prompt_id, ()), strict=False)
        ]
        done = 0

        def judge(pair: tuple[str, str, str, str]) -> Comparison:
            nonlocal done
            _, prompt, mine, other = pair
            compared = self._compare(prompt, mine, other)
            with self._lock:
                done += 1
                note(done, len(pairs))
            return compared

        found: dict[str, list[Comparison]] = {}
        pool = ThreadPoolExecutor(self._config.parallel)
        try:
            for pair, comparison in zip(pairs, pool.map(judge, pairs), strict=True):
                found.setdefault(pair[0], []).append(comparison)
        finally:
            pool.shutdown(cancel_futures=True)
        return found

    def _compare(self, prompt: str, mine: str, other: str) -> Comparison:
        if mine == other:
            return Comparison(0.5, "tie", "tie")
        replies = self._ask(prompt, mine, other), self._ask(prompt, other, mine)
        verdicts = [None if reply is None else parse_verdict(reply) for reply in replies]
        return Comparison(_score(*verdicts), *verdicts)

    def _ask(self, prompt: str, a: str, b: str) -> str | None:
        messages = [
            {"role": "system", "content": f"{self._instruction}\n\n{_FORM}"},
            {"role": "user", "content": f"# Prompt\n{prompt}\n\n# Answer A\n{a}\n\n# Answer B\n{b}"},
        ]
        numbers = {"temperature": self._config.temperature, "max_tokens": self._config.max_tokens}
        request = {"model": self._config.model, "messages": messages}
        request |= {name: number for name, number in numbers.items() if number is not None}
        key = _key(self._config.url, request)
        if (reply := self._replies.get(key)) is not None:
            return reply
        with self._lock:
            if self._failed_in_a_row >= GIVE_UP_AFTER:
                return None
        try:
            reply = self._post(request)
        except EndpointError as error:
            with self._lock:
                self.failure = str(error)
                if error.concerns != "this request":
                    self._failed_in_a_row = GIVE_UP_AFTER if error.concerns == "all" else self._failed_in_a_row + 1
            return None
        with self._lock:
            self._failed_in_a_row = 0
            self.asked += 1
        self._replies.add(key, reply)
        return reply


def parse_verdict(reply: str) -> Verdict:
    """The last verdict in a reply: A, B, or a tie ([[C]])."""
    found = _VERDICT.findall(reply)
    return {"A": "A", "B": "B", "C": "tie"}[found[-1]] if found else "unparsable"


def _score(first: Verdict | None, second: Verdict | None) -> float | None:
    """1 or 0 where both orders agree, or one prefers an answer and the other calls it a tie is 1/2, as is a flip: a win
    needs both."""
    if None in (first, second) or "unparsable" in (first, second):
        return None
    return {("A", "B"): 1.0, ("B", "A"): 0.0}.get((first, second), 0.5)


def _key(url: str | None, request: dict[str, Any]) -> str:
    text = json.dumps([url, request], sort_keys=True, ensure_ascii=False)
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=16).hexdigest()


class EndpointError(Exception):
    """A request that failed with all its retries. What that `concerns`: only this request, which the endpoint refuses;
    all of them, such as a wrong key; or perhaps the next one."""

    def __init__(self, message: str, concerns: Literal["this request", "next", "all"] = "next") -> None:
        super().__init__(message)
        self.concerns = concerns


class OpenAIRequests:
    """Sends chat completions with OpenAI's client, which waits longer before each retry and heeds Retry-After."""

    def __init__(self, config: EndpointConfig) -> None:
        try:
            import openai
        except ImportError as error:
            raise InputError("endpoint: needs OpenAI's client; pip install 'pargs-jax[judge]'") from error
        self._errors = openai
        self._url = config.url
        # Servers of one's own take any key, and the client wants one.
        key = os.environ.get(config.key_variable) or "none"
        self._client = openai.OpenAI(
            base_url=config.url, api_key=key, timeout=config.timeout, max_retries=config.retries
        )

    def __call__(self, request: dict[str, Any]) -> str:
        """The reply's text. Raises EndpointError."""
        errors = self._errors
        try:
            completion = self._client.chat.completions.create(**request)
            content = completion.choices[0].message.content
        except (errors.AuthenticationError, errors.PermissionDeniedError, errors.NotFoundError) as error:
            raise EndpointError(f"{self._url}: {first_line(error)}", "all") from error
        except (errors.BadRequestError, errors.UnprocessableEntityError) as error:
            raise EndpointError(f"{self._url}: {first_line(error)}", "this request") from error
        except errors.APITimeoutError as error:
            raise EndpointError(f"{self._url}: no reply in time") from error
        except errors.APIConnectionError as error:
            raise EndpointError(f"{self._url}: cannot be reached ({first_line(error.__cause__ or error)})") from error
        except errors.APIError as error:
            raise EndpointError(f"{self._url}: {first_line(error)}") from error
        except (AttributeError, IndexError, TypeError, ValueError) as error:
            raise EndpointError(f"{self._url}: the reply is not a chat completion") from error
        return content if isinstance(content, str) else ""


class Replies:
    """The replies of an endpoint on disk, by a digest of what was asked; one process at a time writes them."""

    def __init__(self, path: Path) -> None:
        """Opens or makes the file; a last line that was cut off is dropped. Raises InputError if it cannot be used."""
        advice = "use another file as endpoint.cache"
        with opened_to_append(path, "evaluate.py", advice) as self._file:
            lines = path.read_bytes().split(b"\n")
            cut_off = lines.pop()
            self._replies = dict(_reply(path, number, line) for number, line in enumerate(lines, start=1))
            if cut_off:
                self._file.truncate(path.stat().st_size - len(cut_off))
        self._path = path
        self._lock = threading.Lock()

    def get(self, key: str) -> str | None:
        """The reply to a request, if there is one."""
        with self._lock:
            return self._replies.get(key)

    def add(self, key: str, reply: str) -> None:
        """Keeps a reply. Raises InputError if the disk does not take it."""
        line = json.dumps({"request": key, "reply": reply}) + "\n"
        with (
            self._lock,
            write_errors_named_after(self._path, "earlier replies are safe; fix that, then run the same command again"),
        ):
            append_all(self._file, line)
            self._replies[key] = reply

    def close(self) -> None:
        self._file.close()


def _reply(path: Path, number: int, line: bytes) -> tuple[str, str]:
    try:
        row = parse_json(line)
        key, reply = row["request"], row["reply"]
        if not isinstance(key, str) or not isinstance(reply, str):
            raise TypeError("no texts")
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: line {number} is not a judge's reply; use another file as endpoint.cache") from error
    return key, reply


def flip_rate(comparisons: Sequence[Comparison]) -> float | None:
    """The share of pairs with two parsable verdicts on which the orders prefer different answers; None without any."""
    judged = [comparison for comparison in comparisons if comparison.score is not None]
    return sum(comparison.is_flip for comparison in judged) / len(judged) if judged else None
