"""How well a reward model tells unfinished answers apart: accuracy, calibration, and agreement with its final reward,
at 10, 20, .. 100 % of the answer, for any reward model and any preference pairs."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy.special import expit

from pargs_jax.data.examples import tokenise
from pargs_jax.data.preferences import Preference
from pargs_jax.errors import InputError
from pargs_jax.evaluation.scoring import ScoringModel, TokenisedAnswer
from pargs_jax.evaluation.statistics import (
    Bin,
    Interval,
    bootstrap,
    calibration_error,
    clustered_rate,
    reliability,
    spearman,
)

PERCENTS = tuple(range(10, 101, 10))
_PIECE = re.compile(r"\s*\S+")


class PrefixRewards(NamedTuple):
    """A reward model's rewards of the prefixes of both answers, chosen first.

    Attributes:
        same_length: both answers at the same number of tokens, a percentage of the longer one's, rounded up; the
            shorter one stays at its end, as in training on all prefixes.
        own_length: each answer at that percentage of its own length.
        groups: which pairs have the same prompt.
        notes: what was cut or left out.
    """

    same_length: Float[np.ndarray, "N F 2"]
    own_length: Float[np.ndarray, "N F 2"]
    groups: Int[np.ndarray, "N"]
    notes: str


@dataclass(frozen=True)
class PrefixRow:
    """What holds at one percentage of the answers.

    Attributes:
        percent: how much of the answers is seen.
        accuracy: the share of pairs whose chosen answer has the higher reward; a tie counts half.
        calibration_error: of the model's confidence in its choice, `sigmoid(|difference of rewards|)`.
        spearman: rank correlation, over all answers, of the reward of that much of an answer with that of all of it.
    """

    percent: int
    accuracy: float
    accuracy_interval: Interval
    calibration_error: float
    calibration_interval: Interval
    spearman: float
    spearman_interval: Interval


@dataclass(frozen=True)
class RewardModelReport:
    """A reward model on preference pairs; `reliability` is that of whole answers."""

    name: str
    pairs: int
    prompts: int
    rows: tuple[PrefixRow, ...]
    reliability: tuple[Bin, ...]
    notes: str


def report_on(name: str, rewards: PrefixRewards, seed: int = 0) -> RewardModelReport:
    """The report of a reward model's rewards. Intervals have 95 % and take pairs of one prompt together; those of
    calibration and Spearman are bootstrapped."""
    margins = (rewards.same_length[..., 0] - rewards.same_length[..., 1]).T
    correct, confidences = 0.5 + 0.5 * np.sign(margins), expit(np.abs(margins))
    own = rewards.own_length.transpose(1, 0, 2)

    def statistics(rows: Int[np.ndarray, "N"]) -> np.ndarray:
        chosen = own[:, rows].reshape(len(PERCENTS), -1)
        errors = calibration_error(confidences[:, rows], correct[:, rows])
        return np.concatenate([errors, spearman(chosen, chosen[-1])])

    found = statistics(np.arange(margins.shape[1]))
    intervals = bootstrap(statistics, rewards.groups, seed)
    count = len(PERCENTS)
    table = [
        PrefixRow(
            percent,
            *clustered_rate(correct[f], rewards.groups),
            float(found[f]),
            intervals[f],
            float(found[count + f]),
            intervals[count + f],
        )
        for f, percent in enumerate(PERCENTS)
    ]
    return RewardModelReport(
        name,
        margins.shape[1],
        len(np.unique(rewards.groups)),
        tuple(table),
        tuple(reliability(confidences[-1], correct[-1])),
        rewards.notes,
    )


def model_prefix_rewards(
    model: ScoringModel, pairs: Sequence[Preference], max_length: int, percents: Sequence[int] = PERCENTS
) -> PrefixRewards:
    """Rewards by a model, whose own tokens prefixes are counted in; the end-of-sequence token is an answer's last.

    Pairs are cut to `max_length` tokens or to the model's context (`pargs_jax.data.examples.tokenise`). `percents` are
    how much of the answers is seen, F of them. Raises InputError if no pair is left.
    """
    positions = model.model.config.max_positions - (not model.model.one_pass)
    examples, cut = tokenise(pairs, model.tokenizer, min(max_length, positions))
    texts = [
        TokenisedAnswer(example.prompt.tolist(), answer.tolist(), (*same, *own))
        for example in examples
        for answer, same, own in zip(example.answers, *_prefix_counts(example.prefix_counts, percents), strict=True)
    ]

    def by_kind(of_texts: Sequence[Sequence[float]]) -> np.ndarray:
        return np.stack(of_texts).reshape(len(examples), 2, 2, len(percents)).transpose(2, 0, 3, 1)

    same_length, own_length = by_kind(model.rewards(texts))
    # Answers that begin alike have equal rewards until they part, which rounding in different batches must not hide.
    counts, _ = by_kind([text.prefixes for text in texts])
    shared = np.array([_shared_tokens(*example.answers) for example in examples])[:, None]
    is_alike = (counts[..., 0] == counts[..., 1]) & (counts[..., 0] <= shared)
    same_length[..., 1] = np.where(is_alike, same_length[..., 0], same_length[..., 1])
    prompts = [example.prompt.tobytes() for example in examples]
    return PrefixRewards(same_length, own_length, _groups(prompts), str(cut))


def function_prefix_rewards(
    score: Callable[[str, str], float | None], pairs: Sequence[Preference], read: Callable[[str], None]
) -> PrefixRewards:
    """Rewards by a Python function, for which answers are cut between words; pairs of which it cannot score a prefix
    are left out. Raises InputError if none is left."""
    found, prompts = [], []
    for number, pair in enumerate(pairs, start=1):
        answers = [_PIECE.findall(text) for text in (pair.chosen, pair.rejected)]
        scored = [
            [score(pair.prompt, "".join(pieces[:count])) for count in (*same, *own)]
            for pieces, same, own in zip(answers, *_prefix_counts(list(map(len, answers))), strict=True)
        ]
        if not any(None in each for each in scored):
            found.append(np.array(scored).reshape(2, 2, len(PERCENTS)))
            prompts.append(pair.prompt.encode(errors="surrogatepass"))
        read(f"{number}/{len(pairs)} pairs")
    if not found:
        raise InputError(f"the function scores none of the {len(pairs)} pairs")
    left_out = len(pairs) - len(found)
    note = f"{len(pairs)} rows: {left_out} left out because the function did not score all prefixes"
    return PrefixRewards(*np.stack(found).transpose(2, 0, 3, 1), _groups(prompts), note)


def with_agreement(rewards: PrefixRewards, exact: PrefixRewards, exact_format: str) -> PrefixRewards:
    """Rewards with a note on how a model with rounded weights agrees with the exact one, whose weights are in
    `exact_format`: the rank correlation of their rewards over all prefixes and over whole answers."""
    rounded, unrounded = rewards.own_length, exact.own_length
    over_all = float(spearman(rounded.ravel(), unrounded.ravel()))
    over_whole = float(spearman(rounded[:, -1].ravel(), unrounded[:, -1].ravel()))
    note = f"rank correlation with rewards of {exact_format} weights {over_whole:.4f}, over all prefixes {over_all:.4f}"
    return rewards._replace(notes=f"{rewards.notes}; {note}")


def _prefix_counts(
    lengths: Sequence[int], percents: Sequence[int] = PERCENTS
) -> tuple[list[list[int]], list[list[int]]]:
    """The prefixes of both answers, in tokens: at percentages of the longer one, and each at those of its own."""
    longest = max(lengths)
    same = [[min(_share(longest, percent), length) for percent in percents] for length in lengths]
    return same, [[_share(length, percent) for percent in percents] for length in lengths]


def _shared_tokens(first: Int[np.ndarray, "R"], second: Int[np.ndarray, "S"]) -> int:
    """The number of tokens that both begin with."""
    shortest = min(len(first), len(second))
    return int(np.cumprod(first[:shortest] == second[:shortest]).sum())


def _share(length: int, percent: int) -> int:
    return -(-length * percent // 100)


def _groups(prompts: Sequence[bytes]) -> Int[np.ndarray, "N"]:
    numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
    return np.array([numbers[prompt] for prompt in prompts])
