"""What language models say of answers: the next-token loss of supervised fine-tuning, log-probabilities of prefixes."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


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
    return mean_likelihood(*token_likelihoods(logits, answers), lengths, weights)


def mean_likelihood(
    log_probs: Float[Array, "B R"],
    is_likeliest: Bool[Array, "B R"],
    lengths: Int[Array, "B"],
    weights: Float[Array, "B"] | None = None,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """`answer_likelihood`, from the `token_likelihoods` of the answers."""
    weights = jnp.ones(log_probs.shape[0]) if weights is None else weights
    counted = weights[:, None] * (jnp.arange(log_probs.shape[1]) < lengths[:, None])
    tokens = counted.sum()
    return -(log_probs * counted).sum() / tokens, {"accuracy": (is_likeliest * counted).sum() / tokens}


def token_likelihoods(
    logits: Float[Array, "*B V"], tokens: Int[Array, "*B"]
) -> tuple[Float[Array, "*B"], Bool[Array, "*B"]]:
    """`token_log_probs`, and whether the token is the likeliest."""
    return token_log_probs(logits, tokens), logits.argmax(axis=-1) == tokens


def prefix_log_probs(log_probs: Float[Array, "B A R"], lengths: Int[Array, "B A"]) -> Float[Array, "B A R"]:
    """`log p(y_1 .. y_i | x)` of every prefix, in nats: entry i-1 is that of an answer's first i tokens. Past an
    answer's end it stays that of the whole answer.

    Args:
        log_probs: `token_log_probs` of the answers' tokens.
        lengths: tokens of each answer (end-of-sequence included).
    """
    is_real = jnp.arange(log_probs.shape[-1]) < lengths[..., None]
    return jnp.cumsum(jnp.where(is_real, log_probs, 0.0), axis=-1)


def token_log_probs(logits: Float[Array, "*B V"], tokens: Int[Array, "*B"]) -> Float[Array, "*B"]:
    """`log p(token)` in nats, under softmax(logits)."""
    return jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], axis=-1)[..., 0]
