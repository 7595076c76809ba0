"""Packing: a batch's texts side by side in rows, with each prompt stored once before all of its answers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Int


class PackedTexts(NamedTuple):
    """The texts of a batch in G rows of N slots. A row holds segments: a prompt and then its answers, or some of them.

    An answer continues the prompt of its segment. A batch that is packed in several parts has G / parts rows for each;
    all numbers of pairs and slots count within a part.

    Attributes:
        tokens: token ids.
        positions: each token's place in the text of its prompt and its answer, from 0.
        segments: a segment's number, `b * A + a` for pair b whose answer a comes first in it; -1 in padding.
        answers: 0 for the tokens of a prompt, `a + 1` for those of answer a.
        answer_slots: the slots (row * N + column) of the answers' tokens, answer by answer; M entries, of which the
            last are padding.
        slots_before: the slots of the tokens before these. Before each answer's first token is the prompt's last one.
    """

    tokens: Int[np.ndarray, "G N"]
    positions: Int[np.ndarray, "G N"]
    segments: Int[np.ndarray, "G N"]
    answers: Int[np.ndarray, "G N"]
    answer_slots: Int[np.ndarray, "M"]
    slots_before: Int[np.ndarray, "M"]


class Segment(NamedTuple):
    """A prompt of pair `pair` with the answers of these numbers, and its length in tokens."""

    pair: int
    answers: list[int]
    length: int


@dataclass(frozen=True)
class Packing:
    """How batches are packed.

    Attributes:
        width: N, the slots of a row. Every prompt must fit with each of its answers.
        parts: micro-batches; each has its own rows.
        shards: the number of rows of a part, and M / parts, are multiples of this.
        shares_prompts: whether a prompt is stored once for all of its answers, as far as they fit one row. If not,
            every answer has its own copy, so that distances between slots are distances in the text.
    """

    width: int
    parts: int = 1
    shards: int = 1
    shares_prompts: bool = True

    def size(self, prompt: int, answers: Sequence[int]) -> int:
        """The slots that a prompt and answers of these lengths take if they fit one row."""
        return prompt * (1 if self.shares_prompts else len(answers)) + sum(answers)

    def row_multiple(self, tokens: float) -> int:
        """What the rows of a part are rounded up to a multiple of, if it has so many tokens on average: about 4 % of
        them. A jitted step compiles for each number of rows."""
        return self.shards * max(1, round(tokens / self.width / 24 / self.shards))

    def pack(
        self,
        prompts: Sequence[Int[np.ndarray, "P"]],
        answers: Sequence[Sequence[Int[np.ndarray, "R"]]],
        row_multiple: int,
    ) -> PackedTexts:
        """Packs the texts of a batch, in parts of equally many pairs."""
        pairs = len(prompts) // self.parts
        parts = [slice(start, start + pairs) for start in range(0, len(prompts), pairs)]
        plans = [self.plan(list(map(len, prompts[part])), [list(map(len, a)) for a in answers[part]]) for part in parts]
        rows = _round_up(max(map(len, plans)), row_multiple)
        tokens = max(sum(len(ids) for of_pair in answers[part] for ids in of_pair) for part in parts)
        entries = _round_up(tokens, self.shards * -(-rows * self.width // (16 * self.shards)))
        packed = [
            self._fill(plan, prompts[part], answers[part], rows, entries)
            for plan, part in zip(plans, parts, strict=True)
        ]
        return PackedTexts(*map(np.concatenate, zip(*packed, strict=True)))

    def plan(self, prompts: Sequence[int], answers: Sequence[Sequence[int]]) -> list[list[Segment]]:
        """The segments of each row, for prompts and answers of these lengths."""
        segments = []
        for pair, (prompt, lengths) in enumerate(zip(prompts, answers, strict=True)):
            together = [[a] for a in range(len(lengths))]
            if self.shares_prompts:
                together = [sorted(group) for group in first_fit(lengths, self.width - prompt)]
            segments += [Segment(pair, group, prompt + sum(lengths[a] for a in group)) for group in together]
        rows = first_fit([segment.length for segment in segments], self.width)
        return [[segments[number] for number in row] for row in rows]

    def _fill(
        self,
        plan: list[list[Segment]],
        prompts: Sequence[Int[np.ndarray, "P"]],
        answers: Sequence[Sequence[Int[np.ndarray, "R"]]],
        rows: int,
        entries: int,
    ) -> PackedTexts:
        """One part of a batch."""
        tokens, positions, segments, numbers = (np.zeros((rows, self.width), np.int32) for _ in range(4))
        segments[:] = -1
        slots: dict[tuple[int, int], Int[np.ndarray, "R"]] = {}
        before: dict[tuple[int, int], Int[np.ndarray, "R"]] = {}
        for g, row in enumerate(plan):
            end = 0
            for pair, group, length in row:
                prompt = prompts[pair]
                segments[g, end : end + length] = pair * len(answers[pair]) + group[0]
                tokens[g, end : end + len(prompt)] = prompt
                positions[g, end : end + len(prompt)] = np.arange(len(prompt))
                end += len(prompt)
                last_of_prompt = g * self.width + end - 1
                for a in group:
                    ids = answers[pair][a]
                    own = np.arange(end, end + len(ids))
                    tokens[g, own], numbers[g, own] = ids, a + 1
                    positions[g, own] = len(prompt) + np.arange(len(ids))
                    slots[pair, a] = g * self.width + own
                    before[pair, a] = np.r_[last_of_prompt, slots[pair, a][:-1]]
                    end += len(ids)
        lists = [np.concatenate([of[key] for key in sorted(of)]) for of in (slots, before)]
        padded = (np.pad(each, (0, entries - len(each))).astype(np.int32) for each in lists)
        return PackedTexts(tokens, positions, segments, numbers, *padded)


def first_fit(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Puts numbered things into bins: the largest thing first, each into the first bin that has space for it. This
    takes at most 11/9 of the fewest possible bins and one more (Johnson, 1973)."""
    bins: list[list[int]] = []
    space: list[int] = []
    for number in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        place = next((i for i, free in enumerate(space) if free >= sizes[number]), len(bins))
        if place == len(bins):
            bins.append([])
            space.append(capacity)
        bins[place].append(number)
        space[place] -= sizes[number]
    return bins


def deal(sizes: Int[np.ndarray, "N"], answer_sizes: Int[np.ndarray, "N"], batches: int) -> list[Int[np.ndarray, "B"]]:
    """Deals numbered pairs to batches of equally many, so that the batches' sums of both sizes are nearly equal.

    The pairs are dealt in rounds, from the largest to the smallest. In each round, the batches with the least so far
    get the larger pairs; the rounds judge by `sizes` and by `answer_sizes` in turn.
    """
    rounds = np.argsort(-sizes, kind="stable").reshape(-1, batches)
    dealt, sums = np.empty_like(rounds), np.zeros((2, batches), int)
    for number, pairs in enumerate(rounds):
        judged = (sizes, answer_sizes)[number % 2]
        poorest_first = np.argsort(sums[number % 2], kind="stable")
        dealt[number, poorest_first] = pairs[np.argsort(-judged[pairs], kind="stable")]
        sums += np.stack([sizes, answer_sizes])[:, dealt[number]]
    return list(dealt.T)


def _round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
