"""What decoding a batch computes, assembled from models and a method. It is the same whether the models' parameters are
loaded or only described."""

from functools import partial
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Int, PRNGKeyArray

from pargs_jax.decoding.guides import EncoderGuide, Guide, Prompts, RetokenisedGuide
from pargs_jax.decoding.loop import Decoded, Decoder
from pargs_jax.decoding.methods import Method
from pargs_jax.decoding.state import RowSettings
from pargs_jax.models.causal import CausalModel
from pargs_jax.sharding import on_every_device


class DecodingProgram(NamedTuple):
    """The static parts of decoding a batch. Hashable.

    Attributes:
        decoder: language model, guides, proposer and rule.
        max_new_tokens: the longest answer.
        by_text: which guides have a tokenizer of their own, and so an answer's room in its tokens.
    """

    decoder: Decoder
    max_new_tokens: int
    by_text: tuple[int, ...]

    @classmethod
    def assemble(
        cls,
        lm: CausalModel,
        guides: tuple[Guide, ...],
        method: Method,
        k: int | None,
        max_new_tokens: int,
        *,
        eos_ids: tuple[int, ...],
        pad_id: int,
        keeps_candidates: bool = False,
    ) -> "DecodingProgram":
        """The program of a method with these models; `k` candidates, or as many as the method usually has."""
        decoder = Decoder(lm, guides, method.proposer(k), method.rule, eos_ids, pad_id, keeps_candidates)
        by_text = tuple(j for j, guide in enumerate(guides) if isinstance(guide, EncoderGuide | RetokenisedGuide))
        return cls(decoder, max_new_tokens, by_text)

    def __call__(self, *arguments: Any) -> tuple[Decoded, tuple[Int[Array, ""], ...]]:
        """Decodes a batch. The arguments are the parameters of the language model and of each guide, prompts, their
        lengths, keys, `RowSettings`, and each guide's own prompts (see `decode`).

        Returns the answers, and the room that the texts of each guide `by_text` needed.
        """
        return _decode(self, *arguments)

    def lower(self, *arguments: Any) -> jax.stages.Lowered:
        """The program for arguments of these shapes, ready to be compiled; without the program as an argument."""
        return _decode.lower(self, *arguments)


@partial(jax.jit, static_argnums=0)
def _decode(
    program: DecodingProgram,
    params: Any,
    prompts: Int[Array, "B P"],
    lengths: Int[Array, "B"],
    keys: PRNGKeyArray,
    settings: RowSettings,
    guide_prompts: tuple[Prompts | None, ...],
) -> tuple[Decoded, tuple[Int[Array, ""], ...]]:
    decoder, steps = program.decoder, program.max_new_tokens
    state = decoder.start(params, prompts, lengths, keys, settings, steps, guide_prompts)
    state = decoder.advance(params, state, steps)
    return on_every_device((decoder.read(state), tuple(state.guides[j].needed.max() for j in program.by_text)))
