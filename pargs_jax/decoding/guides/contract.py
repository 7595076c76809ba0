"""The contracts between the decode loop and what scores its tokens.

A *candidate guide* scores the K continuations of each row that are asked of it, as a scalar reward model does. A
*vocabulary guide* scores all tokens at once, before candidates are chosen, as a reward table or an autoregressive
reward model does. Both are static and hashable; their arrays travel as `params` and `state`. The first dimension of
every array of a state is the row, caches apart, so that rows can be copied and replaced.
"""

from typing import Any, NamedTuple, Protocol

from jaxtyping import Array, Bool, Float, Int


class Prompts(NamedTuple):
    """Left-padded prompts in one model's tokens; a row of length 0 is filler."""

    tokens: Int[Array, "B P"]
    lengths: Int[Array, "B"]


class Text(NamedTuple):
    """Prompts and answers in the language model's tokens: `tokens[b, :lengths[b]]` are written, and the first
    `prompt_lengths[b]` of them are the prompt's."""

    tokens: Int[Array, "B C"]
    prompt_lengths: Int[Array, "B"]
    lengths: Int[Array, "B"]

    @property
    def answer_lengths(self) -> Int[Array, "B"]:
        """Tokens of each answer so far."""
        return self.lengths - self.prompt_lengths


class Chosen(NamedTuple):
    """What became part of each answer: a token, its index among the candidates, and whether the row is live. Rows that
    are not live stay as they are."""

    token: Int[Array, "B"]
    index: Int[Array, "B"]
    live: Bool[Array, "B"]


class Capacity(NamedTuple):
    """What a state has to hold for each row: the longest answer in the language model's tokens, and the candidates of a
    step."""

    answer: int
    candidates: int


class Guide(Protocol):
    """What both kinds of guides have."""

    scores_vocabulary: bool
    """Whether this is a vocabulary guide."""

    adds_up: bool
    """Whether the reward of an answer is the sum of its steps' rewards; if not, it is the last step's."""

    def prefill(self, params: Any, prompts: Prompts, capacity: Capacity, own_prompts: Prompts | None) -> Any:
        """The state after the prompts were read.

        `prompts` are in the language model's tokens. `own_prompts` are the same prompts as the guide's own model reads
        them, in its tokens and its chat template; None where it reads what the language model reads.
        """
        ...

    def commit(self, params: Any, state: Any, pending: Any, chosen: Chosen) -> Any:
        """The state after the chosen tokens became part of the answers; `pending` is what `score` gave."""
        ...

    def rewind(self, state: Any, text: Text, dropped: Int[Array, "B"]) -> Any:
        """The state after the last `dropped[b]` tokens of each answer were taken back, which leaves `text`."""
        ...


class CandidateGuide(Guide, Protocol):
    """Scores candidates; `scores_vocabulary` is False."""

    def score(
        self, params: Any, state: Any, text: Text, candidates: Int[Array, "B K"]
    ) -> tuple[Float[Array, "B K"], Any]:
        """Rewards r(prompt, answer so far, candidate) in fp32, and whatever `commit` needs of them."""
        ...


class VocabularyGuide(Guide, Protocol):
    """Scores all tokens; `scores_vocabulary` is True."""

    def score(self, params: Any, state: Any, text: Text) -> tuple[Float[Array, "B V"], Any]:
        """Rewards of every token of the language model's vocabulary in fp32, and whatever `commit` needs of them."""
        ...


class Judge(Guide, Protocol):
    """What a guide may have besides, for search methods, which ask for the reward of a text that has grown by several
    tokens. A guide without these reads them one by one, by its score and `commit`."""

    rereads: bool
    """Whether every text is read from its beginning."""

    def read_prompts(
        self, params: Any, prompts: Prompts, capacity: Capacity, own_prompts: Prompts | None
    ) -> tuple[Float[Array, "B"], Any]:
        """`prefill`, with the rewards of the prompts alone."""
        ...

    def read(
        self, params: Any, state: Any, text: Text, new: Int[Array, "B"], width: int
    ) -> tuple[Float[Array, "B"], Int[Array, "B"], Any]:
        """Reads the last `new[b]` tokens of each text, at most `width`. Returns the reward of each text, how many
        of the model's own tokens were read, and the state. Where `new[b]` is 0 there is no reward and the row stays."""
        ...

    def read_prefixes(
        self, params: Any, state: Any, text: Text, new: Int[Array, "B"], width: int
    ) -> tuple[Float[Array, "B W"], Any]:
        """The same in one pass for every prefix that ends at one of the new tokens; `width` is W."""
        ...
