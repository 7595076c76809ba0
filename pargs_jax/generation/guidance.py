"""How the reward models of a session guide a method: which kind each one must be, and the guides they make."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from pargs_jax.decoding.guides import (
    Guide,
    LookAheadGuide,
    PreferredPrompts,
    Prompts,
    RatioGuide,
    SimilarityGuide,
)
from pargs_jax.decoding.methods import Method
from pargs_jax.errors import InputError
from pargs_jax.generation.reward_models import RewardModel, Role
from pargs_jax.models.causal import CausalModel
from pargs_jax.models.hf import stored_head
from pargs_jax.models.model import Params

_HEADS = {"reward": "a scalar reward head", "table": "a table of rewards for its head"}


def count_guides(method: Method, reward_models: int) -> int:
    """The number of guides that this many reward models make for a method; each guide has a weight.

    Raises InputError if the method needs a different number of reward models.
    """
    if method.draws == "contrastive":
        return 1
    if not method.guided:
        return 0
    if not reward_models:
        raise InputError(f"{method.source}: needs {_needed(method)}")
    if method.reward_model == "ratio" and reward_models % 2:
        raise InputError(f"{method.source}: needs {_needed(method)}, got {reward_models}")
    if method.reward_model == "preference" and reward_models != 1:
        raise InputError(f"{method.source}: needs {_needed(method)}, got {reward_models}")
    if method.reward_model == "look_ahead" and reward_models not in (2, 3):
        raise InputError(f"{method.source}: needs {_needed(method)}, got {reward_models}")
    return {"ratio": reward_models // 2, "look_ahead": 1}.get(method.reward_model, reward_models)


def roles_of(method: Method | None, sources: Sequence[str]) -> tuple[Role, ...]:
    """The role of each reward model in a method, from their configs alone. `method` is None if no method is given.

    Raises InputError for a model that cannot guide the method, and for a wrong number of models.
    """
    if method is None or not method.guided:
        return ("scalar",) * len(sources)
    count_guides(method, len(sources))
    kind = method.reward_model
    if kind == "full":
        return ("scalar",) * len(sources)
    if kind == "partial":
        return tuple(_scalar_or_table(method, source) for source in sources)
    if kind == "look_ahead":
        _require_language_model(method, sources[0])
        return ("log_probs", *("scalar",) * (len(sources) - 1))
    for source in sources:
        _require_language_model(method, source)
    return ("preference" if kind == "preference" else "log_probs",) * len(sources)


def check_roles(method: Method, reward_models: Sequence[RewardModel]) -> None:
    """Raises InputError for a reward model that was loaded for another kind of method."""
    allowed = {
        None: ("scalar",),
        "full": ("scalar",),
        "partial": ("scalar", "table"),
        "autoregressive": ("log_probs",),
        "ratio": ("log_probs",),
        "preference": ("preference",),
        "look_ahead": ("log_probs", "scalar"),
    }[method.reward_model]
    for model in reward_models:
        if model.role not in allowed:
            raise InputError(f"{model.source}: was loaded for another kind of method, cannot guide {method.source}")


class Guides(NamedTuple):
    """The guides of a batch, with their params and prompts."""

    guides: tuple[Guide, ...]
    params: tuple[Any, ...]
    prompts: tuple[Any, ...]
    """The guides' own prompts, as `decode` takes them."""


def make_guides(
    method: Method,
    lm: tuple[CausalModel, Params],
    reward_models: Sequence[RewardModel],
    own_prompts: Sequence[Prompts],
    lm_prompts: Prompts,
    max_new_tokens: int,
    answer_widths: Sequence[int],
    look_ahead: int,
    preferences: Float[np.ndarray, "B M"] | None,
    eos_ids: tuple[int, ...],
) -> Guides:
    """The guides of a method for a batch of prompts.

    Args:
        method: the method.
        lm: the language model and its parameters.
        reward_models: the session's reward models.
        own_prompts: the prompts in each reward model's tokens.
        lm_prompts: the same prompts in the language model's tokens.
        max_new_tokens: the longest answer.
        answer_widths: the answer width that each reward model's texts need, as far as it is known.
        look_ahead: tokens that an aligned model writes after each candidate.
        preferences: a preference vector for each row, for the method that takes them.
        eos_ids: tokens that end an answer.
    """
    if method.draws == "contrastive":
        return Guides((SimilarityGuide(lm[0]),), (lm[1],), (None,))
    if not method.guided:
        return Guides((), (), ())
    params = tuple(model.params for model in reward_models)
    parts = list(zip(reward_models, own_prompts, strict=True))
    prompts = tuple(model.guide_prompts(own, lm_prompts) for model, own in parts)
    if method.reward_model == "look_ahead":
        aligned, *judges = (model.model for model in reward_models)
        return Guides((LookAheadGuide(aligned, tuple(judges), look_ahead, eos_ids),), (params,), (prompts,))
    guides = tuple(
        model.guide(own, max_new_tokens, answer_width)
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
        return Guides(guides, params, (PreferredPrompts(prompts[0], jnp.asarray(preferences)),))
    return Guides(guides, params, prompts)


def guide_names(method: Method, reward_models: Sequence[RewardModel]) -> tuple[str, ...]:
    """The names of an answer's rewards: one for each number."""
    sources = [model.source for model in reward_models]
    if method.reward_model == "ratio":
        return tuple(f"{tuned} - {ref}" for tuned, ref in zip(sources[::2], sources[1::2], strict=True))
    if method.reward_model == "look_ahead":
        return (sources[1],)
    return tuple(sources)


class TokensRead(NamedTuple):
    """Tokens read for an answer and its prompt: by the language model, and by all reward models together. A step that
    scores k candidates reads k. Nobody reads the last token of an answer.

    Answer tokens are counted in the language model's tokens, even where a reward model has its own tokenizer. A reward
    model without a cache reads the whole text again for every candidate.
    """

    lm: int
    rm: int


def tokens_read(
    method: Method,
    reward_models: Sequence[RewardModel],
    prompt: int,
    own_prompts: Sequence[int],
    answer: int,
    candidates: int,
    look_ahead: int,
) -> TokensRead:
    """Counts the tokens read for an answer.

    Args:
        method, reward_models: those that decoded it.
        prompt, own_prompts: tokens of the prompt, in the language model's tokens and in each reward model's.
        answer: tokens of the answer.
        candidates: the number of candidates in each step.
        look_ahead: tokens that an aligned model writes after each candidate.
    """
    lm = prompt - 1 + answer
    if method.draws == "contrastive":
        lm += prompt + candidates * answer
    if not method.guided:
        return TokensRead(lm, sum(own + answer for own in own_prompts))
    if method.reward_model == "look_ahead":
        aligned, *judges = own_prompts
        ahead = aligned + answer * candidates * look_ahead
        return TokensRead(lm, ahead + sum(own + answer * candidates * (look_ahead + 1) for own in judges))
    parts = zip(reward_models, own_prompts, strict=True)
    return TokensRead(lm, sum(model.tokens_read(own, answer, candidates) for model, own in parts))


def _needed(method: Method) -> str:
    return {
        "full": "a reward model",
        "partial": "a reward model",
        "autoregressive": "an autoregressive reward model, or several",
        "preference": "one reward model that takes a preference vector",
        "ratio": "pairs of language models: tuned, reference",
        "look_ahead": "an aligned language model, then a reward model, then a second one for indirect transfer",
    }[method.reward_model]


def _scalar_or_table(method: Method, source: str) -> Role:
    head = stored_head(source)
    # Judging by their configs, FaRMA's published reward models are ordinary language models.
    is_unmarked_table = head == "vocabulary" and method.candidates == "top_k_of_sum"
    return "table" if head == "table" or is_unmarked_table else "scalar"


def _require_language_model(method: Method, source: str) -> None:
    head = stored_head(source)
    if head in _HEADS:
        raise InputError(f"{source}: has {_HEADS[head]}; {method.source} needs {_needed(method)}")
