"""Speculative rejection: best-of-n that drops the worst samples before they are finished."""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from pargs_jax.decoding.loop import Decoded
from pargs_jax.decoding.search.order_statistics import best_of_n_kl
from pargs_jax.decoding.search.rows import (
    Found,
    KlKind,
    Searcher,
    SearchInputs,
    group_by_prompt,
    kls_of_search,
    pick,
    spread,
)
from pargs_jax.errors import InputError
from pargs_jax.models.cache import take_rows


@dataclasses.dataclass(frozen=True)
class SpeculativeRejection:
    """After every chunk, drops the share `alpha` of the rows that has the lowest scores so far, finished ones included.
    The answer is the best of all finished rows (Sun et al., 2024, Algorithm 1). The batch shrinks, and each size is
    compiled separately. The paper continues until memory is full; here chunks have a fixed length.

    Attributes:
        samples: n at the start.
        alpha: the share that is dropped, below 1; 0 is best-of-n.
        chunk: tokens between two selections.
    """

    samples: int = 16
    alpha: float = 0.5
    chunk: int = 32
    kl: ClassVar[KlKind] = "bound"

    def __post_init__(self) -> None:
        if self.samples < 1 or self.chunk < 1 or not 0 <= self.alpha < 1:
            raise InputError(f"{self}: samples and chunk must be at least 1, alpha at least 0 and below 1")

    def __call__(self, searcher: Searcher, inputs: SearchInputs, max_new_tokens: int) -> Found:
        searcher.require_judge(self)
        batch = len(inputs.lengths)
        sizes = self.sizes(max_new_tokens)
        rest = max_new_tokens - (len(sizes) - 1) * self.chunk
        rows, tokens = searcher.start(inputs, max_new_tokens, rest if len(sizes) == 1 else max(rest, self.chunk))
        rows = spread(rows, self.samples)
        ended: list[tuple[Decoded, jax.Array]] = []
        for size in sizes[1:]:
            rows, tokens = searcher.draw(inputs, rows, tokens, self.chunk)
            rows, tokens = searcher.judge(inputs, rows, tokens, self.chunk)
            scores = searcher.scores(inputs, rows)
            # Only finished answers can win, so those that are dropped are remembered.
            ended.append((searcher.found(rows), jnp.where(group_by_prompt(rows.decode.done, batch), scores, -jnp.inf)))
            survivors = jnp.sort(jax.lax.top_k(scores, size)[1], axis=1)
            rows = take_rows(rows, (jnp.arange(batch)[:, None] * scores.shape[1] + survivors).ravel())
        rows, tokens = searcher.draw(inputs, rows, tokens, rest)
        rows, tokens = searcher.judge(inputs, rows, tokens, rest)
        ended.append((searcher.found(rows), searcher.scores(inputs, rows)))

        def all_of(*parts: jax.Array) -> jax.Array:
            joined = jnp.concatenate([group_by_prompt(part, batch) for part in parts], axis=1)
            return joined.reshape(batch * joined.shape[1], *joined.shape[2:])

        scores = jnp.concatenate([scores for _, scores in ended], axis=1)
        chosen = scores.argmax(axis=1)
        answers = pick(jax.tree.map(all_of, *(decoded for decoded, _ in ended)), chosen)
        kl = best_of_n_kl(self.samples) if len(sizes) == 1 else float(np.log(self.samples))
        best = jnp.take_along_axis(scores, chosen[:, None], axis=1)[:, 0]
        return Found(answers, best, kls_of_search(inputs, kl, answers), tokens)

    def sizes(self, max_new_tokens: int) -> list[int]:
        """The number of rows of a prompt after each selection, until it no longer changes."""
        sizes = [self.samples]
        for _ in range(math.ceil(max_new_tokens / self.chunk) - 1):
            size = sizes[-1] - math.floor(self.alpha * sizes[-1])
            if size == sizes[-1]:
                break
            sizes.append(size)
        return sizes
