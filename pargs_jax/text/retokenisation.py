"""Converts a language model's tokens to those of a reward model with another tokenizer, on the host.

At each step the reward model scores the *text* of prompt, answer so far and candidate, in its own tokens. The text is
`decode_answer` of the language model's tokens. A candidate that ends inside a character is therefore scored on the text
before that character. A candidate that ends the answer is scored as the answer so far plus the reward model's EOS, or
what its chat template has there.

Two things make the cost of a step independent of the answer's length. First, the text is extended token by token.
Second, if `words_stand_apart` can prove that the reward model's tokenizer never looks across the space between two
words, then the tokens of all words but the last are *settled*: only the text after them is tokenised again.
"""

import re
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from pargs_jax.errors import InputError
from pargs_jax.text.answer_text import AnswerText, fastest_reader
from pargs_jax.text.tokenization import Place, TextTokenizer, stages

MEMO_ROWS = 2048
"""The number of remembered rows. To be of use, it must be at least twice the number of rows in a step."""

CUT = re.compile(r"(?<=[!-~]) (?=[!-~])")
"""Where a text may be cut, before the space: a single space between two ASCII characters that are not white space."""

_KNOWN_SPLITS = frozenset(
    {
        # GPT-2's, Llama 3's and Qwen 2's. No match has a space except as its first character or in a run of white
        # space, and a run before a printable character is never joined to what precedes it.
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+",
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+",
    }
)

_LOCAL_NORMALISERS = frozenset({"NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Precompiled", "Strip", "Prepend"})
"""Normalisers whose effect on a character depends only on its grapheme and on the text's two ends."""

_LOCAL_REPLACEMENTS = (
    ({"String": " "}, "▁"),
    ({"Regex": " {2,}"}, " "),
    ({"Regex": " {2,}"}, "▁"),
    ({"Regex": r"\s{2,}|[\n\r\t]"}, " "),
)

_PROBES = (
    "The cat sat on the mat, didn't it? (No. 42: it's 3.5 kg!)",
    " def f(x):\n\treturn x  # two  spaces\r\n\r\n if a_b == 'c' : d",
    "l'été 日本 a 語 🙂 ok 👍🏽 e\u0301 x \u200b y\u00a0z </s> <s> [SEP] [CLS] <|endoftext|> end. ",
    "aaaa aaaa aaaaaaaa ~ ! \" # $ % & ' ( ) * + , - . / : ; < = > ? @ [ ] ^ _ ` { | } \\ 0 00 000 1e5",
)
"""Texts that every tokenizer is tested on, in case one does not do what its definition says."""


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
        self.settles: bool = words_stand_apart(rm)
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
            if np.isin(answer, self.lm.eos_ids).any():
                continue
            live.append(b)
            keys.append((prompt.tobytes(), answer.tobytes()))
            row = self._row(keys[-1], prompt, answer)
            cut = row.last_cut() if self.settles else 0
            rows.append(row)
            cuts.append(cut)
            so_far = row.answer.text
            parts.append((so_far[row.settled_chars : cut], row.place(row.settled_chars)))
            for candidate, ends in zip(candidates[b].tolist(), is_end[b].tolist(), strict=True):
                with_candidate = so_far if ends else row.answer.followed_by(candidate).text
                parts.append((with_candidate[cut:], row.place(cut)))
        encoded = iter(self.rm.encode_parts(parts))

        for b, key, row, cut in zip(live, keys, rows, cuts, strict=True):
            row = row._replace(settled_chars=cut, settled_ids=(*row.settled_ids, *next(encoded)))
            self._remember(key, row)
            have = int(settled[b])
            if have > len(row.settled_ids):
                raise InputError(f"row {b}: {have} tokens cannot be settled, there are {len(row.settled_ids)}")
            fresh = row.settled_ids[have : have + fresh_width]
            waiting = row.settled_ids[have + fresh_width :]
            split.fresh[b, : len(fresh)] = fresh
            split.fresh_lengths[b] = len(fresh)
            for k, ends in enumerate(is_end[b].tolist()):
                tail = [*waiting, *next(encoded), *(self.closing_ids if ends else ())]
                split.needed[b] = max(split.needed[b], have + len(fresh) + len(tail))
                del tail[max(0, tail_width - have - len(fresh)) :]
                split.tails[b, k, : len(tail)] = tail
                split.tail_lengths[b, k] = len(tail)
        return split

    def _row(self, key: tuple[bytes, bytes], prompt: Int[np.ndarray, "P"], answer: Int[np.ndarray, "N"]) -> "_Row":
        prompt_key, answer_key = key
        with self._memo_lock:
            row = self._memo.get(key)
            before = self._memo.get((prompt_key, answer_key[: -answer.itemsize])) if len(answer) else None
        if row is not None:
            return row
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
    settled_ids: tuple[int, ...] = ()

    def last_cut(self) -> int:
        """Where the answer's text is cut: the text before this can be settled."""
        cuts = CUT.finditer(self.answer.lasting_text, self.settled_chars + 1)
        return max((match.start() for match in cuts), default=self.settled_chars)

    def place(self, chars: int) -> Place:
        """The place of the text that starts after `chars` characters."""
        if chars:
            return "word"
        return "text" if self.starts_text else "answer"


def words_stand_apart(tokenizer: TextTokenizer) -> bool:
    """Whether cutting a text where `CUT` matches never changes its tokens, whatever text surrounds the cut.

    True only if this follows from the tokenizer's definition and test texts agree.
    """
    definition = tokenizer.definition()
    return definition is not None and _definition_keeps_words_apart(definition) and _probes_agree(tokenizer)


def _definition_keeps_words_apart(definition: dict[str, Any]) -> bool:
    normalisers = stages(definition["normalizer"])
    is_local = all(
        (stage["pattern"], stage["content"]) in _LOCAL_REPLACEMENTS
        if stage["type"] == "Replace"
        else stage["type"] in _LOCAL_NORMALISERS
        for stage in normalisers
    )
    if not is_local or definition["model"].get("dropout") or any(map(_may_hold_a_space, definition["added_tokens"])):
        return False
    # When the text is split into words, spaces are either still spaces, or already SentencePiece's mark for them.
    has_marks = any(stage["type"] == "Replace" and stage["content"] == "▁" for stage in normalisers)
    splits = stages(definition["pre_tokenizer"])
    if all(stage["type"] == "Metaspace" and stage["replacement"] == "▁" for stage in splits):
        if any(stage["split"] for stage in splits):
            return True
        return (bool(splits) or has_marks) and _never_joins_words(definition["model"])
    return not has_marks and _splits_before_words(splits[0]) and all(s["type"] == "ByteLevel" for s in splits[1:])


def _may_hold_a_space(added_token: dict[str, Any]) -> bool:
    takes_spaces = not added_token["special"] and (added_token["lstrip"] or added_token["rstrip"])
    return takes_spaces or re.search(r"[\s▁]", added_token["content"]) is not None


def _splits_before_words(stage: dict[str, Any]) -> bool:
    if stage["type"] == "ByteLevel":
        return stage["use_regex"]
    is_plain_split = stage["type"] == "Split" and stage["behavior"] == "Isolated" and not stage["invert"]
    return is_plain_split and stage["pattern"].get("Regex") in _KNOWN_SPLITS


def _never_joins_words(model: dict[str, Any]) -> bool:
    """Whether a model that reads whole texts with marked spaces has no token across the beginning of a word.

    Then no BPE merge crosses it, and the merges on either side are independent. For Unigram, the best path would not
    cross it either; but ties between paths are broken by rounding, which depends on the preceding text.
    """
    is_plain_bpe = model["type"] == "BPE" and not (
        model["ignore_merges"] or model["continuing_subword_prefix"] or model["end_of_word_suffix"]
    )
    return is_plain_bpe and "▁" in model["vocab"] and not any("▁" in token.lstrip("▁") for token in model["vocab"])


def _probes_agree(tokenizer: TextTokenizer) -> bool:
    for text in _PROBES:
        for cut in (match.start() for match in CUT.finditer(text)):
            before, after = tokenizer.encode_parts([(text[:cut], "answer"), (text[cut:], "word")])
            if before + after != tokenizer.encode_answer(text):
                return False
    return True
