"""Turns preferences into batches of token ids: truncation, padding, and an order that can be resumed at any step."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, Num

from pargs_jax.data.packing import PackedTexts, Packing, deal
from pargs_jax.data.preferences import Preference
from pargs_jax.errors import InputError
from pargs_jax.text.tokenization import TextTokenizer

WINDOW = 16
"""The most batches that are filled together from rows sorted by size."""
PACKED_WINDOW = 32
"""The most packed batches whose rows are dealt out together."""


class PrefixTexts(NamedTuple):
    """The prefixes of answers that end at another tokenizer's tokens; each prefix has its own token ids.

    Attributes:
        tokens: token ids of N prefixes, the shortest first and the whole answer last, padded on the right.
        lengths: tokens of each prefix; at least 0.
        counts: how many of the N prefixes are real; at least 1.
    """

    tokens: Int[np.ndarray, "B A N R"]
    lengths: Int[np.ndarray, "B A N"]
    counts: Int[np.ndarray, "B A"]


class Rollout(NamedTuple):
    """What a step learns of answers that the trained model sampled, one in each row; R slots, 0 beyond an answer's end.

    Attributes:
        log_probs: each token's, under the policy that sampled it, in nats.
        advantages: of each token, or of whole answers.
        returns: the value that the text before each token should have; None without a critic.
    """

    log_probs: Float[np.ndarray, "B R"]
    advantages: Float[np.ndarray, "B *R"]
    returns: Float[np.ndarray, "B R"] | None = None


class Batch(NamedTuple):
    """Rows of one step. Lengths say which tokens are padding, never a token id.

    Attributes:
        prompts: token ids, padded on the left.
        prompt_lengths: tokens of each prompt; at least 1.
        answers: token ids, padded on the right, end-of-sequence included; A is 2 (chosen, rejected), 1 (chosen), the
            number of scored answers that were asked for, or 0 in a batch of prompts.
        answer_lengths: tokens of each answer; at least 1.
        weights: 1 for a row, 0 for a copy that only fills up the last evaluation batch.
        prefixes: the answers' prefixes where they end at another tokenizer's tokens; None where they end at the model's
            own.
        rewards: the rewards of scored answers; None if rows have none.
        labels: for each of M objectives, 1 where the first answer is better, 0 where the second is; None if rows have
            none.
        rollout: the numbers of answers that the trained model sampled; None for other answers.
        packed: the same prompts and answers once more, packed. If they are there, models with one pass read these.
    """

    prompts: Int[np.ndarray, "B P"]
    prompt_lengths: Int[np.ndarray, "B"]
    answers: Int[np.ndarray, "B A R"]
    answer_lengths: Int[np.ndarray, "B A"]
    weights: Float[np.ndarray, "B"]
    prefixes: PrefixTexts | None = None
    rewards: Float[np.ndarray, "B A"] | None = None
    labels: Float[np.ndarray, "B M"] | None = None
    rollout: Rollout | None = None
    packed: PackedTexts | None = None

    @property
    def prefix_counts(self) -> Int[np.ndarray, "B A"]:
        """The number of prefixes of each answer."""
        return self.answer_lengths if self.prefixes is None else self.prefixes.counts

    @property
    def most_prefixes(self) -> int:
        """N, the padded number of prefixes of each answer."""
        return (self.answers if self.prefixes is None else self.prefixes.lengths).shape[2]


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

    rows: int
    prompts_cut: int = 0
    answers_cut: int = 0
    tokens_lost: int = 0
    rows_left_out: int = 0
    ungrouped: int = 0

    def __str__(self) -> str:
        ungrouped = f", {self.ungrouped} left out because their prompts have too few others" if self.ungrouped else ""
        used = self.rows - self.rows_left_out - self.ungrouped
        return (
            f"{used} of {self.rows} rows are used: {self.prompts_cut} prompts and {self.answers_cut} answers cut, "
            f"{self.tokens_lost} tokens lost, {self.rows_left_out} rows left out because their answers became the same"
            f"{ungrouped}"
        )


def tokenise(
    preferences: Sequence[Preference],
    tokenizer: TextTokenizer,
    max_length: int,
    answers: int = 2,
    prefix_tokenizer: TextTokenizer | None = None,
    samples: int = 0,
) -> tuple[list[Example], TruncationReport]:
    """Tokenises prompts and answers separately and cuts them to fit.

    The end-of-sequence token is part of a finished answer. If a prompt and its longest answer exceed `max_length`
    tokens, the prompt first loses tokens on the left, but never BOS, and it keeps at least half of `max_length`. Then
    answers lose tokens on the right.

    Args:
        preferences: the rows; with `answers=2` each needs a rejected answer.
        tokenizer: the model's tokenizer.
        max_length: the most tokens of prompt and answer together; at least 2.
        answers: 2 for chosen and rejected, 1 for chosen alone.
        prefix_tokenizer: the tokenizer of a language model; prefixes end at its tokens. By default they end at the
            tokens of the model that is trained.
        samples: how many scored answers to one prompt make an example; 0: every row is an example.

    Raises InputError if `max_length` is below 2, no prompt has `samples` answers, or no row is left after truncation.
    """
    if max_length < 2:
        raise InputError(
            f"max_length: got {max_length}, must be at least 2: one token of the prompt and one of the answer"
        )
    examples = []
    prompts_cut = answers_cut = tokens_lost = 0
    groups = _samples_of_prompts(preferences, samples) if samples else [[preference] for preference in preferences]
    for group in groups:
        preference = group[0]
        whole_prompt = tokenizer.encode_prompt(preference.prompt)
        whole_answers = [
            tokenizer.encode_answer(text, starts_text=not preference.prompt) + [tokenizer.eos_id] * each.finished
            for each in group
            for text in (each.chosen, each.rejected)[:answers]
        ]
        prompt = _cut_prompt(whole_prompt, max(map(len, whole_answers)), max_length, tokenizer.bos_id)
        cut_answers = [ids[: max_length - len(prompt)] for ids in whole_answers]
        lost = [len(whole) - len(cut) for whole, cut in zip(whole_answers, cut_answers, strict=True)]
        prompts_cut += len(prompt) < len(whole_prompt)
        answers_cut += sum(map(bool, lost))
        tokens_lost += len(whole_prompt) - len(prompt) + sum(lost)
        if answers == 1 or cut_answers[0] != cut_answers[1]:
            ids = tuple(np.asarray(answer, np.int32) for answer in cut_answers)
            prefixes = None
            if prefix_tokenizer is not None:
                texts = (preference.chosen, preference.rejected)[:answers]
                capacity = max_length - len(prompt)
                prefixes = tuple(
                    (*_prefixes_at(prefix_tokenizer, tokenizer, preference.prompt, text, capacity), whole)
                    for text, whole in zip(texts, ids, strict=True)
                )
            rewards = None if preference.reward is None else tuple(each.reward for each in group)
            examples.append(Example(np.asarray(prompt, np.int32), ids, prefixes, rewards, preference.labels))
    report = TruncationReport(
        len(preferences),
        prompts_cut,
        answers_cut,
        tokens_lost,
        rows_left_out=len(groups) - len(examples),
        ungrouped=len(preferences) - sum(map(len, groups)),
    )
    if not examples:
        raise InputError(f"no rows are left after cutting to max_length {max_length}; {report}")
    return examples, report


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


def _cut_prompt(prompt: list[int], longest_answer: int, max_length: int, bos_id: int | None) -> list[int]:
    """The prompt without the tokens on its left that `tokenise` removes."""
    excess = len(prompt) + longest_answer - max_length
    if excess <= 0:
        return prompt
    keep = max(len(prompt) - excess, min(len(prompt), max_length // 2))
    head = prompt[:1] if prompt[0] == bos_id else []
    return head + prompt[len(prompt) - keep + len(head) :]


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


class Batches:
    """An endless, shuffled stream of training batches, and the same rows in order for evaluation.

    The stream consists of epochs. Each epoch is a permutation of the rows, so every row occurs once per epoch. A batch
    may extend across the end of an epoch. The next epoch then begins with rows that the batch does not contain yet, so
    no row is in a batch twice. If a batch is larger than the data set, its places are divided evenly among the rows.

    Each epoch is divided into windows of up to `WINDOW` batches. The rows of a window are sorted by size, cut into
    batches, and the batches are shuffled, so that a batch has rows of similar size and little padding.

    P and R each have two widths, so a jitted step compiles for at most four shapes. The widths are the largest length
    and the length that 70 % of the rows do not exceed, rounded up to a multiple of 8 but never above the maximum
    length.

    With `packing`, the rows of a window of up to `PACKED_WINDOW` batches are dealt out so that all of its batches have
    nearly the same number of tokens, because a jitted step compiles for each number of packed rows. P and R then have
    one width each.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        batch_size: int,
        max_length: int,
        seed: int,
        *,
        copies: int = 1,
        packing: Packing | None = None,
    ) -> None:
        """Makes the stream.

        Args:
            examples: the rows, all with the same number of answers.
            batch_size: rows in each batch.
            max_length: the length that the examples were cut to, in tokens.
            seed: together with the step, decides the order.
            copies: how often each row is in its batch; a row's copies are consecutive, and `batch_size` counts them
                once.
            packing: how batches are packed, if they are.

        Raises InputError if there are no examples, or the batch size or the seed is out of range.
        """
        if not examples:
            raise InputError("there are no examples to make batches of")
        if batch_size < 1:
            raise InputError(f"batch_size: got {batch_size}, must be at least 1")
        if seed < 0:
            raise InputError(f"seed: got {seed}, must be at least 0")
        self._examples = examples
        self._batch_size = batch_size
        self._seed = seed
        self._copies = copies
        self._packing = packing
        self._prompt_lengths = np.array([len(example.prompt) for example in examples])
        answer_lengths = np.array([max(map(len, example.answers), default=0) for example in examples])
        counts = np.array([max(example.prefix_counts, default=0) for example in examples])
        self._widths_of_counts = _widths(counts, max(max_length, counts.max()))
        self._widths_of_prompts = _widths(self._prompt_lengths, max_length)
        self._widths_of_answers = _widths(answer_lengths, max_length)
        self._answer_widths = self._widths_of_answers[np.searchsorted(self._widths_of_answers, answer_lengths)]
        if packing is not None:
            self._widths_of_prompts, self._widths_of_answers = (
                widths[-1:] for widths in (self._widths_of_prompts, self._widths_of_answers)
            )
            lengths = [list(map(len, example.answers)) for example in examples]
            self._answer_sizes = np.array(list(map(sum, lengths)))
            self._sizes = np.array(list(map(packing.size, self._prompt_lengths, lengths)))
            self._row_multiple = packing.row_multiple(self._sizes.mean() * batch_size * copies / packing.parts)
        self._window: tuple[range, list[Int[np.ndarray, "B"]]] = (range(0), [])
        self._orders: dict[int, Int[np.ndarray, "N"]] = {}

    def batch(self, step: int) -> Batch:
        """The training batch of a step (from 0); it depends on the seed and the step only."""
        if step not in self._window[0]:
            window = self._window_of(step)
            self._window = (window, self._rows_of_window(window))
        window, batches = self._window
        rows = batches[step - window.start]
        return self._collate(rows, np.ones(len(rows)))

    def evaluation(self) -> Iterator[Batch]:
        """Yields every row once, sorted by size unless packed; what is missing is filled up with copies of weight 0."""
        order = self._by_size(np.arange(len(self._examples)))
        missing = -len(order) % self._batch_size
        rows = np.concatenate([order, np.repeat(order[:1], missing)])
        is_real = np.arange(len(rows)) < len(order)
        for places in self._divided(rows, len(rows) // self._batch_size):
            yield self._collate(rows[places], is_real[places])

    def _window_of(self, step: int) -> range:
        """The steps whose batches are filled together with this one; only this step if its batch crosses an epoch's
        end."""
        rows, size = len(self._examples), self._batch_size
        epoch = step * size // rows
        first, end = -(-epoch * rows // size), (epoch + 1) * rows // size  # batches inside the epoch
        if not first <= step < end:
            return range(step, step + 1)
        length = WINDOW if self._packing is None else PACKED_WINDOW
        start = step - (step - first) % length
        return range(start, min(start + length, end))

    def _rows_of_window(self, window: range) -> list[Int[np.ndarray, "B"]]:
        """Row numbers of each batch in a window."""
        places = np.arange(window.start * self._batch_size, window.stop * self._batch_size)
        epochs, places = np.divmod(places, len(self._examples))
        rows = np.concatenate([self._order(int(epoch))[places[epochs == epoch]] for epoch in np.unique(epochs)])
        rows = self._by_size(rows)
        batches = [rows[places] for places in self._divided(rows, len(window))]
        order = np.random.default_rng([self._seed, 1, window.start]).permutation(len(window))
        return [batches[i] for i in order]

    def _divided(self, rows: Int[np.ndarray, "N"], batches: int) -> list[Int[np.ndarray, "B"]]:
        """Which of the sorted rows are in each batch: neighbours, or, if packed, rows of every size."""
        if self._packing is None:
            return np.split(np.arange(len(rows)), batches)
        return deal(self._sizes[rows], self._answer_sizes[rows], batches)

    def _order(self, epoch: int) -> Int[np.ndarray, "N"]:
        """The rows of an epoch in the order of the stream; they depend on the seed and the epoch only.

        The order depends on the epoch before if a batch crosses from that epoch into this one, and so on back to an
        epoch that starts at the start of a batch. That is at most `batch_size` epochs, however long the stream.
        """
        chain = [epoch]
        while chain[-1] not in self._orders and (opened := self._opened_in(chain[-1])[0]) != chain[-1]:
            chain.append(opened)
        for link in reversed(chain):
            if link not in self._orders:
                order, opened = self._make_order(link), self._opened_in(link)[0]
                before = {opened: self._orders[opened]} if opened in self._orders else {}
                self._orders = {**before, link: order}  # later epochs do not need the others
        return self._orders[epoch]

    def _opened_in(self, epoch: int) -> tuple[int, int]:
        """Where the batch with the epoch's first row begins: an epoch and a position in it."""
        return divmod(epoch * len(self._examples) // self._batch_size * self._batch_size, len(self._examples))

    def _make_order(self, epoch: int) -> Int[np.ndarray, "N"]:
        """The epoch's permutation; the batch that crosses into it is filled up with rows that the batch does not hold
        yet."""
        permutation = np.random.default_rng([self._seed, 0, epoch]).permutation(len(self._examples))
        opened, place = self._opened_in(epoch)
        if opened == epoch:
            return permutation
        is_new = ~np.isin(permutation, self._orders[opened][place:])
        goes_first = is_new & (np.cumsum(is_new) <= -epoch * len(permutation) % self._batch_size)
        return np.concatenate([permutation[goes_first], permutation[~goes_first]])

    def _by_size(self, rows: Int[np.ndarray, "N"]) -> Int[np.ndarray, "N"]:
        """The rows sorted by answer width, then prompt length. Sorted by the sum, batches would be wide in both P and
        R."""
        return rows[np.lexsort((self._prompt_lengths[rows], self._answer_widths[rows]))]

    def _collate(self, rows: Int[np.ndarray, "B"], weights: Num[np.ndarray, "B"]) -> Batch:
        """The batch of these rows."""
        rows, weights = (np.repeat(each, self._copies) for each in (rows, weights))
        examples = [self._examples[row] for row in rows]
        prompt_lengths = np.array([len(example.prompt) for example in examples], np.int32)
        answer_lengths = np.array([[len(ids) for ids in example.answers] for example in examples], np.int32)
        longest = answer_lengths.max(initial=0)
        prompts = np.zeros((len(rows), _width(self._widths_of_prompts, prompt_lengths.max())), np.int32)
        answers = np.zeros((*answer_lengths.shape, _width(self._widths_of_answers, longest)), np.int32)
        for b, example in enumerate(examples):
            prompts[b, prompts.shape[1] - len(example.prompt) :] = example.prompt
            for a, ids in enumerate(example.answers):
                answers[b, a, : len(ids)] = ids
        batch = Batch(prompts, prompt_lengths, answers, answer_lengths, weights.astype(np.float32))
        if examples[0].rewards is not None:
            batch = batch._replace(rewards=np.array([example.rewards for example in examples], np.float32))
        if examples[0].labels is not None:
            batch = batch._replace(labels=np.array([example.labels for example in examples], np.float32))
        if self._packing is not None:
            texts = [example.prompt for example in examples], [example.answers for example in examples]
            batch = batch._replace(packed=self._packing.pack(*texts, self._row_multiple))
        return batch if examples[0].prefixes is None else batch._replace(prefixes=self._prefixes(examples, answers))

    def _prefixes(self, examples: Sequence[Example], answers: Int[np.ndarray, "B A R"]) -> PrefixTexts:
        """The prefixes of a batch's answers, padded as the answers are."""
        counts = np.array([example.prefix_counts for example in examples], np.int32)
        number = _width(self._widths_of_counts, counts.max())
        tokens = np.zeros((*counts.shape, number, answers.shape[-1]), np.int32)
        lengths = np.zeros((*counts.shape, number), np.int32)
        for b, example in enumerate(examples):
            for a, of_answer in enumerate(example.prefixes):
                for n, ids in enumerate(of_answer):
                    tokens[b, a, n, : len(ids)] = ids
                    lengths[b, a, n] = len(ids)
        return PrefixTexts(tokens, lengths, counts)


def _widths(lengths: Int[np.ndarray, "N"], max_length: int) -> Int[np.ndarray, "W"]:
    """The widths that rows of these lengths are padded to, in increasing order."""
    needed = [np.quantile(lengths, 0.7, method="higher"), lengths.max()]
    return np.unique(np.minimum(np.ceil(np.array(needed) / 8).astype(int) * 8, max_length))


def _width(widths: Int[np.ndarray, "W"], length: int) -> int:
    return int(widths[np.searchsorted(widths, length)])
