"""Search methods from prompts to answers: judges of every kind, what the records say, and what is refused."""

import dataclasses

import numpy as np
import pytest

from pargs_jax.data.preferences import Prompt
from pargs_jax.decoding.methods import METHODS
from pargs_jax.errors import InputError
from pargs_jax.generation.session import Session, Settings
from pargs_jax.models.encoder import EncoderModel
from pargs_jax.models.hf import save_model
from pargs_jax.testing import TINY_DEBERTA, random_params, tiny_tokenizer

PROMPTS = [Prompt(str(i), text) for i, text in enumerate(("Hi", "My lamp broke. What now?", ""))]
TOKENS = 8
SMALL = {
    "best_of_n": {"samples": 3}, "blockwise": {"successors": 2, "chunk": 3},
    "chunk_beam": {"beams": 2, "successors": 2, "chunk": 3},
    "weak_to_strong": {"beams": 2, "successors": 2, "chunk": 3},
    "cards": {"longest": 4, "most_rejections": 3}, "speculative_rejection": {"samples": 4, "chunk": 3},
    "smc": {"particles": 3},
}  # fmt: skip


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A reward model that reads every text whole, in tokens of its own."""
    model = EncoderModel(dataclasses.replace(TINY_DEBERTA, vocab_size=tiny_tokenizer().vocab_size))
    folder = tmp_path_factory.mktemp("encoder")
    save_model(folder, model, random_params(model))
    tiny_tokenizer().save(folder)
    return str(folder)


def answer(session, name, **changes):
    search = {**SMALL[name], **changes.pop("search", {})}
    settings = Settings(METHODS[name], max_new_tokens=TOKENS, search=tuple(search.items()), **changes)
    return {answer.id: answer for batch in session.answer(PROMPTS, settings) for answer in batch}


@pytest.fixture(scope="module")
def session(lm, rm):
    return Session(lm, [rm])


@pytest.mark.parametrize("name", [name for name in SMALL if name != "weak_to_strong"])
def test_every_search_answers_and_counts_tokens(name, session, monkeypatch):
    outcomes = []
    read = session.answers.read
    monkeypatch.setattr(session.answers, "read", lambda *given: outcomes.append(given[:2]) or read(*given))
    found = answer(session, name)
    for prompt in PROMPTS:
        row, ids = found[prompt.id], session.tokenizer.encode_prompt(prompt.text)
        assert 0 < row.tokens <= TOKENS and (row.log_z is not None) == (name == "smc")
        assert row.kl_is == ("estimate" if name == "cards" else "bound")
        assert row.lm_tokens >= len(ids) - 1 + row.tokens and row.rm_tokens >= len(ids) + row.tokens
    # Rewards are those of the answers, read anew in one pass.
    batch, outcome = outcomes[-1]
    answers = outcome.answers
    scored = session.reward_models[0].score(batch.own_prompts[0], answers.tokens, answers.lengths, [], [])
    rewards = [found[prompt.id].guide_rewards[0] for prompt in batch.prompts]
    np.testing.assert_allclose(rewards, scored[: len(rewards)], atol=1e-4)


def test_best_of_n_returns_the_best_of_n_separate_samples(session):
    """`--n` draws with the same keys."""
    plain = Settings(METHODS["top_k"], k=tiny_tokenizer().vocab_size, max_new_tokens=TOKENS, n=3)
    samples = [a for batch in session.answer(PROMPTS, plain) for a in batch]
    for key, best in answer(session, "best_of_n", k=tiny_tokenizer().vocab_size).items():
        own = [a for a in samples if a.id == key]
        expected = max(own, key=lambda a: a.guide_rewards[0])
        assert best.response == expected.response
        assert best.guide_rewards[0] == pytest.approx(expected.guide_rewards[0], abs=1e-4)
        assert best.lm_tokens == own[0].lm_tokens - own[0].tokens + sum(a.tokens for a in own)


def test_a_judge_with_a_tokenizer_of_its_own(lm, encoder):
    session = Session(lm, [encoder])
    plain = Settings(METHODS["top_k"], k=tiny_tokenizer().vocab_size, max_new_tokens=TOKENS, n=3)
    samples = [a for batch in session.answer(PROMPTS, plain) for a in batch]
    for key, best in answer(session, "best_of_n", k=tiny_tokenizer().vocab_size).items():
        expected = max((a for a in samples if a.id == key), key=lambda a: a.guide_rewards[0])
        assert best.response == expected.response
    found = answer(session, "cards", search={"mean": 0.0, "deviation": 0.5})
    assert all(row.rm_tokens > row.tokens for row in found.values())


def test_weak_to_strong_search_scores_by_a_log_ratio(lm, save_tiny):
    models = [save_tiny("vocabulary", family="gpt2", seed=seed) for seed in (3, 4)]
    found = answer(Session(lm, models, method=METHODS["weak_to_strong"]), "weak_to_strong")
    assert all(len(row.guide_rewards) == 1 and row.rm_tokens > 2 * row.tokens for row in found.values())


def test_options_that_do_not_apply_to_a_search_are_refused():
    def refused(name, words, **changes):
        with pytest.raises(InputError, match=words):
            Settings(METHODS[name], **changes)

    refused("best_of_n", "search.beams: is not an option of best-of-n .*; leave it out", search=(("beams", 2),))
    refused("pargs", "search.samples: is not an option of PARGS", search=(("samples", 2),))
    refused("smc", "trace and explain: are not supported by twisted SMC", trace="tokens")
    refused("cards", "search.mean and search.deviation: got only one", search=(("mean", 1.0),))
    refused("cards", "1 <= shortest <= longest", search=(("shortest", 9), ("longest", 3)))
    with pytest.raises(InputError, match="weight: got 3 weights for 2 reward models"):
        Settings(METHODS["cards"], weights=(1.0, 2.0, 3.0)).guide_weights(2)
    refused("best_of_n", "gate-entropy: is not an option of .*, which is not guided at each token", gate_entropy=1.0)
