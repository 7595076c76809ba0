"""Guides whose reward model has a tokenizer of its own: what is scored is the text, as that tokenizer splits it.

Once a step, one host callback for the whole batch turns the language model's tokens into the reward model's
(`Retokeniser`); everything else stays on the device. Prompts come in the reward model's tokens already. The rewards are
exact: those of the reward model on the text of its prompt, the answer so far and the candidate, and of the finished
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
from pargs_jax.models.causal import CausalModel
from pargs_jax.models.encoder import EncoderModel
from pargs_jax.models.model import Params
from pargs_jax.models.prefix_causal import PrefixCausalModel
from pargs_jax.sharding import row_spec

FRESH = 4
"""Settled tokens that a step can add to the cache; what is left over waits for the next."""

TEXTS_AT_ONCE = 64
"""Texts of a step that an encoder reads together: enough to keep a device busy, and few enough for its memory."""

PACKED_WIDTHS = (1, 2, 8, 16)
"""Widths that the tokens of a step are padded to, in units of a token for each candidate and a few that they share.
The first is nearly always enough where words are short. Each is a program to compile."""


class Splits(NamedTuple):
    """The reward model's tokens of K continuations: those that are already settled, `fresh`, and a tail for each; and
    the room that the longest of them needs."""

    fresh: Int[Array, "B M"]
    fresh_lengths: Int[Array, "B"]
    tails: Int[Array, "B K W"]
    tail_lengths: Int[Array, "B K"]
    needed: Int[Array, "B"]


class Retokeniser(Protocol):
    """The host's part, in numpy; hashable. See `pargs_jax.text.retokenisation`."""

    def candidates(
        self,
        tokens: np.ndarray,
        prompt_lengths: np.ndarray,
        lengths: np.ndarray,
        candidates: np.ndarray,
        settled: np.ndarray,
        tail_width: int,
        fresh_width: int,
    ) -> Any: ...


class CachedState(NamedTuple):
    """A cache of what is settled."""

    cache: Cache
    prompt_reward: Float[Array, "B"]
    """The reward of the prompt alone, for candidates that add no text to it."""
    settled: Int[Array, "B"]
    """Tokens of each answer in the cache."""
    settled_after: Int[Array, "B N"]
    """The same after each of the answer's tokens, for when these are taken back."""
    needed: Int[Array, "B"]
    """The most room that an answer with a candidate has needed; where it is more than there is, rewards are void."""


class CachedPending(NamedTuple):
    """Keys and values of the fresh tokens, which are written whatever is chosen, the room that the texts needed, and
    the answers' lengths."""

    kv: Any
    fresh_lengths: Int[Array, "B"]
    needed: Int[Array, "B"]
    answer_lengths: Int[Array, "B"]


@dataclasses.dataclass(frozen=True)
class RetokenisedGuide:
    """A causal (or prefix-causal) reward model with a tokenizer of its own.

    The cache holds the tokens that no later text can change. A step reads what follows them as a tree: what several
    candidates begin with is read once.

    Attributes:
        model: the reward model.
        retokeniser: turns the language model's tokens into this model's.
        answer_width: room for an answer and a candidate, in the reward model's tokens. Texts that need more are cut,
            and the state's `needed` says so.
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
        # The text's last token as the one candidate. What earlier ones settled may wait for later steps.
        before, last = _without_last(text)
        rewards, pending = self.score(params, state, before, last[:, None])
        chosen = Chosen(last, jnp.zeros_like(last), new > 0)
        return (
            rewards[:, 0],
            (pending.needed - state.settled) * chosen.live,
            self.commit(params, state, pending, chosen),
        )

    def score(
        self, params: Params, state: CachedState, text: Text, candidates: Int[Array, "B K"]
    ) -> tuple[Float[Array, "B K"], CachedPending]:
        splits = _split(self.retokeniser, text, candidates, state.settled, self.answer_width)
        tokens, lengths = _join(splits, self.answer_width + FRESH)
        tree = _Tree.of(tokens, lengths)
        unit = -(-(candidates.shape[1] + 4) // FRESH) * FRESH
        widths = [width * unit for width in PACKED_WIDTHS if width * unit < tokens.shape[1] * tokens.shape[2]]
        packed = [partial(self._score_packed, params, state, tokens, lengths, tree, width) for width in widths]
        apart = partial(self._score_apart, params, state, tokens, lengths)
        first = jnp.searchsorted(jnp.asarray(widths, jnp.int32), tree.size.max())
        rewards, kv = jax.lax.switch(first, [*packed, apart])
        rewards = jnp.where(lengths > 0, rewards, state.prompt_reward[:, None])
        return rewards, CachedPending(kv, splits.fresh_lengths, splits.needed, text.answer_lengths)

    def commit(self, params: Params, state: CachedState, pending: CachedPending, chosen: Chosen) -> CachedState:
        fresh = pending.fresh_lengths * chosen.live
        settled = state.settled + fresh
        rows = jnp.arange(len(fresh))
        return CachedState(
            state.cache.append(pending.kv, fresh),
            state.prompt_reward,
            settled,
            state.settled_after.at[rows, pending.answer_lengths].set(settled, mode="drop"),
            jnp.maximum(state.needed, pending.needed * chosen.live),
        )

    def rewind(self, state: CachedState, text: Text, dropped: Int[Array, "B"]) -> CachedState:
        answer_lengths = text.answer_lengths
        last = jnp.maximum(answer_lengths - 1, 0)[:, None]
        before = jnp.take_along_axis(state.settled_after, last, axis=1)[:, 0] * (answer_lengths > 0)
        settled = jnp.where(dropped > 0, before, state.settled)
        # What other tokens will settle is not known, nor will it be where `read` passes over them.
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
        """Rewards, and keys and values of the fresh tokens, by one pass over the tree's tokens side by side."""
        batch, count, longest = tokens.shape
        place = jax.vmap(partial(jnp.nonzero, size=width, fill_value=count * longest))
        (at,) = place(tree.is_node.reshape(batch, -1))
        candidate, offset = at // longest, at % longest
        new = jnp.take_along_axis(tokens.reshape(batch, -1), jnp.minimum(at, count * longest - 1), axis=1)
        # A token sees those that its candidate has before it, wherever these were first found.
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

    def _score_apart(
        self, params: Params, state: CachedState, tokens: Int[Array, "B K W"], lengths: Int[Array, "B K"]
    ) -> tuple[Float[Array, "B K"], Any]:
        """The same for texts of any length, one candidate after the other."""
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
    """The prompts in the encoder's tokens."""

    prompts: Prompts
    needed: Int[Array, "B"]
    """The most room that an answer with a candidate has needed; where it is more than there is, rewards are void."""


@dataclasses.dataclass(frozen=True)
class EncoderGuide:
    """An encoder, which reads every candidate's whole text anew: B * K texts a step, closed as finished ones are.

    Attributes are those of `RetokenisedGuide`, and `closing_id`, the token that closes a text. Texts are padded to one
    of a few widths, the least that holds the longest of a step, and so by no more than a `finest` part of the longest
    text that there is room for.
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
        return EncoderState(_require(own_prompts), jnp.zeros_like(prompts.lengths))

    def read_prompts(
        self, params: Params, prompts: Prompts, capacity: Capacity, own_prompts: Prompts | None
    ) -> tuple[Float[Array, "B"], EncoderState]:
        state = self.prefill(params, prompts, capacity, own_prompts)
        none = jnp.zeros_like(prompts.lengths)
        return self.model.answer_rewards(params, *state.prompts, none[:, None], none, self.closing_id), state

    def read(
        self, params: Params, state: EncoderState, text: Text, new: Int[Array, "B"], width: int
    ) -> tuple[Float[Array, "B"], Int[Array, "B"], EncoderState]:
        before, last = _without_last(text)
        rewards, needed = self.score(params, state, before, last[:, None])
        chosen = Chosen(last, jnp.zeros_like(last), new > 0)
        tokens = (state.prompts.lengths + needed) * chosen.live
        return rewards[:, 0], tokens, self.commit(params, state, needed, chosen)

    def score(
        self, params: Params, state: EncoderState, text: Text, candidates: Int[Array, "B K"]
    ) -> tuple[Float[Array, "B K"], Int[Array, "B"]]:
        splits = _split(self.retokeniser, text, candidates, jnp.zeros_like(text.lengths), self.answer_width)
        longest = (splits.fresh_lengths[:, None] + splits.tail_lengths).max()
        step = -(-(state.prompts.tokens.shape[1] + self.answer_width) // self.finest)
        widths = [min(width, self.answer_width) for width in range(step, self.answer_width + step, step)]
        return _at_least_width(partial(self._score_at, params, state, splits), longest, widths), splits.needed

    def commit(self, params: Params, state: EncoderState, pending: Int[Array, "B"], chosen: Chosen) -> EncoderState:
        return state._replace(needed=jnp.maximum(state.needed, pending * chosen.live))

    def rewind(self, state: EncoderState, text: Text, dropped: Int[Array, "B"]) -> EncoderState:
        return state

    def _score_at(self, params: Params, state: EncoderState, splits: Splits, width: int) -> Float[Array, "B K"]:
        tokens, lengths = _join(splits, width)
        batch, count = lengths.shape
        together = max(n for n in range(1, count + 1) if count % n == 0 and (n == 1 or n * batch <= TEXTS_AT_ONCE))
        prompts, prompt_lengths = (jnp.repeat(x, together, axis=0) for x in state.prompts)

        def read(texts: tuple[Int[Array, "N W"], Int[Array, "N"]]) -> Float[Array, "N"]:
            return self.model.answer_rewards(params, prompts, prompt_lengths, *texts, self.closing_id)

        def in_parts(x: Int[Array, "B K *W"]) -> Int[Array, "P N *W"]:
            parts = x.reshape(batch, -1, together, *x.shape[2:]).swapaxes(0, 1)
            return parts.reshape(-1, batch * together, *x.shape[2:])

        rewards = jax.lax.map(read, (in_parts(tokens), in_parts(lengths)))
        return rewards.reshape(-1, batch, together).swapaxes(0, 1).reshape(batch, count)


def _require(own_prompts: Prompts | None) -> Prompts:
    if own_prompts is None:
        raise InputError("a guide with its own tokenizer needs the prompts in its own tokens: give guide_prompts")
    return own_prompts


def _without_last(text: Text) -> tuple[Text, Int[Array, "B"]]:
    """Each text without its answer's last token, and that token; an empty answer stays as it is."""
    at = jnp.maximum(text.lengths - 1, 0)[:, None]
    before = text._replace(lengths=jnp.maximum(text.lengths - 1, text.prompt_lengths))
    return before, jnp.take_along_axis(text.tokens, at, axis=1)[:, 0]


def _split(
    retokeniser: Retokeniser, text: Text, candidates: Int[Array, "B K"], settled: Int[Array, "B"], width: int
) -> Splits:
    """One host call: what the reward model reads after its settled tokens, for every candidate."""
    options = candidates.shape[1]

    def shapes(batch: int) -> Splits:
        fresh, tails = _int_shape(batch, FRESH), _int_shape(batch, options, width)
        return Splits(fresh, _int_shape(batch), tails, _int_shape(batch, options), _int_shape(batch))

    def call(tokens, prompt_lengths, lengths, candidates, settled):  # noqa: ANN001, ANN202 - numpy arrays in, Splits out
        return retokeniser.candidates(tokens, prompt_lengths, lengths, candidates, settled, width, FRESH)

    return _on_host(call, shapes, *text, candidates, settled)


def _int_shape(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def _on_host(call: Callable[..., Any], shapes: Callable[[int], Any], *arrays: Array) -> Any:
    """Runs a numpy function of batched arrays on the host; on a mesh, each device's rows in a call of their own.

    What it returns, int32 with a leading B, travels as one array: to TPUs several of different ranks do not compile.
    """

    def local(*arrays: Array) -> Any:
        batch = arrays[0].shape[0]
        wanted = jax.tree.leaves(shapes(batch))
        widths = [math.prod(leaf.shape[1:]) for leaf in wanted]

        def packed(*args: Array) -> np.ndarray:
            # Arrays arrive as JAX's: touching JAX inside a callback can deadlock, so they are numpy's first of all.
            results = call(*map(np.asarray, args))
            return np.concatenate([x.reshape(batch, -1).astype(np.int32) for x in results], axis=1)

        row = jax.pure_callback(packed, _int_shape(batch, sum(widths)), *arrays, vmap_method="sequential")
        parts = jnp.split(row, np.cumsum(widths)[:-1], axis=1)
        leaves = [part.reshape(leaf.shape) for part, leaf in zip(parts, wanted, strict=True)]
        return jax.tree.unflatten(jax.tree.structure(shapes(batch)), leaves)

    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return local(*arrays)
    rows = row_spec(mesh, arrays[0].shape[0])
    return jax.shard_map(local, in_specs=rows, out_specs=rows, check_vma=False)(*arrays)


def _join(splits: Splits, width: int) -> tuple[Int[Array, "B K W"], Int[Array, "B K"]]:
    """Fresh tokens and tail of each candidate in one piece, padded to `width`, and the lengths."""
    fresh = splits.fresh_lengths[:, None, None]
    slots = jnp.arange(width)
    from_fresh = jnp.take_along_axis(splits.fresh, jnp.minimum(slots, FRESH - 1)[None], axis=1)[:, None]
    at = jnp.clip(slots - fresh, 0, splits.tails.shape[-1] - 1)
    from_tails = jnp.take_along_axis(splits.tails, jnp.broadcast_to(at, (*splits.tails.shape[:2], width)), axis=-1)
    return jnp.where(slots < fresh, from_fresh, from_tails), splits.fresh_lengths[:, None] + splits.tail_lengths


class _Tree(NamedTuple):
    """The texts of K candidates as a tree of tokens: those that have the same tokens before them are one node.

    `first[b, k, j]` is the first candidate whose text begins with the first j + 1 tokens of candidate k's; `is_node`
    says where that is k itself. Nodes come in the order of candidates, and so the first one's tokens before all others.
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


def _at_least_width(run: Callable[..., Any], needed: Int[Array, ""], widths: list[int]) -> Any:
    """`run(width=...)` at the first of the widths that holds what is needed."""
    branches = [partial(run, width=width) for width in widths]
    return jax.lax.switch(jnp.searchsorted(jnp.asarray(widths), needed), branches)
