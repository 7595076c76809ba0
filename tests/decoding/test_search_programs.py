"""Compiled search programs: what they do with caches."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pargs_jax.aot.hlo import parse_module
from pargs_jax.decoding.guides import CausalGuide
from pargs_jax.decoding.loop import Decoder, row_keys
from pargs_jax.decoding.proposals import TopK
from pargs_jax.decoding.search import Cards, Searcher, SearchInputs, TwistedSmc, search
from pargs_jax.decoding.search.rows import sources_of
from pargs_jax.decoding.state import RowSettings
from pargs_jax.mesh import make_mesh
from pargs_jax.models.cache import Cache, copy_rows
from pargs_jax.models.model import unstack_layers
from pargs_jax.testing import tiny_model

ROWS, PARTICLES, STEPS = 3, 5, 6
SLOTS = "64,8]"  # the end of a cache's shape, which no other array has


def compiled(method, *, guided):
    lm, lm_params = unstack_layers(*tiny_model("gpt2"))
    rm, rm_params = unstack_layers(*tiny_model("llama", "reward"))
    guide = CausalGuide(rm)
    searcher = Searcher(Decoder(lm, (guide,) * guided, TopK(4), eos_ids=(2,)), (guide,) * (not guided))
    settings = RowSettings.alike(ROWS, weights=[1.0] * guided, candidates=4, max_new_tokens=STEPS)
    prompts, lengths = np.full((ROWS, 8), 7, np.int32), np.full(ROWS, 8, np.int32)
    given = SearchInputs(
        (lm_params, (rm_params,) * guided), (rm_params,) * (not guided), prompts, lengths,
        row_keys(0, jnp.arange(ROWS)), settings, jnp.ones((ROWS, 1 - guided)),
    )  # fmt: skip
    return parse_module(search.lower(method, searcher, given, STEPS).compile().as_text())


def of_caches(module, opcode):
    """Shapes of instructions of this kind that make a cache, or rows of one, outside of the entry."""
    loops = [instructions for name, instructions in module.computations.items() if name != module.entry]
    return [
        instruction.shape
        for instructions in loops
        for instruction in instructions.values()
        if instruction.opcode == opcode and SLOTS in instruction.shape
    ]


@pytest.mark.parametrize(("method", "guided"), [(Cards(longest=4), False), (TwistedSmc(PARTICLES), True)])
def test_caches_are_written_in_place(method, guided):
    """Accepting, rewinding and weighting copy no cache. Resampling copies rows, one per prompt at a time."""
    module = compiled(method, guided=guided)
    assert of_caches(module, "copy") == [] == of_caches(module, "transpose")
    assert of_caches(module, "scatter") or of_caches(module, "dynamic-update-slice")  # they are there, and seen
    gathered = of_caches(module, "gather")
    assert bool(gathered) == guided
    # [prompts, 1, ..., heads, slots, width]: as many rows as there are prompts.
    rows = [int(np.prod([int(d) for d in shape.split("[")[1].split("]")[0].split(",")][:-3])) for shape in gathered]
    assert set(rows) <= {ROWS}


@pytest.mark.parametrize("mesh", [None, "cpu-4,data=4", "cpu-4,data=2,tensor=2"])
@pytest.mark.parametrize("prompts", [4, 3])
def test_rows_are_copied_in_place(mesh, prompts):
    """Stacked layers, unrolled ones and plain arrays; the mesh does not divide three prompts."""
    rng, n = np.random.default_rng(prompts), 4
    counts = np.stack([rng.multinomial(n, [0.1, 0.2, 0.3, 0.4]) for _ in range(prompts)])
    sources = np.asarray(sources_of(jnp.asarray(counts)))
    assert [np.bincount(row, minlength=n).tolist() for row in sources] == counts.tolist()
    assert all(row[row[i]] == row[i] for row in sources for i in range(n))  # what others are copied from stays
    rows = prompts * n
    stacked, single, plain = (jnp.asarray(rng.normal(size=s)) for s in ((2, rows, 2, 8, 4), (rows, 2, 8, 4), (rows, 3)))
    tree = {"stacked": Cache(stacked, jnp.arange(rows)), "single": Cache((single,), jnp.arange(rows)), "plain": plain}
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(make_mesh(mesh, "decode")):
        copied = jax.device_get(jax.jit(copy_rows)(tree, sources))
    wanted = (np.arange(prompts)[:, None] * n + sources).ravel()
    np.testing.assert_array_equal(copied["stacked"].kv, stacked[:, wanted])
    np.testing.assert_array_equal(copied["single"].kv[0], single[wanted])
    np.testing.assert_array_equal(copied["plain"], plain[wanted])
    np.testing.assert_array_equal(copied["stacked"].lengths, wanted)
