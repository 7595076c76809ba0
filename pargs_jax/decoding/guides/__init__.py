"""What scores tokens: the contracts that guides keep, and the guides."""

from pargs_jax.decoding.guides.causal import CausalGuide
from pargs_jax.decoding.guides.contract import (
    CandidateGuide,
    Capacity,
    Chosen,
    Guide,
    Judge,
    Prompts,
    Text,
    VocabularyGuide,
)
from pargs_jax.decoding.guides.retokenised import EncoderGuide, RetokenisedGuide

__all__ = [
    "CandidateGuide",
    "Capacity",
    "CausalGuide",
    "Chosen",
    "EncoderGuide",
    "Guide",
    "Judge",
    "Prompts",
    "RetokenisedGuide",
    "Text",
    "VocabularyGuide",
]
