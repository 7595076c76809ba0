"""Search: methods that draw several continuations of a prompt, judge them, and continue the better ones."""

from pargs_jax.decoding.search.best_of_n import BestOfN
from pargs_jax.decoding.search.cards import Cards
from pargs_jax.decoding.search.chunk_beam import ChunkBeam
from pargs_jax.decoding.search.order_statistics import best_of_n_curve
from pargs_jax.decoding.search.rows import Found, Searcher, SearchInputs, SearchMethod, Tokens, search
from pargs_jax.decoding.search.smc import TwistedSmc
from pargs_jax.decoding.search.speculative_rejection import SpeculativeRejection

SEARCHES: dict[str, type[SearchMethod]] = {
    "best_of_n": BestOfN,
    "chunk_beam": ChunkBeam,
    "cards": Cards,
    "speculative_rejection": SpeculativeRejection,
    "smc": TwistedSmc,
}
"""The searches that a method's `search` can name."""
