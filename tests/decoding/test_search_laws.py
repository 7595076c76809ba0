"""What search methods draw from, by enumeration: with 4 tokens and answers of at most 3 every law is a small table."""

import dataclasses
import itertools
import math
from collections import Counter
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pargs_jax.decoding.guides import CausalGuide
from pargs_jax.decoding.loop import Decoder, row_keys
from pargs_jax.decoding.proposals import TopK
from pargs_jax.decoding.search import BestOfN, Cards, Searcher, SearchInputs, TwistedSmc, best_of_n_curve, search
from pargs_jax.decoding.search.order_statistics import best_of_n_kl
from pargs_jax.decoding.state import RowSettings
from pargs_jax.models.model import unstack_layers
from pargs_jax.testing import tiny_model

VOCABULARY, LENGTH, EOS = 4, 3, 0
PROMPT = (1, 3, 2)
ROWS = 1024
WEIGHT = 3.0


@lru_cache
def models():
    lm = tiny_model("gpt2", vocab_size=VOCABULARY, std=0.2)
    rm = tiny_model("llama", "reward", vocab_size=VOCABULARY, seed=1, std=0.2)
    return unstack_layers(*lm), unstack_layers(*rm)


@lru_cache
def tables():
    """log p(token | answer so far) for every unfinished answer, the entropy there, and the reward of every text."""
    (lm, lm_params), (rm, rm_params) = models()
    texts = np.array([(*PROMPT, *rest) for rest in itertools.product(range(VOCABULARY), repeat=LENGTH)])
    log_probs = np.asarray(jax.nn.log_softmax(lm.logits(lm_params, lm.encode(lm_params, texts))), np.float64)
    rewards = np.asarray(rm.rewards(rm_params, rm.encode(rm_params, texts)), np.float64)
    log_p, reward = {}, {}
    for row, text in enumerate(texts.tolist()):
        for length in range(LENGTH + 1):
            prefix = tuple(text[len(PROMPT) : len(PROMPT) + length])
            reward[prefix] = rewards[row, len(PROMPT) + length - 1]
            log_p[prefix] = log_probs[row, len(PROMPT) + length - 1]
    entropy = {prefix: -(np.exp(x) * x).sum() for prefix, x in log_p.items()}
    return log_p, entropy, reward


def is_over(answer):
    return len(answer) == LENGTH or answer[-1:] == (EOS,)


@lru_cache
def answer_law():
    """The language model's probability of every finished answer."""
    log_p = tables()[0]
    law, open_answers = {}, {(): 1.0}
    while open_answers:
        answer, p = open_answers.popitem()
        for token in range(VOCABULARY):
            longer = (*answer, token)
            (law if is_over(longer) else open_answers)[longer] = p * math.exp(log_p[answer][token])
    return law


def run(method, *, rows=ROWS, guided=False, weight=WEIGHT, seed=0):
    (lm, lm_params), (rm, rm_params) = models()
    guides = (CausalGuide(rm),)
    searcher = Searcher(Decoder(lm, guides * guided, TopK(VOCABULARY), eos_ids=(EOS,)), guides * (not guided))
    settings = RowSettings.alike(rows, weights=[weight] * guided, candidates=VOCABULARY, max_new_tokens=LENGTH)
    prompts, lengths = np.tile(PROMPT, (rows, 1)).astype(np.int32), np.full(rows, len(PROMPT), np.int32)
    keys = row_keys(seed, jnp.arange(rows, dtype=jnp.uint32))
    judge_weights = jnp.full((rows, 0 if guided else 1), weight)
    params = (lm_params, (rm_params,) * guided)
    given = SearchInputs(params, (rm_params,) * (not guided), prompts, lengths, keys, settings, judge_weights)
    return jax.device_get(search(method, searcher, given, LENGTH))


def frequencies(found):
    answers = found.answers
    counts = Counter(tuple(row[:length].tolist()) for row, length in zip(answers.tokens, answers.lengths, strict=True))
    return {answer: count / len(answers.lengths) for answer, count in counts.items()}


def assert_drawn_from(found, law):
    """Every answer's frequency is its probability, within 5 standard errors."""
    assert sum(law.values()) == pytest.approx(1.0, abs=1e-6)
    drawn, rows = frequencies(found), len(found.kls)
    assert drawn.keys() <= law.keys()
    for answer, p in law.items():
        assert abs(drawn.get(answer, 0.0) - p) <= 5 * math.sqrt(p * (1 - p) / rows) + 1 / rows, answer


def kl_of(law):
    p = answer_law()
    return sum(q * math.log(q / p[answer]) for answer, q in law.items() if q > 0)


def mean_and_error(x):
    return x.mean(), x.std() / math.sqrt(len(x))


def test_the_curve_of_best_of_n_is_the_mean_over_all_choices():
    rng = np.random.default_rng(0)
    scores, values = rng.integers(0, 4, (3, 7)).astype(float), rng.normal(size=(3, 7))
    curve = best_of_n_curve(scores, values)
    for row, n in itertools.product(range(3), range(1, 8)):
        chosen = [max(choice, key=lambda i: (scores[row, i], -i)) for choice in itertools.combinations(range(7), n)]
        assert curve[row, n - 1] == pytest.approx(np.mean(values[row, chosen]), abs=1e-12)
    # The last of the curve is what the method itself takes.
    np.testing.assert_allclose(curve[:, -1], values[np.arange(3), scores.argmax(axis=1)])
    assert np.isfinite(best_of_n_curve(np.zeros(2000), np.ones(2000))).all()


def best_of_n_law(n):
    reward = tables()[2]
    law, below = {}, 0.0
    for answer in sorted(answer_law(), key=lambda answer: reward[answer]):
        upto = below + answer_law()[answer]
        law[answer], below = upto**n - below**n, upto
    return law


def test_best_of_n_draws_by_order_statistics_and_keeps_to_its_bound():
    found = run(BestOfN(4))
    law = best_of_n_law(4)
    assert_drawn_from(found, law)
    np.testing.assert_allclose(found.kls, best_of_n_kl(4), atol=1e-4)
    assert best_of_n_kl(4) == pytest.approx(0.636, abs=1e-3)
    for n in (1, 2, 4, 16):
        assert kl_of(best_of_n_law(n)) <= best_of_n_kl(n) + 1e-9
    # The curve from n samples and the law agree on the mean reward.
    curve = best_of_n_curve(found.sample_scores, found.sample_scores)
    for n in (1, 2, 4):
        mean, error = mean_and_error(curve[:, n - 1])
        exact = WEIGHT * sum(p * tables()[2][answer] for answer, p in best_of_n_law(n).items())
        assert abs(mean - exact) < 5 * error


def test_soft_best_of_n_draws_by_the_softmax_over_its_samples():
    smoothing = 0.7
    found = run(BestOfN(2, smoothing=smoothing))
    p, reward = answer_law(), tables()[2]
    law = dict.fromkeys(p, 0.0)
    for pair in itertools.product(p, repeat=2):
        tilted = np.exp(WEIGHT * np.array([reward[answer] for answer in pair]) / smoothing)
        for answer, share in zip(pair, tilted / tilted.sum(), strict=True):
            law[answer] += p[pair[0]] * p[pair[1]] * share
    assert_drawn_from(found, law)
    mean, error = mean_and_error(found.kls)
    assert mean + 5 * error > kl_of(law) and mean < math.log(2)


def best_rejected(weights, segments, count, reward_of):
    """The law of the best of `count` draws from these weights."""
    total, below, law = sum(weights), 0.0, {}
    for w, segment in sorted(zip(weights, segments, strict=True), key=lambda item: reward_of(item[1])):
        upto = below + w / total
        law[segment], below = upto**count - below**count, upto
    return law


def cards_law(method):
    """The law of whole answers, from the laws of segments."""
    log_p, entropy, reward = tables()

    def scaled(text):
        return (WEIGHT * reward[text] - method.mean) / method.deviation

    start = (1 - method.start) * scaled(()) + method.start * method.target

    def segments(prefix):
        """Every segment that may come next, and its probability."""
        ended, growing = {}, {(): 1.0}
        while growing:
            segment, p = growing.popitem()
            text = prefix + segment
            is_full = is_over(text) or len(segment) >= method.longest
            is_cut = len(segment) >= method.shortest and entropy[text] >= method.entropy
            if segment and (is_full or is_cut):
                ended[segment] = p
            else:
                for token in range(VOCABULARY):
                    growing[(*segment, token)] = p * math.exp(log_p[text][token])
        return ended

    def accepted(prefix):
        drawn = segments(prefix)
        names, p = list(drawn), np.array(list(drawn.values()))
        lengths = np.array([len(prefix) + len(segment) for segment in names])
        thresholds = np.minimum(method.target, start + lengths * (method.target - start) / LENGTH)
        rewards = np.array([scaled(prefix + segment) for segment in names])
        a = np.exp(np.minimum(0.0, (rewards - thresholds) / method.acceptance_temperature))
        share, count = (p * a).sum(), method.most_rejections
        law = {name: p[i] * a[i] / share * (1 - (1 - share) ** count) for i, name in enumerate(names)}
        fallback = best_rejected(p * (1 - a), names, count, lambda segment: reward[prefix + segment])
        return {name: law[name] + (1 - share) ** count * fallback[name] for name in names}

    whole, open_answers = {}, {(): 1.0}
    while open_answers:
        prefix, p = open_answers.popitem()
        for segment, q in accepted(prefix).items():
            longer = prefix + segment
            target = whole if is_over(longer) else open_answers
            target[longer] = target.get(longer, 0.0) + p * q
    return whole


@pytest.mark.parametrize(
    "method",
    [
        Cards(target=0.5, mean=0.3, deviation=3.0, entropy=0.0, shortest=1, longest=1, most_rejections=60),
        Cards(target=0.8, mean=0.3, deviation=3.0, entropy=1.0, shortest=1, longest=2, most_rejections=3),
    ],
    ids=["single tokens", "segments by entropy, few rejections"],
)
def test_cards_draws_from_its_accepted_law(method):
    found = run(method)
    law = cards_law(method)
    assert_drawn_from(found, law)
    assert max(abs(law[answer] - p) for answer, p in answer_law().items()) > 0.05  # the law is not the model's own
    if method.most_rejections == 60:  # then hardly any segment is taken by force, and the estimate is exact in the mean
        mean, error = mean_and_error(found.kls)
        assert abs(mean - kl_of(law)) < 5 * error


def test_the_tables_have_entropies_on_both_sides_of_the_threshold():
    entropies = [entropy for prefix, entropy in tables()[1].items() if not is_over(prefix) and prefix]
    assert min(entropies) < 1.0 <= max(entropies)


def posterior():
    reward = tables()[2]
    tilted = {answer: p * math.exp(WEIGHT * reward[answer]) for answer, p in answer_law().items()}
    z = sum(tilted.values())
    return {answer: p / z for answer, p in tilted.items()}, math.log(z)


def distance(found, law):
    drawn = frequencies(found)
    return 0.5 * sum(abs(drawn.get(answer, 0.0) - p) for answer, p in law.items())


def test_particles_estimate_z_without_bias_and_come_near_the_posterior():
    law, log_z = posterior()
    distances, gaps = [], []
    for particles in (1, 4, 32):
        found = run(TwistedSmc(particles, 0.9), rows=512, guided=True)
        mean, error = mean_and_error(np.exp(found.log_z - log_z))
        assert abs(mean - 1.0) < 5 * error
        distances.append(distance(found, law))
        bound, bound_error = mean_and_error(found.kls)
        gaps.append(bound - kl_of(law))
        if particles == 32:
            assert_drawn_from(found, law)
            assert gaps[-1] > -5 * bound_error
    assert distances[0] > distances[2]
    assert abs(gaps[2]) < abs(gaps[0])


def test_resampling_keeps_the_estimate_and_the_threshold_says_when():
    """Resampling never, sometimes or at every step gives the same Z."""
    _, log_z = posterior()
    tokens = set()
    for threshold in (0.0, 0.6, 1.0):
        found = run(TwistedSmc(8, threshold), rows=512, guided=True)
        mean, error = mean_and_error(np.exp(found.log_z - log_z))
        assert abs(mean - 1.0) < 5 * error
        tokens.add(found.samples.tokens.tobytes())
    assert len(tokens) == 3


@dataclasses.dataclass(frozen=True)
class Constant:
    """A guide for which all texts are alike."""

    reward: float
    scores_vocabulary = False
    adds_up = False

    def prefill(self, params, prompts, capacity, own_prompts):
        return ()

    def score(self, params, state, text, candidates):
        return jnp.full(candidates.shape, self.reward), ()

    def commit(self, params, state, pending, chosen):
        return state

    def rewind(self, state, text, dropped):
        return state


def test_a_constant_twist_has_an_exact_z():
    (lm, lm_params), _ = models()
    searcher = Searcher(Decoder(lm, (Constant(0.5),), TopK(VOCABULARY), eos_ids=(EOS,)))
    settings = RowSettings.alike(4, weights=[2.0], candidates=VOCABULARY, max_new_tokens=LENGTH)
    prompts, lengths = np.tile(PROMPT, (4, 1)).astype(np.int32), np.full(4, 3, np.int32)
    keys = row_keys(0, jnp.arange(4, dtype=jnp.uint32))
    given = SearchInputs((lm_params, ((),)), (), prompts, lengths, keys, settings, jnp.zeros((4, 0)))
    found = search(TwistedSmc(4), searcher, given, LENGTH)
    np.testing.assert_allclose(found.log_z, 1.0, atol=1e-5)
    np.testing.assert_allclose(found.kls, 0.0, atol=1e-5)
