"""Turns examples into batches of token ids: padding, and an order that can be resumed at any step."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Num

from pargs_jax.data.examples import Example, lengths_of
from pargs_jax.data.packing import PackedTexts, Packing, deal
from pargs_jax.errors import InputError

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
        own: Bool[np.ndarray, "B"] | None = None,
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
            own: which rows of a batch this process reads; the others' tokens, rewards and labels are 0. Packed batches
                are read whole. By default, all.

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
        self._own = np.ones(batch_size * copies, bool) if own is None or packing is not None else own
        self._lengths = lengths = lengths_of(examples)
        self._prompt_lengths = lengths.prompts
        answer_lengths = lengths.answers.max(axis=1, initial=0)
        counts = lengths.prefix_counts.max(axis=1, initial=0)
        self._widths_of_counts = _widths(counts, max(max_length, counts.max()))
        self._widths_of_prompts = _widths(self._prompt_lengths, max_length)
        self._widths_of_answers = _widths(answer_lengths, max_length)
        self._answer_widths = self._widths_of_answers[np.searchsorted(self._widths_of_answers, answer_lengths)]
        if packing is not None:
            self._widths_of_prompts, self._widths_of_answers = (
                widths[-1:] for widths in (self._widths_of_prompts, self._widths_of_answers)
            )
            self._answer_sizes = lengths.answers.sum(axis=1)
            self._sizes = packing.size(lengths.prompts, lengths.answers.T)
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
        prompt_lengths, answer_lengths = self._lengths.prompts[rows], self._lengths.answers[rows]
        longest = answer_lengths.max(initial=0)
        prompts = np.zeros((len(rows), _width(self._widths_of_prompts, prompt_lengths.max())), np.int32)
        answers = np.zeros((*answer_lengths.shape, _width(self._widths_of_answers, longest)), np.int32)
        examples = {int(b): self._examples[int(rows[b])] for b in np.flatnonzero(self._own)}
        for b, example in examples.items():
            prompts[b, prompts.shape[1] - len(example.prompt) :] = example.prompt
            for a, ids in enumerate(example.answers):
                answers[b, a, : len(ids)] = ids
        batch = Batch(prompts, prompt_lengths, answers, answer_lengths, weights.astype(np.float32))
        for name in ("rewards", "labels"):
            batch = batch._replace(**{name: _numbers({b: getattr(x, name) for b, x in examples.items()}, len(rows))})
        if self._packing is not None:
            texts = [example.prompt for example in examples.values()], [x.answers for x in examples.values()]
            batch = batch._replace(packed=self._packing.pack(*texts, self._row_multiple))
        if all(example.prefixes is None for example in examples.values()):
            return batch
        return batch._replace(prefixes=self._prefixes(examples, rows, answers.shape[-1]))

    def _prefixes(self, examples: dict[int, Example], rows: Int[np.ndarray, "B"], width: int) -> PrefixTexts:
        """The prefixes of a batch's answers, padded as the answers are."""
        counts = self._lengths.prefix_counts[rows]
        number = _width(self._widths_of_counts, counts.max())
        tokens = np.zeros((*counts.shape, number, width), np.int32)
        lengths = np.zeros((*counts.shape, number), np.int32)
        for b, example in examples.items():
            for a, of_answer in enumerate(example.prefixes):
                for n, ids in enumerate(of_answer):
                    tokens[b, a, n, : len(ids)] = ids
                    lengths[b, a, n] = len(ids)
        return PrefixTexts(tokens, lengths, counts)


def _numbers(known: dict[int, tuple[float, ...] | None], rows: int) -> Float[np.ndarray, "B M"] | None:
    """Rewards or labels of a batch, of which some rows are known; None if rows have none."""
    first = next(iter(known.values()))
    if first is None:
        return None
    numbers = np.zeros((rows, len(first)), np.float32)
    for b, of_row in known.items():
        numbers[b] = of_row
    return numbers


def _widths(lengths: Int[np.ndarray, "N"], max_length: int) -> Int[np.ndarray, "W"]:
    """The widths that rows of these lengths are padded to, in increasing order."""
    needed = [np.quantile(lengths, 0.7, method="higher"), lengths.max()]
    return np.unique(np.minimum(np.ceil(np.array(needed) / 8).astype(int) * 8, max_length))


def _width(widths: Int[np.ndarray, "W"], length: int) -> int:
    return int(widths[np.searchsorted(widths, length)])
