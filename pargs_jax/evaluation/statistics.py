"""Means, differences and rates with their uncertainty. The unit of every interval is the prompt, not the answer.

Answers to one prompt are alike, so several samples of a prompt count as one observation: their mean (Miller, 2024,
arXiv:2411.00640). Systems that answered the same prompts are compared prompt by prompt.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy import special

CONFIDENCE = 0.95
"""Of all intervals here."""

RESAMPLES = 1000
_PRIOR = 1 / 2.5**2
"""Precision of the normal prior on both numbers of the logistic fit, which keeps it finite where one side nearly always
wins; at 100 prompts it moves a rate of 80 % by 0.2."""


class Estimate(NamedTuple):
    """A mean over independent items and its standard error."""

    mean: float
    standard_error: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Estimate":
        """Raises ValueError for no values; the standard error of a single value is unknown (nan)."""
        if not len(values):
            raise ValueError("no values to estimate a mean from")
        error = np.std(values, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan
        return cls(float(np.mean(values)), float(error))

    def __str__(self) -> str:
        return f"{self.mean:.2f} ± {self.standard_error:.2f}"

    def interval(self, count: int) -> "Interval":
        """Student's interval of a mean over so many items."""
        reach = float(special.stdtrit(max(count - 1, 1), (1 + CONFIDENCE) / 2)) * self.standard_error
        return Interval(self.mean - reach, self.mean + reach)


class Interval(NamedTuple):
    """Where a number lies with 95 % confidence; nan where that is unknown."""

    low: float
    high: float


class Difference(NamedTuple):
    """A mean of paired differences over `prompts`, and Student's two-sided p-value that it is zero."""

    mean: float
    standard_error: float
    interval: Interval
    p: float
    prompts: int


def paired_difference(
    values: Float[np.ndarray, "N"] | Sequence[float], baseline: Float[np.ndarray, "N"] | Sequence[float]
) -> Difference:
    """The mean of `values - baseline`, one number of each for a prompt (the paired t-test).

    Raises ValueError for no prompts.
    """
    differences = np.asarray(values, float) - np.asarray(baseline, float)
    estimate = Estimate.of(differences)
    count = len(differences)
    if count < 2:
        p = np.nan
    elif estimate.standard_error == 0:
        p = float(estimate.mean == 0)
    else:
        t = abs(estimate.mean) / estimate.standard_error
        p = 2 * float(special.stdtr(count - 1, -t))
    return Difference(*estimate, estimate.interval(count), p, count)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's (1979) adjusted p-values: the chance of any false finding among all of them stays below what is asked.

    Unknown ones (nan) stay unknown and are not counted.
    """
    p = np.asarray(p_values, float)
    known = np.flatnonzero(~np.isnan(p))
    order = known[np.argsort(p[known], kind="stable")]
    adjusted = np.full(len(p), np.nan)
    scaled = p[order] * np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(scaled), 1.0) if len(order) else scaled
    return adjusted.tolist()


def wilson(rate: float, trials: float) -> Interval:
    """Wilson's (1927) score interval of a rate of successes. `rate * trials` need not be whole: a tie is half a
    success."""
    z = float(special.ndtri((1 + CONFIDENCE) / 2))
    denominator = 1 + z**2 / trials
    centre = (rate + z**2 / (2 * trials)) / denominator
    reach = z / denominator * np.sqrt(rate * (1 - rate) / trials + z**2 / (4 * trials**2))
    return Interval(max(0.0, float(centre - reach)), min(1.0, float(centre + reach)))


def clustered_rate(values: Float[np.ndarray, "N"], groups: Int[np.ndarray, "N"]) -> tuple[float, Interval]:
    """The mean of values between 0 and 1, and Wilson's interval at the effective number of independent ones.

    That number is N over the design effect (Kish, 1965): the variance of the mean with whole groups as units, over
    that of N independent values; it is never taken to be more than N, and where the variance is zero it is the number
    of groups.
    """
    count, clusters = len(values), len(np.unique(groups))
    rate = float(values.mean())
    independent = float(values.var(ddof=1)) / count if count > 1 else 0.0
    effective = float(clusters)
    if clusters == count:
        effective = float(count)
    elif independent > 0 and clusters > 1:
        sums = np.bincount(np.unique(groups, return_inverse=True)[1], weights=values - rate)
        clustered = clusters / (clusters - 1) * float((sums**2).sum()) / count**2
        effective = count / max(1.0, clustered / independent)
    return rate, wilson(rate, effective)


def win_scores(values: Sequence[float], baseline: Sequence[float]) -> float:
    """How often an answer of one system beats one of the other to the same prompt, over all pairs of them; a tie is
    half a win."""
    signs = np.sign(np.asarray(values, float)[:, None] - np.asarray(baseline, float))
    return float(0.5 + 0.5 * signs.mean())


def length_controlled_win_rate(
    wins: Float[np.ndarray, "N"], length_differences: Float[np.ndarray, "N"], seed: int = 0
) -> tuple[float, Interval]:
    """The win rate that two systems would have at equal lengths, and its bootstrap interval.

    The model is that of AlpacaEval 2 (Dubois et al., 2024, arXiv:2404.04475, Eq. 2) for one pair of systems:
    `P(win) = sigmoid(a + b * tanh(d / sd(d)))` with d the difference of lengths, and the rate is `sigmoid(a)`. Its
    third term, the difficulty of an instruction, is left out: it is fitted to many systems at once. A weak prior, with
    standard deviation 2.5, is on a and b.

    Args:
        wins: of each prompt, from 0 to 1; a tie is 1/2.
        length_differences: of each prompt, system less baseline.
        seed: of the bootstrap, whose unit is the prompt.
    """
    spread = length_differences.std()
    terms = np.tanh(length_differences / spread) if spread > 0 else np.zeros(len(wins))
    rows = np.random.default_rng(seed).integers(0, len(wins), (RESAMPLES, len(wins)))
    rows = np.concatenate([np.arange(len(wins))[None], rows])
    rates = special.expit(_fit_logistic(wins[rows], terms[rows])[:, 0])
    return float(rates[0]), _percentiles(rates[1:])


def _fit_logistic(wins: Float[np.ndarray, "S N"], terms: Float[np.ndarray, "S N"]) -> Float[np.ndarray, "S 2"]:
    """Intercepts and slopes of S logistic regressions, by Newton's method; a step that is too long is halved."""
    weights = np.zeros((len(wins), 2))

    def logits(weights: np.ndarray) -> np.ndarray:
        return weights[:, :1] + weights[:, 1:] * terms

    def loss(weights: np.ndarray) -> np.ndarray:
        z = logits(weights)
        return (np.logaddexp(0, z) - wins * z).sum(axis=1) + _PRIOR / 2 * (weights**2).sum(axis=1)

    best = loss(weights)
    for _ in range(50):
        chances = special.expit(logits(weights))
        excess, spread = chances - wins, chances * (1 - chances)
        gradient = np.stack([excess.sum(axis=1), (excess * terms).sum(axis=1)], axis=1) + _PRIOR * weights
        mixed = (spread * terms).sum(axis=1)
        own = [spread.sum(axis=1) + _PRIOR, (spread * terms**2).sum(axis=1) + _PRIOR]
        curvature = np.stack([own[0], mixed, mixed, own[1]], axis=1).reshape(-1, 2, 2)
        step = np.linalg.solve(curvature, gradient[..., None])[..., 0]
        tried, found = weights - step, loss(weights - step)
        while (worse := found > best + 1e-9).any() and np.abs(step).max() > 1e-8:
            step[worse] /= 2
            tried, found = weights - step, loss(weights - step)
        weights, best = tried, found
        if np.abs(step).max() < 1e-7:
            break
    return weights


def bootstrap(
    statistic: Callable[[Int[np.ndarray, "N"]], Sequence[float]], groups: Int[np.ndarray, "N"], seed: int = 0
) -> list[Interval]:
    """Percentile intervals of statistics, from 1,000 draws of whole groups with replacement.

    Args:
        statistic: its numbers for some rows, which are given by their indices and may come several times.
        groups: which rows belong together.
        seed: of the draws.
    """
    members = np.split(np.argsort(groups, kind="stable"), np.cumsum(np.unique(groups, return_counts=True)[1])[:-1])
    draws = np.random.default_rng(seed)
    found = [
        statistic(np.concatenate([members[g] for g in draws.integers(0, len(members), len(members))]))
        for _ in range(RESAMPLES)
    ]
    return [_percentiles(column) for column in np.asarray(found, float).T]


def spearman(first: Float[np.ndarray, "*F N"], second: Float[np.ndarray, "N"]) -> Float[np.ndarray, "*F"]:
    """Spearman's rank correlation of each row of `first` with `second`; ties share their mean rank. It is nan where
    either is constant."""
    from scipy.stats import rankdata  # slow to import

    centred = [ranks - ranks.mean(axis=-1, keepdims=True) for ranks in (rankdata(first, axis=-1), rankdata(second))]
    with np.errstate(invalid="ignore", divide="ignore"):
        spread = np.sqrt((centred[0] ** 2).sum(axis=-1) * (centred[1] ** 2).sum())
        return (centred[0] * centred[1]).sum(axis=-1) / np.where(spread == 0, np.nan, spread)


class Bin(NamedTuple):
    """Predictions of like confidence: how many, their mean confidence, and how many of them were right."""

    count: int
    confidence: float
    accuracy: float
    interval: Interval


BINS = 10


def reliability(confidences: Float[np.ndarray, "N"], correct: Float[np.ndarray, "N"]) -> list[Bin]:
    """Predictions sorted by confidence, in ten bins of equally many."""
    table = []
    for rows in np.array_split(np.argsort(confidences, kind="stable"), min(BINS, len(confidences))):
        accuracy = float(correct[rows].mean())
        table.append(Bin(len(rows), float(confidences[rows].mean()), accuracy, wilson(accuracy, len(rows))))
    return table


def calibration_error(
    confidences: Float[np.ndarray, "*F N"], correct: Float[np.ndarray, "*F N"]
) -> Float[np.ndarray, "*F"]:
    """The expected calibration error of the bins of `reliability`, `sum_b n_b / N * |accuracy_b - confidence_b|`
    (Naeini et al., 2015; Guo et al., 2017), for each row."""
    count = confidences.shape[-1]
    order = np.argsort(confidences, axis=-1, kind="stable")
    excess = np.take_along_axis(correct - confidences, order, axis=-1)
    sizes = [len(rows) for rows in np.array_split(np.arange(count), min(BINS, count))]
    starts = np.cumsum([0, *sizes[:-1]])
    return np.abs(np.add.reduceat(excess, starts, axis=-1)).sum(axis=-1) / count


def _percentiles(values: Sequence[float] | np.ndarray) -> Interval:
    values = np.asarray(values, float)
    values = values[~np.isnan(values)]
    if not len(values):
        return Interval(np.nan, np.nan)
    low, high = np.quantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(float(low), float(high))
