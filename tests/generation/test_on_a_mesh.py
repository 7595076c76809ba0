"""Four devices give the same answers as one, however arrays are sharded."""

import dataclasses
from functools import lru_cache

import jax
import pytest

from pargs_jax.data.preferences import Prompt
from pargs_jax.decoding.methods import METHODS
from pargs_jax.generation.session import Session, Settings
from pargs_jax.mesh import make_mesh
from pargs_jax.models.encoder import EncoderModel
from pargs_jax.models.hf import save_model
from pargs_jax.models.modernbert import ModernBertModel
from pargs_jax.models.prefix_causal import PrefixCausalModel
from pargs_jax.testing import TINY_CONFIGS, TINY_DEBERTA, TINY_MODERNBERT, random_params, tiny_tokenizer

# Three samples of three prompts in four rows, so that rows are filled again, on a mesh with four copies of the model
# once with filler.
PROMPTS = [Prompt(str(i), text) for i, text in enumerate(("Hi", "My lamp broke. What now?", ""))]
GUIDES = {"llama": ("gpt2", "prefix_causal"), "gpt2": ("full",), "opt": ("opt", "modernbert"), "gpt_neox": ("gemma3",)}


@pytest.fixture(scope="module")
def folders(save_tiny, tmp_path_factory):
    """Folders of a language model, and of its reward models, by family."""

    def reward_model(kind):
        if kind in TINY_CONFIGS:
            return save_tiny("reward", family=kind, seed=1)
        size = tiny_tokenizer().vocab_size
        if kind == "modernbert":
            model = ModernBertModel(dataclasses.replace(TINY_MODERNBERT, vocab_size=size, context_length=512))
        else:
            config = dataclasses.replace(TINY_DEBERTA, vocab_size=size, attention=kind)
            model = (EncoderModel if kind == "full" else PrefixCausalModel)(config)
        folder = tmp_path_factory.mktemp(kind)
        save_model(folder, model, random_params(model))
        tiny_tokenizer().save(folder)
        return str(folder)

    return lru_cache(
        lambda family: (save_tiny("vocabulary", family=family), [reward_model(kind) for kind in GUIDES[family]])
    )


@pytest.fixture(scope="module")
def answers(folders):
    @lru_cache
    def answer(family, mesh):
        with jax.set_mesh(make_mesh(mesh, "decode")):
            session = Session(*folders(family))
            settings = Settings(METHODS["pargs"], max_new_tokens=8, temperature=3.0, n=3, batch_size=4)
            found = (answer for batch in session.answer(PROMPTS, settings) for answer in batch)
            return {(answer.id, answer.sample): answer for answer in found}

    return answer


@pytest.mark.parametrize(
    ("family", "mesh"),
    [
        ("llama", "cpu-4"),  # along tensor
        ("llama", "cpu-4,fsdp=4"),
        ("llama", "cpu-4,data=2,tensor=2"),
        ("gpt2", "cpu-4,data=2,tensor=2"),
        ("opt", "cpu-4,fsdp=2,tensor=2"),
        ("gpt_neox", "cpu-4,fsdp=2,tensor=2"),
    ],
)
def test_four_devices_equal_one(answers, family, mesh):
    expected, found = answers(family, "cpu-1"), answers(family, mesh)
    assert found.keys() == expected.keys() == {(prompt, sample) for prompt in "012" for sample in range(3)}
    for key, answer in expected.items():
        assert found[key].response == answer.response
        assert found[key].tokens == answer.tokens
        assert found[key].guide_rewards == pytest.approx(answer.guide_rewards, abs=1e-4)
        assert found[key].log_probability == pytest.approx(answer.log_probability, abs=1e-3)
