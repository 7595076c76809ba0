"""The computation that decodes a batch, assembled from models and a method. It is the same whether the models'
parameters are loaded or only described."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PRNGKeyArray

from pargs_jax.decoding.guides import (
    EncoderGuide,
    Guide,
    LookAheadGuide,
    PreferredPrompts,
    Prompts,
    RatioGuide,
    RetokenisedGuide,
    SimilarityGuide,
)
from pargs_jax.decoding.loop import Decoded, Decoder
from pargs_jax.decoding.methods import Method
from pargs_jax.decoding.search import Found, Searcher, SearchInputs, SearchMethod
from pargs_jax.decoding.state import RowSettings
from pargs_jax.errors import InputError
from pargs_jax.generation.plan import Batch, Settings
from pargs_jax.generation.reward_models import RewardModel
from pargs_jax.models.causal import CausalModel
from pargs_jax.models.model import Params
from pargs_jax.sharding import on_every_device


class Guides(NamedTuple):
    """The guides of a batch, with their params and prompts."""

    guides: tuple[Guide, ...]
    params: tuple[Any, ...]
    prompts: tuple[Any, ...]
    """The guides' own prompts, as `decode` takes them."""


def make_guides(
    lm: tuple[CausalModel, Params],
    reward_models: Sequence[RewardModel],
    batch: Batch,
    settings: Settings,
    answer_widths: Sequence[int],
    eos_ids: tuple[int, ...],
) -> Guides:
    """The guides of a method for a batch of prompts. Raises InputError for preference vectors that do not fit.

    Args:
        lm: the language model and its parameters.
        reward_models: the session's reward models.
        batch, settings: the prompts, and how they are decoded.
        answer_widths: the answer width that each reward model's texts need, as far as it is known.
        eos_ids: tokens that end an answer.
    """
    method = settings.method
    if method.draws == "contrastive":
        return Guides((SimilarityGuide(lm[0]),), (lm[1],), (None,))
    if not method.guided:
        return Guides((), (), ())
    params = tuple(model.params for model in reward_models)
    parts = list(zip(reward_models, batch.own_prompts, strict=True))
    prompts = tuple(model.guide_prompts(own, batch.lm_prompts) for model, own in parts)
    if method.reward_model == "look_ahead":
        aligned, *judges = (model.model for model in reward_models)
        guide = LookAheadGuide(aligned, tuple(judges), settings.tokens_ahead, eos_ids)
        return Guides((guide,), (params,), (prompts,))
    guides = tuple(
        model.guide(own, settings.max_new_tokens, answer_width)
        for (model, own), answer_width in zip(parts, answer_widths, strict=True)
    )
    if method.reward_model == "ratio":
        pairs = [slice(i, i + 2) for i in range(0, len(guides), 2)]
        return Guides(
            tuple(RatioGuide(*guides[pair]) for pair in pairs),
            tuple(params[pair] for pair in pairs),
            tuple(prompts[pair] for pair in pairs),
        )
    if method.reward_model == "preference":
        preferences = settings.preferences_of(batch.prompts, len(batch.lm_prompts.lengths))
        objectives = reward_models[0].model.lora.objectives
        if preferences.shape[1] != objectives:
            raise InputError(
                f"a preference has {preferences.shape[1]} numbers, but {reward_models[0].source} was trained for "
                f"{objectives} objectives"
            )
        return Guides(guides, params, (PreferredPrompts(prompts[0], jnp.asarray(preferences)),))
    return Guides(guides, params, prompts)


class DecodingProgram(NamedTuple):
    """The static parts of decoding a batch, or of searching over it. Hashable.

    Attributes:
        decoder: language model, guides, proposer and rule.
        max_new_tokens: the longest answer.
        retokenised: the indices of the guides and judges with their own tokenizer, whose answer width can be too small.
        search: the search method, if the method searches.
        judges: the guides that judge the search's samples instead of guiding them.
    """

    decoder: Decoder
    max_new_tokens: int
    retokenised: tuple[int, ...]
    search: SearchMethod | None = None
    judges: tuple[Guide, ...] = ()

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
        search_options: Mapping[str, float | str | bool] | None = None,
    ) -> "DecodingProgram":
        """The program of a method with these models. `k`, `top_p` and `search_options` replace the method's defaults
        unless they are None."""
        judges = guides if method.judged else ()
        decoder = Decoder(
            lm,
            () if method.judged else guides,
            method.proposer(
                k, top_p=top_p, scores_vocabulary=method.judged or all(guide.scores_vocabulary for guide in guides)
            ),
            method.rule,
            eos_ids,
            pad_id,
            keeps_candidates,
            method.reward_form,
            method.keeps_rest,
        )
        retokenised = tuple(j for j, guide in enumerate(guides) if isinstance(guide, EncoderGuide | RetokenisedGuide))
        search = None if method.search is None else method.make_search(search_options or {})
        return cls(decoder, max_new_tokens, retokenised, search, judges)

    def __call__(self, *arguments: Any) -> tuple[Decoded | Found, tuple[Int[Array, ""], ...]]:
        """Decodes a batch. The arguments are the parameters of the language model and of each guide or judge, the
        prompts, their lengths, keys, `RowSettings`, and each guide's own prompts (see `decode`).

        Returns the answers, and the longest answer of each guide in `retokenised`, in that guide's tokens.
        """
        return _run(self, *arguments)

    def lower(self, *arguments: Any) -> jax.stages.Lowered:
        """Lowers the program for arguments of these shapes, ready to be compiled."""
        return _run.lower(self, *arguments)


@partial(jax.jit, static_argnums=0)
def _run(
    program: DecodingProgram,
    params: Any,
    prompts: Int[Array, "B P"],
    lengths: Int[Array, "B"],
    keys: PRNGKeyArray,
    settings: RowSettings,
    guide_prompts: tuple[Prompts | None, ...],
) -> tuple[Decoded | Found, tuple[Int[Array, ""], ...]]:
    decoder, steps = program.decoder, program.max_new_tokens
    if program.search is None:
        state = decoder.start(params, prompts, lengths, keys, settings, steps, guide_prompts)
        state = decoder.advance(params, state, steps)
        return on_every_device((decoder.read(state), tuple(state.guides[j].needed.max() for j in program.retokenised)))
    rows, none = (prompts, lengths, keys), settings.weights[:, :0]
    if program.judges:
        lm_params, judge_params = params
        unguided = settings._replace(weights=none)
        inputs = SearchInputs((lm_params, ()), judge_params, *rows, unguided, settings.weights, (), guide_prompts)
    else:
        inputs = SearchInputs(params, (), *rows, settings, none, guide_prompts, ())
    found = program.search(Searcher(decoder, program.judges), inputs, steps)
    return on_every_device((found._replace(samples=None, sample_scores=None, log_weights=None), found.tokens.needed))
