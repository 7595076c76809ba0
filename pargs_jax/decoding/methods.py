"""The named methods. Each is a combination of parts with default numbers, not a separate code path.

The table imports no JAX, so that help texts appear at once; a method's parts are imported when they are needed.
docs/methods.md says what each method needs, what it costs, and what to watch.
"""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from pargs_jax.decoding.proposals import Proposer
    from pargs_jax.decoding.rules import Rule
    from pargs_jax.decoding.search import SearchMethod

RewardModelKind = Literal["full", "partial", "autoregressive", "preference", "ratio", "look_ahead"]
"""The models that guide a method: reward models trained on full answers, or on their prefixes; language models whose
log-probabilities are rewards; one such model that takes a preference vector; pairs of language models, tuned and
reference, whose log-ratio is the reward; or an aligned language model with a reward model of full answers that scores
its continuations."""

NUMBERS = ("k", "weight", "temperature", "top_p", "look_ahead")
"""The options of methods that are numbers, other than those of searches."""

CandidateKind = Literal["top_k", "top_k_of_sum", "top_p", "all"]
SearchKind = Literal["best_of_n", "chunk_beam", "cards", "speculative_rejection", "smc"]


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to decode: how candidates are chosen, how one of them is drawn, and the default numbers.

    Attributes:
        source: its name and paper.
        score: its equation, in the terms of docs/methods.md. Sampling draws from q = softmax(score / temperature).
        reward_model: the kind of model that guides it; None for a method without a reward model.
        draws: how a token is drawn.
        k, weight, temperature, top_p, look_ahead: the numbers that the paper or its code uses. `look_ahead` is the
            number of tokens that an aligned model writes after each candidate.
        candidates: the language model's k likeliest tokens; the k highest scores; the nucleus; or the whole vocabulary.
            Reward models that score one text at a time cannot score a vocabulary; with them, the k likeliest tokens are
            used.
        reward_form: how rewards enter the scores (see `RewardForm`).
        keeps_rest: whether tokens that are not scored keep their probability.
        search: how several rows of a prompt are searched (docs/search.md). The reward models then judge the language
            model's samples, except in `smc`, where they guide the particles.
        search_options: the options of that search with their default values.
    """

    source: str
    score: str
    reward_model: RewardModelKind | None
    draws: Literal["greedy", "sample", "contrastive"]
    k: int = 10
    weight: float = 0.0
    temperature: float = 1.0
    top_p: float = 1.0
    look_ahead: int = 0
    candidates: CandidateKind = "top_k"
    reward_form: Literal["plain", "clipped", "centred"] = "plain"
    keeps_rest: bool = False
    search: SearchKind | None = None
    search_options: tuple[tuple[str, float | str | bool | None], ...] = ()

    @property
    def guided(self) -> bool:
        return self.reward_model is not None

    @property
    def judged(self) -> bool:
        """Whether reward models judge finished samples instead of guiding them."""
        return self.search not in (None, "smc")

    def make_search(self, given: Mapping[str, float | str | bool]) -> "SearchMethod":
        """The method's search, with its options replaced by the given ones."""
        from pargs_jax.decoding.search import SEARCHES

        options = {**dict(self.search_options), **given}
        return SEARCHES[self.search](**{name: value for name, value in options.items() if value is not None})

    @property
    def rule(self) -> "Rule":
        """The rule that draws a token from the candidates."""
        from pargs_jax.decoding.rules import RULES

        return RULES[self.draws]

    def proposer(
        self, k: int | None = None, *, top_p: float | None = None, scores_vocabulary: bool = True
    ) -> "Proposer":
        """The proposer that chooses the candidates.

        Args:
            k, top_p: replace the method's own. With k, a method whose candidates are all tokens has only k.
            scores_vocabulary: whether all guides are vocabulary guides. If not, the k likeliest tokens replace all
                tokens.
        """
        from pargs_jax.decoding.proposals import AllTokens, TopK, TopKOfSum, TopP

        scores_all = self.candidates == "all" and scores_vocabulary and k is None
        k = self.k if k is None else k
        if self.candidates == "top_p":
            return TopP(self.top_p if top_p is None else top_p)
        if self.candidates == "top_k_of_sum":
            return TopKOfSum(k)
        return AllTokens() if scores_all else TopK(k)

    @property
    def unused(self) -> dict[str, str]:
        """The options below that do not apply to this method, each with the reason."""
        is_contrastive = self.draws == "contrastive"
        reasons = {
            "weight": "" if self.guided or is_contrastive else "is not guided",
            "gate_entropy": "" if self.guided and not self.judged else "is not guided at each token",
            "temperature": "" if self.draws == "sample" else "does not sample",
            "top_p": "" if self.candidates == "top_p" else "does not choose candidates by their total probability",
            "look_ahead": "" if self.look_ahead else "does not look ahead",
            "preference": "" if self.reward_model == "preference" else "takes no preference vector",
        }
        if self.draws == "greedy" and not self.guided:
            reasons["k"] = "takes the most likely token"
        elif self.candidates == "top_p" or (
            self.reward_model in ("autoregressive", "preference", "ratio") and not self.judged
        ):
            reasons["k"] = "does not take the k most likely tokens"
        return {name: reason for name, reason in reasons.items() if reason}

    def numbers(self, given: Mapping[str, Any] | None = None) -> str:
        """The values of its options in words: the given ones, by name, and its own elsewhere. None and an empty tuple
        count as not given."""
        given = {name: value for name, value in (given or {}).items() if value not in (None, ())}
        needless = "k" if self.judged and self.candidates == "all" and "k" not in given else ""
        own = {name: getattr(self, name) for name in NUMBERS if name not in self.unused and name != needless}
        values = {name: given.get(name, value) for name, value in [*own.items(), *self.search_options]}
        words = ((name, value if isinstance(value, tuple) else (value,)) for name, value in values.items())
        return ", ".join(
            f"{name.replace('_', ' ')} {' '.join(f'{x:g}' if type(x) is float else str(x) for x in value)}"
            for name, value in words
            if value != (None,)
        )


METHODS: dict[str, Method] = {
    "greedy": Method("greedy decoding", "the most likely token", None, "greedy", k=1),
    "top_k": Method("top-k sampling (Fan et al., 2018)", "log p(v) for the k most likely tokens", None, "sample"),
    "top_p": Method(
        "nucleus sampling (Holtzman et al., 2020)", "log p(v) for the fewest tokens with total probability P",
        None, "sample", top_p=0.95, candidates="top_p",
    ),
    "contrastive": Method(
        "contrastive search (Su et al., 2022)", "(1 - w) p(v) - w max_j cos(h_v, h_j)", None, "contrastive", k=8,
        weight=0.6,
    ),
    # ARGS adds rewards to raw logits. They differ from log-probabilities by a constant in each step, so choices are
    # equal.
    "args": Method("ARGS-greedy (Khanov et al., 2024)", "log p(v) + w r(y, v)", "full", "greedy", weight=1.5),
    "args_stochastic": Method(
        "ARGS-stochastic (Khanov et al., 2024)", "log p(v) + w r(y, v)", "full", "sample", weight=1.5, temperature=0.7
    ),
    "pargs_greedy": Method("PARGS-G (Rashid et al., 2024)", "log p(v) + w r(y, v)", "partial", "greedy", weight=1.0),
    "pargs": Method(
        "PARGS, Algorithm 1 (Rashid et al., 2024)", "log p(v) + w r(y, v)", "partial", "sample", weight=2.0
    ),
    "rad": Method(
        "RAD (Deng and Raffel, 2023)", "log p(v) + w clip(r(y, v), 0, 1)", "partial", "sample", k=20, weight=30.0,
        reward_form="clipped",
    ),
    "farma": Method(
        "FaRMA (Rashid et al., 2025)", "log p(v) + w r(y, v), the k highest", "partial", "sample", weight=1.0,
        candidates="top_k_of_sum",
    ),
    "cd": Method(
        "CD, token by token (Mudgal et al., 2024)", "log p(v) + w V(y, v)", "partial", "sample", k=20, weight=1.0,
        candidates="all",
    ),
    "vas": Method(
        "VAS (Han et al., 2024)", "log p(v) + w (V(y, v) - mean V) for the k most likely, log p(v) for the rest",
        "partial", "sample", k=20, weight=3.0, reward_form="centred", keeps_rest=True,
    ),
    "genarm": Method(
        "GenARM (Xu et al., 2025)", "log p(v) + sum_j w_j log pi_j(v)", "autoregressive", "sample", weight=1.0,
        candidates="all",
    ),
    "parm": Method(
        "PARM (Lin et al., 2025)", "log p(v) + w log pi(v | a), where a is the row's preference vector", "preference",
        "sample", weight=1.0, candidates="all",
    ),
    "expert_ratio": Method(
        "EFT (Mitchell et al., 2024), DExperts (Liu et al., 2021)",
        "log p(v) + sum_j w_j (log pi_tuned,j(v) - log pi_ref,j(v))", "ratio", "sample", weight=1.0, candidates="all",
    ),
    "transfer_q": Method(
        "Transfer Q* (Chakraborty et al., 2024)", "log p(v) + w r(y, v, what an aligned model writes after it)",
        "look_ahead", "greedy", weight=1.0, look_ahead=20,
    ),
    "best_of_n": Method(
        "best-of-n (Beirami et al., 2024), soft best-of-n (Verdun et al., 2025)",
        "the sample with the highest w r(y), or one drawn by exp(w r(y) / smoothing)", "full", "sample", weight=1.0,
        candidates="all", search="best_of_n", search_options=(("samples", 16), ("smoothing", 0.0), ("by", "last")),
    ),
    "blockwise": Method(
        "CD, blockwise best-of-K (Mudgal et al., 2024)", "the best of K blocks by w V(y), block after block", "partial",
        "sample", weight=1.0, candidates="all", search="chunk_beam", search_options=(("successors", 6), ("chunk", 32)),
    ),
    "chunk_beam": Method(
        "chunk-level beam search (Zhou et al., 2024)", "the W best of W K continuations by w r(y), chunk after chunk",
        "partial", "sample", k=50, weight=1.0, temperature=0.7, search="chunk_beam",
        search_options=(("beams", 4), ("successors", 4), ("chunk", 10)),
    ),
    "weak_to_strong": Method(
        "weak-to-strong search (Zhou et al., 2024)", "chunk_beam by sum_t log pi_tuned(y_t) - log pi_ref(y_t)", "ratio",
        "sample", k=50, weight=1.0, temperature=0.7, search="chunk_beam",
        search_options=(("beams", 4), ("successors", 4), ("chunk", 10)),
    ),
    "cards": Method(
        "CARDS (Li et al., 2024)", "segments, accepted with probability min(1, exp((w r(y) - tau) / T))", "partial",
        "sample", k=40, weight=1.0, temperature=0.7, search="cards",
        search_options=(
            ("target", 1.0), ("mean", None), ("deviation", None), ("acceptance_temperature", 0.7), ("start", 0.5),
            ("entropy", 3.0), ("shortest", 4), ("longest", 64), ("most_rejections", 20), ("hard", False),
        ),
    ),
    "speculative_rejection": Method(
        "speculative rejection (Sun et al., 2024)", "best-of-n by w r(y); the lowest are dropped chunk by chunk",
        "partial", "sample", weight=1.0, candidates="all", search="speculative_rejection",
        search_options=(("samples", 16), ("alpha", 0.5), ("chunk", 32)),
    ),
    "smc": Method(
        "twisted SMC (Zhao et al., 2024)", "particles for p(y) exp(w r(y)), drawn by log p(v) + w r(y, v)", "partial",
        "sample", weight=1.0, search="smc", search_options=(("particles", 16), ("threshold", 0.5)),
    ),
}  # fmt: skip
"""Every method by its name."""
