"""Best-of-n: draws n samples of a prompt; a judge chooses one."""

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pargs_jax.decoding.search.order_statistics import best_of_n_kl
from pargs_jax.decoding.search.rows import (
    Found,
    KlKind,
    Searcher,
    SearchInputs,
    event_keys,
    group_by_prompt,
    kls_of_search,
    pick,
    spread,
    weighted,
)
from pargs_jax.errors import InputError

Judging = Literal["last", "minimum", "mean"]


@dataclasses.dataclass(frozen=True)
class BestOfN:
    """Returns the sample with the highest score. Soft best-of-n returns sample i with probability softmax(score_i /
    smoothing) (Verdun et al., 2025, Definition 1). The prompt is read once for all samples.

    Attributes:
        samples: n, for each prompt.
        smoothing: `lambda` of soft best-of-n; 0 takes the best.
        by: the reward that counts: that of the whole answer (`last`), or the lowest or the mean of its prefixes'
            rewards, for reward models that can score prefixes.
    """

    samples: int = 16
    smoothing: float = 0.0
    by: Judging = "last"
    kl: ClassVar[KlKind] = "bound"

    def __post_init__(self) -> None:
        if self.samples < 1 or self.smoothing < 0:
            raise InputError(
                f"best-of-n: got {self.samples} samples and smoothing {self.smoothing}, must be at least 1 and 0"
            )

    def __call__(self, searcher: Searcher, inputs: SearchInputs, max_new_tokens: int) -> Found:
        searcher.require_judge(self)
        rows, tokens = searcher.start(inputs, max_new_tokens, max_new_tokens)
        rows, tokens = searcher.draw(inputs, spread(rows, self.samples), tokens, max_new_tokens)
        if self.by == "last":
            rows, tokens = searcher.judge(inputs, rows, tokens, max_new_tokens)
            scores = searcher.scores(inputs, rows)
        else:
            rows, tokens, rewards = searcher.judge_prefixes(inputs, rows, tokens, max_new_tokens)
            scores = self._over_prefixes(weighted(rewards, inputs.judge_weights), rows.judged)
            scores = group_by_prompt(scores, len(inputs.lengths))
        samples = searcher.found(rows)
        chosen, kls = self._choose(inputs, scores)
        answers = pick(samples, chosen)
        best = jnp.take_along_axis(scores, chosen[:, None], axis=1)[:, 0]
        return Found(answers, best, kls_of_search(inputs, kls, answers), tokens, samples, scores)

    def _over_prefixes(self, scores: Float[Array, "R N"], lengths: Array) -> Float[Array, "R"]:
        written = jnp.arange(scores.shape[1]) < lengths[:, None]
        if self.by == "minimum":
            least = jnp.where(written, scores, jnp.inf).min(axis=1)
            return jnp.where(lengths > 0, least, 0.0)
        return jnp.where(written, scores, 0.0).sum(axis=1) / jnp.maximum(lengths, 1)

    def _choose(self, inputs: SearchInputs, scores: Float[Array, "B n"]) -> tuple[Array, Float[Array, "B"]]:
        if self.smoothing == 0:
            return scores.argmax(axis=1), jnp.full(len(scores), best_of_n_kl(self.samples))
        log_q = jax.nn.log_softmax(scores / self.smoothing, axis=1)
        chosen = jax.vmap(jax.random.categorical)(event_keys(inputs.keys, 0), log_q)
        return chosen, jnp.log(self.samples) + (jnp.exp(log_q) * log_q).sum(axis=1)
