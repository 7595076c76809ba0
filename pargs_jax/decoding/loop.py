"""The decode loop: reward-guided generation for a batch of prompts in one `lax.scan`.

A step takes the language model's k likeliest next tokens, adds the guides' weighted rewards to their scores, and lets a
rule choose: `score(v) = log p(v | x, y) + sum_j w_j r_j(x, y, v)` (PARGS, Algorithm 1; ARGS, Eq. 1).
"""

import dataclasses
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from pargs_jax.decoding.guides import Guide, Prompts
from pargs_jax.decoding.rules import Rule
from pargs_jax.errors import InputError
from pargs_jax.models.cache import Cache, append_choice
from pargs_jax.models.causal import CausalModel
from pargs_jax.models.model import Params
from pargs_jax.sharding import ROWS, constrain, on_every_device


class DecodeState(NamedTuple):
    """What one step hands to the next."""

    step: Int[Array, ""]
    last: Int[Array, "B"]
    """The newest token, which the language model has not read yet."""
    done: Bool[Array, "B"]
    keys: PRNGKeyArray
    lm: Cache
    guides: tuple[Any, ...]


class StepRecord(NamedTuple):
    """What one step wrote, for each row: `pad_id`, 0 and 0 where the row was finished."""

    tokens: Int[Array, "*N B"]
    log_probs: Float[Array, "*N B"]
    """log p of the chosen token under the language model (full vocabulary, temperature 1), in nats."""
    rewards: Float[Array, "*N B J"]
    """Each guide's reward of the answer up to and including the chosen token."""


class Proposal(NamedTuple):
    """What a step computes before anything is written: the choice, its record, and what the models are to commit."""

    choice: Int[Array, "B"]
    record: StepRecord
    lm_pending: Any
    guides_pending: tuple[Any, ...]


class Decoded(NamedTuple):
    """The answers of a batch; `tokens[b, :lengths[b]]` is row b's, with its end-of-sequence token if it `finished`."""

    tokens: Int[Array, "B N"]
    lengths: Int[Array, "B"]
    finished: Bool[Array, "B"]
    log_probs: Float[Array, "B N"]
    rewards: Float[Array, "B N J"]


@dataclasses.dataclass(frozen=True)
class Decoder:
    """The static parts of a decode: a language model, guides, k, and how scores are based.

    `base` is what rewards are added to: log-probabilities (PARGS) or raw logits (ARGS). The two differ by a constant in
    each step, so they choose alike; both are here because the recorded scores of the papers differ.
    """

    lm: CausalModel
    guides: tuple[Guide, ...] = ()
    k: int = 10
    eos_ids: tuple[int, ...] = ()
    pad_id: int = 0
    base: Literal["log_probs", "logits"] = "log_probs"

    def __post_init__(self) -> None:
        if not 1 <= self.k <= self.lm.config.vocab_size:
            raise InputError(f"k is {self.k}; it must be from 1 to the vocabulary's {self.lm.config.vocab_size} tokens")

    def start(
        self,
        params: tuple[Params, tuple[Any, ...]],
        prompts: Int[Array, "B P"],
        lengths: Int[Array, "B"],
        keys: PRNGKeyArray,
        max_new_tokens: int,
        guide_prompts: tuple[Prompts | None, ...] | None = None,
    ) -> DecodeState:
        """Reads the prompts, each guide its own (see `decode`). A row of length 0 is filler: it is finished from the
        start."""
        lm_params, guide_params = params
        prompts = constrain(prompts, ROWS, None)
        guide_prompts = jax.tree.map(
            lambda x: constrain(x, ROWS, *(None,) * (x.ndim - 1)), guide_prompts or (None,) * len(self.guides)
        )
        if prompts.shape[1] == 1:
            # The language model reads all but the last token before the loop: leave it something to read.
            prompts = jnp.pad(prompts, ((0, 0), (1, 0)))
        width = prompts.shape[1]
        _, cache = self.lm.prefill(lm_params, prompts[:, :-1], jnp.maximum(lengths - 1, 0), width - 1 + max_new_tokens)
        states = tuple(
            guide.prefill(guide_param, Prompts(prompts, lengths), max_new_tokens, own_prompts)
            for guide, guide_param, own_prompts in zip(self.guides, guide_params, guide_prompts, strict=True)
        )
        return DecodeState(jnp.zeros((), jnp.int32), prompts[:, -1], lengths == 0, keys, cache, states)

    def advance(
        self,
        params: tuple[Params, tuple[Any, ...]],
        state: DecodeState,
        weights: Float[Array, "J"],
        rule: Rule,
        steps: int,
    ) -> tuple[DecodeState, StepRecord]:
        """`steps` more tokens for every unfinished row, as one scan; steps after the last row finished are skipped."""

        def body(state: DecodeState, _: None) -> tuple[DecodeState, StepRecord]:
            return self._step(params, state, weights, rule)

        return jax.lax.scan(body, state, length=steps)

    def _step(
        self, params: tuple[Params, tuple[Any, ...]], state: DecodeState, weights: Array, rule: Rule
    ) -> tuple[DecodeState, StepRecord]:
        def move() -> Proposal:
            return self._propose(params, state, weights, rule)

        def skip() -> Proposal:
            return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(move))

        # The caches are read in the branch and written out of it: a branch that returned them would copy them.
        proposal = jax.lax.cond(state.done.all(), skip, move)
        first = jnp.zeros_like(proposal.choice)
        cache = append_choice(state.lm, proposal.lm_pending, first)
        guide_states = tuple(
            guide.commit(guide_params, guide_state, pending, proposal.choice)
            for guide, guide_params, guide_state, pending in zip(
                self.guides, params[1], state.guides, proposal.guides_pending, strict=True
            )
        )
        record = jax.tree.map(
            lambda new, blank: jnp.where(state.done.reshape(-1, *[1] * (new.ndim - 1)), blank, new),
            proposal.record,
            self._blank_record(state.done.shape[0]),
        )
        done = state.done | jnp.isin(record.tokens, jnp.asarray(self.eos_ids, jnp.int32))
        return DecodeState(state.step + 1, record.tokens, done, state.keys, cache, guide_states), record

    def _propose(
        self, params: tuple[Params, tuple[Any, ...]], state: DecodeState, weights: Array, rule: Rule
    ) -> Proposal:
        """Candidates, their fused scores, and the rule's choice."""
        lm_params, guide_params = params
        hidden, lm_pending = self.lm.siblings(lm_params, state.lm, state.last[:, None])
        logits = self.lm.logits(lm_params, hidden[:, 0])
        top_logits, candidates = jax.lax.top_k(logits, self.k)
        log_probs = top_logits - jax.nn.logsumexp(logits, axis=-1, keepdims=True)

        guided = [
            guide.score(guide_param, guide_state, candidates)
            for guide, guide_param, guide_state in zip(self.guides, guide_params, state.guides, strict=True)
        ]
        rewards = jnp.stack([r for r, _ in guided], -1) if guided else jnp.zeros((*candidates.shape, 0))
        scores = (log_probs if self.base == "log_probs" else top_logits) + (rewards * weights).sum(-1)
        choice = rule(scores, jax.vmap(jax.random.fold_in, (0, None))(state.keys, state.step))

        at = choice[:, None]
        record = StepRecord(
            jnp.take_along_axis(candidates, at, axis=1)[:, 0],
            jnp.take_along_axis(log_probs, at, axis=1)[:, 0],
            jnp.take_along_axis(rewards, at[..., None], axis=1)[:, 0],
        )
        return Proposal(choice, record, lm_pending, tuple(pending for _, pending in guided))

    def _blank_record(self, batch: int) -> StepRecord:
        tokens = jnp.full(batch, self.pad_id, jnp.int32)
        return StepRecord(tokens, jnp.zeros(batch), jnp.zeros((batch, len(self.guides))))


def row_keys(seed: int, prompt_ids: Int[Array, "B"]) -> PRNGKeyArray:
    """One key a row, from the seed and the prompt's id alone, so that an answer does not depend on its batch."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), prompt_ids)


start = jax.jit(Decoder.start, static_argnames=("self", "max_new_tokens"))
advance = jax.jit(Decoder.advance, static_argnames=("self", "steps"), donate_argnames="state")


@partial(jax.jit, static_argnames=("decoder", "max_new_tokens"))
def decode(
    decoder: Decoder,
    lm_params: Params,
    guide_params: tuple[Any, ...],
    prompts: Int[Array, "B P"],
    lengths: Int[Array, "B"],
    keys: PRNGKeyArray,
    weights: Float[Array, "J"],
    rule: Rule,
    max_new_tokens: int,
    guide_prompts: tuple[Prompts | None, ...] | None = None,
) -> Decoded:
    """Answers a batch of prompts in one compiled call: prefill, then one scan of `max_new_tokens` steps.

    Args:
        decoder: the static parts (models, k, end-of-sequence ids).
        lm_params, guide_params: the arrays of the language model, and of each guide.
        prompts, lengths: left-padded token ids, and the number of real ones in each row. The longest prompt and
            `max_new_tokens` together must fit the `max_positions` of every model's config.
        keys: one PRNG key a row (`row_keys`).
        weights: one reward weight a guide (`beta` in the paper's Eq. 6); empty without guides.
        rule: `Greedy()` or `Sample(temperature)`.
        max_new_tokens: the longest answer, its end-of-sequence token included.
        guide_prompts: for each guide the same prompts as its own model reads them, or None where it reads what the
            language model reads. Guides with a tokenizer of their own need them.
    """
    params = (lm_params, guide_params)
    state = decoder.start(params, prompts, lengths, keys, max_new_tokens, guide_prompts)
    state, record = decoder.advance(params, state, weights, rule, max_new_tokens)
    return on_every_device(gather_records(record, decoder.eos_ids, lengths))


def gather_records(record: StepRecord, eos_ids: tuple[int, ...], prompt_lengths: Int[Array, "B"]) -> Decoded:
    """Records of N steps, `[N B ...]`, as answers, `[B N ...]`."""
    tokens = record.tokens.T
    count = tokens.shape[1]
    is_eos = jnp.isin(tokens, jnp.asarray(eos_ids, jnp.int32))
    finished = is_eos.any(axis=1)
    lengths = jnp.where(finished, is_eos.argmax(axis=1) + 1, count) * (prompt_lengths > 0)
    return Decoded(tokens, lengths, finished, record.log_probs.T, jnp.moveaxis(record.rewards, 0, 1))
