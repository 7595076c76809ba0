"""The contract between the decode loop and whatever scores its candidates."""

from typing import Any, Protocol

from jaxtyping import Array, Float, Int


class Guide(Protocol):
    """Scores the K candidate continuations of each row. Static and hashable; arrays travel as `params` and `state`."""

    def prefill(self, params: Any, prompts: Int[Array, "B P"], lengths: Int[Array, "B"], capacity: int) -> Any:
        """Reads left-padded prompts; the state has room for `capacity` tokens of prompt and answer."""
        ...

    def score(self, params: Any, state: Any, candidates: Int[Array, "B K"]) -> tuple[Float[Array, "B K"], Any]:
        """Rewards r(prompt, answer so far, candidate) in fp32, and whatever `commit` needs of them."""
        ...

    def commit(self, params: Any, state: Any, pending: Any, choice: Int[Array, "B"]) -> Any:
        """The state after candidate `choice[b]` of each row became part of the answer."""
        ...
