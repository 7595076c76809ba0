"""The rows of a decode: the text of each row, and everything that is needed to continue it.

Each row has its own text, key and settings. So one compiled step serves rows of different requests, and a row's text
does not depend on other rows. Rows can be copied (`take`), shortened (`rewind`) and replaced (`insert`).
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from pargs_jax.decoding.guides.contract import Text
from pargs_jax.decoding.shape import Shape
from pargs_jax.models.cache import Cache, put_rows, take_rows


class RowSettings(NamedTuple):
    """The settings of each row."""

    weights: Float[Array, "B J"]
    """One reward weight per guide: `beta` in PARGS, Eq. 6."""
    temperature: Float[Array, "B"]
    candidates: Int[Array, "B"]
    """The number of candidates, at most K of the proposer."""
    max_new_tokens: Int[Array, "B"]
    """The longest answer, its end-of-sequence token included; at most the capacity of the state."""
    gate_entropy: Float[Array, "B"] | None = None
    """A step is guided only where the language model's entropy is at least this, in nats; None for all steps."""
    shape: Shape | None = None
    """Biases, penalties and nuclei; None for none."""

    @classmethod
    def alike(
        cls,
        rows: int,
        *,
        weights: Any = (),
        temperature: float = 1.0,
        candidates: int,
        max_new_tokens: int,
        gate_entropy: float | None = None,
    ) -> "RowSettings":
        """The same settings for all rows."""
        weights = jnp.asarray(weights, jnp.float32)
        return cls(
            jnp.broadcast_to(weights, (rows, *weights.shape)),
            jnp.full(rows, temperature, jnp.float32),
            jnp.full(rows, candidates, jnp.int32),
            jnp.full(rows, max_new_tokens, jnp.int32),
            None if gate_entropy is None else jnp.full(rows, gate_entropy, jnp.float32),
        )


class Trace(NamedTuple):
    """Numbers about each token of the answers; 0 beyond an answer's end."""

    log_probs: Float[Array, "B N"]
    """The token's log-probability under the language model (whole vocabulary, temperature 1), in nats."""
    guided_log_probs: Float[Array, "B N"]
    """The token's log-probability under the distribution that it was drawn from."""
    entropies: Float[Array, "B N"]
    """The entropy of the language model's distribution, in nats."""
    kls: Float[Array, "B N"]
    """KL(q || p) in nats, exact: q is the distribution that the token was drawn from, p the language model's."""
    rewards: Float[Array, "B N J"]
    """Each guide's reward of the answer up to and including the token, or of the token for guides that add up."""
    candidates: "CandidateTrace | None" = None


class CandidateTrace(NamedTuple):
    """Numbers about each step's candidates, if they were asked for. The decoder's `alternatives` come after them."""

    tokens: Int[Array, "B N K"]
    """Token ids; -1 where a row had fewer candidates than places."""
    log_probs: Float[Array, "B N K"]
    guided_log_probs: Float[Array, "B N K"]
    rewards: Float[Array, "B N K J"]
    """NaN for alternatives, which no guide scored."""
    at_temperature_1: Float[Array, "B N K"]
    """The log-probability after guidance, but at temperature 1."""


class DecodeState(NamedTuple):
    """B rows of a decode. The language model has read all but the last token of each text."""

    text: Text
    done: Bool[Array, "B"]
    keys: PRNGKeyArray
    settings: RowSettings
    lm: Cache
    guides: tuple[Any, ...]
    trace: Trace

    @property
    def live_text(self) -> Text:
        """The texts; those of finished rows are empty, so that guides need not read them."""
        live = ~self.done
        text = self.text
        return Text(text.tokens, text.prompt_lengths * live, text.lengths * live)

    @property
    def last_tokens(self) -> Int[Array, "B"]:
        """The newest token of each row, which the language model has not read yet."""
        at = jnp.maximum(self.text.lengths - 1, 0)
        return jnp.take_along_axis(self.text.tokens, at[:, None], axis=1)[:, 0]


def take(state: DecodeState, rows: Int[Array, "N"]) -> DecodeState:
    """N rows, each a copy of row `rows[n]`: its text, caches and guide states."""
    return take_rows(state, rows)


def insert(state: DecodeState, new: DecodeState, rows: Int[Array, "N"]) -> DecodeState:
    """Replaces rows with those of another state, started by the same decoder with the same longest answer. Row n of
    `new` goes to `rows[n]`, or nowhere if there is no such row. Prompts may be padded to another width; the result has
    the larger of both."""
    return put_rows(state, new, rows)
