"""Backups of a table of values: a prefix's value from those of its next tokens, and losses that ask for it."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pargs_jax.data.batches import Batch
from pargs_jax.objectives.contract import LossResult
from pargs_jax.objectives.prefix_values import mean_over_prefixes, value_metrics


def token_values(table: Float[Array, "*B V"], tokens: Int[Array, "*B"]) -> Float[Array, "*B"]:
    """The values of these next tokens."""
    return jnp.take_along_axis(table, tokens[..., None], axis=-1)[..., 0]


def backed_up(
    table: Float[Array, "*B V"], logits: Float[Array, "*B V"], backup: Literal["expectation", "soft", "max"]
) -> Float[Array, "*B"]:
    """The value of each text from those of its next tokens: `E_p V` (CD-Q), `log E_p exp V` (the optimum under a KL
    penalty), or `max V` (FaRMA). No gradient flows through it.

    Args:
        table: values of all next tokens.
        logits: the language model's, fp32.
        backup: which of the three.
    """
    table = jax.lax.stop_gradient(table)
    if backup == "max":
        return table.max(axis=-1)
    log_probs = jax.nn.log_softmax(jax.lax.stop_gradient(logits))
    if backup == "soft":
        return jax.nn.logsumexp(log_probs + table, axis=-1)
    return (jnp.exp(log_probs) * table).sum(axis=-1)


def backup_loss(values: Float[Array, "B R"], nexts: Float[Array, "B R"], batch: Batch) -> LossResult:
    """Half the squared distance of each prefix's value to the backed-up value after it, and of a full answer's to its
    reward; a mean over all prefixes of a batch. Metrics as `value_metrics` has them, an answer counting by its length.

    Args:
        values: of the answers' tokens, in the tables one token before each.
        nexts: backed-up values of the same tables.
        batch: scored answers, one in each row.
    """
    lengths, rewards = batch.answer_lengths[:, 0], batch.rewards[:, 0]
    places = jnp.arange(values.shape[1])
    is_last = places == lengths[:, None] - 1
    targets = jnp.where(is_last, rewards[:, None], jnp.roll(nexts, -1, axis=1))
    counted = (places < lengths[:, None]).astype(jnp.float32)
    loss, prefixes = mean_over_prefixes(jnp.square(values - targets) / 2, counted, batch.weights)
    full = jnp.take_along_axis(values, lengths[:, None] - 1, axis=1)
    return LossResult(loss, value_metrics(full, rewards, lengths * batch.weights), prefixes)


def consistency_error(
    values: Float[Array, "B R"],
    largest: Float[Array, "B R"],
    lengths: Int[Array, "B"],
    weights: Float[Array, "B"],
    minimum_length: int = 1,
) -> Float[Array, ""]:
    """`(R(y_<t)[y_t] - max_v R(y_<=t)[v])^2`: a prefix is worth as much as its best continuation (FaRMA, Rashid et al.,
    2025, as its code has it: gradients flow through both sides, and the maximum is over the whole vocabulary).

    Here the mean is over an answer's prefixes first, then over answers. The full answer is not among its prefixes,
    because no token follows it.

    Args:
        values: R of the answers' tokens, in the tables one token before each.
        largest: the largest R in the same tables.
        lengths: tokens of each answer (end-of-sequence included).
        weights: the weight of each answer.
        minimum_length: the length of the shortest prefix that counts. An answer without one adds 0.
    """
    errors = jnp.square(values[:, :-1] - largest[:, 1:])
    prefixes = jnp.arange(1, values.shape[1])
    counted = (prefixes >= minimum_length) & (prefixes < lengths[:, None])
    per_answer = (errors * counted).sum(axis=1) / jnp.maximum(counted.sum(axis=1), 1)
    return (per_answer * weights).sum() / weights.sum()


def mean_over_answers(
    each: Float[Array, "B R"], lengths: Int[Array, "B"], weights: Float[Array, "B"]
) -> Float[Array, ""]:
    """The mean over an answer's tokens, then over answers."""
    counted = jnp.arange(each.shape[1]) < lengths[:, None]
    per_answer = (each * counted).sum(axis=1) / lengths
    return (per_answer * weights).sum() / weights.sum()
