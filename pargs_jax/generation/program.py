"""The computation that decodes a batch, assembled from models and a method. It is the same whether the models'
parameters are loaded or only described."""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Int, PRNGKeyArray

from pargs_jax.decoding.guides import EncoderGuide, Guide, Prompts, RetokenisedGuide
from pargs_jax.decoding.loop import Decoded, Decoder
from pargs_jax.decoding.methods import Method
from pargs_jax.decoding.search import Found, Searcher, SearchInputs, SearchMethod
from pargs_jax.decoding.state import RowSettings
from pargs_jax.models.causal import CausalModel
from pargs_jax.sharding import on_every_device


class DecodingProgram(NamedTuple):
    """The static parts of decoding a batch. Hashable.

    Attributes:
        decoder: language model, guides, proposer and rule.
        max_new_tokens: the longest answer.
        retokenised: the indices of the guides with their own tokenizer, whose answer width can be too small.
    """

    decoder: Decoder
    max_new_tokens: int
    retokenised: tuple[int, ...]

    @classmethod
    def assemble(
        cls,
        lm: CausalModel,
        guides: tuple[Guide, ...],
        method: Method,
        k: int | None,
        max_new_tokens: int,
        *,
        top_p: float | None = None,
        eos_ids: tuple[int, ...],
        pad_id: int,
        keeps_candidates: bool = False,
    ) -> "DecodingProgram":
        """The program of a method with these models. `k` and `top_p` replace the method's defaults unless they are
        None."""
        in_vocabulary = method.judged or all(guide.scores_vocabulary for guide in guides)
        decoder = Decoder(
            lm,
            guides,
            method.proposer(k, top_p=top_p, scores_vocabulary=in_vocabulary),
            method.rule,
            eos_ids,
            pad_id,
            keeps_candidates,
            method.reward_form,
            method.keeps_rest,
        )
        retokenised = tuple(j for j, guide in enumerate(guides) if isinstance(guide, EncoderGuide | RetokenisedGuide))
        return cls(decoder, max_new_tokens, retokenised)

    def __call__(self, *arguments: Any) -> tuple[Decoded, tuple[Int[Array, ""], ...]]:
        """Decodes a batch. The arguments are the parameters of the language model and of each guide, the prompts, their
        lengths, keys, `RowSettings`, and each guide's own prompts (see `decode`).

        Returns the answers, and the longest answer of each guide in `retokenised`, in that guide's tokens.
        """
        return _decode(self, *arguments)

    def lower(self, *arguments: Any) -> jax.stages.Lowered:
        """Lowers the program for arguments of these shapes, ready to be compiled."""
        return _decode.lower(self, *arguments)


class SearchProgram(NamedTuple):
    """The static parts of a search over a batch; called and lowered like a `DecodingProgram`. Hashable.

    Attributes:
        search: the search method.
        searcher: draws tokens and judges texts.
        max_new_tokens: the longest answer.
        retokenised: the indices of the judges and guides with their own tokenizer.
    """

    search: SearchMethod
    searcher: Searcher
    max_new_tokens: int
    retokenised: tuple[int, ...]

    @classmethod
    def assemble(cls, program: DecodingProgram, method: Method, search: SearchMethod) -> "SearchProgram":
        """A search that draws with a decoding program. Its guides become judges if the method says so."""
        decoder, judges = program.decoder, ()
        if method.judged:
            decoder, judges = dataclasses.replace(decoder, guides=()), decoder.guides
        return cls(search, Searcher(decoder, judges), program.max_new_tokens, program.retokenised)

    def __call__(self, *arguments: Any) -> tuple[Found, tuple[Int[Array, ""], ...]]:
        """The search's result, and the longest answers as in `DecodingProgram`, whose arguments it takes."""
        return _search(self, *arguments)

    def lower(self, *arguments: Any) -> jax.stages.Lowered:
        """Lowers the program for arguments of these shapes, ready to be compiled."""
        return _search.lower(self, *arguments)


@partial(jax.jit, static_argnums=0)
def _search(
    program: SearchProgram,
    params: Any,
    prompts: Int[Array, "B P"],
    lengths: Int[Array, "B"],
    keys: PRNGKeyArray,
    settings: RowSettings,
    guide_prompts: tuple[Prompts | None, ...],
) -> tuple[Found, tuple[Int[Array, ""], ...]]:
    lm_params, guide_params = params
    none = settings.weights[:, :0]
    if program.searcher.judges:
        judged = settings._replace(weights=none)
        inputs = SearchInputs(
            (lm_params, ()), guide_params, prompts, lengths, keys, judged, settings.weights, (), guide_prompts
        )
    else:
        inputs = SearchInputs(params, (), prompts, lengths, keys, settings, none, guide_prompts, ())
    found = program.search(program.searcher, inputs, program.max_new_tokens)
    found = found._replace(samples=None, sample_scores=None, log_weights=None)
    return on_every_device((found, found.tokens.needed))


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
    return on_every_device((decoder.read(state), tuple(state.guides[j].needed.max() for j in program.retokenised)))
