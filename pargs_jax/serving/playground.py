"""The page that tries guidance out: self-contained, and served at `/` (docs/serving.md)."""

from typing import Any

from pargs_jax.decoding.methods import Method
from pargs_jax.pages import Page, make_page
from pargs_jax.serving.service import Service

_SUMS = ("autoregressive", "preference", "ratio")
"""The kinds of reward models whose rewards of tokens add up to that of the answer."""


def playground_page(service: Service) -> Page:
    """The page."""
    is_by_preference = service.method.reward_model == "preference"
    served = {
        "name": service.name,
        "guides": service.guides,
        "adds_up": service.method.reward_model in _SUMS,
        "objectives": service.session.reward_models[0].model.lora.objectives if is_by_preference else 0,
        "methods": [_method(service, name, method) for name, method in service.methods.items()],
        "usual_method": next(name for name, each in service.methods.items() if each is service.method),
        "max_new_tokens": service.max_new_tokens,
        "eos_ids": service.session.tokenizer.eos_ids,
    }
    return make_page("playground", served, policy="connect-src 'self'; img-src data:; frame-ancestors 'none'; ")


def _method(service: Service, name: str, method: Method) -> dict[str, Any]:
    """A method as the page offers it: its usual numbers, and null for options that it does not have here."""
    most = service.limits.k
    has_k = most is not None and "k" not in method.unused
    return {
        "name": name,
        "source": method.source,
        "score": method.score,
        "guided": method.guided,
        "weight": method.weight if method.guided else None,
        "k": min(method.k, most) if has_k else None,
        "most_k": most if has_k else None,
        "temperature": method.temperature if method.draws == "sample" else None,
        "top_p": method.top_p,
    }
