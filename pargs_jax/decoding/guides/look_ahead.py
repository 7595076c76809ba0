"""A reward model that scores continuations of each candidate; a second model writes a few tokens after it first."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pargs_jax.decoding.guides.contract import Capacity, Chosen, Prompts, Text
from pargs_jax.models.cache import Cache, take_rows
from pargs_jax.models.causal import CausalModel
from pargs_jax.models.model import Params

Caches = tuple[Cache, ...]
"""The cache of the aligned model, then each judge's; they hold the texts so far."""


@dataclasses.dataclass(frozen=True)
class LookAheadGuide:
    """Transfer Q* (Chakraborty et al., 2024): the reward of the text, a candidate, and the tokens that an aligned model
    writes after it.

    All models read the language model's tokens. The params and own prompts are those of the aligned model, followed by
    those of each judge. With two judges, r is the target's reward and b that of the model that the aligned model was
    trained on; the guide's reward is exp((r - b) / 2) r, as in the published code of the paper's indirect transfer.

    Attributes:
        aligned: a language model that writes greedily.
        judges: one reward model, or the target and the baseline.
        tokens: the most tokens that it writes; an end-of-sequence token ends them.
        eos_ids: tokens that end an answer.
    """

    aligned: CausalModel
    judges: tuple[CausalModel, ...]
    tokens: int
    eos_ids: tuple[int, ...]
    scores_vocabulary: ClassVar[bool] = False
    adds_up: ClassVar[bool] = False

    def prefill(
        self,
        params: tuple[Params, ...],
        prompts: Prompts,
        capacity: Capacity,
        own_prompts: tuple[Prompts | None, ...] | None,
    ) -> Caches:
        caches, models, own_prompts = [], (self.aligned, *self.judges), own_prompts or (None,) * len(params)
        for model, model_params, own in zip(models, params, own_prompts, strict=True):
            tokens, lengths = prompts if own is None else own
            slots = tokens.shape[1] + capacity.answer + self.tokens + 1
            caches.append(model.prefill(model_params, tokens, lengths, slots)[1])
        return tuple(caches)

    def score(
        self, params: tuple[Params, ...], state: Caches, text: Text, candidates: Int[Array, "B K"]
    ) -> tuple[Float[Array, "B K"], Any]:
        batch, count = candidates.shape
        branches, lengths, aligned_pending = self._continue(params[0], state[0], candidates)
        width = branches.shape[-1]
        # All branches in one pass; each token sees the text and its own branch.
        branch, offset = jnp.divmod(jnp.arange(count * width), width)
        tree = (branch[:, None] == branch) & (offset[:, None] >= offset)
        offsets = jnp.broadcast_to(offset, (batch, count * width))
        rewards, pending = [], [aligned_pending]
        for model, model_params, cache in zip(self.judges, params[1:], state[1:], strict=True):
            hidden, new = model.extend(model_params, cache, branches.reshape(batch, -1), offsets, tree)
            ends = jnp.arange(count) * width + lengths - 1
            last = jnp.take_along_axis(hidden, ends[..., None], axis=1)
            rewards.append(model.rewards(model_params, last))
            pending.append(new)
        reward = rewards[0] if len(rewards) == 1 else jnp.exp(0.5 * (rewards[0] - rewards[1])) * rewards[0]
        return reward, tuple(pending)

    def commit(self, params: tuple[Params, ...], state: Caches, pending: Any, chosen: Chosen) -> Caches:
        counts = chosen.live.astype(jnp.int32)
        first = chosen.index * (self.tokens + 1)  # of the judges' tokens, which are whole branches
        places = (chosen.index, *(first,) * len(self.judges))
        return tuple(cache.append_one(new, counts, at) for cache, new, at in zip(state, pending, places, strict=True))

    def rewind(self, state: Caches, text: Text, dropped: Int[Array, "B"]) -> Caches:
        return tuple(cache.forget(dropped) for cache in state)

    def _continue(
        self, params: Params, cache: Cache, candidates: Int[Array, "B K"]
    ) -> tuple[Int[Array, "B K W"], Int[Array, "B K"], Any]:
        """The candidates followed by the aligned model's tokens, the number of tokens in each branch, and the keys and
        values of the candidates themselves."""
        batch, count = candidates.shape
        offsets, alone = jnp.zeros_like(candidates), jnp.eye(count, dtype=bool)
        hidden, pending = self.aligned.extend(params, cache, candidates, offsets, alone)
        rows = take_rows(cache, jnp.repeat(jnp.arange(batch), count))  # branches grow apart
        rows = rows.append(jax.tree.map(_as_rows, pending), jnp.ones(batch * count, jnp.int32))
        newest = self._likeliest(params, hidden.reshape(batch * count, -1))

        def write(carry: tuple[Cache, Array], _: None) -> tuple[tuple[Cache, Array], Array]:
            rows, newest = carry
            hidden, pending = self.aligned.siblings(params, rows, newest[:, None])
            rows = self.aligned.keep(rows, pending, jnp.ones(batch * count, bool))
            return (rows, self._likeliest(params, hidden[:, 0])), newest

        (_, last), after = jax.lax.scan(write, (rows, newest), length=self.tokens - 1)
        written = jnp.concatenate([after, last[None]]).T.reshape(batch, count, -1)
        branches = jnp.concatenate([candidates[..., None], written], axis=-1)
        is_end = jnp.isin(branches, jnp.asarray(self.eos_ids, jnp.int32))
        lengths = jnp.where(is_end.any(axis=-1), is_end.argmax(axis=-1) + 1, self.tokens + 1)
        return branches, lengths, pending

    def _likeliest(self, params: Params, hidden: Float[Array, "N D"]) -> Int[Array, "N"]:
        return self.aligned.logits(params, hidden).argmax(axis=-1)


def _as_rows(x: Float[Array, "*L B H K D"]) -> Float[Array, "*L BK H 1 D"]:
    """Turns each of K tokens' keys or values into a row."""
    *layers, batch, heads, count, width = x.shape
    return jnp.swapaxes(x, -3, -2).reshape(*layers, batch * count, heads, 1, width)
