"""The next-token loss on answers: supervised fine-tuning."""

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
    log_probs = jnp.take_along_axis(jax.nn.log_softmax(logits), answers[..., None], axis=-1)[..., 0]
    hits = (logits.argmax(axis=-1) == answers).astype(jnp.float32)
    tokens = counted.sum()
    return -(log_probs * counted).sum() / tokens, {"accuracy": (hits * counted).sum() / tokens}
