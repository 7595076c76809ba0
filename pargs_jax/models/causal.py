"""The interface that all causal families share.

Besides full passes (`encode`), a `CausalModel` has the operations of decoding: `prefill` reads prompts into a cache,
`siblings` reads alternative next tokens, each of which sees the cached text and itself, and `keep` appends one of them.
For continuations longer than one token, `extend` reads them and `Cache.append` keeps the chosen part.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from pargs_jax.models.cache import Cache, with_slots
from pargs_jax.models.heads import CAUSAL_HEADS
from pargs_jax.models.layers import BesideCache, InCache
from pargs_jax.models.model import Model, PackedPrompts, Params
from pargs_jax.models.one_pass import OnePass


@dataclasses.dataclass(frozen=True)
class CausalModel(OnePass, Model):
    """A causal backbone with a vocabulary head (a language model), a scalar head or a table (reward models)."""

    heads: ClassVar = CAUSAL_HEADS
    reads_candidates: ClassVar[bool] = True

    def encode(
        self,
        params: Params,
        tokens: Int[Array, "B T"],
        start: Int[Array, "B"] | None = None,
        key: PRNGKeyArray | None = None,
        *,
        prompt_width: int | None = None,
    ) -> Float[Array, "B T D"]:
        """Final hidden states of whole texts. `start` is the number of left-padding tokens of each row (default 0).
        Right padding needs no mask, because no real token follows it. A key turns dropout on. `prompt_width` makes no
        difference here; it matters to a `PrefixCausalModel`."""
        return self._encode(params, tokens, start, key)[0]

    def encode_with_next(
        self,
        params: Params,
        tokens: Int[Array, "B T"],
        start: Int[Array, "B"],
        place: int,
        nexts: Int[Array, "B R K"],
    ) -> Float[Array, "B R K D"]:
        """Final hidden states of texts that are cut and get another last token: entry (i, k) is that of the first
        `place + i` slots followed by `nexts[:, i, k]`. The texts are read once, and the K tokens one after the other,
        which takes as much memory as one of them."""
        _, kv = self._encode(params, tokens, start, None)
        ends = place + jnp.arange(nexts.shape[1])
        slots = jnp.arange(tokens.shape[1])
        sees = (slots < ends[:, None]) & (slots >= start[:, None, None])
        return self._read_nexts(params, nexts, ends - start[:, None], sees, kv, slots - start[:, None])

    def encode_packed(
        self, params: Params, packed: PackedPrompts, key: PRNGKeyArray | None = None
    ) -> Float[Array, "G N D"]:
        """Final hidden states of packed texts. A token sees its own prompt, and what precedes it in its own answer. A
        key turns dropout on."""
        return self._encode_packed(params, packed, key)[0]

    def encode_packed_with_next(
        self, params: Params, packed: PackedPrompts, nexts: Int[Array, "G N K"]
    ) -> Float[Array, "G N K D"]:
        """Final hidden states of packed texts that are cut and get another last token: entry (n, k) is that of the text
        up to slot n with `nexts[:, n, k]` in place of the token there. The K tokens are read one after the other."""
        _, kv, sees = self._encode_packed(params, packed, None)
        before = sees & ~jnp.eye(sees.shape[1], dtype=bool)
        return self._read_nexts(params, nexts, packed.positions, before, kv, packed.positions)

    def logits(self, params: Params, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Next-token logits (fp32) of a model with a vocabulary head; with a table head, rewards of all next tokens."""
        network = self.network(params)
        return network.head(hidden, network.backbone.embed)[..., : self.config.vocab_size]

    def rewards(self, params: Params, hidden: Float[Array, "*B D"]) -> Float[Array, "*B"]:
        """Rewards (fp32) of the texts that end at each hidden state, for a model with a reward head."""
        return self.network(params).head(hidden)

    def prefill(
        self, params: Params, prompts: Int[Array, "B P"], lengths: Int[Array, "B"], slots: int
    ) -> tuple[Float[Array, "B D"], Cache]:
        """Reads left-padded prompts into a cache of `slots` slots a row. Also returns each prompt's last hidden
        state."""
        hidden, cache = self.prefill_states(params, prompts, lengths, slots)
        return jnp.take_along_axis(hidden, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)[:, 0], cache

    def prefill_states(
        self, params: Params, prompts: Int[Array, "B P"], lengths: Int[Array, "B"], slots: int
    ) -> tuple[Float[Array, "B P D"], Cache]:
        """`prefill` that returns the final hidden states of all prompt tokens, in the order of their cache slots."""
        hidden, new = self._encode(params, shift_left(prompts, lengths), None, None, lengths)
        return hidden, Cache(with_slots(new, slots), lengths)

    def siblings(
        self, params: Params, cache: Cache, candidates: Int[Array, "B K"]
    ) -> tuple[Float[Array, "B K D"], Any]:
        """Hidden states of K alternative next tokens, each of which sees the cached text and itself, and the data that
        `keep` needs. The cached text is stored and read once for all K.

        Unrolled layers write the candidates behind each row's end and attend once; the cache needs K free slots for
        this. Stacked layers store them separately, because a scan that returned its cache would copy it.
        """
        count = candidates.shape[1]
        if not self.unrolled:
            return self.extend(params, cache, candidates, jnp.zeros_like(candidates), jnp.eye(count, dtype=bool))
        slots = jnp.arange(cache.slots)
        own_slots = cache.lengths[:, None] + jnp.arange(count)
        mask = cache.valid[:, None] | (slots == own_slots[..., None])
        positions = jnp.broadcast_to(cache.lengths[:, None], candidates.shape)
        return self.network(params).backbone(candidates, positions, InCache(cache.lengths, mask), cache.kv)

    def keep(self, cache: Cache, pending: Any, live: Bool[Array, "B"], index: Int[Array, "B"] | None = None) -> Cache:
        """The cache with sibling `index[b]` appended to every live row. `index` is None if there was only one
        sibling."""
        counts = live.astype(jnp.int32)
        if self.unrolled:
            return cache._replace(kv=pending).keep_one(counts, index)
        return cache.append_one(pending, counts, index)

    def append(
        self, params: Params, cache: Cache, tokens: Int[Array, "B T"], counts: Int[Array, "B"]
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """Hidden states of T tokens that follow each row's text, and the cache with the first `counts[b]` of them. Each
        row needs T free slots."""
        offsets = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        if not self.unrolled:
            causal = jnp.tril(jnp.ones((tokens.shape[1],) * 2, bool))
            hidden, new = self.extend(params, cache, tokens, offsets, causal)
            return hidden, cache.append(new, counts)
        positions = cache.lengths[:, None] + offsets
        mask = jnp.arange(cache.slots) <= positions[..., None]
        hidden, kv = self.network(params).backbone(tokens, positions, InCache(cache.lengths, mask), cache.kv)
        return hidden, cache._replace(kv=kv, lengths=cache.lengths + counts)

    def extend(
        self,
        params: Params,
        cache: Cache,
        tokens: Int[Array, "B T"],
        offsets: Int[Array, "B T"],
        mask: Bool[Array, "*B T T"],
    ) -> tuple[Float[Array, "B T D"], Any]:
        """Hidden states of T new tokens, and their keys and values for `Cache.append`. Each token stands `offsets[b,
        t]` positions after the cached text and sees all of it; `mask[..., t, s]` says whether token t sees token s."""
        positions = cache.lengths[:, None] + offsets
        return self.network(params).backbone(tokens, positions, BesideCache(cache.valid, mask), cache.kv)

    def _encode_packed(
        self, params: Params, packed: PackedPrompts, key: PRNGKeyArray | None
    ) -> tuple[Array, Any, Bool[Array, "G N N"]]:
        sees = seen_in(packed)
        hidden, kv = self.network(params).backbone(packed.tokens, packed.positions, sees, key=key)
        return hidden, kv, sees

    def _read_nexts(
        self,
        params: Params,
        nexts: Int[Array, "B T K"],
        positions: Int[Array, "B T"],
        sees: Bool[Array, "B T S"],
        kv: Any,
        kv_positions: Int[Array, "B S"],
    ) -> Float[Array, "B T K D"]:
        """States of other tokens at these positions, each of which sees itself and the slots that `sees` says."""
        sight = BesideCache(sees, jnp.eye(nexts.shape[1], dtype=bool), kv_positions)
        backbone = self.network(params).backbone
        states = jax.lax.map(lambda each: backbone(each, positions, sight, kv)[0], jnp.moveaxis(nexts, -1, 0))
        return jnp.moveaxis(states, 0, 2)

    def _encode(
        self,
        params: Params,
        tokens: Array,
        start: Array | None,
        key: PRNGKeyArray | None,
        lengths: Array | None = None,
    ) -> tuple[Array, Any]:
        batch, length = tokens.shape
        start = jnp.zeros(batch, jnp.int32) if start is None else start
        slots = jnp.arange(length)
        positions = jnp.maximum(slots - start[:, None], 0)
        if lengths is not None:  # padding must not count: some rotary scalings go by a row's longest position
            positions = jnp.minimum(positions, jnp.maximum(lengths - 1, 0)[:, None])
        causal = slots[:, None] >= slots
        mask: Bool[Array, "B T T"] = causal & (slots >= start[:, None])[:, None, :]
        return self.network(params).backbone(tokens, positions, mask, key=key)


def shift_left(prompts: Int[Array, "B P"], lengths: Int[Array, "B"]) -> Int[Array, "B P"]:
    """Moves the padding of left-padded prompts to the right."""
    width = prompts.shape[1]
    return jnp.take_along_axis(prompts, (jnp.arange(width) - lengths[:, None]) % width, axis=1)


def shift_right(prompts: Int[Array, "B P"], lengths: Int[Array, "B"]) -> Int[Array, "B P"]:
    """The inverse of `shift_left`."""
    width = prompts.shape[1]
    return jnp.take_along_axis(prompts, (jnp.arange(width) + lengths[:, None]) % width, axis=1)


def seen_in(packed: PackedPrompts) -> Bool[Array, "G N N"]:
    """Whether slot n of packed texts sees slot m: of its own segment, the prompt and its own answer up to itself."""
    of_seen = packed.answers[:, None]
    in_segment = packed.segments[:, :, None] == packed.segments[:, None]
    in_text = in_segment & ((of_seen == 0) | (of_seen == packed.answers[:, :, None]))
    return in_text & jnp.tril(jnp.ones((in_text.shape[1],) * 2, bool))
