"""Answers while they are written: their text so far, and where they contain a text that ends them."""

from collections.abc import Sequence

from pargs_jax.text.answer_text import UNFINISHED, AnswerText, Reader


class GrowingAnswer:
    """An answer that gets one token after another.

    Attributes:
        tokens: the tokens so far. After a text that ends the answer there are no more.
        is_stopped: whether the answer contains a text that ends it.
    """

    def __init__(self, reader: Reader, prompt_ids: list[int], stop: Sequence[str] = ()) -> None:
        self.tokens: list[int] = []
        self.is_stopped = False
        self._stop = stop
        self._text = AnswerText.begin(reader, prompt_ids)
        self._read = 0
        """How many of the tokens are in the text; the others are read when it is asked for."""

    def add(self, tokens: Sequence[int]) -> None:
        """Appends tokens, up to one that completes a text that ends the answer."""
        if not self._stop:
            self.tokens += tokens
            return
        for token in tokens:
            if self.is_stopped:
                return
            self.tokens.append(token)
            text = self._whole().text
            self.is_stopped = any(stop in text for stop in self._stop)

    @property
    def text(self) -> str:
        """The response if the answer ended here."""
        return before_stop(self._whole().text, self._stop)

    @property
    def lasting_text(self) -> str:
        """The beginning of the response that is certain: no later token can change it or make it part of a text that
        ends the answer."""
        if self.is_stopped:
            return self.text
        text = self._whole().lasting_text.rstrip(UNFINISHED)
        return text[: len(text) - max((_begun(text, stop) for stop in self._stop), default=0)]

    def _whole(self) -> AnswerText:
        for token in self.tokens[self._read :]:
            self._text = self._text.followed_by(token)
        self._read = len(self.tokens)
        return self._text


def before_stop(text: str, stop: Sequence[str]) -> str:
    """A text up to the first of these texts in it."""
    found = [at for each in stop if (at := text.find(each)) >= 0]
    return text[: min(found)] if found else text


def _begun(text: str, stop: str) -> int:
    """The length of the longest end of the text that `stop` begins with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
