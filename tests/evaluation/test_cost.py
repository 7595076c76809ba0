import pytest

from pargs_jax.evaluation.cost import layer_weights, step_operations
from pargs_jax.models.causal import CausalModel
from pargs_jax.models.deberta import DebertaConfig
from pargs_jax.models.encoder import EncoderModel
from pargs_jax.models.gpt2 import GPT2Config
from pargs_jax.models.prefix_causal import PrefixCausalModel

GPT2_LARGE = CausalModel(GPT2Config(width=1280, layers=36, heads=20, feedforward=5120))
LARGE = DebertaConfig(width=1024, layers=24, heads=16, feedforward=4096)


def test_weights_are_those_of_the_papers_formula():
    assert layer_weights(GPT2_LARGE) == 12 * 36 * 1280**2
    assert layer_weights(EncoderModel(LARGE)) == 12 * 24 * 1024**2


def test_a_cached_guide_costs_what_the_paper_says_and_an_encoder_the_texts_length_times_more():
    cached = step_operations(GPT2_LARGE, PrefixCausalModel(LARGE), text=1)
    # 4.3 in section 5.3, which leaves out attention and the vocabulary's logits.
    assert cached.guide / (2 * layer_weights(GPT2_LARGE)) == pytest.approx(4.27, abs=0.01)
    read_again = step_operations(GPT2_LARGE, EncoderModel(LARGE), text=511)
    cached = step_operations(GPT2_LARGE, PrefixCausalModel(LARGE), text=511)
    assert read_again.guide == 512 * cached.guide
    assert read_again.overhead == pytest.approx(512 * cached.overhead)
