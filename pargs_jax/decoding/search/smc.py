"""Twisted sequential Monte Carlo: particles are weighted by guides' rewards of unfinished answers, and resampled."""

import dataclasses
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from pargs_jax.decoding.rules import Greedy
from pargs_jax.decoding.search.rows import (
    Found,
    KlKind,
    Rows,
    Searcher,
    SearchInputs,
    Tokens,
    branch,
    event_keys,
    group_by_prompt,
    pick,
    spread,
)
from pargs_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class TwistedSmc:
    """Particles for the posterior p(y) exp(sum_j w_j r_j(y)) / Z (Zhao et al., 2024, Section 3).

    The decoder's guides are the twists, psi(y_1..y_t) = exp(sum_j w_j r_j(y_1..y_t)), and the decoder, at any
    temperature, is the proposal q. The log weight of a particle grows by

        log p(y_t) + log psi(y_1..y_t) - log psi(y_1..y_t-1) - log q(y_t),

    which at temperature 1 is log sum_v p(v) psi(.. v) - log psi(..). If the weights' effective sample size falls below
    a share of n, the particles are resampled systematically. The answer is one particle, drawn by its weight. If the
    decoder proposes only k candidates, p is the language model restricted to them, not normalised again.

    Attributes:
        particles: n.
        threshold: resampling happens below this share of n; 0 means never, 1 means at nearly every step.
    """

    particles: int = 16
    threshold: float = 0.5
    kl: ClassVar[KlKind] = "bound"

    def __post_init__(self) -> None:
        if self.particles < 1 or not 0 <= self.threshold <= 1:
            raise InputError(f"{self}: particles must be at least 1, threshold from 0 to 1")

    def __call__(self, searcher: Searcher, inputs: SearchInputs, max_new_tokens: int) -> Found:
        if searcher.judges:
            raise InputError("TwistedSmc: its particles are weighted by guides; give no judges")
        if searcher.decoder.rule == Greedy():
            raise InputError("TwistedSmc: needs a rule that samples, not Greedy")
        batch = len(inputs.lengths)
        rows, tokens = searcher.start(inputs, max_new_tokens, 1)
        zeros = jnp.zeros(batch)
        first = _Carry(spread(rows, self.particles), tokens, jnp.zeros((batch, self.particles)), zeros, jnp.int32(0))

        def step(carry: _Carry) -> _Carry:
            rows, tokens = searcher.draw(inputs, carry.rows, carry.tokens, 1)
            is_live = ~carry.rows.decode.done
            log_weights = carry.log_weights + group_by_prompt(
                jnp.where(is_live, _increments(searcher, rows), 0.0), batch
            )
            # No resampling once all particles are finished: it would change nothing.
            is_over = group_by_prompt(rows.decode.done, batch).all(axis=1)
            resampled = (_effective(log_weights) < self.threshold * self.particles) & ~is_over
            log_mean = jax.nn.logsumexp(log_weights, axis=1) - jnp.log(self.particles)
            counts = _systematic(event_keys(inputs.keys, 1 + carry.step), log_weights)
            counts = jnp.where(resampled[:, None], counts, 1)
            return _Carry(
                branch(rows, counts),
                tokens,
                jnp.where(resampled[:, None], 0.0, log_weights),
                carry.log_z + jnp.where(resampled, log_mean, 0.0),
                carry.step + 1,
            )

        rows, tokens, log_weights, log_z, _ = jax.lax.while_loop(
            lambda carry: ~carry.rows.decode.done.all(), step, first
        )
        log_z = log_z + jax.nn.logsumexp(log_weights, axis=1) - jnp.log(self.particles)
        chosen = jax.vmap(jax.random.categorical)(event_keys(inputs.keys, 0), log_weights)
        samples = searcher.found(rows)
        scores = group_by_prompt((samples.rewards * rows.decode.settings.weights).sum(axis=-1), batch)  # log psi
        best = jnp.take_along_axis(scores, chosen[:, None], axis=1)[:, 0]
        return Found(
            pick(samples, chosen), best, best - log_z, tokens, samples, scores, log_z, log_weights)  # fmt: skip


class _Carry(NamedTuple):
    rows: Rows
    tokens: Tokens
    log_weights: Float[Array, "B n"]
    log_z: Float[Array, "B"]
    """The sum over the resamplings so far."""
    step: Int[Array, ""]


def _increments(searcher: Searcher, rows: Rows) -> Float[Array, "R"]:
    """The change of each row's log weight by its newest token."""
    trace, at = rows.decode.trace, jnp.maximum(rows.decode.text.answer_lengths - 1, 0)

    def of_token(x: Float[Array, "R N *J"], index: Int[Array, "R"]) -> Float[Array, "R *J"]:
        return jnp.take_along_axis(x, index.reshape(-1, *[1] * (x.ndim - 1)), axis=1)[:, 0]

    rewards = of_token(trace.rewards, at)
    # A guide that adds up gives the token's own reward. Other guides give the text's, so the previous one is
    # subtracted.
    adds_up = jnp.asarray([guide.adds_up for guide in searcher.decoder.guides], bool)
    is_later = (at > 0)[:, None] & ~adds_up
    before = jnp.where(is_later, of_token(trace.rewards, jnp.maximum(at - 1, 0)), 0.0)
    gained = ((rewards - before) * rows.decode.settings.weights).sum(axis=-1)
    return of_token(trace.log_probs, at) + gained - of_token(trace.guided_log_probs, at)


def _effective(log_weights: Float[Array, "B n"]) -> Float[Array, "B"]:
    """The effective sample size 1 / sum_i W_i^2 of the normalised weights W."""
    return jnp.exp(-jax.nn.logsumexp(2 * jax.nn.log_softmax(log_weights, axis=1), axis=1))


def _systematic(keys: PRNGKeyArray, log_weights: Float[Array, "B n"]) -> Int[Array, "B n"]:
    """How many copies of each particle are kept. Uses one uniform number u per prompt, and takes the particles at the
    places (u + i)/n of the cumulative weights."""
    count = log_weights.shape[1]
    u = jax.vmap(jax.random.uniform)(keys)
    places = (u[:, None] + jnp.arange(count)) / count
    ends = jnp.cumsum(jax.nn.softmax(log_weights, axis=1), axis=1)
    # The last end is 1 up to rounding.
    index = jnp.minimum((ends[:, None, :] <= places[:, :, None]).sum(axis=-1), count - 1)
    return jax.nn.one_hot(index, count, dtype=jnp.int32).sum(axis=1)
