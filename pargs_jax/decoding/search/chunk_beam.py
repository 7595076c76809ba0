"""Search over chunks: draws several continuations of each beam and keeps the best."""

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
    branch,
    group_by_prompt,
    kls_of_search,
    pick,
    spread,
)
from pargs_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class ChunkBeam:
    """Chunk-level beam search (weak-to-strong search; Zhou et al., 2024, Algorithm 1). Each of W beams draws K
    continuations of L tokens. Of the W K texts, the W with the best scores so far are kept. A finished text competes
    once, and the search ends when the W best are finished. With W = 1 this is blockwise best-of-K (controlled decoding;
    Mudgal et al., 2024, Section 3).

    Attributes:
        beams: W.
        successors: K.
        chunk: L, in tokens.
    """

    beams: int = 1
    successors: int = 4
    chunk: int = 10
    kl: ClassVar[KlKind] = "bound"

    def __post_init__(self) -> None:
        if min(self.beams, self.successors, self.chunk) < 1:
            raise InputError(f"{self}: beams, successors and chunk must be at least 1")

    def __call__(self, searcher: Searcher, inputs: SearchInputs, max_new_tokens: int) -> Found:
        searcher.require_judge(self)
        batch, count = len(inputs.lengths), self.beams * self.successors
        chunk = min(self.chunk, max_new_tokens)
        rows, tokens = searcher.start(inputs, max_new_tokens, chunk)

        def is_unfinished(carry: _Carry) -> Bool[Array, ""]:
            return ((carry.counts > 0) & ~group_by_prompt(carry.rows.decode.done, batch)).any()

        def extend(carry: _Carry) -> _Carry:
            rows = branch(carry.rows, carry.counts)
            # Copies of a finished text would take the places of other texts.
            is_duplicate = (carry.counts == 0) & group_by_prompt(rows.decode.done, batch)
            rows, tokens = searcher.draw(inputs, rows, carry.tokens, chunk)
            rows, tokens = searcher.judge(inputs, rows, tokens, chunk)
            scores = jnp.where(is_duplicate, -jnp.inf, searcher.scores(inputs, rows))
            best, survivors = jax.lax.top_k(scores, self.beams)
            counts = jax.nn.one_hot(survivors, count, dtype=jnp.int32).sum(axis=1) * self.successors
            return _Carry(rows, tokens, counts, best[:, 0], survivors[:, 0])

        # At first every row is a successor of the prompt.
        ones, zeros = jnp.ones((batch, count), jnp.int32), jnp.zeros(batch)
        first = _Carry(spread(rows, count), tokens, ones, zeros, jnp.zeros(batch, jnp.int32))
        rows, tokens, _, scores, chosen = jax.lax.while_loop(is_unfinished, extend, first)
        answers = pick(searcher.found(rows), chosen)
        chunks = -(-answers.lengths // chunk)
        per_chunk = best_of_n_kl(self.successors) if self.beams == 1 else float(np.log(self.successors))
        kls = chunks * per_chunk + float(np.log(self.beams))
        return Found(answers, scores, kls_of_search(inputs, kls, answers), tokens)


class _Carry(NamedTuple):
    """Rows and tokens, the number of copies of each row in the next chunk, and the best row with its score."""

    rows: Rows
    tokens: Tokens
    counts: Int[Array, "B n"]
    scores: Float[Array, "B"]
    best: Int[Array, "B"]
