"""The options of search methods, `--search.*`."""

from dataclasses import asdict, dataclass
from typing import Literal

from pargs_jax.options import option


@dataclass(frozen=True)
class SearchConfig:
    """For search methods (docs/search.md)."""

    samples: int | None = option(
        None,
        "best_of_n, speculative_rejection: samples per prompt, one of which becomes the answer",
        unset="the method's",
        at_least=1,
    )
    smoothing: float | None = option(
        None,
        "best_of_n: draw the answer in proportion to exp(reward / smoothing) (Verdun et al., 2025, Definition 1); "
        "0: take the best",
        unset="the method's",
        at_least=0,
    )
    by: Literal["last", "minimum", "mean"] | None = option(
        None,
        "best_of_n: judge by the reward of the whole answer (last), or the minimum or mean over its prefixes",
        unset="the method's",
    )
    beams: int | None = option(
        None, "chunk_beam: W, texts to keep (Zhou et al., 2024, Algorithm 1)", unset="the method's", at_least=1
    )
    successors: int | None = option(
        None, "blockwise, chunk_beam: K, continuations of each kept text", unset="the method's", at_least=1
    )
    chunk: int | None = option(
        None,
        "blockwise, chunk_beam, speculative_rejection: tokens between two scorings",
        unset="the method's",
        at_least=1,
    )
    alpha: float | None = option(
        None,
        "speculative_rejection: share of the rows to drop after every chunk (Sun et al., 2024, Algorithm 1); "
        "0: best-of-n",
        unset="the method's",
        at_least=0,
        below=1,
    )
    target: float | None = option(
        None,
        "cards: r*, the target reward (Li et al., 2024, Algorithm 1), in standard deviations above the mean of the "
        "language model's own answers",
        unset="the method's",
    )
    mean: float | None = option(
        None,
        "cards: that mean; 0 with a deviation of 1 uses raw rewards, as the published code does",
        unset="measured on answers to the prompts",
    )
    deviation: float | None = option(
        None, "cards: that standard deviation", unset="measured on answers to the prompts", above=0
    )
    acceptance_temperature: float | None = option(
        None, "cards: beta; accept a segment with probability exp((r - tau) / beta)", unset="the method's", above=0
    )
    start: float | None = option(
        None,
        "cards: where tau starts, from the prompt's reward (0) to r* (1); alpha in the published code",
        unset="the method's",
        at_least=0,
        at_most=1,
    )
    entropy: float | None = option(
        None,
        "cards: end a segment before a token whose distribution has at least this entropy, in nats",
        unset="the method's",
        at_least=0,
    )
    shortest: int | None = option(None, "cards: tokens of the shortest segment", unset="the method's", at_least=1)
    longest: int | None = option(None, "cards: tokens of the longest segment", unset="the method's", at_least=1)
    most_rejections: int | None = option(
        None,
        "cards: after this many rejections in a row, keep the best of the rejected segments",
        unset="the method's",
        at_least=1,
    )
    hard: bool = option(False, "cards: accept a segment if and only if its reward reaches tau")
    particles: int | None = option(
        None, "smc: particles per prompt (Zhao et al., 2024, Section 3)", unset="the method's", at_least=1
    )
    threshold: float | None = option(
        None,
        "smc: resample when the effective sample size is below this share of the particles",
        unset="the method's",
        at_least=0,
        at_most=1,
    )

    @property
    def given(self) -> dict[str, float | str | bool]:
        """The options that differ from a method's own."""
        return {name: value for name, value in asdict(self).items() if value is not None and value is not False}
