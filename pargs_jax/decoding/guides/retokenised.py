"""Guides whose reward model has its own tokenizer: they score the text, tokenised by that tokenizer.

Once per step, one host callback for the whole batch turns the language model's tokens into the reward model's
(`Retokeniser`); everything else stays on the device. Prompts are already in the reward model's tokens. The rewards are
exact: they equal the reward model's rewards of the text of prompt, answer so far and candidate, or of the finished
    answer where the candidate ends it.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from pargs_jax.decoding.guides.contract import Capacity, Chosen, Prompts, Text
from pargs_jax.errors import InputError
from pargs_jax.models.cache import Cache
from pargs_jax.models.causal import CausalModel, shift_left, shift_right
from pargs_jax.models.encoder import EncoderModel
from pargs_jax.models.model import Params
from pargs_jax.models.prefix_causal import PrefixCausalModel
from pargs_jax.sharding import ROWS, constrain, parts_of_rows, row_spec

FRESH = 4
"""The most settled tokens that a step adds to the cache; the remaining ones wait for the next step."""

TEXTS_AT_ONCE = 32
"""The most texts of a step that an encoder reads together on each device: enough to keep it busy, few enough for its
memory, and for the last of them to be mostly live rows' texts."""

PACKED_WIDTHS = (1, 2, 8, 16)
"""Widths that the tokens of a step are padded to, in units of one token per candidate plus a few shared ones. The first
usually suffices where words are short. Each width is compiled separately."""


class Splits(NamedTuple):
    """The reward model's tokens of K continuations: `fresh` ones, which are already settled, and a tail for each; and
    the length of the longest answer with a candidate."""

    fresh: Int[Array, "B M"]
    fresh_lengths: Int[Array, "B"]
    tails: Int[Array, "B K W"]
    tail_lengths: Int[Array, "B K"]
    needed: Int[Array, "B"]


class Retokeniser(Protocol):
    """The host's part, in numpy; hashable. See `pargs_jax.text.retokenisation`."""

    candidates: Callable[..., Any]
    """Takes a `Text`, candidates, settled lengths and two widths; returns what `Splits` holds."""


class CachedState(NamedTuple):
    """A cache of the settled tokens."""

    cache: Cache
    prompt_reward: Float[Array, "B"]
    """The reward of the prompt alone, for candidates that add no text to it."""
    settled: Int[Array, "B"]
    """The number of each answer's tokens in the cache."""
    settled_after: Int[Array, "B N"]
    """`settled` after each of the answer's tokens, for when tokens are removed."""
    needed: Int[Array, "B"]
    """The longest answer with a candidate so far, in the reward model's tokens. If this exceeds `answer_width`, texts
    were cut and rewards are invalid."""


class CachedPending(NamedTuple):
    """Keys and values of the fresh tokens, which are written whichever candidate is chosen; the lengths that the texts
    needed; and the answers' lengths."""

    kv: Any
    fresh_lengths: Int[Array, "B"]
    needed: Int[Array, "B"]
    answer_lengths: Int[Array, "B"]


@dataclasses.dataclass(frozen=True)
class RetokenisedGuide:
    """A causal (or prefix-causal) reward model with its own tokenizer.

    The cache holds the tokens that no later text can change. A step reads the remaining tokens as a tree, so a
    beginning that several candidates share is read once.

    Attributes:
        model: the reward model.
        retokeniser: turns the language model's tokens into this model's.
        answer_width: the most tokens of an answer with a candidate, in the reward model's tokens. Longer texts are cut,
            and the state's `needed` reports it.
    """

    model: CausalModel | PrefixCausalModel
    retokeniser: Retokeniser
    answer_width: int
    scores_vocabulary: ClassVar[bool] = False
    adds_up: ClassVar[bool] = False

    def prefill(self, params: Params, prompts: Prompts, capacity: Capacity, own_prompts: Prompts | None) -> CachedState:
        return self.read_prompts(params, prompts, capacity, own_prompts)[1]

    def read_prompts(
        self, params: Params, prompts: Prompts, capacity: Capacity, own_prompts: Prompts | None
    ) -> tuple[Float[Array, "B"], CachedState]:
        tokens, lengths = _require(own_prompts)
        last, cache = self.model.prefill(params, tokens, lengths, tokens.shape[1] + self.answer_width + FRESH)
        none = jnp.zeros_like(lengths)
        settled_after = jnp.zeros((len(lengths), capacity.answer), jnp.int32)
        rewards = self.model.rewards(params, last)
        return rewards, CachedState(cache, rewards, none, settled_after, none)

    def read(
        self, params: Params, state: CachedState, text: Text, new: Int[Array, "B"], width: int
    ) -> tuple[Float[Array, "B"], Int[Array, "B"], CachedState]:
        # Tokens that earlier ones settled may wait for later steps.
        rewards, pending, after = _read_last(self, params, state, text, new)
        return rewards, (pending.needed - state.settled) * (new > 0), after

    def score(
        self, params: Params, state: CachedState, text: Text, candidates: Int[Array, "B K"]
    ) -> tuple[Float[Array, "B K"], CachedPending]:
        splits = _split(self.retokeniser, text, candidates, state.settled, self.answer_width)
        tokens, lengths = _join(splits, self.answer_width + FRESH)
        tree = _Tree.of(tokens, lengths)
        unit = -(-(candidates.shape[1] + 4) // FRESH) * FRESH
        widths = [width * unit for width in PACKED_WIDTHS if width * unit < tokens.shape[1] * tokens.shape[2]]
        packed = [partial(self._score_packed, params, state, tokens, lengths, tree, width) for width in widths]
        apart = partial(self._score_one_by_one, params, state, tokens, lengths)
        first = (jnp.asarray(widths, jnp.int32) < tree.size.max()).sum()
        rewards, kv = jax.lax.switch(first, [*packed, apart])
        rewards = jnp.where(lengths > 0, rewards, state.prompt_reward[:, None])
        return rewards, CachedPending(kv, splits.fresh_lengths, splits.needed, text.answer_lengths)

    def commit(self, params: Params, state: CachedState, pending: CachedPending, chosen: Chosen) -> CachedState:
        fresh = pending.fresh_lengths * chosen.live
        settled = state.settled + fresh
        rows = jnp.arange(len(fresh))
        # A finished row writes nowhere.
        at = jnp.where(chosen.live, pending.answer_lengths, state.settled_after.shape[1])
        return CachedState(
            state.cache.append(pending.kv, fresh),
            state.prompt_reward,
            settled,
            state.settled_after.at[rows, at].set(settled, mode="drop"),
            jnp.maximum(state.needed, pending.needed * chosen.live),
        )

    def rewind(self, state: CachedState, text: Text, dropped: Int[Array, "B"]) -> CachedState:
        answer_lengths = text.answer_lengths
        last = jnp.maximum(answer_lengths - 1, 0)[:, None]
        before = jnp.take_along_axis(state.settled_after, last, axis=1)[:, 0] * (answer_lengths > 0)
        settled = jnp.where(dropped > 0, before, state.settled)
        # Which tokens other text will settle is unknown, and stays unknown for tokens that `read` skips.
        settled_after = state.settled_after * (jnp.arange(state.settled_after.shape[1]) < answer_lengths[:, None])
        cache = state.cache.forget(state.settled - settled)
        return state._replace(cache=cache, settled=settled, settled_after=settled_after)

    def _score_packed(
        self,
        params: Params,
        state: CachedState,
        tokens: Int[Array, "B K W"],
        lengths: Int[Array, "B K"],
        tree: "_Tree",
        width: int,
    ) -> tuple[Float[Array, "B K"], Any]:
        """Rewards, and keys and values of the fresh tokens, from one pass over all tokens of the tree."""
        batch, count, longest = tokens.shape
        place = jax.vmap(partial(jnp.nonzero, size=width, fill_value=count * longest))
        (at,) = place(tree.is_node.reshape(batch, -1))
        candidate, offset = at // longest, at % longest
        new = jnp.take_along_axis(tokens.reshape(batch, -1), jnp.minimum(at, count * longest - 1), axis=1)
        # A token sees the tokens that precede it in its candidate's text, even if another candidate's node holds them.
        found = jnp.take_along_axis(tree.first, jnp.minimum(candidate, count - 1)[..., None], axis=1)
        found = jnp.take_along_axis(found, jnp.broadcast_to(offset[:, None], (batch, width, width)), axis=2)
        mask = (found == candidate[:, None]) & (offset[:, None] <= offset[:, :, None])

        hidden, kv = self.model.extend(params, state.cache, new, offset, mask)
        last = jnp.maximum(lengths - 1, 0)[..., None]
        node = jnp.take_along_axis(tree.first, last, axis=2) * longest + last
        index = jnp.cumsum(tree.is_node.reshape(batch, -1), axis=1) - 1
        index = jnp.take_along_axis(index, node[..., 0], axis=1)
        rewards = self.model.rewards(params, jnp.take_along_axis(hidden, index[..., None], axis=1))
        return rewards, jax.tree.map(lambda x: x[..., :FRESH, :], kv)

    def _score_one_by_one(
        self, params: Params, state: CachedState, tokens: Int[Array, "B K W"], lengths: Int[Array, "B K"]
    ) -> tuple[Float[Array, "B K"], Any]:
        """Like `_score_packed`, for texts of any length: one candidate at a time."""
        width = tokens.shape[-1]
        offsets = jnp.broadcast_to(jnp.arange(width), (tokens.shape[0], width))
        causal = jnp.tril(jnp.ones((width, width), bool))

        def read(text: tuple[Int[Array, "B W"], Int[Array, "B"]]) -> tuple[Float[Array, "B"], Any]:
            ids, length = text
            hidden, kv = self.model.extend(params, state.cache, ids, offsets, causal)
            last = jnp.maximum(length - 1, 0)[:, None, None]
            reward = self.model.rewards(params, jnp.take_along_axis(hidden, last, axis=1)[:, 0])
            return reward, jax.tree.map(lambda x: x[..., :FRESH, :], kv)

        rewards, kv = jax.lax.map(read, (tokens.swapaxes(0, 1), lengths.T))
        return rewards.T, jax.tree.map(lambda x: x[0], kv)


class EncoderState(NamedTuple):
    """The prompts in the encoder's tokens. They start at the first slot, so that a wider state holds them at the same
    place."""

    tokens: Int[Array, "B P"]
    lengths: Int[Array, "B"]
    needed: Int[Array, "B"]
    """The longest answer with a candidate so far, in the reward model's tokens. If this exceeds `answer_width`, texts
    were cut and rewards are invalid."""


@dataclasses.dataclass(frozen=True)
class EncoderGuide:
    """An encoder, which reads the whole text of every candidate at every step: K texts of each row that has not
    finished, closed like finished ones.

    The attributes are those of `RetokenisedGuide`, and `closing_id`, the token that closes a text. The texts of a step
    are padded to the smallest of a few widths that holds the longest. So padding adds at most 1 / `finest` of the
    longest possible text.
    """

    model: EncoderModel
    retokeniser: Retokeniser
    answer_width: int
    closing_id: int
    finest: int = 16
    rereads: ClassVar[bool] = True
    scores_vocabulary: ClassVar[bool] = False
    adds_up: ClassVar[bool] = False

    def prefill(
        self, params: Params, prompts: Prompts, capacity: Capacity, own_prompts: Prompts | None
    ) -> EncoderState:
        tokens, lengths = _require(own_prompts)
        return EncoderState(shift_left(tokens, lengths), lengths, jnp.zeros_like(lengths))

    def read_prompts(
        self, params: Params, prompts: Prompts, capacity: Capacity, own_prompts: Prompts | None
    ) -> tuple[Float[Array, "B"], EncoderState]:
        state = self.prefill(params, prompts, capacity, own_prompts)
        none = jnp.zeros_like(prompts.lengths)
        return self.model.answer_rewards(params, *_require(own_prompts), none[:, None], none, self.closing_id), state

    def read(
        self, params: Params, state: EncoderState, text: Text, new: Int[Array, "B"], width: int
    ) -> tuple[Float[Array, "B"], Int[Array, "B"], EncoderState]:
        rewards, needed, after = _read_last(self, params, state, text, new)
        return rewards, (state.lengths + needed) * (new > 0), after

    def score(
        self, params: Params, state: EncoderState, text: Text, candidates: Int[Array, "B K"]
    ) -> tuple[Float[Array, "B K"], Int[Array, "B"]]:
        # Settled tokens come once for each row, not once for each candidate.
        none, width = jnp.zeros_like(text.lengths), self.answer_width
        splits = _split(self.retokeniser, text, candidates, none, width, fresh_width=width)
        longest = (splits.fresh_lengths[:, None] + splits.tail_lengths).max()
        step = -(-(state.tokens.shape[1] + self.answer_width) // self.finest)
        widths = [min(width, self.answer_width) for width in range(step, self.answer_width + step, step)]
        at_widths = [partial(self._score_at, params, state, splits, text.lengths > 0, width) for width in widths]
        first = (jnp.asarray(widths) < longest).sum()
        return jax.lax.switch(first, at_widths), splits.needed

    def commit(self, params: Params, state: EncoderState, pending: Int[Array, "B"], chosen: Chosen) -> EncoderState:
        return state._replace(needed=jnp.maximum(state.needed, pending * chosen.live))

    def rewind(self, state: EncoderState, text: Text, dropped: Int[Array, "B"]) -> EncoderState:
        return state

    def _score_at(
        self, params: Params, state: EncoderState, splits: Splits, live: Bool[Array, "B"], width: int
    ) -> Float[Array, "B K"]:
        """Rewards of the texts of live rows, a part of the texts at a time; 0 for other rows."""
        tokens, lengths = _join(splits, width)
        batch, count = lengths.shape
        shards = parts_of_rows(batch)  # each device reads texts of its own rows
        order = jnp.argsort(~live.reshape(shards, -1), axis=1, stable=True)
        texts = batch // shards * count
        parts = -(-texts // TEXTS_AT_ONCE)
        together = -(-texts // parts)
        by_row = shift_right(state.tokens, state.lengths), state.lengths
        by_text = tokens.reshape(batch * count, width), lengths.reshape(-1)

        def read(part: Int[Array, ""], rewards: Float[Array, "S M"]) -> Float[Array, "S M"]:
            at = jnp.minimum(part * together + jnp.arange(together), texts - 1)
            row = order[:, at // count]

            def chosen(x: Int[Array, "R ..."], index: Int[Array, "S N"]) -> Int[Array, "SN ..."]:
                mine = jax.vmap(lambda own, places: own[places])(x.reshape(shards, -1, *x.shape[1:]), index)
                return constrain(mine.reshape(-1, *x.shape[1:]), ROWS, *(None,) * (x.ndim - 1))

            prompts = (chosen(x, row) for x in by_row)
            answers = (chosen(x, row * count + at % count) for x in by_text)
            found = self.model.answer_rewards(params, *prompts, *answers, self.closing_id)
            return jax.lax.dynamic_update_slice(rewards, found.reshape(shards, -1), (0, part * together))

        live_texts = live.reshape(shards, -1).sum(axis=1).max() * count
        rewards = jnp.zeros((shards, parts * together))
        rewards = jax.lax.fori_loop(0, -(-live_texts // together), read, rewards)[:, :texts]
        back = jnp.argsort(order, axis=1)[..., None]
        return jnp.take_along_axis(rewards.reshape(shards, -1, count), back, axis=1).reshape(batch, count)


def _require(own_prompts: Prompts | None) -> Prompts:
    if own_prompts is None:
        raise InputError("a guide with its own tokenizer needs the prompts in its own tokens: give guide_prompts")
    return own_prompts


def _read_last(
    guide: RetokenisedGuide | EncoderGuide, params: Params, state: Any, text: Text, new: Int[Array, "B"]
) -> tuple[Float[Array, "B"], Any, Any]:
    """Reads each text with its answer's last token as the only candidate: its reward, what the score left for `commit`,
    and the state. An empty answer does not change."""
    at = jnp.maximum(text.lengths - 1, 0)[:, None]
    last = jnp.take_along_axis(text.tokens, at, axis=1)[:, 0]
    before = text._replace(lengths=jnp.maximum(text.lengths - 1, text.prompt_lengths))
    rewards, pending = guide.score(params, state, before, last[:, None])
    after = guide.commit(params, state, pending, Chosen(last, jnp.zeros_like(last), new > 0))
    return rewards[:, 0], pending, after


def _split(
    retokeniser: Retokeniser,
    text: Text,
    candidates: Int[Array, "B K"],
    settled: Int[Array, "B"],
    width: int,
    fresh_width: int = FRESH,
) -> Splits:
    """The tokens that the reward model reads after its settled ones, for every candidate. One call of the host; on a
    mesh, one for each device's rows.

    The results are returned as one array, because programs that return several arrays of different ranks do not compile
    for TPUs.
    """
    options = candidates.shape[1]
    shapes = Splits((fresh_width,), (), (options, width), (options,), ())
    widths = [math.prod(shape) for shape in shapes]

    def local(*arrays: Array) -> Splits:
        batch = arrays[0].shape[0]

        def packed(*args: Array) -> np.ndarray:
            # The arrays are JAX's. Using JAX inside a callback can deadlock, so they are converted to numpy first.
            results = retokeniser.candidates(*map(np.asarray, args), width, fresh_width)
            return np.concatenate([x.reshape(batch, -1) for x in results], axis=1)

        shape = jax.ShapeDtypeStruct((batch, sum(widths)), jnp.int32)
        row = jax.pure_callback(packed, shape, *arrays, vmap_method="sequential")
        parts = jnp.split(row, np.cumsum(widths)[:-1], axis=1)
        return Splits(*(part.reshape(batch, *shape) for part, shape in zip(parts, shapes, strict=True)))

    arrays, mesh = (*text, candidates, settled), jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return local(*arrays)
    rows = row_spec(mesh, len(settled))
    return jax.shard_map(local, in_specs=rows, out_specs=rows, check_vma=False)(*arrays)


def _join(splits: Splits, width: int) -> tuple[Int[Array, "B K W"], Int[Array, "B K"]]:
    """Each candidate's fresh tokens followed by its tail, padded to `width`, and the lengths."""
    fresh = splits.fresh_lengths[:, None, None]
    slots = jnp.arange(width)
    from_fresh = jnp.take_along_axis(splits.fresh, jnp.minimum(slots, splits.fresh.shape[1] - 1)[None], axis=1)[:, None]
    at = jnp.clip(slots - fresh, 0, splits.tails.shape[-1] - 1)
    from_tails = jnp.take_along_axis(splits.tails, jnp.broadcast_to(at, (*splits.tails.shape[:2], width)), axis=-1)
    return jnp.where(slots < fresh, from_fresh, from_tails), splits.fresh_lengths[:, None] + splits.tail_lengths


class _Tree(NamedTuple):
    """The texts of K candidates as a tree of tokens: tokens with equal predecessors share a node.

    `first[b, k, j]` is the first candidate whose text begins with the same j + 1 tokens as candidate k's. `is_node`
    says where that is k itself. Nodes are in the order of candidates, so the first candidate's tokens come first.
    """

    first: Int[Array, "B K W"]
    is_node: Bool[Array, "B K W"]

    @property
    def size(self) -> Int[Array, "B"]:
        return self.is_node.sum(axis=(1, 2))

    @classmethod
    def of(cls, tokens: Int[Array, "B K W"], lengths: Int[Array, "B K"]) -> "_Tree":
        _, count, width = tokens.shape
        real = jnp.arange(width) < lengths[..., None]
        same = (tokens[:, :, None] == tokens[:, None]) & real[:, None]
        first = jnp.argmax(jnp.cumprod(same, axis=-1, dtype=jnp.int8), axis=2)
        return cls(first, real & (first == jnp.arange(count)[:, None]))
