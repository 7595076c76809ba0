"""The contract between the decode loop and whatever scores its candidates."""

from typing import Any, NamedTuple, Protocol

from jaxtyping import Array, Float, Int


class Prompts(NamedTuple):
    """Left-padded prompts in one model's tokens; a row of length 0 is filler."""

    tokens: Int[Array, "B P"]
    lengths: Int[Array, "B"]


class Guide(Protocol):
    """Scores the K candidate continuations of each row. Static and hashable; arrays travel as `params` and `state`."""

    def prefill(self, params: Any, prompts: Prompts, max_new_tokens: int, own_prompts: Prompts | None) -> Any:
        """Reads the prompts; the state has room for answers of `max_new_tokens` of the language model's tokens.

        `prompts` are in the language model's tokens. `own_prompts` are the same prompts as the guide's own model reads
        them, in its tokens and its chat template; None where it reads what the language model reads.
        """
        ...

    def score(self, params: Any, state: Any, candidates: Int[Array, "B K"]) -> tuple[Float[Array, "B K"], Any]:
        """Rewards r(prompt, answer so far, candidate) in fp32, and whatever `commit` needs of them."""
        ...

    def commit(self, params: Any, state: Any, pending: Any, choice: Int[Array, "B"]) -> Any:
        """The state after candidate `choice[b]` of each row became part of the answer."""
        ...
