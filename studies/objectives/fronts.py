"""How good a set of points is that trade two rewards off: the front, the hypervolume and the mean inner product."""

import numpy as np
from jaxtyping import Bool, Float

from pargs_jax.evaluation.statistics import Estimate

RESAMPLES = 500


def on_front(points: Float[np.ndarray, "N 2"]) -> Bool[np.ndarray, "N"]:
    """Which points no other point beats: one that is at least as high in both rewards and higher in one."""
    as_high = (points[None] >= points[:, None]).all(axis=-1)
    higher = (points[None] > points[:, None]).any(axis=-1)
    return ~(as_high & higher).any(axis=1)


def hypervolume(points: Float[np.ndarray, "N 2"], reference: tuple[float, float]) -> float:
    """The area that the points dominate above the reference point (Zitzler and Thiele, 1999). Points that are not above
    it in both rewards add nothing."""
    area, height = 0.0, reference[1]
    above = points[(points > reference).all(axis=1)]
    for x, y in sorted(above.tolist(), reverse=True):
        if y > height:
            area += (x - reference[0]) * (y - height)
            height = y
    return area


def inner_products(
    preferences: Float[np.ndarray, "N 2"], points: Float[np.ndarray, "*A N 2"]
) -> Float[np.ndarray, "*A"]:
    """The products of preference vectors with the rewards that they lead to, averaged over the vectors. Their mean over
    prompts is PARM's mean inner product (MIP; Lin et al., 2025)."""
    return (preferences * points).sum(axis=-1).mean(axis=-1)


def hypervolume_estimate(
    rewards: Float[np.ndarray, "S Q N 2"], reference: tuple[float, float], seed: int = 0
) -> Estimate:
    """The hypervolume of the points' mean rewards, averaged over training runs, and its standard error. As in
    `studies.experiment.estimate`, the variance is that over prompts, here by the bootstrap, plus that over training
    runs.

    Args:
        rewards: of training run, prompt and point.
        reference: the reference point.
        seed: of the bootstrap, whose unit is the prompt.
    """

    def over_runs(prompts: np.ndarray) -> list[float]:
        return [hypervolume(points, reference) for points in rewards[:, prompts].mean(axis=1)]

    count = rewards.shape[1]
    draws = np.random.default_rng(seed)
    resampled = [np.mean(over_runs(draws.integers(0, count, count))) for _ in range(RESAMPLES)]
    by_run = over_runs(np.arange(count))
    over_prompts = float(np.std(resampled, ddof=1))
    over_seeds = Estimate.of(by_run).standard_error if len(by_run) > 1 else 0.0
    return Estimate(float(np.mean(by_run)), float(np.hypot(over_prompts, over_seeds)))
