"""The contracts between the decode loop and the guides that score its tokens.

A *candidate guide* scores K given continuations of each row, as a scalar reward model does. A *vocabulary guide* scores
all tokens at once, before candidates are chosen, as a reward table or an autoregressive reward model does. Both are
static and hashable; their arrays are passed as `params` and `state`. Except in caches, the first dimension of every
array in a state is the row, so that rows can be copied and replaced.
"""

from typing import Any, NamedTuple, Protocol

from jaxtyping import Array, Bool, Float, Int


class Prompts(NamedTuple):
    """Left-padded prompts in one model's tokens; a row of length 0 is filler."""

    tokens: Int[Array, "B P"]
    lengths: Int[Array, "B"]


class Text(NamedTuple):
    """Prompts and answers in the language model's tokens. Row b is `tokens[b, :lengths[b]]`; its first
    `prompt_lengths[b]` tokens are the prompt. Guides see the text of a row that has finished as an empty one."""

    tokens: Int[Array, "B C"]
    prompt_lengths: Int[Array, "B"]
    lengths: Int[Array, "B"]

    @property
    def answer_lengths(self) -> Int[Array, "B"]:
        """The number of tokens in each answer so far."""
        return self.lengths - self.prompt_lengths


class Chosen(NamedTuple):
    """The token appended to each answer, its index among the candidates, and whether the row is live. Rows that are not
    live do not change."""

    token: Int[Array, "B"]
    index: Int[Array, "B"]
    live: Bool[Array, "B"]


class Capacity(NamedTuple):
    """The size of a state per row: the longest answer in the language model's tokens, and the candidates of a step."""

    answer: int
    candidates: int


class Guide(Protocol):
    """The interface that both kinds of guides share."""

    scores_vocabulary: bool
    """Whether this is a vocabulary guide."""

    adds_up: bool
    """Whether an answer's reward is the sum of its steps' rewards; otherwise it is the last step's reward."""

    def prefill(self, params: Any, prompts: Prompts, capacity: Capacity, own_prompts: Prompts | None) -> Any:
        """Reads the prompts and returns the first state.

        `prompts` are in the language model's tokens. `own_prompts` are the same prompts in the tokens and chat template
        of the guide's model; None where it reads the same tokens as the language model.
        """
        ...

    def commit(self, params: Any, state: Any, pending: Any, chosen: Chosen) -> Any:
        """The state after the chosen tokens were appended to the answers; `pending` is the second result of `score`."""
        ...

    def rewind(self, state: Any, text: Text, dropped: Int[Array, "B"]) -> Any:
        """The state after removing the last `dropped[b]` tokens of each answer; `text` is the remaining text."""
        ...


class CandidateGuide(Guide, Protocol):
    """Scores candidates; `scores_vocabulary` is False."""

    def score(
        self, params: Any, state: Any, text: Text, candidates: Int[Array, "B K"]
    ) -> tuple[Float[Array, "B K"], Any]:
        """Rewards r(prompt, answer so far, candidate) in fp32, and the data that `commit` needs."""
        ...


class VocabularyGuide(Guide, Protocol):
    """Scores all tokens; `scores_vocabulary` is True."""

    def score(self, params: Any, state: Any, text: Text) -> tuple[Float[Array, "B V"], Any]:
        """Rewards of every token of the language model's vocabulary in fp32, and the data that `commit` needs."""
        ...


class Judge(Guide, Protocol):
    """Optional methods of a guide. Search methods use them to get the reward of a text that grew by several tokens. For
    a guide without them, the tokens are read one by one with `score` and `commit`."""

    rereads: bool
    """Whether every text is read again from its beginning."""

    def read_prompts(
        self, params: Any, prompts: Prompts, capacity: Capacity, own_prompts: Prompts | None
    ) -> tuple[Float[Array, "B"], Any]:
        """`prefill` that also returns the rewards of the prompts alone."""
        ...

    def read(
        self, params: Any, state: Any, text: Text, new: Int[Array, "B"], width: int
    ) -> tuple[Float[Array, "B"], Int[Array, "B"], Any]:
        """Reads the last `new[b]` tokens of each text, at most `width`. Returns the reward of each text, the number of
        the model's own tokens that were read, and the state. Where `new[b]` is 0, the reward is undefined and the row
        does not change."""
        ...

    def read_prefixes(
        self, params: Any, state: Any, text: Text, new: Int[Array, "B"], width: int
    ) -> tuple[Float[Array, "B W"], Any]:
        """Like `read`, in one pass: the reward of every prefix that ends at one of the new tokens; `width` is W."""
        ...
