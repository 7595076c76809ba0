"""Converts a language model's tokens to those of a reward model with another tokenizer, on the host.

At each step the reward model scores the *text* of prompt, answer so far and candidate, in its own tokens. The text is
`decode_answer` of the language model's tokens. A candidate that ends inside a character is therefore scored on the text
before that character. A candidate that ends the answer is scored as the answer so far plus the reward model's EOS, or
what its chat template has there.

Two things make the cost of a step independent of the answer's length. First, the text is extended token by token.
Second, where `Boundaries` can prove that the reward model's tokenizer never looks across a place in the text, the
tokens before it are *settled*: only the text after them is tokenised again.
"""

import threading
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from pargs_jax.errors import InputError
from pargs_jax.text.answer_text import AnswerText, fastest_reader
from pargs_jax.text.boundaries import Boundaries
from pargs_jax.text.tokenization import Place, TextTokenizer

MEMO_ROWS = 2048
"""The number of remembered rows. To be of use, it must be at least twice the number of rows in a step."""


class Candidates(NamedTuple):
    """The reward model's tokens of K continuations: its settled tokens, then `fresh`, then one of the `tails`.

    `fresh[b, :fresh_lengths[b]]` are settled tokens that the caller does not have yet; every continuation of the answer
    starts with them. `tails[b, k, :tail_lengths[b, k]]` are the remaining tokens with candidate k.
    """

    fresh: Int[np.ndarray, "B M"]
    fresh_lengths: Int[np.ndarray, "B"]
    tails: Int[np.ndarray, "B K W"]
    tail_lengths: Int[np.ndarray, "B K"]
    needed: Int[np.ndarray, "B"]
    """The reward model's tokens of the longest answer with a candidate, before it was cut to `tail_width`."""


class Retokeniser:
    """Converts a language model's tokens to a reward model's. Immutable except for a memo, and hashed by identity.

    Attributes:
        lm: the language model's tokenizer.
        rm: the reward model's tokenizer.
        closing_ids: the reward model's tokens that end an answer: its EOS, or what its chat template has there.
        settles: whether the reward model's tokens can be settled. If not, every step tokenises the whole answer again.
            (They also stay unsettled where the language model's text must be decoded as a whole.)
    """

    def __init__(self, lm: TextTokenizer, rm: TextTokenizer, closing_ids: Sequence[int] = ()) -> None:
        self.lm = lm
        self.rm = rm
        self.closing_ids = tuple(closing_ids) or (rm.eos_id,)
        self._boundaries = Boundaries.of(rm)
        self.settles: bool = self._boundaries is not None
        self._ends = frozenset(lm.eos_ids)
        self._reader = fastest_reader(lm)
        self._memo: dict[tuple[bytes, bytes], _Row] = {}
        self._memo_lock = threading.Lock()

    def candidates(
        self,
        tokens: Int[np.ndarray, "B C"],
        prompt_lengths: Int[np.ndarray, "B"],
        lengths: Int[np.ndarray, "B"],
        candidates: Int[np.ndarray, "B K"],
        settled: Int[np.ndarray, "B"],
        tail_width: int,
        fresh_width: int,
    ) -> Candidates:
        """Tokenises each row's answer so far with each of its candidates, in the reward model's tokens.

        The result depends only on the arguments, not on earlier calls. A candidate that adds no text to an empty answer
        has a tail of length 0. Filler rows and finished rows get lengths of 0. Tokens that do not fit are cut; `needed`
        reports it.

        Args:
            tokens, prompt_lengths, lengths: prompts and answers in the language model's tokens. Row b is `tokens[b,
                :lengths[b]]`; its first `prompt_lengths[b]` tokens are the prompt. An answer that contains an
                end-of-sequence token is finished.
            candidates: the possible next tokens of each answer.
            settled: the number of settled tokens that the caller has, from `fresh` of earlier calls.
            tail_width: the most tokens of an answer with a candidate, settled ones included.
            fresh_width: the most fresh tokens. Those beyond it are part of the tails, and become fresh later.

        Raises InputError if `settled` is larger than the number of tokens that were ever settled.
        """
        batch, options = candidates.shape
        split = Candidates(
            np.zeros((batch, fresh_width), np.int32),
            np.zeros(batch, np.int32),
            np.zeros((batch, options, tail_width), np.int32),
            np.zeros((batch, options), np.int32),
            np.zeros(batch, np.int32),
        )
        is_end = np.isin(candidates, self.lm.eos_ids)
        live, keys, rows, cuts = [], [], [], []
        parts: list[tuple[str, Place]] = []
        for b in np.flatnonzero(prompt_lengths):
            text = np.ascontiguousarray(tokens[b, : lengths[b]], np.int32)
            prompt, answer = text[: prompt_lengths[b]], text[prompt_lengths[b] :]
            key = prompt.tobytes(), answer.tobytes()
            row = self._row(key, prompt, answer)
            if row is None:
                continue
            cut = row.last_cut(self._boundaries) if self._boundaries else 0
            live.append(b)
            keys.append(key)
            rows.append(row)
            cuts.append(cut)
            so_far = row.answer.text
            parts.append((so_far[row.settled_chars : cut], row.place(row.settled_chars)))
            for candidate, ends in zip(candidates[b].tolist(), is_end[b].tolist(), strict=True):
                with_candidate = so_far if ends else row.answer.followed_by(candidate).text
                parts.append((with_candidate[cut:], row.place(cut)))
        encoded = iter(self.rm.encode_parts(parts))

        for b, key, row, cut in zip(live, keys, rows, cuts, strict=True):
            newly = np.array(next(encoded), np.int32)
            row = row._replace(settled_chars=cut, settled_ids=np.concatenate([row.settled_ids, newly]))
            self._remember(key, row)
            have = int(settled[b])
            if have > len(row.settled_ids):
                raise InputError(f"row {b}: {have} tokens cannot be settled, there are {len(row.settled_ids)}")
            fresh = row.settled_ids[have : have + fresh_width]
            waiting = row.settled_ids[have + fresh_width :].tolist()
            split.fresh[b, : len(fresh)] = fresh
            split.fresh_lengths[b] = len(fresh)
            for k, ends in enumerate(is_end[b].tolist()):
                tail = [*waiting, *next(encoded), *(self.closing_ids if ends else ())]
                split.needed[b] = max(split.needed[b], have + len(fresh) + len(tail))
                del tail[max(0, tail_width - have - len(fresh)) :]
                split.tails[b, k, : len(tail)] = tail
                split.tail_lengths[b, k] = len(tail)
        return split

    def _row(
        self, key: tuple[bytes, bytes], prompt: Int[np.ndarray, "P"], answer: Int[np.ndarray, "N"]
    ) -> "_Row | None":
        """The row with this answer, as the one before it or else from the beginning; None if the answer has ended.
        Rows that have ended are never remembered."""
        prompt_key, answer_key = key
        with self._memo_lock:
            row = self._memo.get(key)
            before = self._memo.get((prompt_key, answer_key[: -answer.itemsize])) if len(answer) else None
        if row is not None:
            return row
        new = answer if before is None else answer[-1:]
        if not self._ends.isdisjoint(new.tolist()):
            return None
        if before is not None:
            return before._replace(answer=before.answer.followed_by(int(answer[-1])))
        text = AnswerText.begin(self._reader, prompt.tolist())
        for token in answer.tolist():
            text = text.followed_by(token)
        return _Row(text, starts_text=not self.lm.decode(prompt.tolist()))

    def _remember(self, key: tuple[bytes, bytes], row: "_Row") -> None:
        with self._memo_lock:
            self._memo[key] = row
            while len(self._memo) > MEMO_ROWS:
                del self._memo[next(iter(self._memo))]


class _Row(NamedTuple):
    """A row's answer so far, and the part of it that is settled."""

    answer: AnswerText
    starts_text: bool
    """Whether the prompt has no text."""
    settled_chars: int = 0
    settled_ids: Int[np.ndarray, "S"] = np.zeros(0, np.int32)

    def last_cut(self, boundaries: Boundaries) -> int:
        """Where the answer's text is cut: the text before this can be settled."""
        return boundaries.last(self.answer.lasting_text, self.settled_chars)

    def place(self, chars: int) -> Place:
        """The place of the text that starts after `chars` characters."""
        if chars:
            return "word" if self.answer.text[chars] == " " else "inside"
        return "text" if self.starts_text else "answer"
