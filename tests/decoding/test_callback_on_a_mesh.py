"""The host callback of retokenised guides on a mesh: each device's rows are a call of their own."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from pargs_jax.decoding.guides import Capacity, Chosen, Prompts, RetokenisedGuide, Text
from pargs_jax.mesh import make_mesh
from pargs_jax.models.causal import shift_left
from pargs_jax.testing import tiny_model, tiny_tokenizer
from pargs_jax.text.retokenisation import Retokeniser

TEXTS = ("Hi", "My lamp broke.", "", "Thank you.", "a b c", "It is late", "No", "Yes, Eva")


class Noted(Retokeniser):
    """Notes the rows of each call."""

    def __init__(self, *tokenizers):
        super().__init__(*tokenizers)
        self.rows_of_calls = []

    def candidates(self, prompts, *rest):
        self.rows_of_calls.append(len(prompts))
        return super().candidates(prompts, *rest)


def test_each_device_sends_its_own_rows():
    tokenizer = tiny_tokenizer()
    noted = Noted(tokenizer, tokenizer)
    model, params = tiny_model("llama", "reward", vocab_size=tokenizer.vocab_size)
    guide = RetokenisedGuide(model, noted, 32)
    ids = [tokenizer.encode_prompt(text) for text in TEXTS]
    prompts = np.zeros((8, 16), np.int32)
    for row, prompt in enumerate(ids):
        prompts[row, 16 - len(prompt) :] = prompt
    lengths = np.array(list(map(len, ids)), np.int32)
    candidates = np.random.default_rng(0).integers(3, tokenizer.vocab_size, (8, 3)).astype(np.int32)
    choice = np.zeros(8, np.int32)

    def run(params, prompts, lengths, candidates, choice):
        read = Prompts(prompts, lengths)
        tokens = jnp.pad(shift_left(prompts, lengths), ((0, 0), (0, 4)))
        text = Text(tokens, lengths, lengths)
        state = guide.prefill(params, read, Capacity(4, 3), read)
        first, pending = guide.score(params, state, text, candidates)
        token = candidates[:, 0]
        state = guide.commit(params, state, pending, Chosen(token, choice, jnp.ones(8, bool)))
        text = Text(tokens.at[jnp.arange(8), lengths].set(token), lengths, lengths + 1)
        return first, guide.score(params, state, text, candidates[:, ::-1])[0]

    alone = jax.block_until_ready(jax.jit(run)(params, prompts, lengths, candidates, choice))
    assert set(noted.rows_of_calls) == {8}
    noted.rows_of_calls.clear()
    mesh = make_mesh("cpu-4,data=4", "decode")
    with jax.set_mesh(mesh):
        by_row = NamedSharding(mesh, PartitionSpec("data"))
        rows = [jax.device_put(x, by_row) for x in (prompts, lengths, candidates, choice)]
        sharded = jax.block_until_ready(jax.jit(run)(params, *rows))  # callbacks end before the results are there
    assert set(noted.rows_of_calls) == {2} and len(noted.rows_of_calls) == 8, noted.rows_of_calls
    for one, other in zip(alone, sharded, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
