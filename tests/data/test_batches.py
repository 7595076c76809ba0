"""Truncation, padding, and the order of rows."""

from collections import Counter

import numpy as np
import pytest

from pargs_jax.data.batches import WINDOW, Batches
from pargs_jax.data.examples import Example, tokenise
from pargs_jax.data.preferences import Preference
from pargs_jax.errors import InputError

BOS, EOS = 1, 2


class LetterTokenizer:
    """One token a letter, BOS before prompts."""

    bos_id, eos_id = BOS, EOS

    def encode_prompt(self, text):
        return [BOS, *map(ord, text)]

    def encode_answer(self, text, *, starts_text=False):
        return [*([3] if starts_text else []), *map(ord, text)]


def letters(ids):
    return "".join({BOS: "<", EOS: ">", 3: "^"}.get(i) or chr(i) for i in ids)


def tokenised(prompt, chosen, rejected, max_length, answers=2):
    examples, report = tokenise(
        [Preference("1", prompt, chosen, rejected)], LetterTokenizer(), max_length, answers=answers
    )
    return letters(examples[0].prompt), *map(letters, examples[0].answers), report


@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected", "max_length", "expected"),
    [
        ("abc", "xy", "z", 8, ("<abc", "xy>", "z>")),  # fits: 4 + 3
        ("abcdefg", "xy", "z", 8, ("<defg", "xy>", "z>")),  # the prompt's left goes first
        ("abcdefg", "stuvwx", "z", 8, ("<efg", "stuv", "z>")),  # half is the prompt's, then answers lose their right
        ("ab", "stuvwx", "z", 8, ("<ab", "stuvw", "z>")),  # a prompt below the half stays whole
        ("abc", "stuv", "z", 8, ("<abc", "stuv", "z>")),  # the end-of-sequence token alone is cut
        ("", "xy", "z", 8, ("<", "^xy>", "^z>")),
        ("abc", "xy", "z", 2, ("<", "x", "z")),
    ],
)
def test_truncation(prompt, chosen, rejected, max_length, expected):
    *texts, report = tokenised(prompt, chosen, rejected, max_length)
    assert tuple(texts) == expected
    whole = len(prompt) + 1 + sum(len(text) + 1 + (not prompt) for text in (chosen, rejected))
    assert report.tokens_lost == whole - sum(map(len, texts))
    assert report.prompts_cut == (len(texts[0]) < len(prompt) + 1)
    assert report.answers_cut == sum(not text.endswith(">") for text in texts[1:])


def test_rows_that_truncation_makes_equal_are_left_out_and_counted():
    rows = [
        Preference(
            "1",
            "abcd",
            "same-1",
            "same-2",
        ),
        Preference("2", "abcd", "x", "y"),
    ]
    examples, report = tokenise(rows, LetterTokenizer(), max_length=8)
    assert [letters(example.answers[0]) for example in examples] == ["x>"]
    assert report.rows_left_out == 1
    assert str(report) == (
        "1 of 2 rows are used: 1 prompts and 2 answers cut, 7 tokens lost, 1 rows left out because their answers "
        "became the same"
    )
    with pytest.raises(InputError, match="no rows are left after cutting to max_length 8"):
        tokenise(rows[:1], LetterTokenizer(), max_length=8)
    assert len(tokenise(rows, LetterTokenizer(), max_length=8, answers=1)[0]) == 2


def examples_of(count, answers=2, seed=0):
    """Examples that begin with their own number, so that a row can be recognised in a batch."""
    random = np.random.default_rng(seed)

    def ids(number, limit):
        return np.full(random.integers(1, limit), number, np.int32)

    return [Example(ids(i, 40), tuple(ids(i, 60) for _ in range(answers))) for i in range(count)]


def rows_in(batch):
    return batch.prompts[:, -1].tolist()


def test_a_batch_is_a_pure_function_of_seed_and_step():
    examples = examples_of(50)
    in_order = Batches(examples, 4, 100, seed=3)
    steps = [in_order.batch(step) for step in range(3 * WINDOW)]
    for step in (40, 2, 17, 40, 0):
        fresh = Batches(examples, 4, 100, seed=3)
        for ours, theirs in zip(steps[step], fresh.batch(step), strict=True):
            np.testing.assert_array_equal(ours, theirs)
    assert [rows_in(batch) for batch in steps] != [
        rows_in(Batches(examples, 4, 100, seed=4).batch(step)) for step in range(3 * WINDOW)
    ]


SIZES = [
    (64, 64),
    (65, 64),
    (127, 64),
    (256, 64),
    (1, 64),
    (1, 1),
    (7, 3),
    (96, 2),
    (200, 5),
    (3, 7),
    (5, 64),
    (64, 5),
    (12, 24),
]


@pytest.mark.parametrize(("count", "batch_size"), SIZES + [(n, b) for n in range(2, 12) for b in range(2, 12)])
def test_a_row_comes_once_an_epoch_and_not_twice_in_a_batch(count, batch_size):
    batches = Batches(examples_of(count), batch_size, 100, seed=0)
    seen = Counter(dict.fromkeys(range(count), 0))
    for step in range(max(3 * WINDOW, 5 * -(-count // batch_size))):
        times = Counter(rows_in(batches.batch(step)))
        assert max(times.values()) <= -(-batch_size // count)
        seen.update(times)
        assert max(seen.values()) - min(seen.values()) <= 1  # whole epochs, and a part of one


@pytest.mark.parametrize(("count", "batch_size"), [(7, 3), (3, 7), (65, 64), (1000, 64)])
def test_a_batch_does_not_depend_on_the_batches_read_before(count, batch_size):
    """Distant steps are available without computing the earlier ones."""
    steps = [0, 1, 63, 64, 1000, 1001, 10**9, 10**9 + 1]
    expected = [rows_in(Batches(examples_of(count), batch_size, 100, seed=3).batch(step)) for step in steps]
    for order in (range(len(steps)), reversed(range(len(steps)))):
        batches = Batches(examples_of(count), batch_size, 100, seed=3)
        assert {i: rows_in(batches.batch(steps[i])) for i in order} == dict(enumerate(expected))
    batches = Batches(examples_of(count), batch_size, 100, seed=3)
    in_order = [rows_in(batches.batch(step)) for step in range(1002)]
    assert [in_order[step] for step in steps[:6]] == expected[:6]


def test_epochs_differ_and_lengths_are_alike_within_a_batch():
    batches = Batches(examples_of(4 * WINDOW), 4, 100, seed=0)
    epochs = [[rows_in(batches.batch(epoch * WINDOW + step)) for step in range(WINDOW)] for epoch in range(2)]
    assert epochs[0] != epochs[1]
    widths = [batches.batch(step).answers.shape[2] for step in range(WINDOW)]
    assert widths != sorted(widths)  # the batches of a window come in random order
    assert np.mean(widths) < 60  # unsorted, nearly every batch would be as wide as the longest answer


@pytest.mark.parametrize("answers", [1, 2])
def test_padding_sides_and_lengths(answers):
    examples = examples_of(20, answers)
    batch = Batches(examples, 8, 100, seed=0).batch(0)
    assert batch.answers.shape[:2] == batch.answer_lengths.shape == (8, answers)
    assert all(array.dtype == np.int32 for array in batch[:4])
    assert batch.weights.dtype == np.float32
    for b, row in enumerate(rows_in(batch)):
        length = batch.prompt_lengths[b]
        np.testing.assert_array_equal(batch.prompts[b, batch.prompts.shape[1] - length :], examples[row].prompt)
        assert not batch.prompts[b, : batch.prompts.shape[1] - length].any()
        for a in range(answers):
            length = batch.answer_lengths[b, a]
            np.testing.assert_array_equal(batch.answers[b, a, :length], examples[row].answers[a])
            assert not batch.answers[b, a, length:].any()
    assert batch.weights.tolist() == [1.0] * 8


class PairsOfLettersTokenizer(LetterTokenizer):
    """A language model's tokenizer, of which every token is two letters."""

    def encode_answer(self, text, *, starts_text=False):
        return list(range(-(-len(text) // 2)))

    def decode_answer(self, prompt_ids, ids):
        return "abcde"[: 2 * len(ids)]


def test_prefixes_that_end_at_another_tokenizers_tokens_are_counted_apart_from_tokens():
    rows = [Preference("1", "p", "abcde", "ab")]
    examples, _ = tokenise(rows, LetterTokenizer(), 20, prefix_tokenizer=PairsOfLettersTokenizer())
    (batch,) = Batches(examples, 1, 20, seed=0).evaluation()
    assert batch.answer_lengths.tolist() == [[6, 3]]
    assert batch.prefix_counts.tolist() == [[4, 2]] and batch.most_prefixes == 8
    tokens = [
        [letters(ids[:length]) for ids, length in zip(*of_answer, strict=True)]
        for of_answer in zip(batch.prefixes.tokens[0], batch.prefixes.lengths[0], strict=True)
    ]
    assert tokens[0][:4] == ["ab", "abcd", "abcde", "abcde>"] and tokens[1][:2] == ["ab", "ab>"]


def test_prompts_and_answers_have_two_widths_each():
    examples = examples_of(200)
    batches = Batches(examples, 2, 100, seed=0)
    shapes = [(batch.prompts.shape[1], batch.answers.shape[2]) for batch in map(batches.batch, range(100))]
    longest = max(len(example.prompt) for example in examples), max(len(a) for e in examples for a in e.answers)
    for widths, length in zip(map(set, zip(*shapes, strict=True)), longest, strict=True):
        assert len(widths) == 2
        assert max(widths) == -(-length // 8) * 8
    longest = Example(np.ones(29, np.int32), (np.ones(1, np.int32),))
    assert Batches([longest], 1, 30, seed=0).batch(0).prompts.shape == (1, 30)


def test_evaluation_sees_every_row_once_and_fills_up_with_weight_0():
    batches = list(Batches(examples_of(21), 8, 100, seed=0).evaluation())
    weights = np.concatenate([batch.weights for batch in batches])
    rows = np.concatenate([rows_in(batch) for batch in batches])
    assert len(batches) == 3
    assert weights.tolist() == [1.0] * 21 + [0.0] * 3
    assert sorted(rows[weights == 1]) == list(range(21))
    widths = [batch.answers.shape[2] for batch in batches]
    assert widths == sorted(widths)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"examples": []}, "no examples"),
        ({"batch_size": 0}, "batch_size: got 0"),
        ({"seed": -1}, "seed: got -1"),
    ],
)
def test_impossible_options_are_errors(options, reason):
    with pytest.raises(InputError, match=reason):
        Batches(**{"examples": examples_of(2), "batch_size": 2, "max_length": 100, "seed": 0, **options})
    with pytest.raises(InputError, match="max_length: got 1"):
        tokenise([], LetterTokenizer(), 1)


def test_scored_answers_keep_their_rewards_and_end_as_they_did():
    rows = [Preference("1", "p", "abc", None, 0.25), Preference("2", "pq", "ab", None, -3.0, finished=False)]
    examples, _ = tokenise(rows, LetterTokenizer(), max_length=16, answers=1)
    assert [letters(example.answers[0]) for example in examples] == ["abc>", "ab"]
    batches = Batches(examples, 2, 16, seed=0)
    for batch in (batches.batch(0), next(batches.evaluation())):
        assert dict(zip(batch.prompt_lengths.tolist(), batch.rewards[:, 0].tolist(), strict=True)) == {2: 0.25, 3: -3.0}
    assert Batches(examples_of(4), 2, 100, seed=0).batch(0).rewards is None
