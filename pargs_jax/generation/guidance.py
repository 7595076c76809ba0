"""How the reward models of a session guide a method: how many it needs, and which kind each one must be."""

from collections.abc import Sequence

from pargs_jax.decoding.methods import Method
from pargs_jax.errors import InputError
from pargs_jax.generation.reward_models import RewardModel, Role
from pargs_jax.models.hf import stored_head

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


def guide_names(method: Method, reward_models: Sequence[RewardModel]) -> tuple[str, ...]:
    """The names of an answer's rewards: one for each number."""
    sources = [model.source for model in reward_models]
    if method.reward_model == "ratio":
        return tuple(f"{tuned} - {ref}" for tuned, ref in zip(sources[::2], sources[1::2], strict=True))
    if method.reward_model == "look_ahead":
        return (sources[1],)
    return tuple(sources)


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
