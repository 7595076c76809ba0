"""Rotary angles against transformers, and what config.json may say about them."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from pargs_jax.errors import InputError, InputWarning
from pargs_jax.models.llama import LlamaConfig as OurConfig
from pargs_jax.models.rotary import Rotary, rotate

pytestmark = pytest.mark.filterwarnings("ignore:.*rotates all tokens anew")
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5],
    "long_factor": [4, 5, 6, 7, 8, 9, 10, 11],
    "original_max_position_embeddings": 32,
}
PROPORTIONAL = {"rope_type": "proportional", "rope_theta": 100.0}
TRAINED_LENGTH = 64
# (rope_parameters, head width, longest position): every branch of every scaling.
CASES = {
    "default": ({"rope_type": "default", "rope_theta": 500.0}, 8, 40),
    "linear": ({"rope_type": "linear", "factor": 4.0}, 16, 63),
    "dynamic, within the trained length": ({"rope_type": "dynamic", "factor": 4.0}, 16, 63),
    "dynamic, one beyond": ({"rope_type": "dynamic", "factor": 4.0}, 16, 64),
    "dynamic, far beyond": ({"rope_type": "dynamic", "factor": 4.0}, 16, 200),
    "llama3": (LLAMA3, 128, 200),
    "llama3, small": ({**LLAMA3, "original_max_position_embeddings": 32}, 16, 100),
    "yarn": (YARN, 64, 200),
    "yarn, real sizes": ({**YARN, "factor": 32.0, "original_max_position_embeddings": 4096}, 128, 200),
    "yarn, not truncated": ({**YARN, "truncate": False}, 64, 100),
    "yarn, betas": ({**YARN, "beta_fast": 16.0, "beta_slow": 2.0}, 64, 100),
    "yarn, attention factor": ({**YARN, "attention_factor": 0.75}, 16, 100),
    "yarn, mscale": ({**YARN, "mscale": 1.5, "mscale_all_dim": 0.5}, 16, 100),
    "yarn, mscale alone counts for nothing": ({**YARN, "mscale": 1.5}, 16, 100),
    "yarn, no stretch": ({**YARN, "factor": 1.0}, 16, 60),
    "yarn, the ratio of lengths for a factor": (
        {**YARN, "factor": None, "original_max_position_embeddings": 8},
        16,
        60,
    ),
    "yarn, not truncated by null": ({**YARN, "truncate": None}, 64, 100),
    "yarn, an empty range": ({**YARN, "original_max_position_embeddings": 6}, 16, 60),
    "yarn, a range upside down": ({**YARN, "beta_fast": 1.0, "beta_slow": 8.0, "truncate": False}, 64, 60),
    "longrope, within the first length": (LONGROPE, 16, 31),
    "longrope, one beyond": (LONGROPE, 16, 32),
    "longrope, factor": ({**LONGROPE, "factor": 8.0}, 16, 100),
    "longrope, no stretch": ({**LONGROPE, "factor": 0.5}, 16, 100),
    "longrope, attention factor": ({**LONGROPE, "attention_factor": 0.75}, 16, 100),
    "proportional": (PROPORTIONAL, 16, 40),
    "proportional, factor": ({**PROPORTIONAL, "factor": 3.0}, 16, 40),
    "proportional, a part": ({**PROPORTIONAL, "partial_rotary_factor": 0.7}, 16, 40),
    "yarn, a narrow range": ({**YARN, "beta_fast": 1.0001, "beta_slow": 1.0, "truncate": False}, 64, 60),
}


@pytest.mark.parametrize("case", CASES)
def test_angles_equal_transformers(case):
    torch = pytest.importorskip("torch", reason="the reference is transformers on torch")
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    parameters, head_dim, last = CASES[case]
    config = LlamaConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        max_position_embeddings=TRAINED_LENGTH,
        rope_parameters=dict(parameters),
    )
    positions = np.arange(last + 1)[None]
    reference = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.tensor(positions))

    rotary = Rotary.from_hf(config.rope_parameters, head_dim)
    ours = rotary.cos_sin(jnp.asarray(positions), head_dim, TRAINED_LENGTH)
    for mine, theirs in zip(ours, reference, strict=True):
        # Half the width: the reference repeats every angle for the second half. fp32 angles are good to 1e-7 of 200.
        np.testing.assert_allclose(mine, theirs[..., : head_dim // 2], rtol=0, atol=5e-5)


@pytest.mark.parametrize("parameters", [YARN, LLAMA3, {"rope_type": "linear", "factor": 2.0}])
@pytest.mark.parametrize("beside", [{}, {"original_max_position_embeddings": 16}, {"rope_theta": 77.0}])
def test_fields_beside_rope_parameters_count_as_in_transformers(parameters, beside, tmp_path):
    torch = pytest.importorskip("torch", reason="the reference is transformers on torch")
    from transformers import AutoConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    sizes = {"hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": TRAINED_LENGTH}
    config = AutoConfig.for_model("llama", **sizes, **beside, rope_parameters=dict(parameters))
    rotary = OurConfig.from_hf(config).rotary
    positions = np.arange(TRAINED_LENGTH)[None]
    reference = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.tensor(positions))
    for mine, theirs in zip(rotary.cos_sin(jnp.asarray(positions), 16, TRAINED_LENGTH), reference, strict=True):
        np.testing.assert_allclose(mine, theirs[..., :8], rtol=0, atol=5e-5)
    # What is written says the same in one place.
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **OurConfig.from_hf(config).to_hf()}))
    assert OurConfig.from_hf(AutoConfig.from_pretrained(tmp_path)).rotary == rotary


def test_numbers_that_a_scaling_does_not_use_are_named():
    with pytest.warns(InputWarning, match="rope_parameters has low_freq_factor, which RoPE scaling 'linear' does not"):
        rotary = Rotary.from_hf({"rope_type": "linear", "factor": 2.0, "low_freq_factor": 1.0}, 16)
    assert rotary == Rotary(10000.0, "linear", (("factor", 2.0),))


def test_dynamic_scaling_follows_each_row_of_a_batch():
    with pytest.warns(InputWarning, match="'dynamic' rotates all tokens anew .* answers that cross this length"):
        rotary = Rotary.from_hf({"rope_type": "dynamic", "factor": 4.0}, 16)
    short, long = np.arange(12), np.arange(12) + 8
    together, _ = rotary.cos_sin(jnp.asarray([short, long]), 16, 16)
    for row, positions in enumerate((short, long)):
        alone, _ = rotary.cos_sin(jnp.asarray([positions]), 16, 16)
        np.testing.assert_array_equal(together[row], alone[0])
    unscaled, _ = Rotary().cos_sin(jnp.asarray([short, long]), 16, 16)
    np.testing.assert_allclose(together[0], unscaled[0], rtol=0, atol=1e-6)
    assert np.abs(together[1] - unscaled[1]).max() > 0.01


def test_scores_depend_on_distance_alone_and_lengths_stay():
    query, key = np.random.default_rng(0).normal(size=(2, 1, 1, 1, 16))

    def turned(vector, position):
        angles = Rotary().cos_sin(jnp.asarray([[position]]), 16, 64)
        return np.asarray(rotate(jnp.asarray(vector, jnp.float32), angles)).ravel()

    near, far = (turned(query, shift + 5) @ turned(key, shift) for shift in (0, 20))
    assert near == pytest.approx(far, abs=1e-4)
    assert near != pytest.approx(turned(query, 6) @ turned(key, 0), abs=1e-2)
    assert np.linalg.norm(turned(query, 17)) == pytest.approx(np.linalg.norm(query), abs=1e-5)


def test_a_part_of_each_head_stays_as_it_is():
    rotary = Rotary.from_hf({"rope_type": "default", "partial_rotary_factor": 0.25}, 16, may_be_partial=True)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 1, 5, 16)), jnp.float32)
    angles = rotary.cos_sin(jnp.arange(5)[None], 16, 64)
    np.testing.assert_array_equal(rotate(x, angles)[..., 4:], x[..., 4:])
    np.testing.assert_allclose(
        rotate(x, angles)[..., :4], rotate(x[..., :4], Rotary().cos_sin(jnp.arange(5)[None], 4, 64))
    )
    with pytest.raises(InputError, match=r"head_dim is 16 with partial_rotary_factor 0.2, which rotary positions"):
        Rotary.from_hf({"rope_type": "default", "partial_rotary_factor": 0.2}, 16, may_be_partial=True)


def test_rotation_keeps_the_dtype():
    angles = Rotary().cos_sin(jnp.arange(3)[None], 4, 8)
    assert rotate(jnp.ones((1, 2, 3, 4), jnp.bfloat16), angles).dtype == jnp.bfloat16
    assert angles[0].dtype == angles[1].dtype == jnp.float32


@pytest.mark.parametrize(
    "parameters",
    [
        LLAMA3,
        YARN,
        LONGROPE,
        {**PROPORTIONAL, "partial_rotary_factor": 0.5},
        {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 100.0},
    ],
)
def test_config_fields_come_back(parameters):
    assert Rotary.from_hf(parameters, 16).to_hf() == {"rope_theta": 10000.0, **parameters}


def test_the_older_name_of_the_scaling_is_read():
    assert Rotary.from_hf({"type": "linear", "factor": 2.0, "attention_factor": None}, 16) == Rotary(
        10000.0, "linear", (("factor", 2.0),)
    )


def test_only_dynamic_scaling_reaches_beyond_the_trained_length():
    assert Rotary.from_hf({"rope_type": "dynamic", "factor": 2.5}, 16).reach(100) == 250
    assert Rotary.from_hf(YARN, 16).reach(100) == 100


@pytest.mark.parametrize(
    ("parameters", "told"),
    [
        (
            {"rope_type": "axial"},
            "'axial' is not known; known are default, linear, dynamic, llama3, yarn, longrope, prop",
        ),
        ({"rope_type": "llama3", "factor": 8.0}, "needs low_freq_factor, high_freq_factor, original_max_position"),
        ({"rope_type": "linear", "factor": None}, "needs factor"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5, must be 1 for this"),
        (
            {**PROPORTIONAL, "partial_rotary_factor": 1.5},
            "partial_rotary_factor is 1.5, must be a number above 0 and at",
        ),
        ({**PROPORTIONAL, "partial_rotary_factor": "1"}, "partial_rotary_factor is '1', must be a number above 0"),
        ({**PROPORTIONAL, "factor": 0}, "factor is 0 in rope_parameters, must be a number above 0"),
        ({**LONGROPE, "short_factor": [1.0]}, "short_factor must be a list of 8 numbers above 0"),
        ({**LONGROPE, "long_factor": [0.0] * 8}, "long_factor must be a list of 8 numbers above 0"),
        ({**LONGROPE, "long_factor": 2.0}, "long_factor must be a list of 8 numbers above 0"),
        ({**LONGROPE, "original_max_position_embeddings": 1}, "must be greater than 1 with RoPE scaling 'longrope'"),
        ({"rope_type": "yarn", "original_max_position_embeddings": 8}, "RoPE scaling 'yarn' needs factor"),
        ({"rope_type": None}, "RoPE scaling None is not known"),
        ({"full_attention": {"rope_type": "default"}}, "rope_parameters has full_attention: scaling of single layers"),
        ({"rope_type": "linear", "factor": 0}, "factor is 0 in rope_parameters, must be a number above 0"),
        ({"rope_type": "linear", "factor": "2"}, "factor is '2' in rope_parameters"),
        ({"rope_type": "default", "rope_theta": None}, "rope_theta is None in rope_parameters"),
        ({**LLAMA3, "low_freq_factor": 4.0}, "high_freq_factor must be greater than low_freq_factor"),
        ({**YARN, "rope_theta": 1.0}, "rope_theta must not be 1 with RoPE scaling 'yarn'"),
        ({**YARN, "attention_factor": -1.0}, "attention_factor is -1.0 in rope_parameters"),
    ],
)
def test_scalings_that_cannot_be_used_are_named(parameters, told):
    with pytest.raises(InputError, match=told) as error:
        Rotary.from_hf(parameters, 16)
    assert "\n" not in str(error.value)
