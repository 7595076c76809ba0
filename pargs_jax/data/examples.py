"""Turns preferences into examples: token ids of prompts and answers, cut to fit."""

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int

from pargs_jax.data.preferences import Preference
from pargs_jax.errors import InputError
from pargs_jax.text.tokenization import TextTokenizer, cut_left


@dataclass(frozen=True, eq=False)
class Example:
    """Token ids of one prompt and its answers, chosen first; together they fit the maximum length.

    `prefixes` holds the prefixes of each answer, shortest first, where they end at another tokenizer's tokens;
    `rewards` holds those of scored answers, `labels` those of pairs that were judged by several objectives.
    """

    prompt: Int[np.ndarray, "P"]
    answers: tuple[Int[np.ndarray, "R"], ...]
    prefixes: tuple[tuple[Int[np.ndarray, "R"], ...], ...] | None = None
    rewards: tuple[float, ...] | None = None
    labels: tuple[float, ...] | None = None

    @property
    def prefix_counts(self) -> list[int]:
        """The number of prefixes of each answer: its number of tokens, unless `prefixes` is given."""
        return list(map(len, self.answers if self.prefixes is None else self.prefixes))


class Lengths(NamedTuple):
    """The lengths of N examples with A answers each, in tokens, and how many prefixes each answer has."""

    prompts: Int[np.ndarray, "N"]
    answers: Int[np.ndarray, "N A"]
    prefix_counts: Int[np.ndarray, "N A"]


@runtime_checkable
class KnowsLengths(Protocol):
    """Examples that know their lengths, so that none has to be read for them."""

    lengths: Lengths


def lengths_of(examples: Sequence[Example]) -> Lengths:
    """The lengths of examples that all have the same number of answers."""
    if isinstance(examples, KnowsLengths):
        return examples.lengths
    return Lengths(
        np.array([len(example.prompt) for example in examples], np.int32),
        np.array([list(map(len, example.answers)) for example in examples], np.int32),
        np.array([example.prefix_counts for example in examples], np.int32),
    )


def digest_of(examples: Sequence[Example]) -> str:
    """A digest of the training input: all token ids, where texts begin and end, rewards, labels, and
    the order of the rows."""
    total = hashlib.sha256()
    for example in examples:
        prefixes = [ids for of_answer in example.prefixes or () for ids in of_answer]
        texts = [example.prompt, *example.answers, *prefixes]
        lengths = np.array([*example.prefix_counts, *map(len, texts)])
        total.update(b"".join(np.asarray(ids, "<i4").tobytes() for ids in ([len(lengths)], lengths, *texts)))
        if example.rewards is not None:
            total.update(np.asarray(example.rewards, "<f4").tobytes())
        if example.labels is not None:
            total.update(np.asarray(example.labels, "<f4").tobytes())
    return total.hexdigest()


@dataclass(frozen=True)
class TruncationReport:
    """How much was lost to the maximum length.

    Attributes:
        rows: the number of rows before truncation.
        prompts_cut: prompts that lost tokens on the left.
        answers_cut: answers that lost tokens on the right, including their end-of-sequence token.
        tokens_lost: tokens cut from prompts and answers together.
        rows_left_out: rows whose two answers were equal after truncation, so that they compare nothing.
        ungrouped: scored answers that were left over when those to one prompt were put together.
    """

    rows: int = 0
    prompts_cut: int = 0
    answers_cut: int = 0
    tokens_lost: int = 0
    rows_left_out: int = 0
    ungrouped: int = 0

    def __add__(self, other: "TruncationReport") -> "TruncationReport":
        """That of the rows of both."""
        both = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return TruncationReport(*map(sum, both))

    def __str__(self) -> str:
        ungrouped = f", {self.ungrouped} left out because their prompts have too few others" if self.ungrouped else ""
        used = self.rows - self.rows_left_out - self.ungrouped
        return (
            f"{used} of {self.rows} rows are used: {self.prompts_cut} prompts and {self.answers_cut} answers cut, "
            f"{self.tokens_lost} tokens lost, {self.rows_left_out} rows left out because their answers became the same"
            f"{ungrouped}"
        )


@dataclass(frozen=True)
class Cutting:
    """How preferences become examples.

    Prompts and answers are tokenised separately. The end-of-sequence token is part of a finished answer. If a prompt
    and its longest answer exceed `max_length` tokens, the prompt first loses tokens on the left, but never BOS, and it
    keeps at least half of `max_length`. Then answers lose tokens on the right.

    Attributes:
        tokenizer: the model's tokenizer.
        max_length: the most tokens of prompt and answer together; at least 2.
        answers: 2 for chosen and rejected, 1 for chosen alone.
        prefix_tokenizer: the tokenizer of a language model; prefixes end at its tokens. By default they end at the
            tokens of the model that is trained.
    """

    tokenizer: TextTokenizer
    max_length: int
    answers: int = 2
    prefix_tokenizer: TextTokenizer | None = None

    def __post_init__(self) -> None:
        """Raises InputError if `max_length` is below 2."""
        if self.max_length < 2:
            raise InputError(
                f"max_length: got {self.max_length}, must be at least 2: one token of the prompt and one of the answer"
            )

    def example(self, group: Sequence[Preference]) -> tuple[Example | None, TruncationReport]:
        """A preference, or several scored answers to one prompt, as an example, and what it lost. None if its two
        answers are equal after truncation."""
        preference, tokenizer = group[0], self.tokenizer
        whole_prompt = tokenizer.encode_prompt(preference.prompt)
        whole_answers = [
            tokenizer.encode_answer(text, starts_text=not preference.prompt) + [tokenizer.eos_id] * each.finished
            for each in group
            for text in (each.chosen, each.rejected)[: self.answers]
        ]
        prompt = self._cut_prompt(whole_prompt, max(map(len, whole_answers)))
        capacity = self.max_length - len(prompt)
        cut_answers = [ids[:capacity] for ids in whole_answers]
        lost = [len(whole) - len(cut) for whole, cut in zip(whole_answers, cut_answers, strict=True)]
        compares = self.answers == 1 or cut_answers[0] != cut_answers[1]
        report = TruncationReport(
            len(group),
            prompts_cut=int(len(prompt) < len(whole_prompt)),
            answers_cut=sum(map(bool, lost)),
            tokens_lost=len(whole_prompt) - len(prompt) + sum(lost),
            rows_left_out=int(not compares),
        )
        if not compares:
            return None, report
        ids = tuple(np.asarray(answer, np.int32) for answer in cut_answers)
        prefixes = None
        if self.prefix_tokenizer is not None:
            texts = (preference.chosen, preference.rejected)[: self.answers]
            prefixes = tuple(
                (*_prefixes_at(self.prefix_tokenizer, tokenizer, preference.prompt, text, capacity), whole)
                for text, whole in zip(texts, ids, strict=True)
            )
        rewards = None if preference.reward is None else tuple(each.reward for each in group)
        return Example(np.asarray(prompt, np.int32), ids, prefixes, rewards, preference.labels), report

    def _cut_prompt(self, prompt: list[int], longest_answer: int) -> list[int]:
        most = max(self.max_length - longest_answer, self.max_length // 2)
        return cut_left(prompt, most, self.tokenizer.bos_id)


def tokenise(
    preferences: Sequence[Preference],
    tokenizer: TextTokenizer,
    max_length: int,
    answers: int = 2,
    prefix_tokenizer: TextTokenizer | None = None,
    samples: int = 0,
) -> tuple[list[Example], TruncationReport]:
    """Tokenises preferences and cuts them to fit (`Cutting`).

    Args:
        preferences: the rows; with `answers=2` each needs a rejected answer.
        tokenizer, max_length, answers, prefix_tokenizer: see `Cutting`.
        samples: how many scored answers to one prompt make an example; 0: every row is an example.

    Raises InputError if `max_length` is below 2, no prompt has `samples` answers, or no row is left after truncation.
    """
    cutting = Cutting(tokenizer, max_length, answers, prefix_tokenizer)
    groups, report = grouped(preferences, samples)
    examples = []
    for group in groups:
        example, lost = cutting.example(group)
        report += lost
        if example is not None:
            examples.append(example)
    if not examples:
        raise nothing_left(max_length, report)
    return examples, report


def grouped(preferences: Sequence[Preference], samples: int) -> tuple[list[list[Preference]], TruncationReport]:
    """The preferences that make an example together: each alone, or `samples` scored answers to one prompt. Also how
    many are left over. Raises InputError if no prompt has so many."""
    groups = _samples_of_prompts(preferences, samples) if samples else [[preference] for preference in preferences]
    left_over = len(preferences) - sum(map(len, groups))
    return groups, TruncationReport(left_over, ungrouped=left_over)


def nothing_left(max_length: int, report: TruncationReport) -> InputError:
    """The error of a set that has no row after truncation."""
    return InputError(f"no rows are left after cutting to max_length {max_length}; {report}")


def _samples_of_prompts(preferences: Sequence[Preference], count: int) -> list[list[Preference]]:
    """Groups of `count` scored answers to the same prompt; what is left over is in none."""
    by_prompt: dict[str, list[Preference]] = {}
    for preference in preferences:
        by_prompt.setdefault(preference.prompt, []).append(preference)
    groups = [
        rows[start : start + count] for rows in by_prompt.values() for start in range(0, len(rows) - count + 1, count)
    ]
    if not groups:
        most = max(map(len, by_prompt.values()))
        raise InputError(f"no prompt has {count} scored answers (objective.n), the most are {most}")
    return groups


def _prefixes_at(
    boundaries: TextTokenizer, tokenizer: TextTokenizer, prompt: str, answer: str, capacity: int
) -> list[Int[np.ndarray, "R"]]:
    """The model's ids of an answer's prefixes, one for each token of `boundaries`, as long as they fit `capacity`."""
    starts_text = not prompt
    prompt_ids = boundaries.encode_prompt(prompt)
    answer_ids = boundaries.encode_answer(answer, starts_text=starts_text)
    prefixes = []
    for end in range(1, len(answer_ids) + 1):
        text = boundaries.decode_answer(prompt_ids, answer_ids[:end])
        ids = tokenizer.encode_answer(text, starts_text=starts_text)
        if len(ids) > capacity:
            break
        prefixes.append(np.asarray(ids, np.int32))
    return prefixes
