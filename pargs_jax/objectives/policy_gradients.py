"""Advantages and losses of answers that the trained model sampled itself. R slots of an answer, of which the first
`lengths[b]` hold tokens; the policy pi is the trained model, the reference rho the model that training starts from."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pargs_jax.objectives.likelihood import token_log_probs


class PolicyNumbers(NamedTuple):
    """What the policy and the reference say of sampled answers, in nats; 0 beyond an answer's end."""

    log_probs: Float[Array, "B R"]
    """`log pi(y_t | x, y_<t)` of each token."""
    log_ratios: Float[Array, "B R"]
    """`log pi(y_t | x, y_<t) - log rho(y_t | x, y_<t)`: its sum over tokens is an estimate of KL(pi || rho)."""
    kls: Float[Array, "B R"]
    """KL(pi || rho) of the next token, exact: its sum over tokens is an estimate too, with less noise."""


def policy_numbers(
    logits: Float[Array, "B R V"],
    reference: Float[Array, "B R V"],
    answers: Int[Array, "B R"],
    lengths: Int[Array, "B"],
    temperature: float = 1.0,
) -> PolicyNumbers:
    """The log-probabilities of sampled tokens, and the distance from the reference.

    Args:
        logits, reference: of the policy and the reference; entry i predicts `answers[:, i]`, fp32.
        answers, lengths: right-padded token ids (end-of-sequence included), and how many are real.
        temperature: pi and rho are softmax(logits / temperature), as tokens are sampled.
    """
    said, before = (jax.nn.log_softmax(x / temperature) for x in (logits, reference))
    kls = (jnp.exp(said) * (said - before)).sum(axis=-1)
    log_probs, of_reference = (jnp.take_along_axis(x, answers[..., None], axis=-1)[..., 0] for x in (said, before))
    real = real_tokens(answers, lengths)
    return PolicyNumbers(*(jnp.where(real, x, 0.0) for x in (log_probs, log_probs - of_reference, kls)))


def real_tokens(slots: Array, lengths: Int[Array, "B"]) -> Bool[Array, "B R"]:
    """Which of R slots hold a token of the answer."""
    return jnp.arange(slots.shape[1]) < lengths[:, None]


def token_rewards(
    rewards: Float[Array, "B"], log_ratios: Float[Array, "B R"], lengths: Int[Array, "B"], kl_weight: float
) -> Float[Array, "B R"]:
    """`-beta log(pi(y_t) / rho(y_t))` for every token, and for the last one also the answer's reward (Ziegler et al.,
    2019, Eq. 2, and Stiennon et al., 2020, section 3.4, as the sum over tokens); 0 beyond an answer's end."""
    is_last = jnp.arange(log_ratios.shape[1]) == lengths[:, None] - 1
    return is_last * rewards[:, None] - kl_weight * log_ratios


def advantages_by_gae(
    rewards: Float[Array, "B R"], values: Float[Array, "B R"], lengths: Int[Array, "B"], gamma: float, decay: float
) -> Float[Array, "B R"]:
    """Generalised advantage estimation (Schulman et al., 2016, Eq. 11 and 16): `A_t = sum_l (gamma lambda)^l d_(t+l)`
    with `d_t = r_t + gamma V_(t+1) - V_t`. After an answer's last token the value is 0.

    Args:
        rewards: of each token.
        values: V_t of the text before each token.
        lengths: tokens of each answer.
        gamma, decay: the discount, and lambda.
    """
    real = real_tokens(rewards, lengths)
    values = jnp.where(real, values, 0.0)
    errors = jnp.where(real, rewards + gamma * jnp.pad(values[:, 1:], ((0, 0), (0, 1))) - values, 0.0)

    def earlier(later: Float[Array, "B"], error: Float[Array, "B"]) -> tuple[Array, Array]:
        advantage = error + gamma * decay * later
        return advantage, advantage

    _, advantages = jax.lax.scan(earlier, jnp.zeros(len(rewards)), errors.T, reverse=True)
    return advantages.T


def whitened(advantages: Float[Array, "B R"], lengths: Int[Array, "B"]) -> Float[Array, "B R"]:
    """The advantages with mean 0 and variance 1 over all tokens of a rollout; 0 beyond an answer's end."""
    real = real_tokens(advantages, lengths)
    mean = jnp.mean(advantages, where=real)
    return jnp.where(real, (advantages - mean) / (jnp.std(advantages, where=real) + 1e-8), 0.0)


def leave_one_out(rewards: Float[Array, "B"], samples: int) -> Float[Array, "B"]:
    """`R_i - mean of R_j over the other answers j to the same prompt` (RLOO: Ahmadian et al., 2024). The
    `samples` answers to a prompt are consecutive rows."""
    groups = rewards.reshape(-1, samples)
    others = (groups.sum(axis=1, keepdims=True) - groups) / (samples - 1)
    return (groups - others).reshape(-1)


def clipped_gain(
    log_ratios: Float[Array, "*B"], advantages: Float[Array, "*B"], clip: float
) -> tuple[Float[Array, "*B"], Bool[Array, "*B"]]:
    """`min(u A, clip(u, 1 - clip, 1 + clip) A)` with `u = pi / pi_old` (PPO: Schulman et al., 2017, Eq. 7), and where
    the clipped term is the smaller one, so that it has no gradient.

    Args:
        log_ratios: `log pi - log pi_old` of what was sampled.
        advantages: its advantages A.
        clip: epsilon.
    """
    ratios = jnp.exp(log_ratios)
    plain, cut = ratios * advantages, jnp.clip(ratios, 1 - clip, 1 + clip) * advantages
    return jnp.minimum(plain, cut), cut < plain


def weighted_mean(values: Float[Array, "*B"], weights: Float[Array, "*B"]) -> Float[Array, ""]:
    """The mean by these weights."""
    return (values * weights).sum() / weights.sum()


def ppo_loss(
    logits: Float[Array, "B R V"],
    values: Float[Array, "B R"],
    answers: Int[Array, "B R"],
    old_log_probs: Float[Array, "B R"],
    advantages: Float[Array, "B R"],
    returns: Float[Array, "B R"],
    counted: Float[Array, "B R"],
    *,
    temperature: float,
    clip: float,
    value_weight: float,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """`-L^CLIP + c L^VF` (Schulman et al., 2017, Eq. 9 without the entropy bonus): the clipped gain of every token, and
    `(V_t - return_t)^2 / 2` with the weight c; means over tokens, by `counted`.

    Returns the loss, and the metrics `clip_share` (the share of clipped tokens) and `value_loss`.
    """
    log_probs = token_log_probs(logits / temperature, answers)
    # Slots beyond an answer's end have a ratio of 1, so that nothing in them overflows.
    log_ratios = jnp.where(counted > 0, log_probs - old_log_probs, 0.0)
    gains, is_clipped = clipped_gain(log_ratios, advantages, clip)
    value_loss = weighted_mean(jnp.square(values - returns) / 2, counted)
    loss = value_weight * value_loss - weighted_mean(gains, counted)
    return loss, {"clip_share": weighted_mean(is_clipped, counted), "value_loss": value_loss}


def rloo_loss(
    logits: Float[Array, "B R V"],
    answers: Int[Array, "B R"],
    lengths: Int[Array, "B"],
    old_log_probs: Float[Array, "B R"],
    advantages: Float[Array, "B"],
    weights: Float[Array, "B"],
    *,
    temperature: float,
    clip: float,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Minus the clipped gain of whole answers, `u = pi(y | x) / pi_old(y | x)`; the mean over answers, by `weights`.

    In the first update of a rollout u is 1, and the gradient is that of REINFORCE with these advantages, `-A
    grad log pi(y | x)` (Ahmadian et al., 2024). Returns the loss, and the metric `clip_share`.
    """
    log_ratios = token_log_probs(logits / temperature, answers) - old_log_probs
    log_ratios = jnp.where(real_tokens(answers, lengths), log_ratios, 0.0).sum(axis=1)
    gains, is_clipped = clipped_gain(log_ratios, advantages, clip)
    return -weighted_mean(gains, weights), {"clip_share": weighted_mean(is_clipped, weights)}
