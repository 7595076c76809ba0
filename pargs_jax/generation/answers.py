"""Turns decoded tokens into answers: texts, rewards and, on request, the trace of every token."""

import dataclasses
from collections.abc import Sequence
from functools import cached_property
from typing import Literal, NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from pargs_jax.decoding.loop import Decoded
from pargs_jax.decoding.search import Found
from pargs_jax.decoding.state import CandidateTrace, Trace
from pargs_jax.errors import InputError
from pargs_jax.generation.growing import before_stop
from pargs_jax.generation.guidance import guide_names
from pargs_jax.generation.plan import Batch, Settings
from pargs_jax.generation.reward_models import RewardModel
from pargs_jax.generation.traces import AnswerTrace, TracedCandidate, TracedToken
from pargs_jax.text.answer_text import AnswerText, Reader, added_text, fastest_reader, shares_of, texts_as_they_grow
from pargs_jax.text.tokenization import TextTokenizer


@dataclasses.dataclass(frozen=True)
class Answer:
    """An answer to a prompt.

    `finish_reason` is `stop` (an end-of-sequence token, or a text that ends it, which is not in the response) or
    `length`. `log_probability` is that of all the answer's
    tokens under the language model, in nats. `kl` is the sum over its tokens of KL(q || p), where q is the distribution
    that a token was drawn from and p the language model's; for a search see docs/search.md. `kl_is` says whether `kl`
    is exact, an upper bound or an estimate. `guide_rewards` are the reward models' rewards of the whole answer, one for
    each group that guides together. `tokens` includes the end-of-sequence token. `seconds` is the answer's
    share of the device's time, without compiling: its share of a step is that of a row among those that drew a token.
    `sample` numbers the answers to one prompt, from 0. `lm_tokens` and `rm_tokens` are the tokens that the language
    model, and all reward models together, read for it (`TokensRead`). `log_z` is given only for particles, `trace` only
    on request.
    """

    id: str
    prompt: str
    response: str
    finish_reason: str
    log_probability: float
    kl: float
    guide_rewards: tuple[float, ...]
    tokens: int
    seconds: float
    sample: int = 0
    lm_tokens: int = 0
    rm_tokens: int = 0
    kl_is: Literal["exact", "bound", "estimate"] = "exact"
    log_z: float | None = None
    trace: AnswerTrace | None = None


class TokensRead(NamedTuple):
    """Tokens read for an answer and its prompt: by the language model, and by all reward models together. A step that
    scores k candidates reads k. Nobody reads the last token of an answer.

    Answer tokens are counted in the language model's tokens, even where a reward model has its own tokenizer. A reward
    model without a cache reads the whole text again for every candidate.
    """

    lm: int
    rm: int


class AnswerReader:
    """Reads decoded batches of one language model and its reward models."""

    def __init__(self, lm_source: str, tokenizer: TextTokenizer, reward_models: Sequence[RewardModel]) -> None:
        self._lm_source = lm_source
        self._tokenizer = tokenizer
        self._reward_models = reward_models

    def read(
        self, batch: Batch, outcome: Decoded | Found, seconds: Sequence[float], settings: Settings
    ) -> list[Answer]:
        """The answers to a batch of requests; `seconds` are those of each. Raises InputError for a number that is not
        valid in an answer, such as NaN."""
        found = outcome if isinstance(outcome, Found) else None
        decoded = outcome if found is None else found.answers
        kls = decoded.trace.kls.sum(axis=1) if found is None else found.kls
        tokens = [decoded.tokens[row, : decoded.lengths[row]].tolist() for row in range(len(batch.requests))]
        prompts = [request.lm_ids for request in batch.requests]
        texts = list(map(self._tokenizer.decode_answer, prompts, tokens))
        texts = [before_stop(text, own.settings.stop) for text, own in zip(texts, batch.requests, strict=True)]
        rewards = self._final_rewards(batch, decoded, texts, settings.method.guided)
        self._check_finite(batch, decoded, rewards, settings)
        answers = [
            Answer(
                prompt.id,
                prompt.text,
                texts[row],
                "stop" if decoded.finished[row] else "length",
                float(decoded.trace.log_probs[row].sum()),
                float(kls[row]),
                tuple(map(float, rewards[row])),
                int(decoded.lengths[row]),
                seconds[row],
                batch.requests[row].sample,
                *self._tokens_read(batch, row, int(decoded.lengths[row]), settings, found),
                settings.kl_is,
                None if found is None or found.log_z is None else float(found.log_z[row]),
            )
            for row, prompt in enumerate(batch.prompts)
        ]
        if settings.trace is None:
            return answers
        traces = [self._trace(answer, batch, tokens[row], row, decoded, settings) for row, answer in enumerate(answers)]
        return [dataclasses.replace(answer, trace=trace) for answer, trace in zip(answers, traces, strict=True)]

    def _final_rewards(
        self, batch: Batch, decoded: Decoded, texts: Sequence[str], guided: bool
    ) -> Float[np.ndarray, "B J"]:
        """Every reward model's reward of each whole answer."""
        if guided:
            return decoded.rewards
        finished = decoded.finished[: len(texts)]
        scored = [
            model.score(own, decoded.tokens, decoded.lengths, texts, finished)
            for model, own in zip(self._reward_models, batch.own_prompts, strict=True)
        ]
        return np.stack(scored, axis=1) if scored else np.zeros((len(texts), 0))

    def _tokens_read(self, batch: Batch, row: int, answer: int, settings: Settings, found: Found | None) -> TokensRead:
        if found is not None:
            return TokensRead(int(found.tokens.lm[row]), int(found.tokens.rm[row]))
        method, candidates = settings.method, settings.candidates + settings.method.keeps_rest
        request = batch.requests[row]
        prompt, own_prompts = len(request.lm_ids), list(map(len, request.own_ids))
        lm = prompt - 1 + answer
        if method.draws == "contrastive":
            lm += prompt + candidates * answer
        if not method.guided:
            return TokensRead(lm, sum(own + answer for own in own_prompts))
        if method.reward_model == "look_ahead":
            aligned, *judges = own_prompts
            tried, ahead = answer * candidates, settings.tokens_ahead
            return TokensRead(lm, aligned + tried * ahead + sum(own + tried * (ahead + 1) for own in judges))
        parts = zip(self._reward_models, own_prompts, strict=True)
        return TokensRead(lm, sum(model.tokens_read(own, answer, candidates) for model, own in parts))

    def _check_finite(
        self, batch: Batch, decoded: Decoded, final_rewards: Float[np.ndarray, "B J"], settings: Settings
    ) -> None:
        """Raises InputError for the first row with a number that is not valid in an answer, such as NaN."""
        trace = decoded.trace
        for row, prompt in enumerate(batch.prompts):
            if not np.isfinite(trace.log_probs[row]).all():
                raise InputError(f"prompt {prompt.id!r}: a log-probability of the language model is not finite")
            steps = settings.method.guided and not settings.method.judged
            rewards = trace.rewards[row] if steps else final_rewards[row][None]
            advice = "its weights may be damaged, or too large for the dtype"
            for j, name in enumerate(guide_names(settings.method, self._reward_models)):
                if not np.isfinite(rewards[:, j]).all():
                    raise InputError(f"prompt {prompt.id!r}: a reward of {name} is not finite; {advice}")
            # One candidate's NaN makes all probabilities NaN, even if another candidate was chosen.
            if not np.isfinite(trace.guided_log_probs[row]).all():
                raise InputError(
                    f"prompt {prompt.id!r}: a candidate's reward is not finite; the reward model's {advice[4:]}"
                )

    def _trace(
        self, answer: Answer, batch: Batch, tokens: list[int], row: int, decoded: Decoded, settings: Settings
    ) -> AnswerTrace:
        growing = texts_as_they_grow(self.text_reader, batch.requests[row].lm_ids, tokens)
        noted = decoded.trace if settings.trace == "candidates" else decoded.trace._replace(candidates=None)
        numbers = jax.tree.map(lambda x: x[row, : len(tokens)], noted)
        texts = shares_of(answer.response, growing)
        return AnswerTrace(
            answer.id,
            answer.sample,
            answer.prompt,
            answer.response,
            answer.finish_reason,
            answer.log_probability,
            answer.kl,
            answer.guide_rewards,
            settings.method_name,
            settings.guide_weights(len(self._reward_models), batch.prompts[row].weights),
            settings.candidates_in_use,
            settings.sampling_temperature if settings.samples else None,
            settings.seed,
            self._lm_source,
            guide_names(settings.method, self._reward_models),
            self._tokenizer.eos_ids,
            tuple(traced_tokens(tokens, texts, numbers, growing, guided=settings.method.guided)),
        )

    @cached_property
    def text_reader(self) -> Reader:
        """Reads answers token by token."""
        return fastest_reader(self._tokenizer)


def traced_tokens(
    tokens: Sequence[int], texts: Sequence[str], numbers: Trace, growing: Sequence[AnswerText], *, guided: bool
) -> list[TracedToken]:
    """The entries of a trace for n tokens of an answer that follow each other.

    Args:
        tokens: their ids.
        texts: their parts of the response.
        numbers: theirs, `[n ...]`, on the host.
        growing: the answer's text before each of them, and any later ones.
        guided: whether there are rewards.
    """
    rewards = numbers.rewards if guided else numbers.rewards[..., :0]
    columns = (numbers.log_probs, numbers.guided_log_probs, rewards, numbers.entropies, numbers.kls)
    log_p, log_q, rewards, entropies, kls = map(_numbers, columns)
    noted = numbers.candidates
    candidates = [
        None if noted is None else _candidates(CandidateTrace(*(x[step] for x in noted)), growing[step])
        for step in range(len(tokens))
    ]
    parts = zip(tokens, texts, log_p, log_q, map(tuple, rewards), entropies, kls, candidates, strict=True)
    return [TracedToken(*each) for each in parts]


def _candidates(noted: CandidateTrace, before: AnswerText) -> tuple[TracedCandidate, ...]:
    """The candidates of a step, in decreasing order of log-probability after guidance."""
    ids, log_p, log_q, rewards, _ = noted
    order = np.lexsort((-log_p, -log_q))
    order = order[(ids[order] >= 0) & ~np.isnan(rewards[order]).any(axis=-1)]  # without alternatives
    texts = [added_text(before, token) for token in ids[order].tolist()]
    columns = texts, _numbers(log_p[order]), _numbers(log_q[order]), map(tuple, _numbers(rewards[order]))
    return tuple(map(TracedCandidate, ids[order].tolist(), *columns))


def _numbers(array: Float[np.ndarray, "..."]) -> list:
    """Converts float32 numbers to Python's, with the fewest digits that identify them."""
    return np.asarray(array, np.float32).astype("U").astype(np.float64).tolist()
