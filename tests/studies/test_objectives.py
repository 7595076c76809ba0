"""The numbers of the study of two objectives: against counting, and by hand."""

import numpy as np
import pytest

from studies.objectives.fronts import hypervolume, hypervolume_estimate, inner_products, on_front

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("count", [1, 2, 7, 30])
def test_a_hypervolume_is_the_share_of_random_points_that_are_dominated(count):
    points = RNG.uniform(-0.5, 1, size=(count, 2))
    thrown = RNG.uniform(0, 1, size=(200_000, 2))
    dominated = (thrown[:, None] < points).all(axis=-1).any(axis=1)
    assert hypervolume(points, (0, 0)) == pytest.approx(dominated.mean(), abs=0.005)


def test_a_hypervolume_by_hand():
    points = np.array([[1.0, 3.0], [2.0, 2.0], [3.0, -5.0], [1.5, 1.5], [2.0, 2.0]])
    assert hypervolume(points, (0, 0)) == 1 * 3 + 1 * 2
    assert hypervolume(points, (-1, -6)) == 2 * 9 + 1 * 8 + 1 * 1
    assert hypervolume(points, (5, 5)) == 0
    assert on_front(points).tolist() == [True, True, True, False, True]


def test_inner_products_by_hand():
    preferences = np.array([[1.0, 0.0], [0.25, 0.75]])
    assert inner_products(preferences, np.array([[2.0, 9.0], [4.0, 8.0]])) == (2 + 1 + 6) / 2


def test_the_standard_error_of_a_hypervolume_covers_prompts_and_training_runs():
    """One point above the origin: the area is the product of its rewards."""
    prompts, runs = RNG.normal(size=(200, 1, 50, 1, 2)), 0.3 * RNG.normal(size=(200, 4, 1, 1, 2))
    found = [hypervolume_estimate(each, (0, 0)) for each in 3 + prompts + runs]
    variance = 3**2 * 2 * (1 / 50 + 0.3**2 / 4)
    assert np.mean([each.standard_error**2 for each in found]) == pytest.approx(variance, rel=0.1)
    assert np.mean([each.mean for each in found]) == pytest.approx(9, rel=0.02)
