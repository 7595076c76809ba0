"""The text of an answer that grows token by token, without decoding all of it at every step.

It always equals the text of `decode_answer`. Byte-level tokenizers and SentencePiece's BPE with byte fallback, the two
kinds that language models use, get each token's text from a table. For all others the whole answer is decoded again.
"""

import codecs
import os.path
import random
import re
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple, Protocol

from pargs_jax.text.tokenization import TextTokenizer, byte_letters, stages

UNFINISHED = "\ufffd"
"""The replacement character, which unfinished characters are decoded to."""

_PROBE = "Hi  there\n\n\tl'été 日本語 🙂👍🏽 e\u0301\r\n</s> <s> <|endoftext|> \u200b\u00a0."
"""A text that every tokenizer is tested on, in case one does not do what its definition says."""


class Reading(NamedTuple):
    """The text of an answer's tokens, with U+FFFD for bytes that are not a character."""

    text: str
    final: int
    """The number of characters that no later token can change."""


class Reader(Protocol):
    """Reads a growing answer's text. States are immutable, so one state can be continued in several ways."""

    def begin(self, prompt_ids: list[int]) -> Any: ...

    def extend(self, state: Any, token: int) -> Any: ...

    def read(self, state: Any) -> Reading: ...


class AnswerText(NamedTuple):
    """The text of an answer so far. Immutable: adding a token makes a new one."""

    reader: Reader
    state: Any
    readings: tuple[Reading, ...]
    """The readings after the newest token and after each of up to three tokens before it, the newest first."""

    @classmethod
    def begin(cls, reader: Reader, prompt_ids: list[int]) -> "AnswerText":
        """The empty answer to a prompt."""
        state = reader.begin(prompt_ids)
        return cls(reader, state, (reader.read(state),))

    def followed_by(self, token: int) -> "AnswerText":
        state = self.reader.extend(self.state, token)
        return AnswerText(self.reader, state, (self.reader.read(state), *self.readings[:3]))

    @property
    def text(self) -> str:
        """The text that `decode_answer` gives."""
        return self._shown.text.rstrip(UNFINISHED)

    @property
    def lasting_text(self) -> str:
        """The text that every continuation begins with, apart from trailing U+FFFD.

        `decode_answer` drops unfinished characters, but never goes back behind a token that ended in a finished one,
        and at most three tokens. So a continuation shows at least the present text, without the part that more bytes
        can change.
        """
        shown = self._shown
        return shown.text[: shown.final]

    @property
    def _shown(self) -> Reading:
        """The reading that `decode_answer` uses: the newest that does not end in an unfinished character, or else the
        oldest of the four."""
        finished = (reading for reading in self.readings if not reading.text.endswith(UNFINISHED))
        return next(finished, self.readings[-1])


def texts_as_they_grow(reader: Reader, prompt_ids: list[int], tokens: Sequence[int]) -> list[AnswerText]:
    """The answer's text before each of its tokens, and after the last one."""
    return list(accumulate(tokens, AnswerText.followed_by, initial=AnswerText.begin(reader, prompt_ids)))


def shares_of(answer: str, growing: Sequence[AnswerText]) -> list[str]:
    """The part of an answer's text that each token gives; joined, they are the answer.

    If several tokens make one character, the character belongs to the token that completes it; the earlier ones give
    nothing, and neither do special tokens.

    Args:
        answer: the whole text.
        growing: the result of `texts_as_they_grow` for its tokens.
    """
    agreed = [common_length(prefix.text, answer) for prefix in growing[:-1]]
    ends = list(accumulate([len(answer), *reversed(agreed)], min))[::-1]
    return [answer[start:end] for start, end in pairwise(ends)]


def added_text(before: AnswerText, token: int) -> str:
    """The text that a token would add to an answer; empty if the token ends inside a character."""
    text = before.followed_by(token).text
    return text[common_length(before.text, text) :]


def common_length(text: str, other: str) -> int:
    """The length of the common beginning of two texts."""
    if other.startswith(text):  # the usual case, and faster than comparing characters
        return len(text)
    return len(os.path.commonprefix([text, other]))  # noqa: RUF071


def fastest_reader(tokenizer: TextTokenizer) -> Reader:
    """The fastest reader that gives the same text as the tokenizer's `decode_answer`."""
    definition = tokenizer.definition()
    reader = definition and _piece_reader(definition)
    return reader if reader and _reads_alike(reader, tokenizer) else _WholeReader(tokenizer)


def _reads_alike(reader: Reader, tokenizer: TextTokenizer) -> bool:
    prompt = tokenizer.encode_prompt("Why?\n")
    tokens = random.Random(0).choices(range(tokenizer.vocab_size), k=64) + tokenizer.encode_answer(_PROBE)
    answer = AnswerText.begin(reader, prompt)
    for count, token in enumerate(tokens, start=1):
        answer = answer.followed_by(token)
        if answer.text != tokenizer.decode_answer(prompt, tokens[:count]):
            return False
    return True


class _Grown(NamedTuple):
    """A growing text: `closed` is final; `open_end` holds bytes whose text later bytes can still change.

    The answer's text starts at character `start`; a space at the beginning of the whole text may have to be removed
    first.
    """

    closed: str
    open_end: bytes
    start: int
    loses_space: bool


class _PieceReader:
    """Reads token by token, from a table of each token's content: bytes, text, or None for special tokens.

    Bytes are joined to those before them. In a byte-level tokenizer all tokens are bytes, and everything but an
    unfinished character at the end is final. In a tokenizer with byte fallback (SentencePiece), a run of bytes between
    other tokens is text if the whole run is valid UTF-8, and otherwise one U+FFFD per byte; so it is not final before
    the run is over.
    """

    def __init__(self, pieces: list[bytes | str | None], *, byte_level: bool, loses_space: bool) -> None:
        self._pieces = pieces
        self._byte_level = byte_level
        self._loses_space = loses_space

    def begin(self, prompt_ids: list[int]) -> _Grown:
        state = _Grown("", b"", 0, self._loses_space)
        for token in prompt_ids:
            state = self.extend(state, token)
        if state.closed:
            # The prompt's final text is not part of the answer, so it is not carried along.
            state = state._replace(closed="", loses_space=False)
        return state._replace(start=len(self.read(state).text))

    def extend(self, state: _Grown, token: int) -> _Grown:
        piece = self._pieces[token] if 0 <= token < len(self._pieces) else None
        if piece is None:
            return state
        if isinstance(piece, str):
            return state._replace(closed=state.closed + self._render(state.open_end) + piece, open_end=b"")
        open_end = state.open_end + piece
        if not self._byte_level:
            return state._replace(open_end=open_end)
        text, used = codecs.utf_8_decode(open_end, "replace", False)
        return state._replace(closed=state.closed + text, open_end=open_end[used:])

    def read(self, state: _Grown) -> Reading:
        text = state.closed + self._render(state.open_end)
        start = state.start + (state.loses_space and text.startswith(" "))
        return Reading(text[start:], max(0, len(state.closed) - start))

    def _render(self, open_end: bytes) -> str:
        if self._byte_level:
            return open_end.decode(errors="replace")
        try:
            return open_end.decode()
        except UnicodeDecodeError:
            return UNFINISHED * len(open_end)


class _WholeReader:
    """Reads by decoding everything again; no part of the text counts as final."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer

    def begin(self, prompt_ids: list[int]) -> tuple[list[int], int]:
        return prompt_ids, len(self._tokenizer.decode(prompt_ids))

    def extend(self, state: tuple[list[int], int], token: int) -> tuple[list[int], int]:
        ids, start = state
        return [*ids, token], start

    def read(self, state: tuple[list[int], int]) -> Reading:
        ids, start = state
        return Reading(self._tokenizer.decode(ids)[start:], 0)


def _piece_reader(definition: dict[str, Any]) -> _PieceReader | None:
    """A reader for byte-level tokenizers and for SentencePiece's BPE with byte fallback; None for others."""
    if definition["model"]["type"] != "BPE":
        return None
    decoders = stages(definition["decoder"])
    byte_level = [stage["type"] for stage in decoders] == ["ByteLevel"]
    loses_space = decoders[3:] == [{"type": "Strip", "content": " ", "start": 1, "stop": 0}]
    has_byte_fallback = decoders[: 3 if loses_space else None] == [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if not (byte_level or has_byte_fallback):
        return None
    tokens = {token_id: token for token, token_id in definition["model"]["vocab"].items()}
    tokens |= {token["id"]: None if token["special"] else token["content"] for token in definition["added_tokens"]}
    piece = _byte_level_piece if byte_level else _fallback_piece
    pieces: list[bytes | str | None] = [None] * (max(tokens) + 1)
    for token_id, token in tokens.items():
        pieces[token_id] = None if token is None else piece(token)
    return _PieceReader(pieces, byte_level=byte_level, loses_space=loses_space)


def _fallback_piece(token: str) -> bytes | str:
    if re.fullmatch("<0x[0-9A-Fa-f]{2}>", token):
        return bytes.fromhex(token[3:5])
    return token.replace("▁", " ")


def _byte_level_piece(token: str) -> bytes:
    if all(char in _BYTE_OF for char in token):
        return bytes(_BYTE_OF[char] for char in token)
    return token.encode()


_BYTE_OF = byte_letters()
