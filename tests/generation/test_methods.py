"""Every token method from a session: what its reward models have to be, and what its answers say."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pargs_jax.data.preferences import Prompt, load_prompts
from pargs_jax.decoding.methods import METHODS
from pargs_jax.errors import InputError
from pargs_jax.generation.session import Session, Settings
from pargs_jax.models.hf import load_model, save_model, stored_head
from pargs_jax.models.preference_lora import PreferenceLora
from pargs_jax.testing import tiny_model, tiny_tokenizer
from pargs_jax.text.prompts import get_form

TOKENS, K = 4, 3
PROMPTS = [Prompt("a", "Hi"), Prompt("b", "My lamp broke.")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, lm, rm, save_tiny):
    """Model folders, by their content."""

    def save(name, model, params):
        path = tmp_path_factory.mktemp(name)
        save_model(path, model, params, special_tokens={"bos_token_id": 1, "eos_token_id": 2})
        tiny_tokenizer().save(path)
        return str(path)

    model, params = tiny_model("llama", seed=3, vocab_size=tiny_tokenizer().vocab_size)
    conditioned = dataclasses.replace(model, lora=PreferenceLora(2))
    rng = np.random.default_rng(0)

    def fill(path, leaf):
        found = params
        for key in path:
            if key.key == "addition":
                return jnp.asarray(0.5 * rng.standard_normal(leaf.shape), jnp.float32)
            found = found[key.key]
        return found

    full = jax.tree_util.tree_map_with_path(fill, conditioned.abstract_params())
    return {
        "lm": lm,
        "rm": rm,
        "arm": save_tiny("vocabulary", family="gpt2", seed=2),
        "table": save("table", dataclasses.replace(model, head="table"), params),
        "parm": save("parm", conditioned, full),
    }


def answer(folder, method, names, prompts=PROMPTS, **changes):
    session = Session(folder["lm"], [folder[name] for name in names], method=METHODS[method])
    settings = Settings(METHODS[method], **{"max_new_tokens": TOKENS} | changes)
    return {found.id: found for batch in session.answer(prompts, settings) for found in batch}


# What reward models read: tokens of the prompt, and of one step.
CASES = {
    "top_p": ([], {}, 0, 0),
    "contrastive": ([], {"k": K}, 0, 0),
    "rad": (["rm"], {"k": K}, 1, K),
    "farma": (["table"], {"k": K}, 1, 1),
    "cd": (["table"], {}, 1, 1),
    "vas": (["rm"], {"k": K}, 1, K + 1),
    "genarm": (["arm", "lm"], {"weights": (0.5, 1.0)}, 2, 2),
    "parm": (["parm"], {"preference": (0.3, 0.7)}, 1, 1),
    "expert_ratio": (["arm", "lm"], {}, 2, 2),
    "transfer_q": (["arm", "rm"], {"k": K, "look_ahead": 2}, 2, K * (2 + 3)),
}


@pytest.mark.parametrize("name", CASES)
def test_a_method_answers_and_counts_what_was_read(folder, name):
    names, changes, prompts_read, a_step = CASES[name]
    for found in answer(folder, name, names, trace="candidates", **changes).values():
        prompt = len(tiny_tokenizer().encode_prompt(found.prompt))
        second_pass = prompt + K * found.tokens if name == "contrastive" else 0
        assert found.lm_tokens == prompt - 1 + found.tokens + second_pass
        one_less = len(names) if a_step == len(names) else 0  # models that read as the language model does
        assert found.rm_tokens == prompts_read * prompt + a_step * found.tokens - one_less
        assert found.kl >= 0 and len(found.trace.tokens) == found.tokens
        guides = {"genarm": 2}.get(name, int(bool(names)))
        assert (
            len(found.guide_rewards) == len(found.trace.reward_models) == len(found.trace.tokens[0].rewards) == guides
        )
        assert np.isfinite(found.guide_rewards).all()


def test_a_ratio_of_a_model_and_itself_guides_nothing(folder):
    """And neither does an autoregressive reward model at weight 0: all answer as the language model does."""
    plain = answer(folder, "top_p", [], top_p=1.0)
    for found in (answer(folder, "expert_ratio", ["arm", "arm"]), answer(folder, "genarm", ["arm"], weights=(0.0,))):
        assert {key: row.response for key, row in found.items()} == {key: row.response for key, row in plain.items()}
    guided = answer(folder, "genarm", ["arm"], weights=(5.0,))
    assert {row.response for row in guided.values()} != {row.response for row in plain.values()}
    gated = answer(folder, "genarm", ["arm"], weights=(5.0,), gate_entropy=1e9)
    assert {row.response for row in gated.values()} == {row.response for row in plain.values()}


def test_prompts_have_weights_and_preferences_of_their_own(folder, tmp_path):
    rows = [
        {"id": "a", "prompt": "Hi", "weights": [4], "preference": [1, 0]},
        {"id": "b", "prompt": "My lamp broke.", "preference": [0.2, 0.8]},
    ]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = load_prompts(tmp_path / "prompts.jsonl", get_form("plain"))
    mixed = answer(folder, "parm", ["parm"], prompts, weights=(2.0,))
    for prompt, weight in zip(prompts, (4.0, 2.0), strict=True):
        bare = dataclasses.replace(prompt, weights=None, preference=None)
        alone = answer(folder, "parm", ["parm"], [bare], weights=(weight,), preference=prompt.preference)
        assert alone[prompt.id].response == mixed[prompt.id].response
        assert alone[prompt.id].guide_rewards == pytest.approx(mixed[prompt.id].guide_rewards, abs=1e-4)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Hi", "weights": "much"}\n')
    with pytest.raises(InputError, match="line 1: weights: got 'much', must be a list of numbers"):
        load_prompts(tmp_path / "prompts.jsonl", get_form("plain"))


def test_a_saved_model_says_what_its_head_is(folder):
    found = {name: stored_head(folder[name]) for name in ("lm", "rm", "arm", "table", "parm")}
    assert found == {"lm": "vocabulary", "rm": "reward", "arm": "vocabulary", "table": "table", "parm": "vocabulary"}
    model, params = load_model(folder["parm"], "vocabulary")[:2]
    assert model.lora == PreferenceLora(2)
    assert float(jnp.abs(params["backbone"]["layers"]["query"]["addition"]["own_out"]).max()) > 0.1
    with pytest.raises(InputError, match="its head is a table"):
        load_model(folder["table"], "vocabulary")


@pytest.mark.parametrize(
    ("method", "names", "changes", "message"),
    [
        ("genarm", [], {}, r"GenARM .*: needs an autoregressive reward model, or several"),
        ("genarm", ["arm", "rm"], {}, "has a scalar reward head; GenARM .* needs an autoregressive reward model"),
        ("genarm", ["table"], {}, "has a table of rewards for its head; GenARM"),
        ("expert_ratio", ["arm"], {}, "needs pairs of language models: tuned, reference, got 1"),
        ("expert_ratio", ["arm", "lm"], {"weights": (1.0, 2.0)}, "got 2 weights for 1 pairs of models"),
        ("parm", ["parm", "parm"], {}, "needs one reward model that takes a preference vector, got 2"),
        ("transfer_q", ["rm"], {}, "needs an aligned language model, then a reward model, .* got 1"),
        ("transfer_q", ["rm", "arm"], {}, "has a scalar reward head; Transfer Q"),
        ("pargs", ["arm"], {}, "has no reward head, so it is not a reward model"),
        ("args", ["table"], {}, "its head is a table"),
        ("genarm", ["parm"], {}, "needs a preference vector, which only the method parm provides"),
        ("parm", ["arm"], {"preference": (1.0,)}, "takes no preference vector"),
        ("parm", ["parm"], {}, "prompt 'a': PARM .* needs a preference vector; set the option preference"),
        ("parm", ["parm"], {"preference": (0.2, 0.3, 0.5)}, "has 3 numbers, but .* was trained for 2 objectives"),
        ("transfer_q", ["arm", "rm"], {"look_ahead": 60}, "60 tokens of look-ahead it exceeds that model's context"),
    ],
)
def test_combinations_that_do_not_work_are_refused_in_one_line(folder, method, names, changes, message):
    with pytest.raises(InputError, match=message) as raised:
        answer(folder, method, names, **changes)
    assert "\n" not in str(raised.value)


def test_kinds_of_reward_models_are_refused_before_any_model_is_loaded(folder):
    with pytest.raises(InputError, match="has a scalar reward head"):
        Session("./nowhere", [folder["rm"]], method=METHODS["genarm"])


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        ("genarm", {"k": 5}, "k: is not an option of GenARM .* does not take the k most likely tokens"),
        ("pargs", {"top_p": 0.5}, "top-p: is not an option of PARGS"),
        ("top_k", {"gate_entropy": 1.0}, "gate-entropy: is not an option of top-k sampling .* is not guided"),
        ("vas", {"look_ahead": 3}, "look-ahead: is not an option of VAS"),
        ("genarm", {"preference": (1.0,)}, "preference: is not an option of GenARM"),
        ("parm", {"preference": (0.5, 0.2)}, "preference: got 0.5, 0.2, must be numbers of at least 0 that sum to 1"),
        ("contrastive", {"weights": (1.5,)}, "weight: got 1.5, must be from 0 to 1"),
    ],
)
def test_numbers_that_do_not_apply_to_a_method_are_refused(method, changes, message):
    with pytest.raises(InputError, match=message):
        Settings(METHODS[method], **changes)


def test_another_tokenizer_is_refused_where_all_next_tokens_are_scored(folder, tmp_path):
    model, params = tiny_model("llama", vocab_size=tiny_tokenizer().vocab_size)
    save_model(tmp_path, model, params)
    tiny_tokenizer().save(tmp_path)
    tokenizer = json.loads((tmp_path / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    one, other = list(vocabulary)[300:302]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(InputError, match="does not have the language model's tokenizer"):
        answer(folder | {"other": str(tmp_path)}, "genarm", ["other"])
