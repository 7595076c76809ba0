"""The named methods: each is a combination of parts and their defaults, not a code path of its own."""

import dataclasses
from typing import Literal

from pargs_jax.decoding.rules import Greedy, Rule, Sample


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to decode: how many candidates, what rewards are added to, how one is chosen, and the usual numbers.

    `reward_model` says what the method's reward model is trained on, full answers or all their prefixes; None for a
    method without one.
    """

    source: str
    reward_model: Literal["full", "partial"] | None
    rule: Literal["greedy", "sample"]
    k: int = 10
    weight: float = 0.0
    temperature: float = 1.0
    base: Literal["log_probs", "logits"] = "log_probs"

    @property
    def guided(self) -> bool:
        return self.reward_model is not None

    @property
    def unused(self) -> dict[str, str]:
        """Which of `k`, `weight` and `temperature` mean nothing to this method, and why."""
        reasons = {}
        if not self.guided:
            reasons["weight"] = "is not guided"
        if self.rule == "greedy":
            reasons["temperature"] = "does not sample"
        if self.rule == "greedy" and not self.guided:
            reasons["k"] = "takes the likeliest token"
        return reasons

    def make_rule(self, temperature: float | None = None) -> Rule:
        if self.rule == "greedy":
            return Greedy()
        return Sample(self.temperature if temperature is None else temperature)


METHODS: dict[str, Method] = {
    "greedy": Method("greedy decoding", None, rule="greedy", k=1),
    "top_k": Method("top-k sampling (Fan et al., 2018)", None, rule="sample"),
    "args": Method("ARGS-greedy (Khanov et al., 2024)", "full", rule="greedy", weight=1.5, base="logits"),
    "args_stochastic": Method(
        "ARGS-stochastic (Khanov et al., 2024)",
        "full",
        rule="sample",
        weight=1.5,
        temperature=0.7,
        base="logits",
    ),
    "pargs_greedy": Method("PARGS-G (Rashid et al., 2024)", "partial", rule="greedy", weight=1.0),
    "pargs": Method("PARGS, Algorithm 1 (Rashid et al., 2024)", "partial", rule="sample", weight=2.0),
}
