"""Losses as pure functions of arrays; they know nothing of models."""

from pargs_jax.objectives.bradley_terry import (
    FRACTIONS,
    Metrics,
    Prefixes,
    bradley_terry,
    choose_prefixes,
    partial_bradley_terry,
    preference_metrics,
    prefix_lengths,
    prefix_loss,
    prefix_metrics,
    prefix_rewards,
    rewards_at,
)
from pargs_jax.objectives.likelihood import answer_likelihood

__all__ = [
    "FRACTIONS",
    "Metrics",
    "Prefixes",
    "answer_likelihood",
    "bradley_terry",
    "choose_prefixes",
    "partial_bradley_terry",
    "preference_metrics",
    "prefix_lengths",
    "prefix_loss",
    "prefix_metrics",
    "prefix_rewards",
    "rewards_at",
]
