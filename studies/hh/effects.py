"""How sure a difference between two kinds of reward model is, and how many pairs it would take to be sure of it."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import special

from pargs_jax.evaluation.statistics import CONFIDENCE, Difference, Interval, paired_difference

POWER = 0.8
_Z = float(special.ndtri((1 + CONFIDENCE) / 2))
_Z_POWER = float(special.ndtri(POWER))


class Effect(NamedTuple):
    """How much more often models of one kind are right than models of another, on the same prompts, with S training
    runs of each.

    Attributes:
        over_prompts: the uncertainty that other prompts would show, for these training runs.
        over_seeds: the uncertainty that other training runs would show, on these prompts.
        overall: both together (`crossed_difference`).
        by_seed: the difference of each training run, whose models share the seed.
        discordant: the share of pairs on which two models of one seed differ; one that ties counts a quarter.
        standardised: the difference of two models over the standard deviation of a pair's difference (Cohen's d_z).
        needed: pairs that it would take to detect this difference between two models (`pairs_needed`).
        needed_at_least: the same for the end of the overall interval that is farther from zero, the largest difference
            that the data allow.
    """

    over_prompts: Difference
    over_seeds: Difference
    overall: Difference
    by_seed: tuple[float, ...]
    discordant: float
    standardised: float
    needed: float
    needed_at_least: float


def effect(values: Float[np.ndarray, "S N"], baseline: Float[np.ndarray, "S N"]) -> Effect:
    """The effect of `values` over `baseline`: how right the models of each seed are on each prompt, from 0 to 1."""
    differences = values - baseline
    mean, discordant = float(differences.mean()), float((differences**2).mean())
    overall = crossed_difference(differences)
    spread = np.sqrt(max(discordant - mean**2, 0.0))
    return Effect(
        paired_difference(values.mean(axis=0), baseline.mean(axis=0)),
        paired_difference(values.mean(axis=1), baseline.mean(axis=1)),
        overall,
        tuple(map(float, differences.mean(axis=1))),
        discordant,
        mean / spread if spread > 0 else np.nan,
        pairs_needed(mean, discordant),
        pairs_needed(max(map(abs, overall.interval)), discordant),
    )


def crossed_difference(differences: Float[np.ndarray, "S N"]) -> Difference:
    """The mean of differences between two kinds of model, each trained S times, on N prompts, with an interval for new
    training runs and new prompts.

    Seeds and prompts are crossed random effects: with the mean squares of a two-way table,
    `Var(mean) = (MS_prompts + MS_seeds - MS_rest) / (S N)`, with Satterthwaite's (1946) degrees of freedom. It is never
    taken to be less than either of the first two alone. With one seed or one prompt the interval is unknown (nan).
    """
    seeds, prompts = differences.shape
    mean = float(differences.mean())
    if seeds < 2 or prompts < 2:
        return Difference(mean, np.nan, Interval(np.nan, np.nan), np.nan, prompts)
    by_prompt, by_seed = differences.mean(axis=0), differences.mean(axis=1)
    rest = differences - by_prompt - by_seed[:, None] + mean
    squares = np.array([seeds * by_prompt.var(ddof=1), prompts * by_seed.var(ddof=1), 0.0])
    freedom = np.array([prompts - 1, seeds - 1, (prompts - 1) * (seeds - 1)])
    squares[2] = (rest**2).sum() / freedom[2]
    total = squares[0] + squares[1] - squares[2]
    squares_total = (squares**2 / freedom).sum()
    if total <= squares[:2].max():
        larger = int(squares[:2].argmax())
        total, squares_total = squares[larger], squares[larger] ** 2 / freedom[larger]
    error = float(np.sqrt(total / differences.size))
    if error == 0:
        return Difference(mean, 0.0, Interval(mean, mean), float(mean == 0), prompts)
    degrees = total**2 / squares_total
    reach = float(special.stdtrit(degrees, (1 + CONFIDENCE) / 2)) * error
    p = 2 * float(special.stdtr(degrees, -abs(mean) / error))
    return Difference(mean, error, Interval(mean - reach, mean + reach), p, prompts)


def pairs_needed(difference: float, discordant: float) -> float:
    """Pairs that McNemar's test at 5 %, two-sided, needs to detect a difference of accuracies with 80 % power:

        n = (z_0.975 sqrt(p) + z_0.8 sqrt(p - d^2))^2 / d^2

    with d the difference and p the share of pairs on which the two models differ (Connor, 1987, Biometrics 43:207).
    Infinite for no difference.
    """
    if difference == 0 or not np.isfinite(difference):
        return np.inf
    difference = min(abs(difference), 1.0)
    square, discordant = difference**2, max(discordant, difference)  # the models differ at least that often
    return (_Z * np.sqrt(discordant) + _Z_POWER * np.sqrt(discordant - square)) ** 2 / square


def detectable(pairs: float, discordant: float) -> float:
    """The smallest difference that `pairs` pairs detect: the inverse of `pairs_needed`.

    It solves the quadratic equation `(n + z_b^2) d^2 - 2 z_a sqrt(n p) d + (z_a^2 - z_b^2) p = 0`.
    """
    a = pairs + _Z_POWER**2
    half_b = _Z * np.sqrt(pairs * discordant)
    c = (_Z**2 - _Z_POWER**2) * discordant
    return float((half_b + np.sqrt(half_b**2 - a * c)) / a)
