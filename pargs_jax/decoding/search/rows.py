"""The code that search methods share: several rows of each prompt, a judge that reads them, and token counts.

The R = B * n rows of a search belong to B prompts; those of prompt b are rows b * n to b * n + n - 1.
"""

import dataclasses
from functools import partial
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from pargs_jax.decoding.guides import Capacity, Chosen, Guide, Prompts, Text
from pargs_jax.decoding.loop import AllParams, Decoded, Decoder
from pargs_jax.decoding.state import DecodeState, RowSettings
from pargs_jax.errors import InputError
from pargs_jax.models.cache import copy_rows, repeat_rows
from pargs_jax.sharding import on_every_device

EVENTS = 1 << 31
"""A row's key is folded with the numbers of its tokens, which are small. Draws that are not tokens use numbers from
here on; the keys of branches count down from the largest number."""


KlKind = Literal["bound", "estimate"]
"""What a search reports as KL between the answers' distribution and the language model's: an upper bound, or an
unbiased estimate. docs/search.md has the equations."""


class SearchInputs(NamedTuple):
    """The arrays of a search."""

    params: AllParams
    judge_params: tuple[Any, ...]
    prompts: Int[Array, "B P"]
    """Left-padded, in the language model's tokens."""
    lengths: Int[Array, "B"]
    keys: PRNGKeyArray
    """One per prompt (`row_keys`)."""
    settings: RowSettings
    judge_weights: Float[Array, "B J"]
    """The score of a text is the sum of the judges' rewards with these weights."""
    guide_prompts: tuple[Prompts | None, ...] | None = None
    judge_prompts: tuple[Prompts | None, ...] | None = None
    """The prompts in each model's tokens and template; None where it reads the language model's."""


class Tokens(NamedTuple):
    """Tokens read for each prompt, including the prompt and all rejected tokens; and the longest texts."""

    lm: Int[Array, "B"]
    rm: Int[Array, "B"]
    """By all guides and judges together. A judge counts its own tokens; a guide counts the language model's, K per step
    if it scores candidates."""
    needed: tuple[Int[Array, ""], ...]
    """The longest text in the model's own tokens, for each judge, then each guide, that has its own tokenizer."""


class Found(NamedTuple):
    """The result of a search. `answers.rewards` are the judges' rewards, or the guides' if there are no judges."""

    answers: Decoded
    scores: Float[Array, "B"]
    """The scores that answers were chosen by: the weighted sums of the rewards."""
    kls: Float[Array, "B"]
    """KL of the answers' distribution from the language model's, in nats: a bound or an estimate (the method's
    `kl`)."""
    tokens: Tokens
    samples: Decoded | None = None
    """All R rows, for methods that finish them."""
    sample_scores: Float[Array, "B n"] | None = None
    log_z: Float[Array, "B"] | None = None
    """For particles: estimate of log E_p[exp(score)]."""
    log_weights: Float[Array, "B n"] | None = None
    """For particles; not normalised."""


class Rows(NamedTuple):
    """The rows of a search."""

    decode: DecodeState
    judges: tuple[Any, ...]
    judged: Int[Array, "R"]
    """The number of answer tokens that the judges have read."""
    rewards: Float[Array, "R J"]
    """The judges' rewards of the answers up to there."""


class SearchMethod(Protocol):
    """A search method. Static and hashable; its fields are its options."""

    kl: KlKind
    """What `Found.kls` is: a bound or an estimate."""

    def __call__(self, searcher: "Searcher", inputs: SearchInputs, max_new_tokens: int) -> Found: ...


@dataclasses.dataclass(frozen=True)
class Searcher:
    """The static parts of a search: a decoder, which may be guided, and judges of its texts."""

    decoder: Decoder
    judges: tuple[Guide, ...] = ()

    def start(self, inputs: SearchInputs, max_new_tokens: int, width: int) -> tuple[Rows, Tokens]:
        """One row per prompt; reads the prompts. Judges will read at most `width` tokens at once."""
        return self.start_judged(inputs, max_new_tokens, width, rewards=False)[:2]

    def start_judged(
        self, inputs: SearchInputs, max_new_tokens: int, width: int, *, rewards: bool = True
    ) -> tuple[Rows, Tokens, Float[Array, "B J"]]:
        """Like `start`, and returns the judges' rewards of the prompts alone, or else 0."""
        lengths = inputs.lengths
        state = self.decoder.start(
            inputs.params, inputs.prompts, lengths, inputs.keys, inputs.settings, max_new_tokens, inputs.guide_prompts
        )
        prompts, capacity = Prompts(inputs.prompts, lengths), Capacity(max_new_tokens, width)
        no_reward = jnp.zeros(len(lengths))
        own_prompts = inputs.judge_prompts or (None,) * len(self.judges)
        per_judge, judges = [], []
        for guide, params, own in zip(self.judges, inputs.judge_params, own_prompts, strict=True):
            if rewards and not guide.adds_up:
                if not hasattr(guide, "read_prompts"):
                    raise InputError(
                        f"{type(guide).__name__}: cannot score a prompt without an answer, but this method needs it to"
                    )
                reward, judge = guide.read_prompts(params, prompts, capacity, own)
            else:
                reward, judge = no_reward, guide.prefill(params, prompts, capacity, own)
            per_judge.append(reward)
            judges.append(judge)
        read = jnp.zeros_like(lengths)
        for own in (*(inputs.guide_prompts or (None,) * len(self.decoder.guides)), *own_prompts):
            read = read + sum(lengths if prompts is None else prompts.lengths for prompts in _model_prompts(own))
        blank = jnp.zeros((len(lengths), len(self.judges)))
        prompt_rewards = jnp.stack(per_judge, axis=-1) if per_judge else blank
        rows = Rows(state, tuple(judges), jnp.zeros_like(lengths), blank)
        return rows, Tokens(jnp.maximum(lengths - 1, 0), read, _needed(rows)), prompt_rewards

    def draw(self, inputs: SearchInputs, rows: Rows, tokens: Tokens, steps: int) -> tuple[Rows, Tokens]:
        """Draws `steps` more tokens for every unfinished row."""
        before = rows.decode.text.lengths
        state = self.decoder.advance(inputs.params, rows.decode, steps)
        drawn = state.text.lengths - before
        read = jnp.zeros_like(drawn)
        guide_prompts = inputs.guide_prompts or (None,) * len(self.decoder.guides)
        for guide, own in zip(self.decoder.guides, guide_prompts, strict=True):
            # Guides count all candidates of a step, or only the newest token, or each candidate's text from its
            # beginning.
            texts = drawn * before + drawn * (drawn + 1) // 2 if getattr(guide, "rereads", False) else drawn
            per_step = 1 if guide.scores_vocabulary else self.decoder.candidates
            read = read + texts * per_step * len(_model_prompts(own))
        drawn, read = (group_by_prompt(x, len(tokens.lm)).sum(axis=1) for x in (drawn, read))
        rows = rows._replace(decode=state)
        return rows, Tokens(tokens.lm + drawn, tokens.rm + read, _most_needed(tokens, rows))

    def judge(
        self,
        inputs: SearchInputs,
        rows: Rows,
        tokens: Tokens,
        width: int,
        answer_lengths: Int[Array, "R"] | None = None,
    ) -> tuple[Rows, Tokens]:
        """Lets the judges read the unread tokens of each answer, at most `width` of them, up to `answer_lengths[r]` (by
        default the whole answer)."""
        text = self._text(rows, answer_lengths)
        new = text.answer_lengths - rows.judged
        judges, rewards, read = [], [], tokens.rm
        own_prompts = inputs.judge_prompts or (None,) * len(self.judges)
        parts = zip(self.judges, inputs.judge_params, rows.judges, own_prompts, strict=True)
        for j, (guide, params, state, own) in enumerate(parts):
            reward, count, state = _reward_so_far(guide, params, state, text, new, width)
            before = rows.rewards[:, j]
            rewards.append(jnp.where(new > 0, reward + before if guide.adds_up else reward, before))
            judges.append(state)
            read = read + group_by_prompt(count, len(read)).sum(axis=1) * len(_model_prompts(own))
        stacked = jnp.stack(rewards, axis=-1) if rewards else rows.rewards
        rows = Rows(rows.decode, tuple(judges), text.answer_lengths, stacked)
        return rows, tokens._replace(rm=read, needed=_most_needed(tokens, rows))

    def judge_prefixes(
        self, inputs: SearchInputs, rows: Rows, tokens: Tokens, width: int
    ) -> tuple[Rows, Tokens, Float[Array, "R W J"]]:
        """`judge` that also returns the rewards of every prefix of the answers; `width` is W, the longest answer."""
        text = self._text(rows, None)
        judges, rewards, read = [], [], tokens.rm
        for guide, params, state in zip(self.judges, inputs.judge_params, rows.judges, strict=True):
            reward, count, state = _prefix_rewards(guide, params, state, text, text.answer_lengths, width)
            rewards.append(jnp.cumsum(reward, axis=1) if guide.adds_up else reward)
            judges.append(state)
            read = read + group_by_prompt(count, len(read)).sum(axis=1)
        stacked = jnp.stack(rewards, axis=-1)
        last = jnp.maximum(text.answer_lengths - 1, 0)[:, None, None]
        newest = jnp.take_along_axis(stacked, last, axis=1)[:, 0]
        rows = Rows(rows.decode, tuple(judges), text.answer_lengths, newest)
        return rows, tokens._replace(rm=read, needed=_most_needed(tokens, rows)), stacked

    def rewind(self, rows: Rows, answer_lengths: Int[Array, "R"], keys: PRNGKeyArray) -> Rows:
        """Removes the tokens beyond `answer_lengths[r]`, from the judges' states too."""
        decode = self.decoder.rewind(rows.decode, answer_lengths, keys)
        dropped = jnp.maximum(rows.judged - answer_lengths, 0)
        judged = rows.judged - dropped
        text = decode.text._replace(lengths=decode.text.prompt_lengths + judged)
        judges = tuple(
            guide.rewind(state, text, dropped) for guide, state in zip(self.judges, rows.judges, strict=True)
        )
        return rows._replace(decode=decode, judges=judges, judged=judged)

    def found(self, rows: Rows) -> Decoded:
        """The answers of all rows, with the judges' rewards if there are judges."""
        decoded = self.decoder.read(rows.decode)
        return decoded._replace(rewards=rows.rewards) if self.judges else decoded

    def scores(self, inputs: SearchInputs, rows: Rows) -> Float[Array, "B n"]:
        """The scores of each prompt's rows: the weighted sums of the judges' rewards."""
        return group_by_prompt(weighted(rows.rewards, inputs.judge_weights), len(inputs.lengths))

    def require_judge(self, method: Any) -> None:
        """Raises InputError if there is no judge."""
        if not self.judges:
            raise InputError(f"{type(method).__name__}: needs a reward model as judge of the samples")

    def _text(self, rows: Rows, answer_lengths: Int[Array, "R"] | None) -> Text:
        text = rows.decode.text
        return text if answer_lengths is None else text._replace(lengths=text.prompt_lengths + answer_lengths)


@partial(jax.jit, static_argnames=("method", "searcher", "max_new_tokens"))
def search(method: SearchMethod, searcher: Searcher, inputs: SearchInputs, max_new_tokens: int) -> Found:
    """Answers a batch of prompts by a search method in one compiled call.

    Args:
        method: `BestOfN`, `ChunkBeam`, `Cards`, `SpeculativeRejection` or `TwistedSmc`.
        searcher: draws tokens and judges texts.
        inputs: parameters, prompts, keys and settings of the rows.
        max_new_tokens: the longest answer of all rows, its end-of-sequence token included.

    Raises InputError if the method lacks something that it needs, such as a judge.
    """
    return on_every_device(method(searcher, inputs, max_new_tokens))


def group_by_prompt(x: Float[Array, "R *d"], prompts: int) -> Float[Array, "B n *d"]:
    """Groups rows by prompt."""
    return x.reshape(prompts, len(x) // prompts, *x.shape[1:])


def branch_keys(keys: PRNGKeyArray, numbers: Int[Array, "*n"]) -> PRNGKeyArray:
    """Keys of rows that branch off one row. Number 0 keeps the row's own key, so it draws what the row would alone."""
    folded = jax.vmap(jax.random.fold_in)(keys, jnp.uint32(0xFFFFFFFF) - numbers.astype(jnp.uint32))
    return jnp.where(numbers == 0, keys, folded)


def event_keys(keys: PRNGKeyArray, number: Int[Array, "B"] | int) -> PRNGKeyArray:
    """Keys of draws that are not tokens."""
    numbers = jnp.broadcast_to(jnp.asarray(number, jnp.uint32) + jnp.uint32(EVENTS), keys.shape)
    return jax.vmap(jax.random.fold_in)(keys, numbers)


def spread(rows: Rows, count: int) -> Rows:
    """Copies each prompt's row `count` times. Each copy gets its own key; the first keeps the prompt's."""
    wide = repeat_rows(rows, count)
    numbers = jnp.tile(jnp.arange(count), len(rows.judged))
    return wide._replace(decode=wide.decode._replace(keys=branch_keys(wide.decode.keys, numbers)))


def branch(rows: Rows, counts: Int[Array, "B n"]) -> Rows:
    """Copies rows so that there are `counts[b, i]` of row i of a prompt, n in all. Rows that stay do not move; copies
    overwrite the others, and nothing else is written. Keys stay with places, so copies continue differently."""
    copied = copy_rows(rows, sources_of(counts))
    return copied._replace(decode=copied.decode._replace(keys=rows.decode.keys))


def sources_of(counts: Int[Array, "B n"]) -> Int[Array, "B n"]:
    """The source row of each place, such that row i of a prompt occurs `counts[b, i]` times, and stays in its place
    unless its count is 0."""
    places = jnp.arange(counts.shape[1])
    is_free = counts == 0
    rank = jnp.cumsum(is_free, axis=1) - 1
    copies = jnp.cumsum(jnp.maximum(counts - 1, 0), axis=1)
    source = (copies[:, None, :] <= rank[:, :, None]).sum(axis=-1)
    return jnp.where(is_free, source, places)


def pick(tree: Any, index: Int[Array, "B *m"]) -> Any:
    """The rows at `index` among each prompt's rows; all arrays of the tree are `[R ...]`."""
    chosen = index if index.ndim == 2 else index[:, None]

    def pick_rows(x: Array) -> Array:
        taken = jax.vmap(lambda rows, i: rows[i])(group_by_prompt(x, len(index)), chosen)
        return taken.reshape(chosen.size, *x.shape[1:])

    return jax.tree.map(pick_rows, tree)


def weighted(rewards: Float[Array, "R *d J"], weights: Float[Array, "B J"]) -> Float[Array, "R *d"]:
    """Scores: the sums of rewards, weighted with each prompt's weights."""
    repeated = jnp.repeat(weights, len(rewards) // len(weights), axis=0)
    return (rewards * repeated.reshape(len(rewards), *[1] * (rewards.ndim - 2), -1)).sum(axis=-1)


def kls_of_search(inputs: SearchInputs, kls: Float[Array, "*B"] | float, answers: Decoded) -> Float[Array, "B"]:
    """KL from the language model of a search over draws from q: that of the search from q, plus sum_t log q(y_t) - log
    p(y_t), because of the temperature, the choice of candidates and guidance. 0 for filler rows."""
    drift = (answers.trace.guided_log_probs - answers.trace.log_probs).sum(axis=1)
    return jnp.where(inputs.lengths > 0, kls + drift, 0.0)


def _model_prompts(own: Any) -> tuple[Prompts | None, ...]:
    """The prompts of each model of a guide; a guide may have several models."""
    return own if isinstance(own, tuple) and not hasattr(own, "lengths") else (own,)


def _needed(rows: Rows) -> tuple[Int[Array, ""], ...]:
    states = (*rows.judges, *rows.decode.guides)
    return tuple(state.needed.max() for state in states if hasattr(state, "needed"))


def _most_needed(tokens: Tokens, rows: Rows) -> tuple[Int[Array, ""], ...]:
    """Includes rows that are dropped or overwritten: if their texts were cut, their ranking was wrong."""
    return tuple(map(jnp.maximum, tokens.needed, _needed(rows)))


def _reward_so_far(
    guide: Any, params: Any, state: Any, text: Text, new: Int[Array, "R"], width: int
) -> tuple[Float[Array, "R"], Int[Array, "R"], Any]:
    """The reward of each text, or of its new tokens for a guide that adds up; the number of tokens read; and the
    state."""
    if hasattr(guide, "read"):
        return guide.read(params, state, text, new, width)
    rewards, count, state = _prefix_rewards(guide, params, state, text, new, width)
    if guide.adds_up:
        return jnp.where(jnp.arange(width) < new[:, None], rewards, 0.0).sum(axis=1), count, state
    return jnp.take_along_axis(rewards, jnp.maximum(new - 1, 0)[:, None], axis=1)[:, 0], count, state


def _prefix_rewards(
    guide: Any, params: Any, state: Any, text: Text, new: Int[Array, "R"], width: int
) -> tuple[Float[Array, "R W"], Int[Array, "R"], Any]:
    """The guide's reward at each of the new tokens; the number of tokens read; and the state."""
    if hasattr(guide, "read_prefixes"):
        rewards, state = guide.read_prefixes(params, state, text, new, width)
        return rewards, new, state
    start = text.lengths - new

    def read(carry: tuple[Any, Array], step: Int[Array, ""]) -> tuple[tuple[Any, Array], Float[Array, "R"]]:
        state, count = carry
        live = step < new
        at = jnp.where(live, start + step, text.lengths)
        if hasattr(guide, "read"):
            longer = text._replace(lengths=at + live)
            rewards, more, state = guide.read(params, state, longer, live.astype(jnp.int32), 1)
            return (state, count + more), rewards
        token = jnp.take_along_axis(text.tokens, jnp.minimum(at, text.tokens.shape[1] - 1)[:, None], axis=1)
        before = text._replace(lengths=at)
        if guide.scores_vocabulary:
            every, pending = guide.score(params, state, before)
            rewards = jnp.take_along_axis(every, token, axis=1)
        else:
            rewards, pending = guide.score(params, state, before, token)
        chosen = Chosen(token[:, 0], jnp.zeros_like(new), live)
        return (guide.commit(params, state, pending, chosen), count + live), rewards[:, 0]

    (state, count), rewards = jax.lax.scan(read, (state, jnp.zeros_like(new)), jnp.arange(width))
    return rewards.T, count, state
