"""What language models say of answers: the next-token loss of supervised fine-tuning, log-probabilities of prefixes."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def answer_likelihood(
    logits: Float[Array, "B R V"],
    answers: Int[Array, "B R"],
    lengths: Int[Array, "B"],
    weights: Float[Array, "B"] | None = None,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """The mean of `-log p(y_i | x, y_<i)` over the answers' tokens, in nats per token; prompt tokens do not count.

    Args:
        logits: entry i predicts `answers[:, i]`, fp32.
        answers, lengths: right-padded token ids (end-of-sequence included), and how many are real.
        weights: the weight of each row's tokens. Default: all 1.

    Returns:
        The loss, and `accuracy`: the share of tokens that are the model's likeliest.
    """
    weights = jnp.ones(answers.shape[0]) if weights is None else weights
    counted = weights[:, None] * (jnp.arange(answers.shape[1]) < lengths[:, None])
    log_probs = token_log_probs(logits, answers)
    hits = (logits.argmax(axis=-1) == answers).astype(jnp.float32)
    tokens = counted.sum()
    return -(log_probs * counted).sum() / tokens, {"accuracy": (hits * counted).sum() / tokens}


def prefix_log_probs(
    logits: Float[Array, "B A R V"], answers: Int[Array, "B A R"], lengths: Int[Array, "B A"]
) -> Float[Array, "B A R"]:
    """`log p(y_1 .. y_i | x)` of every prefix, in nats: entry i-1 is that of an answer's first i tokens. Past an
    answer's end it stays that of the whole answer.

    Args:
        logits: row i predicts `answers[..., i]`, fp32.
        answers, lengths: right-padded token ids (end-of-sequence included), and how many are real.
    """
    is_real = jnp.arange(answers.shape[-1]) < lengths[..., None]
    return jnp.cumsum(jnp.where(is_real, token_log_probs(logits, answers), 0.0), axis=-1)


def token_log_probs(logits: Float[Array, "*B V"], tokens: Int[Array, "*B"]) -> Float[Array, "*B"]:
    """`log p(token)` in nats, under softmax(logits)."""
    return jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], axis=-1)[..., 0]
