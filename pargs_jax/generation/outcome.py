"""What decoding a batch gives, in one form for methods that draw token by token and for searches."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from pargs_jax.decoding.loop import Decoded
from pargs_jax.decoding.search import Found
from pargs_jax.generation.plan import Batch
from pargs_jax.generation.program import DecodingProgram


class Outcome(NamedTuple):
    """The answers of a batch, and what they cost; arrays are numpy's."""

    decoded: Decoded
    kls: Float[np.ndarray, "B"]
    """The KL of each answer's distribution from the language model's, in nats: exact, or what docs/search.md says."""
    lm_tokens: Int[np.ndarray, "B"]
    """Tokens that the language model read for each answer: the prompt, and all that was drawn."""
    rm_tokens: Int[np.ndarray, "B"] | None
    """The same of the reward models together while decoding; None where that is not counted: guides that go by the text
    read their candidates as trees."""
    log_z: Float[np.ndarray, "B"] | None = None

    @classmethod
    def of_decoding(cls, decoded: Decoded, program: DecodingProgram, batch: Batch) -> "Outcome":
        """Of answers drawn token by token: every guide reads the prompt, then all candidates of a step, or the newest
        token where it scores the whole vocabulary."""
        decoder, lengths = program.decoder, batch.lm_prompts.lengths
        kls = decoded.trace.kls.sum(axis=1)
        lm_tokens = np.maximum(lengths - 1, 0) + decoded.lengths
        if program.by_text:
            return cls(decoded, kls, lm_tokens, None)
        rm_tokens = np.zeros_like(lm_tokens)
        for guide, own in zip(decoder.guides, batch.own_prompts, strict=False):
            a_step = 1 if guide.scores_vocabulary else decoder.candidates
            rm_tokens = rm_tokens + own.lengths + a_step * decoded.lengths
        return cls(decoded, kls, lm_tokens, rm_tokens)

    @classmethod
    def of_search(cls, found: Found, *, counts_guides: bool) -> "Outcome":
        """Of a search. `counts_guides` is False where guides go by the text."""
        rm_tokens = found.tokens.rm if counts_guides else None
        return cls(found.answers, found.kls, found.tokens.lm, rm_tokens, found.log_z)
