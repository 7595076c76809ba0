"""Best-of-n for every n from one set of N samples, without drawing again."""

import math

import numpy as np
from jaxtyping import Float


def best_of_n_kl(n: int) -> float:
    """log n - (n - 1)/n, in nats: at least KL(best of n || p), and close to it where no answer has much probability
    (Beirami et al., 2024, Theorem 1)."""
    return math.log(n) - (n - 1) / n


def best_of_n_curve(scores: Float[np.ndarray, "*B N"], values: Float[np.ndarray, "*B N"]) -> Float[np.ndarray, "*B N"]:
    """The expected value of the best of n samples, n = 1 .. N, over all choices of n of the N.

    `scores` rank the samples; of equal scores the earlier wins. `values` are averaged: a true reward, for example. With
    samples in increasing order of score, E[value of best of n] = sum_i C(i-1, n-1) / C(N, n) value_(i). This is exact,
    so the choice of n samples adds no variance.
    """
    # From the lowest score to the highest. Of equal scores the earliest comes last, because argmax takes the earliest.
    order = scores.shape[-1] - 1 - np.argsort(scores[..., ::-1], axis=-1, kind="stable")
    ranked = np.take_along_axis(values, order, axis=-1)
    return ranked @ order_weights(scores.shape[-1]).T


def order_weights(count: int) -> Float[np.ndarray, "N N"]:
    """`[n-1, i-1]`: the probability that the best of n out of N samples is the one with the i-th lowest score."""
    factorials = np.array([math.lgamma(i + 1) for i in range(count + 1)])

    def log_choose(n: np.ndarray, k: np.ndarray) -> np.ndarray:
        return factorials[n] - factorials[k] - factorials[n - k]

    n, i = np.mgrid[1 : count + 1, 1 : count + 1]
    chosen = np.where(i >= n, n - 1, 0)
    logs = log_choose(i - 1, chosen) - log_choose(np.full_like(n, count), n)
    return np.where(i >= n, np.exp(logs), 0.0)
