"""A search as one compiled call."""

from functools import partial

import jax

from pargs_jax.decoding.search.rows import Found, Searcher, SearchInputs, SearchMethod
from pargs_jax.sharding import on_every_device


@partial(jax.jit, static_argnames=("method", "searcher", "max_new_tokens"))
def search(method: SearchMethod, searcher: Searcher, inputs: SearchInputs, max_new_tokens: int) -> Found:
    """Answers a batch of prompts by a search method in one compiled call.

    Args:
        method: `BestOfN`, `ChunkBeam`, `Cards`, `SpeculativeRejection` or `TwistedSmc`.
        searcher: draws tokens and judges texts.
        inputs: parameters, prompts, keys and settings of the rows.
        max_new_tokens: the longest answer of all rows, its end-of-sequence token included.

    Raises InputError if the method lacks something that it needs, such as a judge.
    """
    return on_every_device(method(searcher, inputs, max_new_tokens))
