"""The options of search methods, `--search.*`."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

from pargs_jax.options import option


def _of_method(meaning: str, **limits: float) -> Any:
    """An option whose default is the method's own number."""
    return option(None, meaning, unset="the method's", **limits)


@dataclass(frozen=True)
class SearchConfig:
    """For search methods (docs/search.md)."""

    samples: int | None = _of_method(
        "best_of_n, speculative_rejection: samples per prompt, one of which becomes the answer", at_least=1
    )
    smoothing: float | None = _of_method(
        "best_of_n: draw the answer in proportion to exp(reward / smoothing) (Verdun et al., 2025, Definition 1); "
        "0: take the best",
        at_least=0,
    )
    by: Literal["last", "minimum", "mean"] | None = _of_method(
        "best_of_n: judge by the reward of the whole answer (last), or the minimum or mean over its prefixes"
    )
    beams: int | None = _of_method("chunk_beam: W, texts to keep (Zhou et al., 2024, Algorithm 1)", at_least=1)
    successors: int | None = _of_method("blockwise, chunk_beam: K, continuations of each kept text", at_least=1)
    chunk: int | None = _of_method(
        "blockwise, chunk_beam, speculative_rejection: tokens between two scorings", at_least=1
    )
    alpha: float | None = _of_method(
        "speculative_rejection: share of the rows to drop after every chunk (Sun et al., 2024, Algorithm 1); "
        "0: best-of-n",
        at_least=0,
        below=1,
    )
    target: float | None = _of_method(
        "cards: r*, the target reward (Li et al., 2024, Algorithm 1), in standard deviations above the mean of the "
        "language model's own answers"
    )
    mean: float | None = option(
        None,
        "cards: that mean; 0 with a deviation of 1 uses raw rewards, as the published code does",
        unset="measured on answers to the prompts",
    )
    deviation: float | None = option(
        None, "cards: that standard deviation", unset="measured on answers to the prompts", above=0
    )
    acceptance_temperature: float | None = _of_method(
        "cards: beta; accept a segment with probability exp((r - tau) / beta)", above=0
    )
    start: float | None = _of_method(
        "cards: where tau starts, from the prompt's reward (0) to r* (1); alpha in the published code",
        at_least=0,
        at_most=1,
    )
    entropy: float | None = _of_method(
        "cards: end a segment before a token whose distribution has at least this entropy, in nats", at_least=0
    )
    shortest: int | None = _of_method("cards: tokens of the shortest segment", at_least=1)
    longest: int | None = _of_method("cards: tokens of the longest segment", at_least=1)
    most_rejections: int | None = _of_method(
        "cards: after this many rejections in a row, keep the best of the rejected segments", at_least=1
    )
    hard: bool = option(False, "cards: accept a segment if and only if its reward reaches tau")
    particles: int | None = _of_method("smc: particles per prompt (Zhao et al., 2024, Section 3)", at_least=1)
    threshold: float | None = _of_method(
        "smc: resample when the effective sample size is below this share of the particles", at_least=0, at_most=1
    )

    @property
    def given(self) -> dict[str, float | str | bool]:
        """The options that differ from a method's own."""
        return {name: value for name, value in asdict(self).items() if value is not None and value is not False}
