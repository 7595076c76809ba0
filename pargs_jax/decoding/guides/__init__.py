"""Guides score tokens. This package holds their contracts and the guides themselves."""

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
from pargs_jax.decoding.guides.look_ahead import LookAheadGuide
from pargs_jax.decoding.guides.next_token import (
    AutoregressiveGuide,
    NextTokenGuide,
    PreferenceGuide,
    PreferredPrompts,
    RatioGuide,
)
from pargs_jax.decoding.guides.retokenised import EncoderGuide, RetokenisedGuide
from pargs_jax.decoding.guides.similarity import SimilarityGuide
