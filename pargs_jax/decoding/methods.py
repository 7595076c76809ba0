"""The named methods: each is a combination of parts and their usual numbers, not a code path of its own."""

import dataclasses
from typing import Literal

from pargs_jax.decoding.proposals import AllTokens, Proposer, RewardForm, TopK, TopKOfSum, TopP
from pargs_jax.decoding.rules import Contrastive, Greedy, Rule, Sample

RewardModelKind = Literal["full", "partial", "autoregressive", "preference", "ratio", "look_ahead"]
"""What guides a method: reward models trained on full answers, or on their prefixes; language models whose
log-probabilities are rewards; one of these that takes a preference vector; pairs of language models, tuned and
reference, whose log-ratio is the reward; or an aligned language model, and a reward model of full answers, which scores
what it writes."""

CandidateKind = Literal["top_k", "top_k_of_sum", "top_p", "all"]


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to decode: which tokens are candidates, how one is drawn, and the usual numbers.

    Attributes:
        source: its name and paper.
        score: its equation, in the terms of docs/methods.md.
        reward_model: what guides it; None for a method without a reward model.
        rule: how a token is drawn.
        k, weight, temperature, top_p, look_ahead: the numbers that the paper or its code uses. The last is how many
            tokens an aligned model writes after each candidate.
        candidates: the language model's k likeliest tokens; the k highest scores; the nucleus; or the whole vocabulary.
            A reward model that scores one text at a time cannot score them all: the k likeliest are scored.
        reward_form: how rewards enter the scores.
        keeps_rest: whether tokens that are not scored keep their probability.
    """

    source: str
    score: str
    reward_model: RewardModelKind | None
    rule: Rule
    k: int = 10
    weight: float = 0.0
    temperature: float = 1.0
    top_p: float = 1.0
    look_ahead: int = 0
    candidates: CandidateKind = "top_k"
    reward_form: RewardForm = "plain"
    keeps_rest: bool = False

    @property
    def guided(self) -> bool:
        return self.reward_model is not None

    @property
    def is_contrastive(self) -> bool:
        """Whether the language model's own hidden states guide it (`SimilarityGuide`)."""
        return self.rule == Contrastive()

    def proposer(
        self, k: int | None = None, *, top_p: float | None = None, scores_vocabulary: bool | None = None
    ) -> Proposer:
        """What proposes candidates.

        Args:
            k, top_p: instead of the method's own.
            scores_vocabulary: whether all guides are vocabulary guides; by default as the method's paper has it.
        """
        k = self.k if k is None else k
        if self.candidates == "top_p":
            return TopP(self.top_p if top_p is None else top_p)
        if self.candidates == "top_k_of_sum":
            return TopKOfSum(k)
        if self.candidates == "all" and scores_vocabulary is not False:
            return AllTokens()
        return TopK(k)

    @property
    def unused(self) -> dict[str, str]:
        """Which of `k`, `weight`, `temperature`, `top_p` and `gate_entropy` mean nothing to this method, and why."""
        reasons = {}
        if not self.guided:
            reasons["gate_entropy"] = "is not guided"
        if not self.guided and not self.is_contrastive:
            reasons["weight"] = "is not guided"
        if self.rule != Sample():
            reasons["temperature"] = "does not sample"
        if self.rule == Greedy() and not self.guided:
            reasons["k"] = "takes the likeliest token"
        if self.candidates == "top_p" or self.reward_model in ("autoregressive", "preference", "ratio"):
            reasons["k"] = "does not take the k likeliest tokens"
        if self.candidates != "top_p":
            reasons["top_p"] = "has other candidates"
        return reasons


METHODS: dict[str, Method] = {
    "greedy": Method("greedy decoding", "the likeliest token", None, Greedy(), k=1),
    "top_k": Method("top-k sampling (Fan et al., 2018)", "log p(v) for the k likeliest tokens", None, Sample()),
    "top_p": Method(
        "nucleus sampling (Holtzman et al., 2020)", "log p(v) for the fewest tokens that have probability P together",
        None, Sample(), top_p=0.95, candidates="top_p",
    ),
    "contrastive": Method(
        "contrastive search (Su et al., 2022)", "(1 - w) p(v) - w max_j cos(h_v, h_j)", None, Contrastive(), k=8,
        weight=0.6,
    ),
    # ARGS adds rewards to raw logits, which differ from log-probabilities by a constant in each step: it chooses alike.
    "args": Method("ARGS-greedy (Khanov et al., 2024)", "log p(v) + w r(y, v)", "full", Greedy(), weight=1.5),
    "args_stochastic": Method(
        "ARGS-stochastic (Khanov et al., 2024)", "log p(v) + w r(y, v)", "full", Sample(), weight=1.5, temperature=0.7
    ),
    "pargs_greedy": Method(
        "PARGS-G (Rashid et al., 2024)", "log p(v) + w r(y, v)", "partial", Greedy(), weight=1.0
    ),
    "pargs": Method(
        "PARGS, Algorithm 1 (Rashid et al., 2024)", "log p(v) + w r(y, v)", "partial", Sample(), weight=2.0
    ),
    "rad": Method(
        "RAD (Deng and Raffel, 2023)", "log p(v) + w clip(r(y, v), 0, 1)", "partial", Sample(), k=20, weight=30.0,
        reward_form="clipped",
    ),
    "farma": Method(
        "FaRMA (Rashid et al., 2025)", "log p(v) + w r(y, v), of which the k highest", "partial", Sample(), weight=1.0,
        candidates="top_k_of_sum",
    ),
    "cd": Method(
        "CD, token by token (Mudgal et al., 2024)", "log p(v) + w V(y, v)", "partial", Sample(), k=20, weight=1.0,
        candidates="all",
    ),
    "vas": Method(
        "VAS (Han et al., 2024)", "log p(v) + w (V(y, v) - mean V) for the k likeliest, log p(v) for the rest",
        "partial", Sample(), k=20, weight=3.0, reward_form="centred", keeps_rest=True,
    ),
    "genarm": Method(
        "GenARM (Xu et al., 2025)", "log p(v) + sum_j w_j log pi_j(v)", "autoregressive", Sample(), weight=1.0,
        candidates="all",
    ),
    "parm": Method(
        "PARM (Lin et al., 2025)", "log p(v) + w log pi(v | a), a row's preference vector a", "preference", Sample(),
        weight=1.0, candidates="all",
    ),
    "expert_ratio": Method(
        "EFT (Mitchell et al., 2024) and DExperts (Liu et al., 2021)",
        "log p(v) + sum_j w_j (log pi_tuned,j(v) - log pi_ref,j(v))", "ratio", Sample(), weight=1.0, candidates="all",
    ),
    "transfer_q": Method(
        "Transfer Q* (Chakraborty et al., 2024)", "log p(v) + w r(y, v, and what an aligned model writes after it)",
        "look_ahead", Greedy(), weight=1.0, look_ahead=20,
    ),
}  # fmt: skip
"""What `--method` takes. The scores of a sampled method are divided by the temperature as a whole: q is
softmax(score / T)."""
