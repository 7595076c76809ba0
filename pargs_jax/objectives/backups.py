"""Backups of a table of values: a prefix's value from those of its next tokens."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pargs_jax.data.batches import Batch
from pargs_jax.objectives.contract import LossResult
from pargs_jax.objectives.prefix_values import mean_over_prefixes, value_metrics


def backed_up(
    table: Float[Array, "B R V"], logits: Float[Array, "B R V"], backup: Literal["expectation", "soft", "max"]
) -> Float[Array, "B R"]:
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


def backup_loss(table: Float[Array, "B R V"], nexts: Float[Array, "B R"], batch: Batch) -> LossResult:
    """Half the squared distance of each prefix's value to the backed-up value after it, and of a full answer's to its
    reward; a mean over all prefixes of a batch. Metrics as `value_metrics` has them, an answer counting by its length.

    Args:
        table: values of all next tokens, one token before each of the answers' tokens.
        nexts: backed-up values at the same places.
        batch: scored answers, one in each row.
    """
    lengths, rewards = batch.answer_lengths[:, 0], batch.rewards[:, 0]
    values = jnp.take_along_axis(table, batch.answers[:, 0, :, None], axis=-1)[..., 0]
    places = jnp.arange(values.shape[1])
    is_last = places == lengths[:, None] - 1
    targets = jnp.where(is_last, rewards[:, None], jnp.roll(nexts, -1, axis=1))
    counted = (places < lengths[:, None]).astype(jnp.float32)
    loss, prefixes = mean_over_prefixes(jnp.square(values - targets) / 2, counted, batch.weights)
    full = jnp.take_along_axis(values, lengths[:, None] - 1, axis=1)
    return LossResult(loss, value_metrics(full, rewards, lengths * batch.weights), prefixes)
