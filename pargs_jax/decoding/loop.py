"""The decode loop: reward-guided generation for a batch of rows in one `lax.scan`.

In each step the proposer chooses candidates, the guides' weighted rewards are added to their log-probabilities, and the
rule draws one: `score(v) = log p(v | x, y) + sum_j w_j r_j(x, y, v)` (PARGS, Algorithm 1; ARGS, Eq. 1).
"""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from pargs_jax.decoding.guides import Capacity, Chosen, Guide, Prompts, Text
from pargs_jax.decoding.proposals import Proposal, Proposer, RewardForm, TopK, in_form
from pargs_jax.decoding.rest import Rest, draw_rest
from pargs_jax.decoding.rules import Rule, Sample
from pargs_jax.decoding.state import CandidateTrace, DecodeState, RowSettings, Trace
from pargs_jax.errors import InputError
from pargs_jax.models.causal import CausalModel, shift_left
from pargs_jax.models.model import Params
from pargs_jax.sharding import ROWS, constrain, on_every_device

AllParams = tuple[Params, tuple[Any, ...]]
"""The arrays of the language model, and of each guide."""


MAX_TRACED = 100
"""The most candidates per step in a trace; whole vocabularies at every token would take gigabytes."""


class Decoded(NamedTuple):
    """The answers of a batch; row b is `tokens[b, :lengths[b]]`, with its end-of-sequence token if it `finished`."""

    tokens: Int[Array, "B N"]
    lengths: Int[Array, "B"]
    finished: Bool[Array, "B"]
    rewards: Float[Array, "B J"]
    """Each guide's reward of the answer: the last token's, or the sum over all tokens for guides that add up."""
    trace: Trace


class _Fused(NamedTuple):
    """The results of a step before a token is drawn. `noise` is each candidate's; None for a rule without chance."""

    proposal: Proposal
    rest: Rest | None
    noise: Float[Array, "B K"] | None
    others: "_Others | None"
    entropies: Float[Array, "B"]
    lm_pending: Any
    guides_pending: tuple[Any, ...]


class _Others(NamedTuple):
    """The likeliest tokens before guidance, for the trace; -1 in place of those that are candidates."""

    tokens: Int[Array, "B A"]
    log_probs: Float[Array, "B A"]
    of_rest: Float[Array, "B A"] | None
    """Log-probabilities among the tokens that are not candidates; None where these cannot be drawn."""
    scores: Float[Array, "B A"]


@dataclasses.dataclass(frozen=True)
class Decoder:
    """The static parts of a decoder.

    Attributes:
        lm: the language model.
        guides: the guides that score tokens.
        proposer: chooses the candidates.
        rule: draws one of them.
        eos_ids: tokens that end an answer.
        pad_id: the token after an answer's end.
        keeps_candidates: whether the trace holds the candidates with their numbers: all of them, or else `MAX_TRACED`,
            which are the chosen one and the most probable others.
        reward_form: how rewards enter the scores.
        keeps_rest: whether tokens that are not proposed can be drawn too, with their scores without rewards (VAS).
            Together they form one more candidate (see `Rest`). Rows with a `Shape` choose for themselves.
        alternatives: the number of likeliest tokens that a trace with candidates also holds where they are not
            candidates.
    """

    lm: CausalModel
    guides: tuple[Guide, ...] = ()
    proposer: Proposer = TopK(10)  # noqa: RUF009 (frozen)
    rule: Rule = Sample()  # noqa: RUF009 (frozen)
    eos_ids: tuple[int, ...] = ()
    pad_id: int = 0
    keeps_candidates: bool = False
    reward_form: RewardForm = "plain"
    keeps_rest: bool = False
    alternatives: int = 0

    def __post_init__(self) -> None:
        vocab_size = self.lm.config.vocab_size
        proposed = self.proposer.size(vocab_size)
        if not 1 <= proposed <= vocab_size:
            raise InputError(f"k: got {proposed}, must be from 1 to {vocab_size}, the size of the vocabulary")

    @property
    def candidates(self) -> int:
        """K, the most candidates of a row."""
        return self.proposer.size(self.lm.config.vocab_size) + self.keeps_rest

    @property
    def bare(self) -> "Decoder":
        """A decoder that advances the same states, for steps in which no row asks for its candidates or keeps the rest.
        It does not record candidates."""
        return dataclasses.replace(self, keeps_candidates=False, keeps_rest=False, alternatives=0)

    def start(
        self,
        params: AllParams,
        prompts: Int[Array, "B P"],
        lengths: Int[Array, "B"],
        keys: PRNGKeyArray,
        settings: RowSettings,
        max_new_tokens: int,
        guide_prompts: tuple[Prompts | None, ...] | None = None,
    ) -> DecodeState:
        """Reads the prompts; each guide reads its own (see `decode`). The state holds answers of up to `max_new_tokens`
        tokens. A row of length 0 is filler: it is finished from the start."""
        lm_params, guide_params = params
        prompts = constrain(prompts, ROWS, None)
        guide_prompts = jax.tree.map(
            lambda x: constrain(x, ROWS, *(None,) * (x.ndim - 1)), guide_prompts or (None,) * len(self.guides)
        )
        batch, width = prompts.shape
        _, cache = self.lm.prefill(lm_params, prompts, lengths, width + max_new_tokens)
        capacity = Capacity(max_new_tokens, self.candidates)
        guides = tuple(
            guide.prefill(guide_param, Prompts(prompts, lengths), capacity, own_prompts)
            for guide, guide_param, own_prompts in zip(self.guides, guide_params, guide_prompts, strict=True)
        )
        # As many as a cache has slots: then prompts of many widths need states of the same size.
        tokens = jnp.pad(shift_left(prompts, lengths), ((0, 0), (0, cache.slots - width)))
        return DecodeState(
            Text(tokens, lengths, lengths),
            lengths == 0,
            keys,
            settings,
            # The prompt's last token is left for the first step, which reads the newest token like every other step.
            cache._replace(lengths=jnp.maximum(lengths - 1, 0)),
            guides,
            self._blank_trace(batch, max_new_tokens),
        )

    def advance(
        self, params: AllParams, state: DecodeState, steps: int, enough: int | Int[Array, ""] | None = None
    ) -> DecodeState:
        """Draws `steps` more tokens for every unfinished row, in one scan. When `enough` rows have finished (by default
        all), steps are skipped."""
        enough = len(state.done) if enough is None else enough

        def body(state: DecodeState, _: None) -> tuple[DecodeState, None]:
            # A loop that runs at most once. Unlike a `cond`, it updates caches in place.
            _, state = jax.lax.while_loop(
                lambda carry: carry[0] & (carry[1].done.sum() < enough),
                lambda carry: (jnp.zeros((), bool), self._step(params, carry[1])),
                (jnp.ones((), bool), state),
            )
            return state, None

        return jax.lax.scan(body, state, length=steps)[0]

    def rewind(
        self, state: DecodeState, answer_lengths: Int[Array, "B"], keys: PRNGKeyArray | None = None
    ) -> DecodeState:
        """Removes the tokens of each answer beyond `answer_lengths[b]`; nothing is copied. The row can then go on, even
        if it was finished. It draws the same tokens again unless it gets another key."""
        dropped = jnp.maximum(state.text.answer_lengths - answer_lengths, 0)
        text = state.text._replace(lengths=state.text.lengths - dropped)
        return state._replace(
            text=text,
            done=state.done & (dropped == 0),
            keys=state.keys if keys is None else keys,
            lm=state.lm.forget(dropped),
            guides=tuple(
                guide.rewind(guide_state, text, dropped)
                for guide, guide_state in zip(self.guides, state.guides, strict=True)
            ),
        )

    def read(self, state: DecodeState) -> Decoded:
        """Returns the answers so far."""
        lengths = state.text.answer_lengths
        width = state.trace.log_probs.shape[1]
        written = jnp.arange(width) < lengths[:, None]
        at = jnp.minimum(state.text.prompt_lengths[:, None] + jnp.arange(width), state.text.tokens.shape[1] - 1)
        tokens = jnp.where(written, jnp.take_along_axis(state.text.tokens, at, axis=1), self.pad_id)
        finished = (lengths > 0) & self._is_end(state.last_tokens)

        def blank(x: Array) -> Array:
            return jnp.where(written.reshape(*written.shape, *[1] * (x.ndim - 2)), x, jnp.zeros((), x.dtype))

        trace = jax.tree.map(blank, state.trace)
        last = jnp.maximum(lengths - 1, 0)[:, None, None]
        newest = jnp.take_along_axis(trace.rewards, last, axis=1)[:, 0]
        adds_up = jnp.asarray([guide.adds_up for guide in self.guides], bool)
        return Decoded(tokens, lengths, finished, jnp.where(adds_up, trace.rewards.sum(axis=1), newest), trace)

    def _step(self, params: AllParams, state: DecodeState) -> DecodeState:
        text, live = state.text, ~state.done
        keys = jax.vmap(jax.random.fold_in)(state.keys, text.answer_lengths)
        fused = self._fuse(params, state, keys)
        proposal = fused.proposal
        log_q = self.rule(proposal, state.settings.temperature)
        index = (log_q if fused.noise is None else log_q + fused.noise).argmax(axis=1)
        token = jnp.take_along_axis(proposal.tokens, index[:, None], axis=1)[:, 0]
        chosen = Chosen(token, index, live)

        rows = jnp.arange(len(live))
        # A finished row writes nowhere.
        at = jnp.where(live, text.lengths, text.tokens.shape[1])
        step = jnp.where(live, text.answer_lengths, state.trace.log_probs.shape[1])
        new, candidates = self._note(fused, log_q, index), state.trace.candidates
        recorded = state.trace if self.keeps_candidates else state.trace._replace(candidates=None)
        trace = jax.tree.map(lambda x, y: x.at[rows, step].set(y, mode="drop"), recorded, new)
        trace = trace if self.keeps_candidates else trace._replace(candidates=candidates)
        lengths = text.lengths + live
        is_over = self._is_end(token) | (lengths - text.prompt_lengths >= state.settings.max_new_tokens)
        return state._replace(
            text=text._replace(tokens=text.tokens.at[rows, at].set(token, mode="drop"), lengths=lengths),
            done=state.done | is_over,
            lm=self.lm.keep(state.lm, fused.lm_pending, live),
            guides=tuple(
                guide.commit(guide_params, guide_state, pending, chosen)
                for guide, guide_params, guide_state, pending in zip(
                    self.guides, params[1], state.guides, fused.guides_pending, strict=True
                )
            ),
            trace=trace,
        )

    def _fuse(self, params: AllParams, state: DecodeState, keys: PRNGKeyArray) -> _Fused:
        """The candidates and their fused scores."""
        lm_params, guide_params = params
        hidden, lm_pending = self.lm.siblings(lm_params, state.lm, state.last_tokens[:, None])
        logits = self.lm.logits(lm_params, hidden[:, 0])
        normaliser = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
        entropies = normaliser[:, 0] - (jnp.exp(logits - normaliser) * logits).sum(axis=-1)

        weights = state.settings.weights
        if state.settings.gate_entropy is not None:
            weights = jnp.where((entropies >= state.settings.gate_entropy)[:, None], weights, 0.0)
        text = state.live_text
        rewards: list[Any] = [None] * len(self.guides)
        pending: list[Any] = [None] * len(self.guides)
        of_vocabulary = jnp.zeros_like(logits)
        parts = list(zip(self.guides, guide_params, state.guides, strict=True))
        for j, (guide, guide_param, guide_state) in enumerate(parts):
            if guide.scores_vocabulary:
                rewards[j], pending[j] = guide.score(guide_param, guide_state, text)
                of_vocabulary = of_vocabulary + weights[:, j, None] * rewards[j]
        shape, vocabulary = state.settings.shape, logits.shape[-1]
        added = None if shape is None else shape.added(state.text, vocabulary)
        shaped = logits if added is None else logits + added
        tokens, is_candidate = self.proposer(shaped, of_vocabulary, state.settings.candidates)
        allowed = None if shape is None else shape.allowed(shaped)
        if allowed is not None:
            is_candidate = is_candidate & jnp.take_along_axis(allowed, tokens, axis=1)
        # Every token has noise of its own, whatever the candidates are: so methods share their randomness.
        noise = jax.vmap(lambda key: jax.random.gumbel(key, (vocabulary,)))(keys) if self.rule.is_random else None
        rest = None
        if self.keeps_rest:
            places = jnp.where(is_candidate, tokens, vocabulary)  # empty places exclude nothing
            outside = jnp.ones(logits.shape, bool).at[jnp.arange(len(tokens))[:, None], places].set(False, mode="drop")
            if shape is not None:
                outside &= allowed & shape.keeps_rest[:, None]
            scores = shaped - normaliser
            rest = draw_rest(logits - normaliser, scores, outside, state.settings.temperature, noise)
            tokens = jnp.concatenate([tokens, rest.token[:, None]], axis=1)
            is_candidate = jnp.concatenate([is_candidate, rest.exists[:, None]], axis=1)
        for j, (guide, guide_param, guide_state) in enumerate(parts):
            if guide.scores_vocabulary:
                rewards[j] = jnp.take_along_axis(rewards[j], tokens, axis=1)
            else:
                rewards[j], pending[j] = guide.score(guide_param, guide_state, text, tokens)

        log_probs = jnp.take_along_axis(logits, tokens, axis=1) - normaliser
        stacked = jnp.stack(rewards, axis=-1) if rewards else jnp.zeros((*tokens.shape, 0))
        proposed = self.proposer.size(self.lm.config.vocab_size)
        in_scores = in_form(self.reward_form, stacked[:, :proposed], is_candidate[:, :proposed])
        before = log_probs if added is None else log_probs + jnp.take_along_axis(added, tokens, axis=1)
        scores = before[:, :proposed] + (in_scores * weights[:, None]).sum(axis=-1)
        if rest is not None:
            scores = jnp.concatenate([scores, rest.score[:, None]], axis=1)
        scores = jnp.where(is_candidate, scores, -jnp.inf)
        proposal = Proposal(tokens, is_candidate, log_probs, stacked, scores, hidden[:, 0], weights)
        if noise is not None:
            noise = jnp.take_along_axis(noise, tokens, axis=1)
            noise = noise if rest is None else noise.at[:, -1].set(rest.noise)
        others = self._others(proposal, rest, logits - normaliser, shaped - normaliser) if self.alternatives else None
        return _Fused(proposal, rest, noise, others, entropies, lm_pending, tuple(pending))

    def _others(
        self, proposal: Proposal, rest: Rest | None, log_probs: Float[Array, "B V"], scores: Float[Array, "B V"]
    ) -> _Others:
        _, tokens = jax.lax.top_k(scores, min(self.alternatives, scores.shape[1]))
        is_known = (tokens[:, :, None] == proposal.tokens[:, None]) & proposal.is_candidate[:, None]

        def of(x: Float[Array, "B V"]) -> Float[Array, "B A"]:
            return jnp.take_along_axis(x, tokens, axis=1)

        of_rest = None if rest is None else of(rest.scaled)
        return _Others(jnp.where(is_known.any(axis=2), -1, tokens), of(log_probs), of_rest, of(scores))

    def _note(self, fused: _Fused, log_q: Float[Array, "B K"], index: Int[Array, "B"]) -> Trace:
        """The trace of one step, `[B ...]`."""
        proposal = fused.proposal

        def of_chosen(x: Array) -> Array:
            return jnp.take_along_axis(x, index.reshape(-1, *[1] * (x.ndim - 1)), axis=1)[:, 0]

        for_kl = proposal.log_probs
        if fused.rest is not None:
            for_kl = for_kl.at[:, -1].set(fused.rest.kl_log_prob)
        # 0 log 0 = 0
        kls = jnp.where(log_q > -jnp.inf, jnp.exp(log_q) * (log_q - for_kl), 0.0).sum(axis=-1)
        of_all = log_q
        if fused.rest is not None:
            log_q = log_q.at[:, -1].add(fused.rest.log_share)
        candidates = self._note_candidates(fused, of_all, log_q, index) if self.keeps_candidates else None
        of_token = map(of_chosen, (proposal.log_probs, log_q))
        return Trace(*of_token, fused.entropies, kls, of_chosen(proposal.rewards), candidates)

    def _note_candidates(
        self, fused: _Fused, of_all: Float[Array, "B K"], log_q: Float[Array, "B K"], index: Int[Array, "B"]
    ) -> CandidateTrace:
        """The candidates of one step, `[B K]`. `log_q` is of each token; in `of_all` the last candidate stands for all
        of the rest."""
        proposal, rest, others = fused.proposal, fused.rest, fused.others
        scores, masses = proposal.scores, proposal.scores
        if rest is not None:
            # The score of the rest is that of all its tokens together, and at the row's temperature.
            exists = proposal.is_candidate[:, -1]
            scores = scores.at[:, -1].set(jnp.where(exists, rest.own_score, -jnp.inf))
            masses = masses.at[:, -1].set(rest.log_mass)
        total = jax.nn.logsumexp(masses, axis=1, keepdims=True)
        tokens = jnp.where(proposal.is_candidate, proposal.tokens, -1)
        noted = CandidateTrace(tokens, proposal.log_probs, log_q, proposal.rewards, scores - total)
        if self.candidates > MAX_TRACED:
            is_chosen = jnp.arange(self.candidates) == index[:, None]
            _, traced = jax.lax.top_k(jnp.where(is_chosen, jnp.inf, log_q), MAX_TRACED)
            rows = jnp.arange(len(index))[:, None]
            noted = jax.tree.map(lambda x: x[rows, traced], noted)
        if others is None:
            return noted
        nothing = jnp.full(others.tokens.shape, -jnp.inf)
        can_be_drawn = others.of_rest is not None
        more = CandidateTrace(
            others.tokens,
            others.log_probs,
            of_all[:, -1:] + others.of_rest if can_be_drawn else nothing,
            jnp.full((*others.tokens.shape, len(self.guides)), jnp.nan),
            jnp.where(others.of_rest > -jnp.inf, others.scores - total, -jnp.inf) if can_be_drawn else nothing,
        )
        return jax.tree.map(lambda x, y: jnp.concatenate([x, y], axis=1), noted, more)

    def _blank_trace(self, batch: int, steps: int) -> Trace:
        guides, vocabulary = len(self.guides), self.lm.config.vocab_size
        count = min(self.candidates, MAX_TRACED) + min(self.alternatives, vocabulary)
        candidates = None
        if self.keeps_candidates:
            numbers = jnp.zeros((batch, steps, count))
            tokens = jnp.zeros(numbers.shape, jnp.int32)
            candidates = CandidateTrace(tokens, numbers, numbers, jnp.zeros((*numbers.shape, guides)), numbers)
        numbers = jnp.zeros((batch, steps))
        return Trace(numbers, numbers, numbers, numbers, jnp.zeros((batch, steps, guides)), candidates)

    def _is_end(self, tokens: Int[Array, "B"]) -> Bool[Array, "B"]:
        return jnp.isin(tokens, jnp.asarray(self.eos_ids, jnp.int32))


def row_keys(seed: int, prompt_ids: Int[Array, "B"]) -> PRNGKeyArray:
    """One key per row, from the seed and the prompt's id only, so that an answer does not depend on its batch."""
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
    settings: RowSettings,
    max_new_tokens: int,
    guide_prompts: tuple[Prompts | None, ...] | None = None,
) -> Decoded:
    """Answers a batch of prompts in one compiled call: prefill, then one scan of at most `max_new_tokens` steps.

    Args:
        decoder: the static parts (models, proposer, rule, end-of-sequence ids).
        lm_params, guide_params: the arrays of the language model, and of each guide.
        prompts, lengths: left-padded token ids, and the number of real ones in each row. The longest prompt and
            `max_new_tokens` together must fit the `max_positions` of every model's config.
        keys: one PRNG key per row (`row_keys`).
        settings: each row's reward weights, temperature, number of candidates, and longest answer.
        max_new_tokens: the longest answer of all rows, its end-of-sequence token included.
        guide_prompts: for each guide the same prompts in its model's tokens and template, or None where it reads the
            language model's prompts. Guides with their own tokenizer need them.
    """
    params = (lm_params, guide_params)
    state = decoder.start(params, prompts, lengths, keys, settings, max_new_tokens, guide_prompts)
    return on_every_device(decoder.read(decoder.advance(params, state, max_new_tokens)))
