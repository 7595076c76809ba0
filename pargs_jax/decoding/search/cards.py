"""CARDS: segments of an answer are drawn, judged, and accepted or drawn again."""

import dataclasses
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from pargs_jax.decoding.search.order_statistics import best_of_n_kl
from pargs_jax.decoding.search.rows import (
    Found,
    KlKind,
    Rows,
    Searcher,
    SearchInputs,
    Tokens,
    branch_keys,
    event_keys,
    kls_of_search,
    weighted,
)
from pargs_jax.decoding.state import DecodeState
from pargs_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Cards:
    """Cascade reward sampling (Li et al., 2024, Algorithm 1). A segment ends before a token that the language model is
    uncertain of. It is accepted with probability min(1, exp((r - tau(t)) / T)), where

        tau(t) = min(r*, r0 + t (r* - r0) / N),    r0 = (1 - start) r(prompt) + start r*,

    t is the answer's length with the segment and N the longest answer. A rejected segment is removed and drawn anew.
    After `most_rejections` in a row, the best of these segments is drawn once more and kept.

    Rewards are in standard deviations from the mean, r = (score - mean) / deviation. The published code uses raw
    rewards (a mean of 0, a deviation of 1), for which r* must be tuned for each reward model.

    Attributes:
        target: r*.
        mean, deviation: those of the scores of the language model's own answers.
        acceptance_temperature: T of acceptance; the published code uses the sampling temperature.
        start: `alpha` in the code: where the threshold begins, as a share of the way from the prompt's reward to r*.
        entropy: a segment ends before a token whose distribution has at least this entropy, in nats.
        shortest, longest: tokens of a segment; the end of the answer also ends a segment.
        most_rejections: the most rejections in a row.
        hard: accept exactly where r >= tau.
    """

    target: float = 1.0
    mean: float = 0.0
    deviation: float = 1.0
    acceptance_temperature: float = 0.7
    start: float = 0.5
    entropy: float = 3.0
    shortest: int = 4
    longest: int = 64
    most_rejections: int = 20
    hard: bool = False
    kl: ClassVar[KlKind] = "estimate"

    def __post_init__(self) -> None:
        if not (1 <= self.shortest <= self.longest and self.most_rejections >= 1):
            raise InputError(f"{self}: must have 1 <= shortest <= longest, and most_rejections of at least 1")
        if not (self.deviation > 0 and self.acceptance_temperature > 0):
            raise InputError(f"{self}: deviation and acceptance_temperature must be above 0")

    def __call__(self, searcher: Searcher, inputs: SearchInputs, max_new_tokens: int) -> Found:
        searcher.require_judge(self)
        batch, longest = len(inputs.lengths), min(self.longest, max_new_tokens)
        rows, tokens, prompt_rewards = searcher.start_judged(inputs, max_new_tokens, longest)
        start_rewards = self._scaled(weighted(prompt_rewards, inputs.judge_weights))
        harmonic = jnp.asarray(np.cumsum([0.0, *1 / np.arange(1, self.most_rejections + 1)]), jnp.float32)
        zeros, lowest = jnp.zeros(batch, jnp.int32), jnp.full(batch, -jnp.inf)
        false = jnp.zeros(batch, bool)
        first = _Carry(
            rows, tokens, zeros, rows.rewards, rows.decode.done, zeros, zeros, zeros, zeros, lowest, zeros, false,
            jnp.zeros(batch),
        )  # fmt: skip

        def propose(carry: _Carry) -> _Carry:
            rows, tokens = self._draw(searcher, inputs, carry)
            end = jnp.where(carry.is_over, carry.begin, self._end(rows.decode, carry.begin, longest)[1])
            rows, tokens = searcher.judge(inputs, rows, tokens, longest, end)
            reward = self._scaled(weighted(rows.rewards, inputs.judge_weights))
            log_accept = self._log_accept(reward, start_rewards, end, rows.decode.settings.max_new_tokens)
            log_u = jnp.log(jax.vmap(jax.random.uniform)(event_keys(inputs.keys, carry.proposals)))
            accepted = ~carry.is_over & (carry.is_forced | (log_u < log_accept))
            rejected = ~carry.is_over & ~accepted

            is_best = rejected & (reward > carry.best)
            best, best_key = jnp.where(is_best, reward, carry.best), jnp.where(is_best, carry.key, carry.best_key)
            rejections, all_rejections = carry.rejections + rejected, carry.all_rejections + rejected
            is_forced = rejected & (rejections >= self.most_rejections)
            key = jnp.where(rejected, jnp.where(is_forced, best_key, all_rejections), carry.key)
            lengths = jnp.where(rejected, carry.begin, rows.decode.text.answer_lengths)
            rows = searcher.rewind(rows, lengths, branch_keys(inputs.keys, key))
            rewards = jnp.where(rejected[:, None], carry.begin_rewards, rows.rewards)
            kl = jnp.where(carry.is_forced, best_of_n_kl(self.most_rejections), log_accept + harmonic[carry.rejections])
            return _Carry(
                rows._replace(rewards=rewards),
                tokens,
                begin=jnp.where(accepted, end, carry.begin),
                begin_rewards=rewards,
                is_over=carry.is_over | (accepted & rows.decode.done & (end == rows.decode.text.answer_lengths)),
                proposals=carry.proposals + ~carry.is_over,
                all_rejections=all_rejections,
                rejections=jnp.where(accepted, 0, rejections),
                key=key,
                best=jnp.where(accepted, -jnp.inf, best),
                best_key=best_key,
                is_forced=is_forced,
                kls=carry.kls + jnp.where(accepted, kl, 0.0),
            )

        last = jax.lax.while_loop(lambda carry: ~carry.is_over.all(), propose, first)
        answers = searcher.found(last.rows)
        scores = weighted(answers.rewards, inputs.judge_weights)
        return Found(answers, scores, kls_of_search(inputs, last.kls, answers), last.tokens)

    def _draw(self, searcher: Searcher, inputs: SearchInputs, carry: "_Carry") -> tuple[Rows, Tokens]:
        """Draws a segment for every unfinished row. Rows whose segment has ended wait for the others."""
        longest = min(self.longest, carry.rows.decode.trace.entropies.shape[1])

        def waits(state: DecodeState) -> Bool[Array, "B"]:
            return carry.is_over | self._end(state, carry.begin, longest)[0]

        def draw_one(drawn: tuple[Rows, Tokens]) -> tuple[Rows, Tokens]:
            rows, tokens = drawn
            done, waiting = rows.decode.done, waits(rows.decode)
            rows = rows._replace(decode=rows.decode._replace(done=done | waiting))
            rows, tokens = searcher.draw(inputs, rows, tokens, 1)
            return rows._replace(decode=rows.decode._replace(done=jnp.where(waiting, done, rows.decode.done))), tokens

        return jax.lax.while_loop(lambda drawn: ~waits(drawn[0].decode).all(), draw_one, (carry.rows, carry.tokens))

    def _end(
        self, state: DecodeState, begin: Int[Array, "B"], longest: int
    ) -> tuple[Bool[Array, "B"], Int[Array, "B"]]:
        """Whether each row's segment has ended, and the answer's length at its end. A token is drawn before it is known
        to be uncertain; it becomes the first token of the next segment."""
        length = state.text.answer_lengths
        newest = jnp.maximum(length - 1, 0)[:, None]
        entropy = jnp.take_along_axis(state.trace.entropies, newest, axis=1)[:, 0]
        is_uncertain = (length - begin > self.shortest) & (entropy >= self.entropy)
        is_full = state.done | (length - begin >= longest)
        return is_uncertain | is_full, length - is_uncertain

    def _scaled(self, scores: Float[Array, "B"]) -> Float[Array, "B"]:
        return (scores - self.mean) / self.deviation

    def _log_accept(
        self,
        reward: Float[Array, "B"],
        start_reward: Float[Array, "B"],
        length: Int[Array, "B"],
        limit: Int[Array, "B"],
    ) -> Float[Array, "B"]:
        start = (1 - self.start) * start_reward + self.start * self.target
        threshold = jnp.minimum(self.target, start + length * (self.target - start) / limit)
        if self.hard:
            return jnp.where(reward >= threshold, 0.0, -jnp.inf)
        return jnp.minimum(0.0, (reward - threshold) / self.acceptance_temperature)


class _Carry(NamedTuple):
    rows: Rows
    tokens: Tokens
    begin: Int[Array, "B"]
    """The number of accepted tokens of each answer."""
    begin_rewards: Float[Array, "B J"]
    is_over: Bool[Array, "B"]
    proposals: Int[Array, "B"]
    all_rejections: Int[Array, "B"]
    rejections: Int[Array, "B"]
    """The number of rejections in a row."""
    key: Int[Array, "B"]
    """The number of the key that a row draws with. A rejection changes it; the same key draws the same tokens."""
    best: Float[Array, "B"]
    """The highest reward among the segments rejected in a row; `best_key` is the key that drew it."""
    best_key: Int[Array, "B"]
    is_forced: Bool[Array, "B"]
    """Whether the best rejected segment is being drawn again."""
    kls: Float[Array, "B"]
