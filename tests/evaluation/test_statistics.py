"""Statistics, against scipy and against a bootstrap on the same numbers."""

import math

import numpy as np
import pytest
from scipy import optimize, special, stats

from pargs_jax.evaluation.statistics import (
    Estimate,
    bootstrap,
    calibration_error,
    clustered_rate,
    holm,
    length_controlled_win_rate,
    paired_difference,
    reliability,
    spearman,
    wilson,
    win_scores,
)

RNG = np.random.default_rng(0)


def test_a_mean_and_its_standard_error():
    mean, error = Estimate.of([1.0, 2.0, 4.0, 5.0])
    assert mean == 3.0
    assert error == pytest.approx(math.sqrt(10 / 3 / 4))
    assert str(Estimate(1.234, 0.056)) == "1.23 ± 0.06"


def test_one_value_has_no_standard_error_and_none_have_no_mean():
    assert math.isnan(Estimate.of([2.0]).standard_error)
    with pytest.raises(ValueError, match="no values"):
        Estimate.of([])


def test_a_means_interval_is_students():
    values = RNG.normal(size=12)
    found = stats.ttest_1samp(values, 0).confidence_interval()
    assert Estimate.of(values).interval(12) == pytest.approx((found.low, found.high))


def test_a_paired_difference_is_the_paired_t_test_and_its_error_the_bootstraps():
    a, b = RNG.normal(size=80), RNG.normal(0.3, 2, size=80)
    found, expected = paired_difference(a, b), stats.ttest_rel(a, b)
    assert found.p == pytest.approx(expected.pvalue)
    interval = expected.confidence_interval()
    assert found.interval == pytest.approx((interval.low, interval.high))
    drawn = stats.bootstrap((a - b,), np.mean, n_resamples=2000, rng=np.random.default_rng(1))
    assert found.standard_error == pytest.approx(drawn.standard_error, rel=0.06)


def test_differences_that_are_all_alike_are_certain_and_a_single_one_is_not():
    assert paired_difference([2, 3, 4], [1, 2, 3]).p == 0
    assert paired_difference([1, 2], [1, 2]).p == 1
    assert math.isnan(paired_difference([1], [0]).p)


def test_holm_is_the_stepwise_test():
    p = [0.01, 0.04, 0.03, 0.005, math.nan]
    assert holm(p) == pytest.approx([0.03, 0.06, 0.06, 0.02, math.nan], nan_ok=True)
    # Rejecting by adjusted values is the procedure as it was published: stop at the first that is too large.
    p = RNG.uniform(size=30) ** 3
    order = np.argsort(p)
    passes = p[order] <= 0.05 / np.arange(30, 0, -1)
    rejected = set(order[: len(p) if passes.all() else int(np.argmin(passes))])
    assert {i for i, adjusted in enumerate(holm(p)) if adjusted <= 0.05} == rejected
    assert holm([]) == []


@pytest.mark.parametrize(("wins", "trials"), [(0, 7), (3, 10), (55, 100), (40, 40)])
def test_wilsons_interval_is_scipys(wins, trials):
    expected = stats.binomtest(wins, trials).proportion_ci(method="wilson")
    assert wilson(wins / trials, trials) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_a_rate_of_like_pairs_has_fewer_independent_ones():
    values = (RNG.uniform(size=60) < 0.6).astype(float)
    alone = clustered_rate(values, np.arange(60))
    assert alone[1] == wilson(values.mean(), 60)
    # Every pair four times: nothing is learnt from the copies. 59 of 60, as a variance is estimated.
    copies = clustered_rate(np.repeat(values, 4), np.repeat(np.arange(60), 4))
    assert copies[0] == alone[0]
    assert copies[1] == pytest.approx(alone[1], abs=2e-3)
    assert clustered_rate(np.ones(40), np.repeat(np.arange(10), 4))[1] == wilson(1.0, 10)


def test_wins_count_all_pairs_of_samples_and_half_of_ties():
    assert win_scores([1], [0]) == 1 and win_scores([1], [1]) == 0.5
    a, b = RNG.integers(0, 4, 7), RNG.integers(0, 4, 5)
    assert win_scores(a, b) == pytest.approx(stats.mannwhitneyu(a, b).statistic / 35)


def test_wins_by_length_alone_vanish_at_equal_lengths():
    lengths = RNG.normal(40, 60, size=400)
    wins = (RNG.uniform(size=400) < special.expit(3 * np.tanh(lengths / lengths.std()))).astype(float)
    rate, interval = length_controlled_win_rate(wins, lengths)
    assert wins.mean() > 0.6
    assert interval.low < 0.5 < interval.high and interval.high - interval.low < 0.2

    def negative_log_posterior(weights):
        logits = weights[0] + weights[1] * np.tanh(lengths / lengths.std())
        return (np.logaddexp(0, logits) - wins * logits).sum() + (np.square(weights) / 2.5**2 / 2).sum()

    fitted = optimize.minimize(negative_log_posterior, np.zeros(2), method="Nelder-Mead", options={"xatol": 1e-7})
    assert rate == pytest.approx(special.expit(fitted.x[0]), abs=1e-4)


def test_a_length_controlled_rate_is_the_plain_one_where_lengths_are_alike_and_stays_finite_where_one_side_wins():
    wins = np.array([1, 1, 1, 0, 0.5] * 10)
    assert length_controlled_win_rate(wins, np.zeros(50))[0] == pytest.approx(0.7, abs=5e-3)
    rate, interval = length_controlled_win_rate(np.ones(30), RNG.normal(size=30))
    assert 0.95 < rate < 1 and 0.85 < interval.low <= interval.high <= 1


def test_spearman_is_scipys_with_ties():
    first, second = RNG.integers(0, 9, (3, 50)), RNG.integers(0, 9, 50)
    assert spearman(first, second) == pytest.approx([stats.spearmanr(row, second).statistic for row in first])
    assert np.isnan(spearman(np.zeros((1, 50)), second)).all()


def test_the_bootstrap_of_groups_agrees_with_scipys_of_their_means():
    values = RNG.normal(size=(50, 3)) + RNG.normal(size=(50, 1))
    groups = np.repeat(np.arange(50), 3)
    (found,) = bootstrap(lambda rows: [values.ravel()[rows].mean()], groups)
    expected = stats.bootstrap(
        (values.mean(axis=1),), np.mean, method="percentile", n_resamples=4000, rng=np.random.default_rng(2)
    ).confidence_interval
    assert found == pytest.approx((expected.low, expected.high), abs=0.03)


def test_calibration_is_the_tables_weighted_gap():
    confidences = RNG.uniform(0.5, 1, 205)
    correct = (RNG.uniform(size=205) < confidences - 0.2).astype(float)
    table = reliability(confidences, correct)
    expected = sum(row.count * abs(row.accuracy - row.confidence) for row in table) / 205
    assert calibration_error(confidences[None], correct[None])[0] == pytest.approx(expected)
    assert expected == pytest.approx(0.2, abs=0.08)
    assert sum(row.count for row in table) == 205 and len(table) == 10
    assert calibration_error(np.array([0.9, 0.6]), np.array([1.0, 0.0])) == pytest.approx((0.1 + 0.6) / 2)
