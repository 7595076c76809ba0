"""Losses as pure functions of arrays; they know nothing of models."""

from pargs_jax.objectives.bradley_terry import (
    bradley_terry,
    partial_bradley_terry,
    preference_metrics,
    prefix_rewards,
)
from pargs_jax.objectives.likelihood import answer_likelihood

__all__ = ["answer_likelihood", "bradley_terry", "partial_bradley_terry", "preference_metrics", "prefix_rewards"]
