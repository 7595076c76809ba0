"""Replies in the form of OpenAI's, whole and as streams, with what guidance has to say of each answer."""

import dataclasses
import math
import secrets
import time
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import jax
import numpy as np

from pargs_jax.decoding.state import CandidateTrace
from pargs_jax.generation.answers import Answer, traced_tokens
from pargs_jax.generation.plan import Request
from pargs_jax.generation.scheduler import Grown
from pargs_jax.generation.traces import TracedToken, one_or_all, token_row
from pargs_jax.serving.engine import Finished, Progress
from pargs_jax.text.answer_text import AnswerText, Reader, added_text, common_length


@dataclasses.dataclass
class TokenNote:
    """A token of an answer: its text, its log-probability and the likeliest alternatives (text, log-probability).

    Log-probabilities are those after guidance, at temperature 1.
    """

    text: str
    log_prob: float
    alternatives: list[tuple[str, float]]


class Choice:
    """One answer of a reply, as it grows."""

    def __init__(self, request: Request, reader: Reader, alternatives: int | None, streams_trace: bool = False) -> None:
        """`reader` reads the tokens if they are asked for: each with so many alternatives (None: not asked for), or
        the entries of a trace."""
        self.request = request
        self.text = ""
        self.answer: Answer | None = None
        self._alternatives, self.streams_trace = alternatives, streams_trace
        self._before = AnswerText.begin(reader, request.lm_ids) if self.has_notes or streams_trace else None
        self._notes: list[TokenNote] = []
        self._texts: list[str] = []
        """The text after each token."""
        self._given = 0
        """How many of the notes are in earlier chunks of the stream."""
        self._given_text = 0
        """The number of characters of their tokens."""
        self._traced: list[TracedToken] = []
        self._told, self._told_text = 0, 0
        """How many of the traced tokens are in earlier chunks, and the number of their characters."""
        self._count = 0

    @property
    def has_notes(self) -> bool:
        return self._alternatives is not None

    @property
    def finish_reason(self) -> str | None:
        return None if self.answer is None else self.answer.finish_reason

    @property
    def tokens(self) -> int:
        """The number of tokens so far."""
        return self._count if self.answer is None else self.answer.tokens

    def take(self, event: Progress | Finished) -> str:
        """Takes news; returns the text that is new."""
        before = len(self.text)
        if isinstance(event, Finished):
            self.answer = event.answer
            self.text = event.answer.response
        else:
            self.text = event.text
            self._count += len(event.grown.tokens)
            if self._before is not None:
                self._read(event.grown)
        return self.text[before:]

    def _read(self, grown: Grown) -> None:
        tokens, numbers = grown.tokens, grown.numbers
        growing = list(accumulate(tokens, AnswerText.followed_by, initial=self._before))
        self._before = growing[-1]
        self._texts += [after.text for after in growing[1:]]
        if self.has_notes:
            for place, token in enumerate(tokens):
                candidates = jax.tree.map(lambda x, place=place: x[place], numbers.candidates)
                self._notes.append(self._note(token, candidates, growing[place]))
        if self.streams_trace:
            texts = [""] * len(tokens)  # known when the response is
            guided = self.request.settings.method.guided
            self._traced += traced_tokens(tokens, texts, numbers, growing, guided=guided)

    def _ends(self, first: int) -> list[int]:
        """Where the texts of the tokens from number `first` on end: up to where the answer after the token, and after
        all that follow, agrees with the text."""
        agreed = [common_length(text, self.text) for text in self._texts[first:]]
        return list(accumulate(reversed(agreed), min))[::-1]

    def new_notes(self) -> list[TokenNote]:
        """The notes of the tokens whose text is given and that were not returned before. Tokens without text at the
        end, such as the end-of-sequence token and those of a text that ends the answer, have none."""
        last, found = len(self.text), []
        for end in self._ends(self._given):
            is_certain = self.answer is not None or len(self._texts[self._given]) <= last
            if self._given_text >= last or not is_certain:
                break
            text = self.text[self._given_text : end]
            found.append(dataclasses.replace(self._notes[self._given], text=text))
            self._given += 1
            self._given_text = max(self._given_text, end)
        return found

    def new_traced(self, is_over: bool) -> list[dict[str, Any]]:
        """The entries of a trace for the tokens whose text is given and that were not returned before; for all that
        are left once the answer is over. Their texts, joined, are the response."""
        last, found = len(self.text), []
        for end in self._ends(self._told):
            if len(self._texts[self._told]) > last and not is_over:
                break
            token = self._traced[self._told]
            end = last if is_over and token is self._traced[-1] else max(self._told_text, end)
            found.append(token_row(token._replace(text=self.text[self._told_text : end])))
            self._told, self._told_text = self._told + 1, end
        return found

    def _note(self, token: int, candidates: CandidateTrace, before: AnswerText) -> TokenNote:
        order = np.argsort(-candidates.at_temperature_1, kind="stable")
        log_probs = dict(
            zip(candidates.tokens[order].tolist(), candidates.at_temperature_1[order].tolist(), strict=True)
        )
        log_probs.pop(-1, None)
        likeliest = [(i, x) for i, x in log_probs.items() if math.isfinite(x)][: self._alternatives]
        return TokenNote(
            added_text(before, token), log_probs[token], [(added_text(before, other), x) for other, x in likeliest]
        )

    def guidance(self) -> dict[str, Any]:
        """What there is to say of the answer beyond OpenAI's fields."""
        answer, settings = self.answer, self.request.settings
        said: dict[str, Any] = {
            "id": self.request.prompt.id,
            "sample": self.request.sample,
            "seed": settings.seed,
            "weights": list(settings.weights),
            "k": settings.k,
            "temperature": settings.temperature,
        }
        if answer is not None:
            said |= {
                "log_probability": answer.log_probability,
                "kl": answer.kl,
                "guide_reward": one_or_all(answer.guide_rewards),
                "lm_tokens": answer.lm_tokens,
                "rm_tokens": answer.rm_tokens,
            }
            if answer.trace is not None:
                said["trace"] = answer.trace.as_row()
        return said


class Reply:
    """A reply to a request for completions or for chat.

    Attributes:
        choices: its answers.
        is_chat: whose form it has.
    """

    def __init__(self, choices: Sequence[Choice], model: str, prompt_tokens: int, *, is_chat: bool) -> None:
        self.choices, self.is_chat = choices, is_chat
        self._model, self._prompt_tokens = model, prompt_tokens
        self._id = ("chatcmpl-" if is_chat else "cmpl-") + secrets.token_hex(12)
        self._created = int(time.time())
        self._offsets = [0] * len(choices)

    def whole(self, cut_by: str | None = None) -> dict[str, Any]:
        """The reply without a stream. `cut_by` says what ended the answers that did not end by themselves."""
        choices = []
        for index, choice in enumerate(self.choices):
            row: dict[str, Any] = {"index": index}
            row |= {"message": {"role": "assistant", "content": choice.text}} if self.is_chat else {"text": choice.text}
            row["logprobs"] = self._logprobs(index) if choice.has_notes else None
            row["finish_reason"] = choice.finish_reason or "length"
            row["pargs"] = choice.guidance() | ({"cut_by": cut_by} if choice.answer is None else {})
            choices.append(row)
        return self._outer(choices, is_chunk=False) | {"usage": self.usage()}

    def opening(self) -> list[dict[str, Any]]:
        """The first chunks of a stream."""
        if not self.is_chat:
            return []
        return [
            self._chunk(index, {"delta": {"role": "assistant", "content": ""}}) for index in range(len(self.choices))
        ]

    def chunk(self, index: int, text: str, cut_by: str | None = None) -> dict[str, Any] | None:
        """A chunk of a stream with new text of an answer, and its end if it has ended; None if there is nothing new."""
        choice = self.choices[index]
        is_over = choice.answer is not None or cut_by is not None
        if not text and not is_over:
            return None
        row: dict[str, Any] = {"delta": {"content": text} if text else {}} if self.is_chat else {"text": text}
        if choice.has_notes:
            row["logprobs"] = self._logprobs(index)
        if is_over:
            row["finish_reason"] = choice.finish_reason or "length"
            row["pargs"] = choice.guidance() | ({"cut_by": cut_by} if cut_by else {})
        if choice.streams_trace:
            row["pargs"] = row.get("pargs", {}) | {"tokens": choice.new_traced(is_over)}
        return self._chunk(index, row)

    def last_chunk(self) -> dict[str, Any]:
        """The chunk with the numbers of tokens."""
        return self._outer([], is_chunk=True) | {"usage": self.usage()}

    def usage(self) -> dict[str, int]:
        completion = sum(choice.tokens for choice in self.choices)
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": completion,
            "total_tokens": self._prompt_tokens + completion,
        }

    def _chunk(self, index: int, row: dict[str, Any]) -> dict[str, Any]:
        return self._outer([{"index": index, "logprobs": None, "finish_reason": None} | row], is_chunk=True)

    def _outer(self, choices: list[dict[str, Any]], *, is_chunk: bool) -> dict[str, Any]:
        kind = "chat.completion" if self.is_chat else "text_completion"
        return {
            "id": self._id,
            "object": f"{kind}.chunk" if self.is_chat and is_chunk else kind,
            "created": self._created,
            "model": self._model,
            "choices": choices,
        }

    def _logprobs(self, index: int) -> dict[str, Any]:
        """Those of the tokens whose text is new."""
        notes = self.choices[index].new_notes()
        if self.is_chat:
            return {
                "content": [_token(note.text, note.log_prob) | _alternatives(note) for note in notes],
                "refusal": None,
            }
        offsets = []
        for note in notes:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(note.text)
        return {
            "tokens": [note.text for note in notes],
            "token_logprobs": [note.log_prob for note in notes],
            "top_logprobs": [_best_by_text(note.alternatives) for note in notes],
            "text_offset": offsets,
        }


def _alternatives(note: TokenNote) -> dict[str, Any]:
    return {"top_logprobs": [_token(text, log_prob) for text, log_prob in note.alternatives]}


def _token(text: str, log_prob: float) -> dict[str, Any]:
    return {"token": text, "logprob": log_prob, "bytes": list(text.encode(errors="surrogatepass"))}


def _best_by_text(alternatives: Sequence[tuple[str, float]]) -> dict[str, float]:
    """By their texts; of several tokens with the same text the likeliest, which comes first."""
    return dict(reversed(alternatives))
