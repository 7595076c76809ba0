"""The computation that decodes rows, assembled from models and a method, and its compiled forms. It is the same whether
the models' parameters are loaded or only described."""

import re
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import jax
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


class Models(NamedTuple):
    """A language model with its parameters, the tokens that end its answers and the one that fills them up, and its
    reward models."""

    lm: CausalModel
    lm_params: Params
    eos_ids: tuple[int, ...]
    pad_id: int
    reward_models: Sequence[RewardModel]


def make_guides(
    models: Models, settings: Settings, answer_widths: Sequence[int]
) -> tuple[tuple[Guide, ...], tuple[Any, ...]]:
    """The guides of a method, and their parameters.

    Args:
        models: the language model and the reward models.
        settings: the method, and its options.
        answer_widths: the answer width that each reward model's texts need, as far as it is known.
    """
    method, reward_models = settings.method, models.reward_models
    if method.draws == "contrastive":
        return (SimilarityGuide(models.lm),), (models.lm_params,)
    if not method.guided:
        return (), ()
    params = tuple(model.params for model in reward_models)
    if method.reward_model == "look_ahead":
        aligned, *judges = (model.model for model in reward_models)
        return (LookAheadGuide(aligned, tuple(judges), settings.tokens_ahead, models.eos_ids),), (params,)
    parts = zip(reward_models, answer_widths, strict=True)
    guides = tuple(model.guide(settings.max_new_tokens, width) for model, width in parts)
    if method.reward_model == "ratio":
        return tuple(RatioGuide(*pair) for pair in _pairs(guides)), _pairs(params)
    return guides, params


def guide_prompts(method: Method, reward_models: Sequence[RewardModel], batch: Batch) -> tuple[Any, ...]:
    """Each guide's own prompts, as `decode` takes them. Raises InputError for preference vectors that do not fit."""
    if method.draws == "contrastive":
        return (None,)
    if not method.guided:
        return ()
    parts = zip(reward_models, batch.own_prompts, strict=True)
    prompts = tuple(model.guide_prompts(own, batch.lm_prompts) for model, own in parts)
    if method.reward_model == "look_ahead":
        return (prompts,)
    if method.reward_model == "ratio":
        return _pairs(prompts)
    if method.reward_model == "preference":
        preferences, objectives = batch.preferences(), reward_models[0].model.lora.objectives
        if preferences.shape[1] != objectives:
            raise InputError(
                f"a preference has {preferences.shape[1]} numbers, but {reward_models[0].source} was trained for "
                f"{objectives} objectives"
            )
        return (PreferredPrompts(prompts[0], preferences),)
    return prompts


def _pairs(of_models: tuple[Any, ...]) -> tuple[tuple[Any, Any], ...]:
    return tuple(zip(of_models[::2], of_models[1::2], strict=True))


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
        may_keep_rest: bool = False,
        alternatives: int = 0,
    ) -> "DecodingProgram":
        """The program of a method with these models. `k`, `top_p` and `search_options` replace the method's defaults
        unless they are None. `may_keep_rest` lets rows with a `Shape` draw tokens that are not candidates."""
        judges = guides if method.judged else ()
        proposer = method.proposer(
            k, top_p=top_p, scores_vocabulary=method.judged or all(guide.scores_vocabulary for guide in guides)
        )
        has_rest = proposer.size(lm.config.vocab_size) < lm.config.vocab_size
        decoder = Decoder(
            lm,
            () if method.judged else guides,
            proposer,
            method.rule,
            eos_ids,
            pad_id,
            keeps_candidates,
            method.reward_form,
            method.keeps_rest or (may_keep_rest and has_rest),
            alternatives,
        )
        retokenised = tuple(j for j, guide in enumerate(guides) if isinstance(guide, EncoderGuide | RetokenisedGuide))
        search = None if method.search is None else method.make_search(search_options or {})
        return cls(decoder, max_new_tokens, retokenised, search, judges)

    @classmethod
    def of(cls, models: Models, guides: tuple[Guide, ...], settings: Settings) -> "DecodingProgram":
        """The program of these models with these settings."""
        return cls.assemble(
            models.lm,
            guides,
            settings.method,
            settings.k,
            settings.max_new_tokens,
            top_p=settings.top_p,
            eos_ids=models.eos_ids,
            pad_id=models.pad_id,
            keeps_candidates=settings.trace == "candidates",
            search_options=dict(settings.search),
            may_keep_rest=settings.shape is not None,
            alternatives=settings.alternatives,
        )

    @property
    def bare(self) -> "DecodingProgram":
        """The program for requests whose settings say that they take bare steps; it has the same states."""
        return self._replace(decoder=self.decoder.bare)

    @property
    def guides(self) -> tuple[Guide, ...]:
        """The guides that were assembled, judges among them."""
        return self.judges or self.decoder.guides

    def __call__(self, *arguments: Any) -> tuple[Decoded | Found, tuple[Int[Array, ""], ...]]:
        """Decodes a batch. The arguments are the parameters of the language model and of each guide or judge, the
        prompts, their lengths, keys, `RowSettings`, and each guide's own prompts (see `decode`).

        Returns the answers, and the longest answer of each guide in `retokenised`, in that guide's tokens.
        """
        return run_batch(self, *arguments)

    def lower(self, *arguments: Any) -> jax.stages.Lowered:
        """Lowers the program for arguments of these shapes, ready to be compiled."""
        return run_batch.lower(self, *arguments)


class Programs:
    """Functions, compiled once for each shape of their arguments. They are compiled before they run, so that times have
    no compiling in them."""

    def __init__(self) -> None:
        self._compiled: dict[Any, Callable[..., Any]] = {}

    def __call__(self, function: Any, static: tuple[Any, ...], *arguments: Any) -> tuple[Any, float]:
        """Calls a jitted function; its first arguments are static. Returns its result when it is there, and the seconds
        that it took."""
        arrays, structure = jax.tree.flatten(arguments)
        shapes = function, static, structure, *((x.shape, x.dtype) for x in arrays)
        if shapes not in self._compiled:
            with warnings.catch_warnings():
                # A state that grows cannot be updated in place.
                warnings.filterwarnings("ignore", "Some donated buffers were not usable")
                self._compiled[shapes] = function.lower(*static, *arguments).compile()
        began = time.perf_counter()
        with input_errors_of_callbacks():
            result = jax.block_until_ready(self._compiled[shapes](*arguments))
        return result, time.perf_counter() - began

    def count(self, function: Any) -> int:
        """The number of shapes that a function was compiled for."""
        return sum(shapes[0] is function for shapes in self._compiled)


@contextmanager
def input_errors_of_callbacks() -> Iterator[None]:
    """Raises the InputError of a host callback as itself, because XLA only passes on its text."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        found = re.search(r"InputError: (.*)", str(error))
        if found is None:
            raise
        raise InputError(found[1]) from error


@partial(jax.jit, static_argnums=0)
def run_batch(
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
