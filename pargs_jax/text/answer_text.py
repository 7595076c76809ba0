"""The text of an answer while it grows token by token, without decoding all of it at every step.

It is `decode_answer`'s text to the letter. For the two kinds of tokenizers that language models have, byte-level ones
and SentencePiece's BPE with byte fallback, a token's text is looked up; for all others the whole is decoded again.
"""

import codecs
import os.path
import random
import re
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple, Protocol

from pargs_jax.text.tokenization import TextTokenizer, stages

UNFINISHED = "\ufffd"
"""What an unfinished character is decoded as."""

_PROBE = "Hi  there\n\n\tl'été 日本語 🙂👍🏽 e\u0301\r\n</s> <s> <|endoftext|> \u200b\u00a0."
"""A text that every tokenizer is tried on, in case one does not do what its definition says."""


class Reading(NamedTuple):
    """An answer's text as all its tokens give it, where bytes that are no character are U+FFFD."""

    text: str
    final: int
    """So many characters are the same whatever tokens follow."""


class Reader(Protocol):
    """Gives a growing answer's text; a state is immutable, so that one can be continued in several ways."""

    def begin(self, prompt_ids: list[int]) -> Any: ...

    def extend(self, state: Any, token: int) -> Any: ...

    def read(self, state: Any) -> Reading: ...


class AnswerText(NamedTuple):
    """The text of an answer so far. Immutable: another token makes another one."""

    reader: Reader
    state: Any
    readings: tuple[Reading, ...]
    """After the newest token and after up to three before it, the newest first."""

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
        """What `decode_answer` gives."""
        return self._shown.text.rstrip(UNFINISHED)

    @property
    def lasting_text(self) -> str:
        """What the text of every continuation begins with, trailing U+FFFD apart.

        `decode_answer` goes back over unfinished characters, but never behind a token after which none was, and at most
        three tokens: a continuation shows at least what is shown now, less what more bytes can change.
        """
        shown = self._shown
        return shown.text[: shown.final]

    @property
    def _shown(self) -> Reading:
        """The reading that `decode_answer` shows: the newest that does not end in an unfinished character, or else the
        oldest of the four."""
        finished = (reading for reading in self.readings if not reading.text.endswith(UNFINISHED))
        return next(finished, self.readings[-1])


def texts_as_they_grow(reader: Reader, prompt_ids: list[int], tokens: Sequence[int]) -> list[AnswerText]:
    """The answer before each of its tokens, and after the last one."""
    return list(accumulate(tokens, AnswerText.followed_by, initial=AnswerText.begin(reader, prompt_ids)))


def shares_of(answer: str, growing: Sequence[AnswerText]) -> list[str]:
    """Which part of an answer's text each token gives; joined, they are the answer.

    A character that several tokens make is given by the one after which it stays; the tokens before it give nothing,
    as special tokens do.

    Args:
        answer: the whole text.
        growing: what `texts_as_they_grow` gave for its tokens.
    """
    agreed = [_common_length(prefix.text, answer) for prefix in growing[:-1]]
    ends = list(accumulate([len(answer), *reversed(agreed)], min))[::-1]
    return [answer[start:end] for start, end in pairwise(ends)]


def added_text(before: AnswerText, token: int) -> str:
    """The text that an answer would gain by a token; empty if the token ends inside a character."""
    text = before.followed_by(token).text
    return text[_common_length(before.text, text) :]


def _common_length(text: str, other: str) -> int:
    """How many characters two texts begin with alike."""
    if other.startswith(text):  # nearly always, and faster than to compare characters
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
    """A text while it grows: `closed` is final, `open_end` are bytes that the next ones may make something else of.

    The answer's text is theirs from character `start` on; before that, a space at the beginning may have to go.
    """

    closed: str
    open_end: bytes
    start: int
    loses_space: bool


class _PieceReader:
    """Reads token by token, from a table of what each stands for: bytes, text, or None for special tokens.

    Bytes are joined to those before them. In a byte-level tokenizer all tokens are bytes, and all but an unfinished
    character at the end is final. In one with byte fallback (SentencePiece's), a run of bytes between other tokens is
    text if it is valid UTF-8 as a whole, and else one U+FFFD for every byte, so that it is not final before it is over.
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
            # Final, and so no part of the answer: it need not be carried along.
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
    """Reads by decoding everything again; nothing is taken to be final."""

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


def _byte_letters() -> dict[str, int]:
    """The letter that byte-level tokenizers write for each byte, back to the byte."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(0x100) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(0x100 + index): byte for index, byte in enumerate(hidden)}


_BYTE_OF = _byte_letters()
