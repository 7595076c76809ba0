"""Rewards of prefixes and likelihoods, against transformers in torch and against texts read one by one."""

import shutil

import numpy as np
import pytest
import torch
import transformers

from pargs_jax.data.preferences import Preference
from pargs_jax.errors import InputError
from pargs_jax.evaluation.answers import GivenAnswer, System
from pargs_jax.evaluation.judges import RewardModelJudge
from pargs_jax.evaluation.prefixes import PERCENTS, function_prefix_rewards, model_prefix_rewards, report_on
from pargs_jax.evaluation.scoring import ScoringModel, TokenisedAnswer
from pargs_jax.evaluation.statistics import wilson
from pargs_jax.models.deberta import DebertaConfig
from pargs_jax.models.encoder import EncoderModel
from pargs_jax.testing import random_params, tiny_preferences, tiny_tokenizer

TEXTS = [("My lamp broke.", " I am sorry."), ("Hi", ""), ("My kettle leaks, Anna.", " We will send you a new one.")]


def test_log_likelihoods_are_those_of_transformers(lm):
    model = ScoringModel.load(lm, "vocabulary", batch_size=2)
    texts = [model.tokenise(prompt, answer, closed=False) for prompt, answer in TEXTS]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(lm, dtype=torch.float32)
    for found, text in zip(model.log_likelihoods(texts), texts, strict=True):
        with torch.no_grad():
            logits = theirs(torch.tensor([[*text.prompt, *text.answer]])).logits[0, len(text.prompt) - 1 : -1]
        chosen = torch.log_softmax(logits, -1)[torch.arange(len(text.answer)), list(text.answer)]
        assert found == pytest.approx(float(chosen.sum()), abs=1e-4)


def test_a_judge_reads_whole_answers_with_their_end_and_cut_ones_without(rm):
    judge = RewardModelJudge(rm, batch_size=2)
    answers = [
        GivenAnswer(f"p{i}", 0, *text, is_whole)
        for i, (text, is_whole) in enumerate(zip(TEXTS, (True, None, False), strict=True))
    ]
    answers.append(GivenAnswer("p3", 0, "word " * 100, " much too long"))
    found = judge.scores(System("mine", "mine.jsonl", tuple(answers)))
    assert found[3] is None and judge.problems == {"longer than its context of 64 tokens": 1}
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(rm, dtype=torch.float32)
    theirs.config.pad_token_id = 0
    tokenizer = tiny_tokenizer()
    for (prompt, answer), end, score in zip(TEXTS, ([2], [2], []), found, strict=False):
        ids = [*tokenizer.encode_prompt(prompt), *tokenizer.encode_answer(answer), *end]
        with torch.no_grad():
            assert score == pytest.approx(float(theirs(torch.tensor([ids])).logits[0, 0]), abs=1e-4)


def test_a_judge_may_read_all_prompts_in_its_own_template(rm, tmp_path):
    shutil.copytree(rm, tmp_path / "rm")
    template = "{% for turn in messages %}R {{turn.role}} {{turn.content}}|{% endfor %}"
    (tmp_path / "rm" / "chat_template.jinja").write_text(template)
    prompt = "\n\nHuman: Hi\n\nAssistant: Yes\n\nHuman: Bye\n\nAssistant:"
    answers = (GivenAnswer("0", 0, prompt, "No", True), GivenAnswer("1", 0, "Hi", "Yes", False))
    system = System("mine", "mine.jsonl", answers)
    plain, own = (RewardModelJudge(str(tmp_path / "rm"), prefers_template=own) for own in (False, True))
    rendered = ("R user Hi|R assistant Yes|R user Bye|", "R user Hi|")
    encode, model = own.model.tokenizer, own.model
    texts = [
        TokenisedAnswer(encode.encode_prompt(text), ids, (len(ids),))
        for text, ids in zip(
            rendered, ([*encode.encode_answer("No"), *encode.closing_ids], encode.encode_answer("Yes")), strict=True
        )
    ]
    assert encode.decode(encode.closing_ids) == "|"
    expected = [float(reward[0]) for reward in model.rewards(texts)]
    assert own.scores(system) == pytest.approx(expected, abs=1e-5)
    assert np.abs(np.subtract(plain.scores(system), expected)).min() > 1e-3


def test_what_is_not_a_reward_model_does_not_judge(lm):
    with pytest.raises(InputError, match="not a reward model"):
        RewardModelJudge(lm)


def naive_rewards(model, example_pairs):
    """Rewards of prefixes, each read as a text of its own."""
    same = np.zeros((len(example_pairs), len(PERCENTS), 2))
    own = np.zeros_like(same)
    for n, pair in enumerate(example_pairs):
        prompt = model.tokenizer.encode_prompt(pair.prompt)
        ids = [[*model.tokenizer.encode_answer(text), model.tokenizer.eos_id] for text in (pair.chosen, pair.rejected)]
        longest = max(map(len, ids))
        for f, percent in enumerate(PERCENTS):
            for a, answer in enumerate(ids):
                for target, count in ((same, longest), (own, len(answer))):
                    prefix = answer[: int(np.ceil(percent * count / 100))]
                    target[n, f, a] = model.rewards([TokenisedAnswer(prompt, prefix, (len(prefix),))])[0][0]
    return same, own


def scoring_encoder():
    config = DebertaConfig(
        vocab_size=tiny_tokenizer().vocab_size, context_length=128, width=32, layers=1, heads=4, feedforward=48,
        position_buckets=8, max_relative_positions=24,
    )  # fmt: skip
    model = EncoderModel(config)
    return ScoringModel("tiny", model, random_params(model), tiny_tokenizer(), batch_size=8)


@pytest.mark.parametrize("kind", ["causal", "encoder"])
def test_rewards_of_all_prefixes_are_those_of_prefixes_read_alone(rm, kind):
    model = ScoringModel.load(rm, "reward", batch_size=8) if kind == "causal" else scoring_encoder()
    pairs = [Preference("1", "Hi", " a b c.", " Go away, please."), Preference("2", "Hi", " No", " Yes, we will.")]
    found = model_prefix_rewards(model, pairs, max_length=64)
    same, own = naive_rewards(model, pairs)
    np.testing.assert_allclose(found.same_length, same, atol=1e-4)
    np.testing.assert_allclose(found.own_length, own, atol=1e-4)
    assert found.groups.tolist() == [0, 0] and "0 answers cut" in found.notes


def test_a_function_is_tested_on_prefixes_that_end_between_words():
    seen = []

    def score(prompt, response):
        seen.append(response)
        return None if "fail" in response else float(len(response.split()))

    pairs = [Preference("1", "Hi", " one two  three four five", " one two"), Preference("2", "Hi", " fail", " x")]
    rewards = function_prefix_rewards(score, pairs, lambda note: None)
    assert rewards.same_length.shape == (1, 10, 2) and "1 left out" in rewards.notes
    assert " one two  three" in seen
    # At 40 % of the longer answer both have two words; from there on the chosen one is longer.
    report = report_on("words", rewards)
    assert [row.accuracy for row in report.rows] == [0.5] * 4 + [1.0] * 6


def test_the_report_of_a_perfect_and_of_a_random_model():
    pairs = tiny_preferences(60)
    best = {pair.chosen for pair in pairs}
    perfect = report_on("p", function_prefix_rewards(lambda _, text: 9.0 * (text in best), pairs, lambda note: None))
    last = perfect.rows[-1]
    assert last.accuracy == 1 and last.accuracy_interval == wilson(1.0, 60) and last.calibration_error < 1e-3
    assert last.spearman == pytest.approx(1) and np.isnan(perfect.rows[0].spearman)
    assert (perfect.pairs, perfect.prompts, sum(row.count for row in perfect.reliability)) == (60, 60, 60)

    draws = np.random.default_rng(0)
    random = report_on("r", function_prefix_rewards(lambda *_: draws.normal(), pairs, lambda note: None))
    accuracies = [row.accuracy_interval for row in random.rows[:-1]]
    agreements = [row.spearman_interval for row in random.rows[:-1]]
    assert sum(low < 0.5 < high for low, high in accuracies) >= 7
    assert sum(low < 0 < high for low, high in agreements) >= 7


def test_answers_that_begin_alike_are_ties_until_they_part(rm, monkeypatch):
    model, draws = ScoringModel.load(rm, "reward"), np.random.default_rng(0)
    # Rewards of one text may differ by rounding between batches; here they differ as much as those of other texts.
    monkeypatch.setattr(
        ScoringModel, "rewards", lambda self, texts: [draws.normal(size=len(t.prefixes)) for t in texts]
    )
    pair = Preference("1", "Hi", " We will send you a new lamp.", " We will not send you a new lamp.")
    answers = [model.tokenizer.encode_answer(text) for text in (pair.chosen, pair.rejected)]
    shared = next(n for n, (one, other) in enumerate(zip(*answers, strict=False)) if one != other)
    margins = np.diff(model_prefix_rewards(model, [pair], 64, (1, 10, 50, 100)).same_length[0])[:, 0]
    seen = [int(np.ceil(percent * (max(map(len, answers)) + 1) / 100)) for percent in (1, 10, 50, 100)]
    assert [margin == 0 for margin in margins] == [n <= shared for n in seen]
    assert 0 < sum(margins == 0) < 4
