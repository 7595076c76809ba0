"""The host callback of retokenised guides on a mesh: each device's rows are a call of their own."""

import os
import subprocess
import sys

SCRIPT = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from pargs_jax.text.retokenisation import Retokeniser
from pargs_jax.decoding.guides import Capacity, Chosen, Prompts, RetokenisedGuide, Text
from pargs_jax.mesh import make_mesh
from pargs_jax.models.causal import shift_left
from pargs_jax.testing import tiny_model, tiny_tokenizer

assert len(jax.devices()) == 4
tokenizer = tiny_tokenizer()
rows_of_calls = []


class Noted(Retokeniser):
    def candidates(self, prompts, *rest):
        rows_of_calls.append(len(prompts))
        return super().candidates(prompts, *rest)


model, params = tiny_model("llama", "reward", vocab_size=tiny_tokenizer().vocab_size)
guide = RetokenisedGuide(model, Noted(tokenizer, tokenizer), 32)
texts = ["Hi", "My lamp broke.", "", "Thank you.", "a b c", "It is late", "No", "Yes, Eva"]
ids = [tokenizer.encode_prompt(text) for text in texts]
prompts = np.zeros((8, 16), np.int32)
for row, prompt in enumerate(ids):
    prompts[row, 16 - len(prompt):] = prompt
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
assert set(rows_of_calls) == {8}
rows_of_calls.clear()
mesh = make_mesh("cpu-4,data=4", "decode")
with jax.set_mesh(mesh):
    by_row = NamedSharding(mesh, PartitionSpec("data"))
    rows = [jax.device_put(x, by_row) for x in (prompts, lengths, candidates, choice)]
    sharded = jax.block_until_ready(jax.jit(run)(params, *rows))  # callbacks end before the results are there
assert set(rows_of_calls) == {2} and len(rows_of_calls) == 8, rows_of_calls
for one, other in zip(alone, sharded):
    np.testing.assert_allclose(one, other, atol=1e-5)
"""


def test_each_device_sends_its_own_rows():
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
