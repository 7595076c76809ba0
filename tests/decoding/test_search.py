"""Every search method equals a naive loop that re-reads each text from its beginning; and the identities of search."""

import dataclasses
import math
from functools import cache, lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pargs_jax.decoding.guides import CausalGuide
from pargs_jax.decoding.loop import Decoder, decode, row_keys
from pargs_jax.decoding.proposals import TopK
from pargs_jax.decoding.search import (
    BestOfN,
    Cards,
    ChunkBeam,
    Searcher,
    SearchInputs,
    SpeculativeRejection,
    TwistedSmc,
    search,
)
from pargs_jax.decoding.state import RowSettings
from pargs_jax.errors import InputError
from pargs_jax.mesh import make_mesh
from pargs_jax.models.model import unstack_layers
from pargs_jax.testing import tiny_model

VOCABULARY, PAD, STEPS, K = 61, 60, 10, 5
EOS_IDS = (0, 1, 2, 3)  # enough of them that some rows stop early
LENGTHS = (5, 1, 8, 3, 4, 0)  # the last row is filler
KEY_NUMBERS = (11, 12, 13, 14, 15, 16)
TEMPERATURE = 1.3


@lru_cache
def models(unrolled=True):
    """A language model and a reward model."""
    pairs = tiny_model("gpt2", vocab_size=VOCABULARY), tiny_model("llama", "reward", vocab_size=VOCABULARY, seed=1)
    return tuple(unstack_layers(*pair) if unrolled else pair for pair in pairs)


def make_prompts(lengths=LENGTHS):
    generator = np.random.default_rng(0)
    return [generator.integers(6, PAD, size=length).tolist() for length in lengths]


def padded(prompts, width):
    ids = np.full((len(prompts), width), 7, np.int32)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = prompt
    return ids, np.array([len(prompt) for prompt in prompts], np.int32)


def parts(*, guided=False, judged=True, k=K):
    """A searcher, and its parameters as a function of prompts."""
    (lm, lm_params), (rm, rm_params) = models()
    guides = (CausalGuide(rm),) if guided else ()
    judges = (CausalGuide(rm),) if judged else ()
    searcher = Searcher(Decoder(lm, guides, TopK(k), eos_ids=EOS_IDS, pad_id=PAD), judges)
    return searcher, (lm_params, (rm_params,) * guided), (rm_params,) * judged


def inputs(params, judge_params, prompts, *, numbers=KEY_NUMBERS, width=9, weight=1.0, steps=STEPS, k=K, t=TEMPERATURE):
    guides = len(params[1])
    settings = RowSettings.alike(
        len(prompts), weights=[weight] * guides, temperature=t, candidates=k, max_new_tokens=steps
    )
    keys = row_keys(0, jnp.array(numbers, jnp.uint32))
    weights = jnp.ones((len(prompts), len(judge_params)))
    return SearchInputs(params, judge_params, *padded(prompts, width), keys, settings, weights)


def run(method, prompts=None, *, guided=False, numbers=KEY_NUMBERS, width=9, weight=1.0, t=TEMPERATURE, judged=None):
    searcher, params, judge_params = parts(guided=guided, judged=not guided if judged is None else judged)
    prompts = make_prompts() if prompts is None else prompts
    given = inputs(params, judge_params, prompts, numbers=numbers, width=width, weight=weight, t=t)
    return jax.device_get(search(method, searcher, given, STEPS))


@partial(jax.jit, static_argnums=0)
def _read_end(model, params, text, length):
    hidden = model.encode(params, text)[:, length - 1]
    return (
        model.rewards(params, hidden)[0]
        if model.head == "reward"
        else jax.nn.log_softmax(model.logits(params, hidden))[0]
    )


@cache
def _read(which, text):
    model, params = models(False)[which]
    ids = np.zeros((1, 24), np.int32)
    ids[0, : len(text)] = text
    return np.asarray(_read_end(model, params, ids, len(text)))


def log_probs_after(text):
    return _read(0, tuple(text))


def reward_of(text):
    return float(_read(1, tuple(text)))


def branch_key(key, number):
    return key if number == 0 else jax.random.fold_in(key, np.uint32(0xFFFFFFFF - number))


def event_uniform(key, number):
    return float(jax.random.uniform(jax.random.fold_in(key, np.uint32((1 << 31) + number))))


def is_over(answer):
    return len(answer) >= STEPS or (bool(answer) and answer[-1] in EOS_IDS)


def draw_token(prompt, answer, key, *, weight=None, temperature=TEMPERATURE, k=K):
    """Draws a token like the decoder; also its log-probability under the model and under q, and the model's entropy."""
    log_probs = log_probs_after(prompt + answer)
    candidates = np.argsort(-log_probs, kind="stable")[:k].tolist()
    scores = log_probs[candidates].copy()
    if weight is not None:
        scores += np.float32(weight) * np.array([reward_of([*prompt, *answer, c]) for c in candidates], np.float32)
    log_q = np.asarray(jax.nn.log_softmax(scores / np.float32(temperature)))
    every = np.full(len(log_probs), -np.inf, np.float32)
    every[candidates] = log_q
    index = candidates.index(int(jax.random.categorical(jax.random.fold_in(key, len(answer)), every)))
    entropy = float(-(np.exp(log_probs) * log_probs).sum())
    return candidates[index], float(log_probs[candidates[index]]), float(log_q[index]), entropy


def draw_answer(prompt, key, **options):
    answer = []
    while not is_over(answer):
        answer.append(draw_token(prompt, answer, key, **options)[0])
    return answer


def answers_of(found):
    tokens, lengths = found.answers.tokens, found.answers.lengths
    return [tokens[row, : lengths[row]].tolist() for row in range(len(lengths))]


N = 6


def naive_best_of_n(prompt, key, method):
    samples = [draw_answer(prompt, branch_key(key, i)) for i in range(method.samples)]
    scores = []
    for answer in samples:
        prefixes = [reward_of(prompt + answer[: i + 1]) for i in range(len(answer))]
        scores.append({"last": prefixes[-1], "minimum": min(prefixes), "mean": float(np.mean(prefixes))}[method.by])
    if method.smoothing:
        log_q = np.asarray(scores, np.float32) / method.smoothing
        best = int(jax.random.categorical(jax.random.fold_in(key, np.uint32(1 << 31)), log_q))
    else:
        best = int(np.argmax(scores))
    lm_tokens = len(prompt) - 1 + sum(map(len, samples))
    return samples[best], scores[best], lm_tokens, lm_tokens + 1


def naive_chunk_beam(prompt, key, method):
    """Beams in places: a beam that goes on stays in its place, and copies take the free places in order."""
    count = method.beams * method.successors
    texts, copies = [[] for _ in range(count)], [1] * count
    lm_tokens, rm_tokens = len(prompt) - 1, len(prompt)
    while True:
        free = [i for i in range(count) if copies[i] == 0]
        twins = set()
        for i in range(count):
            for _ in range(copies[i] - 1):
                place = free.pop(0)
                texts[place] = list(texts[i])
                if is_over(texts[i]):
                    twins.add(place)
        for i in range(count):
            before = len(texts[i])
            for _ in range(method.chunk):
                if not is_over(texts[i]):
                    texts[i].append(draw_token(prompt, texts[i], branch_key(key, i))[0])
            lm_tokens += len(texts[i]) - before
            rm_tokens += len(texts[i]) - before
        scores = [-math.inf if i in twins else reward_of(prompt + texts[i]) for i in range(count)]
        order = sorted(range(count), key=lambda i: (-scores[i], i))[: method.beams]
        copies = [method.successors if i in order else 0 for i in range(count)]
        if all(is_over(texts[i]) for i in order):
            return texts[order[0]], scores[order[0]], lm_tokens, rm_tokens


def naive_speculative_rejection(prompt, key, method):
    pool = [(i, []) for i in range(method.samples)]
    ended = []
    lm_tokens, rm_tokens = len(prompt) - 1, len(prompt)
    written = 0
    while written < STEPS:
        will_drop = math.floor(method.alpha * len(pool))
        steps = method.chunk if will_drop and written + method.chunk < STEPS else STEPS - written
        for i, answer in pool:
            before = len(answer)
            while not is_over(answer) and len(answer) < written + steps:
                answer.append(draw_token(prompt, answer, branch_key(key, i))[0])
            lm_tokens += len(answer) - before
            rm_tokens += len(answer) - before
        written += steps
        scored = [(reward_of(prompt + answer), i, answer) for i, answer in pool]
        ended += [(score, list(answer)) for score, _, answer in scored if is_over(answer)]
        scored.sort(key=lambda item: (-item[0], item[1]))
        pool = sorted((i, answer) for _, i, answer in scored[: len(pool) - will_drop])
    score, answer = max(ended, key=lambda item: item[0])
    return answer, score, lm_tokens, rm_tokens


def naive_cards(prompt, key, method):
    def scaled(text):
        return (reward_of(text) - method.mean) / method.deviation

    start = (1 - method.start) * scaled(prompt) + method.start * method.target
    answer, carried = [], []
    number = rejections = all_rejections = proposals = 0
    rejected, forced = [], False
    lm_tokens, rm_tokens = len(prompt) - 1, len(prompt)
    while not (is_over(answer) and not carried):
        segment, over = list(carried), False
        while not (over or is_over(answer + segment) or len(segment) >= method.longest):
            token, _, _, entropy = draw_token(prompt, answer + segment, branch_key(key, number))
            lm_tokens += 1
            over = len(segment) >= method.shortest and entropy >= method.entropy
            segment.append(token)
        segment, tail = (segment[:-1], segment[-1:]) if over else (segment, [])
        rm_tokens += len(segment)
        reward = scaled(prompt + answer + segment)
        slope = (len(answer) + len(segment)) * (method.target - start) / STEPS
        threshold = min(method.target, start + slope)
        u = event_uniform(key, proposals)
        proposals += 1
        if forced or (
            reward >= threshold
            if method.hard
            else u < math.exp(min(0, (reward - threshold) / method.acceptance_temperature))
        ):
            answer, carried = answer + segment, tail
            rejections, rejected, forced = 0, [], False
        else:
            # A token that had been drawn for the next segment is drawn again too.
            carried = []
            rejected.append((reward, number))
            rejections, all_rejections = rejections + 1, all_rejections + 1
            forced = rejections >= method.most_rejections
            number = max(rejected, key=lambda item: item[0])[1] if forced else all_rejections
    return answer, reward_of(prompt + answer), lm_tokens, rm_tokens


def naive_smc(prompt, key, method, weight=1.0):
    n = method.particles
    texts, log_weights, log_z, step = [[] for _ in range(n)], np.zeros(n), 0.0, 0
    lm_tokens, rm_tokens = len(prompt) - 1, len(prompt)
    while not all(map(is_over, texts)):
        for i, answer in enumerate(texts):
            if is_over(answer):
                continue
            before = weight * reward_of(prompt + answer) if answer else 0.0
            token, log_p, log_q, _ = draw_token(prompt, answer, branch_key(key, i), weight=weight)
            answer.append(token)
            log_weights[i] += log_p + weight * reward_of(prompt + answer) - before - log_q
            lm_tokens, rm_tokens = lm_tokens + 1, rm_tokens + K
        normal = np.exp(log_weights - log_weights.max())
        normal /= normal.sum()
        if 1 / (normal**2).sum() < method.threshold * n and not all(map(is_over, texts)):
            log_z += np.log(np.exp(log_weights).mean())
            places = (event_uniform(key, 1 + step) + np.arange(n)) / n
            kept = np.searchsorted(np.cumsum(normal), places, side="right")
            copies = np.bincount(np.minimum(kept, n - 1), minlength=n)
            free = [i for i in range(n) if copies[i] == 0]
            for i in range(n):
                for _ in range(copies[i] - 1):
                    texts[free.pop(0)] = list(texts[i])
            log_weights[:] = 0.0
        step += 1
    log_z += np.log(np.exp(log_weights).mean())
    chosen = int(
        jax.random.categorical(jax.random.fold_in(key, np.uint32(1 << 31)), np.asarray(log_weights, np.float32))
    )
    return texts[chosen], weight * reward_of(prompt + texts[chosen]), lm_tokens, rm_tokens, log_z


CARDS = Cards(target=1.5, mean=-0.2, deviation=0.4, entropy=3.955, shortest=2, longest=5, most_rejections=3)
METHODS = {
    "best of n": (BestOfN(N), naive_best_of_n),
    "soft best of n": (BestOfN(N, smoothing=0.3), naive_best_of_n),
    "best of n by minimum": (BestOfN(N, by="minimum"), naive_best_of_n),
    "best of n by mean": (BestOfN(N, by="mean"), naive_best_of_n),
    "blockwise": (ChunkBeam(1, 4, 3), naive_chunk_beam),
    "chunk beam": (ChunkBeam(2, 3, 3), naive_chunk_beam),
    "speculative rejection": (SpeculativeRejection(N, 0.5, 3), naive_speculative_rejection),
    "cards": (CARDS, naive_cards),
    "hard cards": (dataclasses.replace(CARDS, hard=True), naive_cards),
    "smc": (TwistedSmc(N, 0.7), naive_smc),
}


ONE_OF_EACH = ("soft best of n", "chunk beam", "speculative rejection", "cards", "smc")


@cache
def found_by(name):
    return run(METHODS[name][0], guided=name == "smc")


@pytest.mark.parametrize("name", METHODS)
def test_a_search_equals_a_naive_loop(name):
    (method, naive), found = METHODS[name], found_by(name)
    for row, (prompt, number) in enumerate(zip(make_prompts(), KEY_NUMBERS, strict=True)):
        if not prompt:
            assert found.answers.lengths[row] == found.tokens.lm[row] == found.tokens.rm[row] == found.kls[row] == 0
            continue
        key = jax.random.fold_in(jax.random.key(0), number)
        answer, score, lm_tokens, rm_tokens, *log_z = naive(prompt, key, method)
        assert answers_of(found)[row] == answer
        assert found.scores[row] == pytest.approx(score, abs=1e-4)
        assert (found.tokens.lm[row], found.tokens.rm[row]) == (lm_tokens, rm_tokens)
        if log_z:
            assert found.log_z[row] == pytest.approx(log_z[0], abs=1e-4)
    assert np.isfinite(found.kls).all()


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_a_prompt_alone_equals_the_prompt_in_a_batch(name):
    found = found_by(name)
    for row in (0, 3):
        one = slice(row, row + 1)
        alone = run(METHODS[name][0], make_prompts()[one], guided=name == "smc", numbers=KEY_NUMBERS[one], width=12)
        assert answers_of(alone)[0] == answers_of(found)[row]
        np.testing.assert_allclose(alone.scores[0], found.scores[row], atol=1e-4)
        np.testing.assert_allclose(alone.kls[0], found.kls[row], atol=1e-4)
        assert (alone.tokens.lm[0], alone.tokens.rm[0]) == (found.tokens.lm[row], found.tokens.rm[row])


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_four_devices_find_what_one_finds(name):
    one = found_by(name)
    with jax.set_mesh(make_mesh("cpu-4,data=2,tensor=2", "decode")):
        four = run(METHODS[name][0], guided=name == "smc")
    assert answers_of(four) == answers_of(one)
    np.testing.assert_allclose(four.scores, one.scores, atol=1e-4)
    jax.tree.map(np.testing.assert_array_equal, four.tokens, one.tokens)


def own_tokens():
    """What the language model draws for the prompts by itself."""
    searcher, params, _ = parts()
    given = inputs(params, (), make_prompts())
    keys = row_keys(0, jnp.array(KEY_NUMBERS, jnp.uint32))
    decoded = decode(searcher.decoder, params[0], (), given.prompts, given.lengths, keys, given.settings, STEPS)
    return [row[:length].tolist() for row, length in zip(decoded.tokens, decoded.lengths, strict=True)]


@pytest.mark.parametrize(
    "method",
    [BestOfN(1), ChunkBeam(1, 1, 3), Cards(target=-1e9), TwistedSmc(1)],
    ids=lambda method: type(method).__name__,
)
def test_a_search_that_has_no_choice_gives_the_language_models_own_tokens(method):
    guided = isinstance(method, TwistedSmc)
    found = run(method, guided=guided, weight=0.0)
    assert answers_of(found) == own_tokens()
    # What remains of the KL is what temperature and candidates do to the language model.
    trace = found.answers.trace
    np.testing.assert_allclose(found.kls, (trace.guided_log_probs - trace.log_probs).sum(axis=1), atol=1e-4)


def test_particles_that_are_not_resampled_nor_twisted_are_samples():
    found = run(TwistedSmc(N, 0.0), guided=True, weight=0.0, t=1.0)
    best = run(BestOfN(N), t=1.0)
    np.testing.assert_array_equal(found.samples.tokens, best.samples.tokens)


def test_one_beam_of_one_long_chunk_is_best_of_n():
    best, beam = found_by("best of n"), run(ChunkBeam(1, N, STEPS))
    assert answers_of(best) == answers_of(beam)
    np.testing.assert_allclose(best.scores, beam.scores, atol=1e-5)


def test_speculative_rejection_that_drops_nothing_is_best_of_n():
    best, kept = found_by("best of n"), run(SpeculativeRejection(N, 0.0, 3))
    assert answers_of(best) == answers_of(kept)
    np.testing.assert_allclose(best.kls, kept.kls, atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, best.tokens, kept.tokens)


def test_combinations_that_do_not_work_are_refused():
    searcher, params, _ = parts(judged=False)
    given = inputs(params, (), make_prompts())
    for method in (BestOfN(2), ChunkBeam(), Cards(), SpeculativeRejection()):
        with pytest.raises(InputError, match=f"{type(method).__name__}: needs a reward model"):
            search(method, Searcher(searcher.decoder), given, STEPS)
    with pytest.raises(InputError, match="give no judges"):
        run(TwistedSmc(2))


@dataclasses.dataclass(frozen=True)
class AddsUp:
    """A guide without ways to read several tokens at once, whose rewards add up over an answer."""

    inner: CausalGuide
    scores_vocabulary = False
    adds_up = True

    def prefill(self, *arguments):
        return self.inner.prefill(*arguments)

    def score(self, *arguments):
        return self.inner.score(*arguments)

    def commit(self, *arguments):
        return self.inner.commit(*arguments)

    def rewind(self, *arguments):
        return self.inner.rewind(*arguments)


@pytest.mark.parametrize("method", [ChunkBeam(1, 3, 4), CARDS], ids=["blockwise", "cards"])
def test_any_guide_can_judge_and_rewards_that_add_up_do(method):
    searcher, params, judge_params = parts()
    searcher = Searcher(searcher.decoder, (AddsUp(searcher.judges[0]),))
    found = jax.device_get(search(method, searcher, inputs(params, judge_params, make_prompts()), STEPS))
    for row, (prompt, answer) in enumerate(zip(make_prompts(), answers_of(found), strict=True)):
        expected = sum(reward_of(prompt + answer[: i + 1]) for i in range(len(answer)))
        assert found.scores[row] == pytest.approx(expected, abs=1e-4)
