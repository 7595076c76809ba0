"""What scores candidates: the contract that every guide keeps, and the guides."""

from pargs_jax.decoding.guides.causal import CausalGuide
from pargs_jax.decoding.guides.contract import Guide, Prompts
from pargs_jax.decoding.guides.retokenised import EncoderGuide, RetokenisedGuide

__all__ = ["CausalGuide", "EncoderGuide", "Guide", "Prompts", "RetokenisedGuide"]
