"""The named methods: each is a combination of parts and their usual numbers, not a code path of its own."""

import dataclasses
from typing import Literal

from pargs_jax.decoding.proposals import TopK
from pargs_jax.decoding.rules import Greedy, Rule, Sample


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to decode: which tokens are candidates, how one is drawn, and the usual numbers.

    `reward_model` says what the method's reward model is trained on, full answers or all their prefixes; None for a
    method without one.
    """

    source: str
    reward_model: Literal["full", "partial"] | None
    rule: Rule
    k: int = 10
    weight: float = 0.0
    temperature: float = 1.0

    @property
    def guided(self) -> bool:
        return self.reward_model is not None

    def proposer(self, k: int | None = None) -> TopK:
        """What proposes candidates: the k likeliest tokens."""
        return TopK(self.k if k is None else k)

    @property
    def unused(self) -> dict[str, str]:
        """Which of `k`, `weight` and `temperature` mean nothing to this method, and why."""
        reasons = {}
        if not self.guided:
            reasons["weight"] = "is not guided"
        if self.rule == Greedy():
            reasons["temperature"] = "does not sample"
        if self.rule == Greedy() and not self.guided:
            reasons["k"] = "takes the likeliest token"
        return reasons


METHODS: dict[str, Method] = {
    "greedy": Method("greedy decoding", None, Greedy(), k=1),
    "top_k": Method("top-k sampling (Fan et al., 2018)", None, Sample()),
    # ARGS adds rewards to raw logits, which differ from log-probabilities by a constant in each step: it chooses alike.
    "args": Method("ARGS-greedy (Khanov et al., 2024)", "full", Greedy(), weight=1.5),
    "args_stochastic": Method("ARGS-stochastic (Khanov et al., 2024)", "full", Sample(), weight=1.5, temperature=0.7),
    "pargs_greedy": Method("PARGS-G (Rashid et al., 2024)", "partial", Greedy(), weight=1.0),
    "pargs": Method("PARGS, Algorithm 1 (Rashid et al., 2024)", "partial", Sample(), weight=2.0),
}
