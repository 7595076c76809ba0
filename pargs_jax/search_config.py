"""The options of search methods, `--search.*`."""

from dataclasses import asdict, dataclass
from typing import Literal

from pargs_jax.options import option


@dataclass(frozen=True)
class SearchConfig:
    """For search methods (docs/search.md)."""

    samples: int | None = option(
        None,
        "best_of_n, speculative_rejection: samples of a prompt, of which one is the answer",
        unset="the method's",
        at_least=1,
    )
    smoothing: float | None = option(
        None,
        "best_of_n: the answer is drawn by exp(reward / smoothing) (Verdun et al., 2025, Definition 1); 0: the best",
        unset="the method's",
        at_least=0,
    )
    by: Literal["last", "minimum", "mean"] | None = option(
        None,
        "best_of_n: the reward of the whole answer, or the least or the mean of its prefixes' rewards",
        unset="the method's",
    )
    beams: int | None = option(
        None, "chunk_beam: W, texts that are kept (Zhou et al., 2024, Algorithm 1)", unset="the method's", at_least=1
    )
    successors: int | None = option(
        None, "blockwise, chunk_beam: K, continuations of each kept text", unset="the method's", at_least=1
    )
    chunk: int | None = option(
        None,
        "blockwise, chunk_beam, speculative_rejection: tokens between two judgements",
        unset="the method's",
        at_least=1,
    )
    alpha: float | None = option(
        None,
        "speculative_rejection: share of the rows that is dropped after every chunk (Sun et al., 2024, Algorithm "
        "1); 0: best-of-n",
        unset="the method's",
        at_least=0,
        below=1,
    )
    target: float | None = option(
        None,
        "cards: r*, the reward that is aimed at (Li et al., 2024, Algorithm 1), in standard deviations over the "
        "mean of the language model's own answers",
        unset="the method's",
    )
    mean: float | None = option(
        None,
        "cards: that mean; 0, with a deviation of 1, makes rewards raw as in the published code",
        unset="measured on answers to the prompts",
    )
    deviation: float | None = option(
        None, "cards: that standard deviation", unset="measured on answers to the prompts", above=0
    )
    acceptance_temperature: float | None = option(
        None, "cards: beta, a segment is accepted with probability exp((r - tau) / beta)", unset="the method's", above=0
    )
    start: float | None = option(
        None,
        "cards: alpha of the code, how far tau begins from the prompt's reward towards r*",
        unset="the method's",
        at_least=0,
        at_most=1,
    )
    entropy: float | None = option(
        None,
        "cards: a segment ends before a token whose distribution has at least this entropy, in nats",
        unset="the method's",
        at_least=0,
    )
    shortest: int | None = option(None, "cards: tokens of the shortest segment", unset="the method's", at_least=1)
    longest: int | None = option(None, "cards: tokens of the longest segment", unset="the method's", at_least=1)
    most_rejections: int | None = option(
        None,
        "cards: segments rejected in a row, after which the best of them is kept",
        unset="the method's",
        at_least=1,
    )
    hard: bool = option(False, "cards: accept where the reward reaches tau, and only there")
    particles: int | None = option(
        None, "smc: particles of a prompt (Zhao et al., 2024, Section 3)", unset="the method's", at_least=1
    )
    threshold: float | None = option(
        None,
        "smc: particles are resampled where their effective sample size is below this share",
        unset="the method's",
        at_least=0,
        at_most=1,
    )

    @property
    def given(self) -> dict[str, float | str | bool]:
        """The options that differ from a method's own."""
        return {name: value for name, value in asdict(self).items() if value is not None and value is not False}
