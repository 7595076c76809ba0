"""Runs on the model's own answers: what is sampled, scored and learned, on one device and on four, with and without a
break."""

import dataclasses
import io
import json
import shutil
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import load_file

from pargs_jax.commands import train as command
from pargs_jax.config import DataConfig, LoraConfig, ModelConfig, ObjectiveConfig, OptimConfig, TrainConfig
from pargs_jax.data.batches import Batch, Batches
from pargs_jax.data.examples import Example
from pargs_jax.decoding.loop import Decoder, decode
from pargs_jax.decoding.proposals import AllTokens
from pargs_jax.decoding.state import RowSettings
from pargs_jax.demo import task as demo
from pargs_jax.errors import InputError
from pargs_jax.generation.reward_models import RewardModel
from pargs_jax.generation.rollouts import Rollouts, sample
from pargs_jax.mesh import make_mesh
from pargs_jax.models.hf import load_model, save_model
from pargs_jax.models.lora import Lora, draw_lora, join_params
from pargs_jax.objectives.policy_gradients import policy_numbers
from pargs_jax.testing import tiny_model, tiny_tokenizer
from pargs_jax.text.tokenization import TextTokenizer

pytestmark = pytest.mark.usefixtures("compiled_steps_are_reused")

WORDS = ("lamp", "kettle", "chair", "phone", "table", "radio", "clock", "fan")
NEW_TOKENS = 6
METRICS = {
    "loss", "gradient_norm", "learning_rate", "tokens_per_second", "data_wait_share",
    "reward", "kl", "length", "finished", "sampled_tokens", "clip_share",
}  # fmt: skip


@pytest.fixture(scope="module")
def rm(tmp_path_factory):
    """A random reward model with the language model's tokenizer."""
    folder = tmp_path_factory.mktemp("rm")
    model, params = tiny_model("llama", "reward", seed=1, vocab_size=640)
    save_model(folder, model, params, special_tokens={"bos_token_id": 1, "eos_token_id": 2})
    tiny_tokenizer().save(folder)
    return folder


@pytest.fixture(scope="module")
def other_rm(tmp_path_factory, tokenizer_folder):
    """A random reward model with a tokenizer of its own."""
    folder = tmp_path_factory.mktemp("other_rm")
    tokenizer = TextTokenizer.load(tokenizer_folder("llama"))
    model, params = tiny_model("llama", "reward", seed=2, vocab_size=tokenizer.vocab_size)
    save_model(folder, model, params, special_tokens={"eos_token_id": tokenizer.eos_id})
    tokenizer.save(folder)
    return folder


@pytest.fixture
def settings(lm, rm, tmp_path):
    """Makes a config of a short run on eight prompts, with what the arguments change."""
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"Customer: my {word} broke\nAgent:"}) + "\n" for word in WORDS))
    return partial(
        TrainConfig,
        steps=4,
        batch_size=8,
        max_length=48,
        log_every=1,
        save_every=2,
        model=ModelConfig(init=str(lm)),
        data=DataConfig(train=str(path), eval=str(path)),
        objective=ObjectiveConfig(name="ppo", rm=str(rm), max_new_tokens=NEW_TOKENS, updates=2),
        optim=OptimConfig(lr=1e-2, schedule="constant", warmup=0.0),
        out=str(tmp_path / "run"),
    )


def train(config):
    """Runs it, and returns its metrics: those of each step, and the last evaluation."""
    command.train(config, Console(file=io.StringIO()))
    lines = [json.loads(line) for line in (Path(config.out) / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["split"] == "train"], lines[-1]


def weights_of(config):
    return load_file(Path(config.out) / "model" / "model.safetensors")


def untimed(steps):
    return [{k: v for k, v in step.items() if k not in ("tokens_per_second", "data_wait_share")} for step in steps]


def test_ppo_begins_at_the_reference_and_a_break_changes_nothing(settings, lm, tmp_path):
    config = settings()
    steps, evaluation = train(config)
    assert steps[0].keys() == METRICS | {"value_loss", "step", "split"}
    assert [step["step"] for step in steps] == [1, 2, 3, 4]
    assert steps[0]["kl"] == pytest.approx(0, abs=1e-5) and steps[-1]["kl"] > 1e-3
    assert steps[0]["clip_share"] < 0.5 and steps[0]["learning_rate"] == pytest.approx(1e-2)
    expected_loss = 0.05 * evaluation["kl"] - evaluation["reward"]
    assert evaluation["loss"] == pytest.approx(expected_loss, rel=1e-6) and evaluation["length"] <= NEW_TOKENS

    # Another process would continue in the same way: what is sampled depends on seed, step and parameters.
    first = dataclasses.replace(config, steps=2, out=str(tmp_path / "stopped"))
    train(first)
    resumed, found = train(dataclasses.replace(first, steps=4, resume=True))
    assert untimed(resumed) == untimed(steps) and found == evaluation
    tuned, again = weights_of(config), weights_of(first)
    assert all(np.array_equal(again[name], tensor) for name, tensor in tuned.items())
    # The critic stays behind: the export is a language model like the one it started from.
    before = load_file(lm / "model.safetensors")
    assert {name: x.shape for name, x in tuned.items()} == {name: x.shape for name, x in before.items()}
    assert any(not np.array_equal(tuned[name], before[name]) for name in before)


def test_rloo_with_additions_and_a_foreign_reward_model_is_alike_on_four_devices(settings, other_rm, tmp_path):
    objective = ObjectiveConfig(name="rloo", rm=str(other_rm), max_new_tokens=NEW_TOKENS, n=2)
    config = settings(
        objective=objective, lora=LoraConfig(rank=2), optim=OptimConfig(lr=1e-2, accumulation=2, warmup=0.0), steps=3
    )
    steps, evaluation = train(config)
    assert steps[0].keys() == METRICS | {"step", "split"}
    assert steps[0]["kl"] == 0 and steps[0]["clip_share"] == 0 and steps[-1]["kl"] > 1e-4
    with jax.set_mesh(make_mesh("cpu-4,fsdp=2,tensor=2", "train")):
        others, found = train(dataclasses.replace(config, out=str(tmp_path / "four")))
    for one, other in zip([*untimed(steps), evaluation], [*untimed(others), found], strict=True):
        assert one.keys() == other.keys()
        for name in one.keys() - {"split"}:
            assert one[name] == pytest.approx(other[name], rel=1e-3, abs=1e-4), name


def prompt_batch(tokenizer, copies=1):
    prompts = [np.array(tokenizer.encode_prompt(f"My {word}"), np.int32) for word in WORDS[:4]]
    return next(Batches([Example(ids, ()) for ids in prompts], 4, 32, 0, copies=copies).evaluation())


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_sampled_log_probabilities_are_those_of_a_full_pass(temperature):
    """The decode loop draws the tokens with the probabilities that training computes, additions included."""
    model, params = tiny_model("llama", vocab_size=640)
    model = dataclasses.replace(model, lora=Lora(rank=2))
    additions = draw_lora(model.abstract_params(), jax.random.key(0))
    additions = jax.tree.map(lambda x: x + 0.05, additions)  # `lora_out` begins at 0
    params = join_params(additions, params)
    batch, key = prompt_batch(tiny_tokenizer()), jax.random.key(3)
    options = (2,), "float32", temperature, NEW_TOKENS
    answers, lengths, *_ = sample(model, *options, params, batch, key)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(4))
    rows = RowSettings.alike(4, temperature=temperature, candidates=640, max_new_tokens=NEW_TOKENS)
    decoder = Decoder(model, proposer=AllTokens(), eos_ids=(2,), pad_id=2)
    drawn = decode(decoder, params, (), batch.prompts, batch.prompt_lengths, keys, rows, NEW_TOKENS)
    np.testing.assert_array_equal(answers, drawn.tokens)
    np.testing.assert_array_equal(lengths, drawn.lengths)

    read = batch._replace(answers=answers[:, None], answer_lengths=lengths[:, None])
    logits = model.read_answers(params, read).logits()[:, 0]
    numbers = policy_numbers(logits, logits, answers, lengths, temperature)
    np.testing.assert_allclose(numbers.log_probs, drawn.trace.guided_log_probs, atol=2e-5)
    assert not np.any(numbers.log_ratios) and float(numbers.log_probs.sum()) < -20
    others, *_ = sample(model, *options, params, batch, jax.random.key(4))
    assert not np.array_equal(others, answers)


def test_rewards_are_the_reward_models_own_of_the_texts(lm, rm, other_rm):
    """Each answer scored alone, from its text, by one full pass; many tokens end an answer."""
    tokenizer = TextTokenizer.load(demo.DEMO_LM, extra_eos_ids=range(500, 640))
    batch = prompt_batch(tokenizer, copies=2)
    np.testing.assert_array_equal(batch.prompts[::2], batch.prompts[1::2])
    model, params, *_ = load_model(lm, "vocabulary")
    for source in (rm, other_rm):
        scorer = RewardModel.load(str(source), tokenizer, 640, dtype="float32", unroll=False)
        assert (scorer.retokeniser is None) == (source == rm)
        own = {}
        for ids, length in zip(batch.prompts, batch.prompt_lengths, strict=True):
            prompt = ids[len(ids) - length :]
            text = tokenizer.decode(prompt.tolist())
            own[prompt.tobytes()] = prompt.tolist() if source == rm else scorer.tokenizer.encode_prompt(text)
        rollouts = Rollouts(tokenizer, scorer, own, "float32", 1.0, NEW_TOKENS)
        answered, finished = rollouts(model, params, batch, jax.random.key(0))
        assert answered.answers.shape == (8, 1, NEW_TOKENS) and answered.rewards.shape == (8, 1)
        assert 0 < finished.sum() < 8
        for row in range(8):
            prompt = batch.prompts[row, batch.prompts.shape[1] - batch.prompt_lengths[row] :]
            tokens = answered.answers[row, 0, : answered.answer_lengths[row, 0]].tolist()
            if source == other_rm:
                text = tokenizer.decode_answer(prompt.tolist(), tokens)
                tokens = scorer.tokenizer.encode_answer(text) + [scorer.tokenizer.eos_id] * bool(finished[row])
            ids = [*own[prompt.tobytes()], *tokens]
            # Filled up behind, which none of its tokens sees: passes of one width are compiled once.
            hidden = scorer.model.encode(scorer.params, jnp.array([ids + [0] * (64 - len(ids))]))
            reward = scorer.model.rewards(scorer.params, hidden)[0, len(ids) - 1]
            assert float(answered.rewards[row, 0]) == pytest.approx(float(reward), abs=1e-4)
        damaged = dataclasses.replace(scorer, params=jax.tree.map(lambda x: x * jnp.nan, scorer.params))
        with pytest.raises(InputError, match="a reward is not finite; its weights may be damaged"):
            dataclasses.replace(rollouts, reward_model=damaged)(model, params, batch, jax.random.key(0))


def refused(config):
    with pytest.raises(InputError) as caught:
        train(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_bad_combinations_are_refused_before_models_are_loaded(settings, lm, rm, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "load_model", lambda *_, **__: pytest.fail("the model was loaded"))
    base = settings()

    def with_objective(**changes):
        return dataclasses.replace(base, objective=dataclasses.replace(base.objective, **changes))

    assert "--objective.rm: is missing; ppo needs a reward model" in refused(with_objective(rm=None))
    assert "has a vocabulary head, must be a reward model" in refused(with_objective(rm=str(lm)))
    assert "no such folder" in refused(with_objective(rm=str(tmp_path / "none")))
    assert "--batch-size: got 8, must be a multiple of the 3 answers" in refused(with_objective(n=3))
    assert "objective.max-new-tokens: got 48, must be below max-length (48)" in refused(
        with_objective(max_new_tokens=48)
    )
    assert "must be at least 2 for rloo" in refused(
        dataclasses.replace(base, objective=ObjectiveConfig(name="rloo", rm=str(rm), n=1, max_new_tokens=4))
    )
    for name, value in (("gamma", 0.9), ("gae_lambda", 0.5), ("value_weight", 1.0)):
        message = refused(
            dataclasses.replace(base, objective=ObjectiveConfig(name="rloo", rm=str(rm), **{name: value}))
        )
        assert "is not an option of --objective.name rloo; it belongs to ppo" in message
    dropping = dataclasses.replace(base, model=dataclasses.replace(base.model, dropout=0.1))
    assert "--model.dropout: got 0.1, must be 0 for ppo" in refused(dropping)
    prefixes = dataclasses.replace(base, data=dataclasses.replace(base.data, prefix_tokenizer=str(lm)))
    assert "--data.prefix-tokenizer: has no effect on ppo" in refused(prefixes)
    assert "got 'accuracy', but ppo has none" in refused(dataclasses.replace(base, best_metric="accuracy"))
    with pytest.raises(InputError, match="--compile-only: cannot describe a step of ppo"):
        command.compile_only(dataclasses.replace(base, mesh="tpu-v4-8", compile_only=True))


def test_prompts_without_place_for_an_answer_are_left_out(settings):
    config = settings(max_length=24, steps=1)
    path = Path(config.data.train)
    rows = [{"prompt": "Customer: hi\nAgent:"}, {"prompt": "Customer: " + "my lamp broke " * 20}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = dataclasses.replace(config, batch_size=2)
    printed = io.StringIO()
    command.train(config, Console(file=printed, width=10_000))
    assert "1 prompts; 1 longer than 18 tokens left out" in printed.getvalue()
    path.write_text(json.dumps(rows[1]) + "\n")
    shutil.rmtree(config.out)
    assert "none of its 1 prompts has at most 18 tokens" in refused(config)


def test_batches_of_prompts_hold_each_prompt_several_times():
    examples = [Example(np.arange(1, 2 + i, dtype=np.int32), ()) for i in range(5)]
    batch = Batches(examples, 2, 16, seed=0, copies=3).batch(0)
    assert isinstance(batch, Batch) and batch.answers.shape == (6, 0, 0)
    assert (batch.prompt_lengths[:3] == batch.prompt_lengths[0]).all() and batch.weights.sum() == 6
