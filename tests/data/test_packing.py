"""Packed batches: every text is there once, rows are full, and batches of one window have nearly the same size."""

from collections import Counter

import numpy as np
import pytest

from pargs_jax.data.batches import PACKED_WINDOW, Batches
from pargs_jax.data.examples import Example
from pargs_jax.data.packing import Packing, deal, first_fit

LONGEST = 30


def examples_of(count, answers=2, seed=0):
    """Examples of random tokens; a prompt has up to 20, an answer up to 10."""
    rng = np.random.default_rng(seed)

    def ids(most):
        return rng.integers(1, 1000, rng.integers(1, most + 1)).astype(np.int32)

    return [Example(ids(20), tuple(ids(10) for _ in range(answers))) for _ in range(count)]


def packed_batch(packing, answers=2, count=8):
    return Batches(examples_of(count, answers), count, LONGEST, seed=0, packing=packing).batch(0)


@pytest.mark.parametrize("answers", [1, 2, 5])
@pytest.mark.parametrize("width", [LONGEST, 45, 200])
@pytest.mark.parametrize("shares_prompts", [True, False])
@pytest.mark.parametrize("parts", [1, 2])
def test_every_answer_continues_its_prompt_in_one_segment(answers, width, shares_prompts, parts):
    batch = packed_batch(Packing(width, parts, shards=2, shares_prompts=shares_prompts), answers)
    for part in range(parts):
        pairs = range(part * 8 // parts, (part + 1) * 8 // parts)
        packed = [np.split(x, parts)[part] for x in batch.packed]
        tokens, positions, segments, numbers, slots, before = packed
        assert len(tokens) % 2 == len(slots) % 2 == 0 and tokens.shape[1] == width
        tokens, positions, segments, numbers = (x.reshape(-1) for x in (tokens, positions, segments, numbers))
        done = 0
        for local, pair in enumerate(pairs):
            prompt = batch.prompts[pair, batch.prompts.shape[1] - batch.prompt_lengths[pair] :]
            for a, length in enumerate(batch.answer_lengths[pair]):
                own = slots[done : done + length]
                np.testing.assert_array_equal(tokens[own], batch.answers[pair, a, :length])
                np.testing.assert_array_equal(numbers[own], a + 1)
                np.testing.assert_array_equal(positions[own], len(prompt) + np.arange(length))
                (segment,) = set(segments[own])
                assert segment // answers == local
                of_prompt = np.flatnonzero((segments == segment) & (numbers == 0))
                np.testing.assert_array_equal(tokens[of_prompt], prompt)
                np.testing.assert_array_equal(positions[of_prompt], np.arange(len(prompt)))
                assert len({*(of_prompt // width), *(own // width)}) == 1  # all in one row
                np.testing.assert_array_equal(before[done : done + length], [of_prompt[-1], *own[:-1]])
                if not shares_prompts:
                    assert own[0] == of_prompt[-1] + 1
                done += length
        copies = len(set(segments[segments >= 0]))
        assert copies == len(pairs) * answers if not shares_prompts else copies >= len(pairs)
        assert (segments >= 0).sum() == done + sum(
            batch.prompt_lengths[pairs[segment // answers]] for segment in set(segments[segments >= 0])
        )


def test_a_prompt_is_copied_only_for_answers_that_do_not_fit_its_row():
    plan = Packing(10).plan([4, 2], [[3, 4, 3], [1, 1]])
    assert sorted(segment for row in plan for segment in row) == [(0, [0, 2], 10), (0, [1], 8), (1, [0, 1], 4)]
    assert sorted(sum(segment.length for segment in row) for row in plan) == [4, 8, 10]


def test_the_largest_things_come_first_and_fill_the_first_bins():
    assert first_fit([3, 7, 5, 2, 3], 10) == [[1, 0], [2, 4, 3]]
    assert first_fit([], 10) == []


def test_dealt_batches_have_equally_many_pairs_and_nearly_the_same_sizes():
    rng = np.random.default_rng(0)
    answers = rng.integers(2, 200, 16 * 32)
    sizes = answers + rng.integers(1, 300, len(answers))
    batches = deal(sizes, answers, 32)
    assert sorted(np.concatenate(batches)) == list(range(len(sizes))) and {len(batch) for batch in batches} == {16}
    for what in (sizes, answers):
        sums = [what[batch].sum() for batch in batches]
        assert np.ptp(sums) < 0.05 * np.mean(sums)


def test_packed_batches_depend_on_seed_and_step_only_and_have_every_row_once_an_epoch():
    examples, packing = examples_of(300), Packing(64)
    in_order = Batches(examples, 4, LONGEST, seed=3, packing=packing)
    steps = [in_order.batch(step) for step in range(75)]
    for step in (70, 2, 17, 70, 0):
        fresh = Batches(examples, 4, LONGEST, seed=3, packing=packing).batch(step)
        np.testing.assert_array_equal(steps[step].prompts, fresh.prompts)
        for ours, theirs in zip(steps[step].packed, fresh.packed, strict=True):
            np.testing.assert_array_equal(ours, theirs)
    prompts = Counter(tuple(example.prompt) for example in examples)
    seen = Counter(
        tuple(ids[len(ids) - length :])
        for batch in steps
        for ids, length in zip(batch.prompts, batch.prompt_lengths, strict=True)
    )
    assert seen == prompts
    assert steps[0].prompts.shape == steps[1].prompts.shape and steps[0].answers.shape == steps[1].answers.shape


def test_the_order_does_not_depend_on_how_rows_are_cut_into_micro_batches():
    batches = [Batches(examples_of(64), 8, LONGEST, seed=0, packing=Packing(64, parts)).batch(3) for parts in (1, 2, 4)]
    for batch in batches[1:]:
        np.testing.assert_array_equal(batch.prompts, batches[0].prompts)


def test_a_run_has_few_shapes_with_little_padding():
    batches = Batches(examples_of(16 * PACKED_WINDOW), 16, LONGEST, seed=0, packing=Packing(2 * LONGEST))
    packed = [batches.batch(step).packed for step in range(PACKED_WINDOW)]
    assert len({(each.tokens.shape, each.answer_slots.shape) for each in packed}) <= 3
    assert np.mean([each.segments < 0 for each in packed if each.tokens.shape == packed[0].tokens.shape]) < 0.12
    assert Packing(512).row_multiple(512 * 100) == 4 and Packing(512, shards=8).row_multiple(100) == 8


def test_packed_evaluation_sees_every_row_once_and_fills_up_with_weight_0():
    examples = examples_of(21)
    batches = list(Batches(examples, 8, LONGEST, seed=0, packing=Packing(64)).evaluation())
    weights = np.concatenate([batch.weights for batch in batches])
    lengths = np.concatenate([batch.prompt_lengths for batch in batches])
    assert len(batches) == 3 and weights.sum() == 21 and len(weights) == 24
    assert sorted(lengths[weights == 1]) == sorted(len(example.prompt) for example in examples)
    assert {batch.packed.tokens.shape for batch in batches} == {batches[0].packed.tokens.shape}
