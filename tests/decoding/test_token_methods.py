"""Every method that decodes token by token: equal to a naive loop, row by row, and to the language model at weight 0.

The naive loop knows the methods' equations only: it reads every text anew, scores the whole vocabulary, and draws from
softmax(score / T) with the key of the row and step.
"""

import dataclasses
from functools import cache, lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pargs_jax.decoding import loop
from pargs_jax.decoding.guides import (
    AutoregressiveGuide,
    CausalGuide,
    LookAheadGuide,
    NextTokenGuide,
    RatioGuide,
    SimilarityGuide,
)
from pargs_jax.decoding.loop import Decoder, advance, decode, row_keys, start
from pargs_jax.decoding.methods import METHODS
from pargs_jax.decoding.proposals import AllTokens, TopP
from pargs_jax.decoding.state import RowSettings, insert, take
from pargs_jax.errors import InputError
from pargs_jax.mesh import make_mesh
from pargs_jax.models.model import unstack_layers
from pargs_jax.sharding import place_params
from pargs_jax.testing import tiny_model

V, PAD, EOS_IDS, STEPS, K, AHEAD = 61, 60, (0, 1, 2, 3), 7, 5, 3
LENGTHS = (6, 3, 1, 4, 0)  # the last row is filler
NUMBERS = (11, 12, 13, 14, 0)
PROMPTS = [np.random.default_rng(length).integers(6, PAD, length).tolist() for length in LENGTHS]


@lru_cache
def model(name):
    """The models, each of another kind or layout than the language model."""
    if name == "lm":
        return tiny_model("gpt2")
    if name == "scalar":
        return unstack_layers(*tiny_model("llama", "reward", seed=1, std=0.3))
    if name == "baseline":
        return tiny_model("gpt2", "reward", seed=5, std=0.3)
    family, seed = {"one": ("llama", 2), "other": ("opt", 3), "table": ("gpt2", 4)}[name]
    return unstack_layers(*tiny_model(family, seed=seed))


GUIDES = {
    "scalar": CausalGuide,
    "table": lambda m: NextTokenGuide(m, V),
    "one": lambda m: AutoregressiveGuide(m, V),
    "other": lambda m: AutoregressiveGuide(m, V),
    "lm": SimilarityGuide,
}


def guide(name):
    """A guide and its params, by the name of its model; two names are a ratio's, or an aligned model's and judges'."""
    if name[-1] in ("scalar", "baseline"):
        aligned, *judges = (model(part)[0] for part in name)
        return LookAheadGuide(aligned, tuple(judges), AHEAD, EOS_IDS), tuple(model(part)[1] for part in name)
    if isinstance(name, tuple):
        parts = [guide(part) for part in name]
        return RatioGuide(*(part for part, _ in parts)), tuple(params for _, params in parts)
    return GUIDES[name](model(name)[0]), model(name)[1]


@dataclasses.dataclass(frozen=True)
class Case:
    """A method with its guides; numbers that differ from its own make a clear difference on tiny models."""

    method: str
    guides: tuple = ()
    weights: tuple[float, ...] = ()
    temperature: float = 1.0
    top_p: float | None = None

    @property
    def decoder(self):
        method = METHODS[self.method]
        guides = tuple(guide(name)[0] for name in self.guides)
        in_vocabulary = all(part.scores_vocabulary for part in guides)
        every = method.candidates == "all" and in_vocabulary
        proposer = method.proposer(None if every else K, top_p=self.top_p, scores_vocabulary=in_vocabulary)
        return Decoder(
            model("lm")[0], guides, proposer, method.rule, EOS_IDS, PAD,
            reward_form=method.reward_form, keeps_rest=method.keeps_rest,
        )  # fmt: skip

    @property
    def params(self):
        return tuple(guide(name)[1] for name in self.guides)


CASES = {
    "top_p": Case("top_p", temperature=1.5, top_p=0.7),
    "contrastive": Case("contrastive", ("lm",), (0.6,)),
    "rad": Case("rad", ("scalar",), (3.0,)),
    "farma, scalar": Case("farma", ("scalar",), (2.0,)),
    "farma": Case("farma", ("table",), (2.0,), temperature=0.8),
    "cd, scalar": Case("cd", ("scalar",), (2.0,)),
    "cd": Case("cd", ("table",), (2.0,)),
    "vas": Case("vas", ("scalar",), (2.0,), temperature=0.7),
    "vas, greedy": Case("vas", ("scalar",), (2.0,), temperature=0.0),
    "vas, table": Case("vas", ("table",), (2.0,)),
    "genarm": Case("genarm", ("one",), (1.0,)),
    "genarm, two": Case("genarm", ("one", "other"), (0.7, 0.4), temperature=1.3),
    "expert_ratio": Case("expert_ratio", (("one", "other"),), (1.5,)),
    "transfer_q": Case("transfer_q", (("one", "scalar"),), (1.0,)),
    "transfer_q, indirect": Case("transfer_q", (("other", "scalar", "baseline"),), (1.0,)),
}
GUIDED = [name for name, case in CASES.items() if case.guides]


def padded(prompts, width=None):
    width = width or max(map(len, prompts))
    ids = np.full((len(prompts), width), 7, np.int32)  # padding is a real token's id
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = prompt
    return ids, np.array(list(map(len, prompts)), np.int32)


def settings(case, rows, **changes):
    wanted = {"weights": case.weights, "temperature": case.temperature, "candidates": V, "max_new_tokens": STEPS}
    return RowSettings.alike(rows, **{**wanted, **changes})


def run(case, prompts=PROMPTS, numbers=NUMBERS, width=None, decoder=None, row_settings=None, **changes):
    decoded = decode(
        decoder or case.decoder, model("lm")[1], case.params, *padded(prompts, width),
        row_keys(0, jnp.asarray(numbers, jnp.uint32)), row_settings or settings(case, len(prompts), **changes), STEPS,
    )  # fmt: skip
    return jax.device_get(decoded)


finished_runs = lru_cache(lambda name: run(CASES[name]))


@partial(jax.jit, static_argnums=0)
def states(network, params, texts):
    hidden = network.encode(params, texts)
    return hidden, network.rewards(params, hidden) if network.head == "reward" else network.logits(params, hidden)


@cache
def read(text):
    """What the models say of a text with each token of the vocabulary appended, from whole passes, `[V]`."""
    ids = np.zeros((V, max(LENGTHS) + STEPS + 1), np.int32)
    ids[:, : len(text)] = text
    ids[:, len(text)] = np.arange(V)
    found = {name: jax.device_get(states(*model(name), ids)) for name in ("lm", "scalar", "one", "other", "table")}
    at = len(text) - 1
    said = {name: np.float64(numbers[0, at]) for name, (_, numbers) in found.items() if name != "scalar"}
    said = {name: x if name == "table" else x - np.logaddexp.reduce(x) for name, x in said.items()}
    said["scalar"] = np.float64(found["scalar"][1][:, at + 1])
    hidden = np.float64(found["lm"][0])
    unit = hidden / np.linalg.norm(hidden, axis=-1, keepdims=True)
    said["similarity"] = np.einsum("vd,vsd->vs", unit[:, at + 1], unit[:, : at + 1]).max(axis=1)
    return said


@cache
def look_ahead(text, names):
    """The reward of a text with each token, once the aligned model has gone on from there, `[V]`."""
    ids = np.zeros((V, max(LENGTHS) + STEPS + 1 + AHEAD), np.int32)
    ids[:, : len(text)] = text
    ids[:, len(text)] = np.arange(V)
    ends = np.full(V, len(text))  # the last token of each
    for at in range(len(text), len(text) + AHEAD):
        goes_on = (ends == at) & ~np.isin(ids[:, at], EOS_IDS)
        logits = np.asarray(states(*model(names[0]), ids)[1][:, at])
        ids[:, at + 1] = np.where(goes_on, logits.argmax(axis=1), 0)
        ends = ends + goes_on
    target, *baseline = (np.float64(states(*model(name), ids)[1])[np.arange(V), ends] for name in names[1:])
    return np.exp(0.5 * (target - baseline[0])) * target if baseline else target


def naive_reward(name, text):
    """What a guide says of a text with each token appended."""
    if name == "lm":
        return -read(text)["similarity"]
    if isinstance(name, str):
        return read(text)[name]
    if name[-1] in ("scalar", "baseline"):
        return look_ahead(text, name)
    return read(text)[name[0]] - read(text)[name[1]]


def naive_scores(case, text):
    """A method's equation: scores of the whole vocabulary, and each guide's rewards."""
    said = read(text)
    log_p = said["lm"]
    rewards = [naive_reward(name, text) for name in case.guides]
    top = np.argsort(-log_p)[:K]
    among = np.isin(np.arange(V), top)
    total = sum(w * r for w, r in zip(case.weights, rewards, strict=True)) if rewards else np.zeros(V)
    match case.method:
        case "top_p":
            order = np.argsort(-log_p)
            count = np.searchsorted(np.cumsum(np.exp(log_p[order])), case.top_p) + 1
            scores = np.where(np.isin(np.arange(V), order[:count]), log_p, -np.inf)
        case "contrastive":
            mixed = 0.4 * np.exp(log_p) - 0.6 * said["similarity"]
            scores = np.where(np.arange(V) == np.where(among, mixed, -np.inf).argmax(), 0.0, -np.inf)
        case "rad":
            scores = np.where(among, log_p + case.weights[0] * np.clip(rewards[0], 0, 1), -np.inf)
        case "vas":
            scores = log_p + np.where(among, case.weights[0] * (rewards[0] - rewards[0][top].mean()), 0.0)
        case "farma" if case.guides == ("table",):
            fused = log_p + total
            scores = np.where(fused >= np.sort(fused)[-K], fused, -np.inf)
        case "transfer_q":
            best = np.where(among, log_p + total, -np.inf).argmax()
            scores = np.where(np.arange(V) == best, 0.0, -np.inf)
        case "farma" | "cd" if case.guides == ("scalar",):
            scores = np.where(among, log_p + total, -np.inf)
        case _:
            scores = log_p + total
    return scores, rewards


def drawn(case, scores, key):
    """The token of a step: `categorical` over the whole vocabulary, whatever the candidates are."""
    if case.temperature == 0 or case.method in ("contrastive", "transfer_q"):
        return int(scores.argmax())
    return int(jax.random.categorical(key, jnp.asarray(scores / case.temperature, jnp.float32)))


def naive(case, prompt, number):
    key = jax.random.fold_in(jax.random.key(0), number)
    row = []
    while prompt and len(row) < STEPS and not (row and row[-1][0] in EOS_IDS):
        text = tuple(prompt + [step[0] for step in row])
        said = read(text)
        scores, rewards = naive_scores(case, text)
        token = drawn(case, scores, jax.random.fold_in(key, len(row)))
        if case.temperature == 0:
            log_q = np.where(np.arange(V) == scores.argmax(), 0.0, -np.inf)
        else:
            log_q = scores / case.temperature - np.logaddexp.reduce(scores / case.temperature)
        q, real = np.exp(log_q), log_q > -np.inf
        kl = (q[real] * (log_q[real] - said["lm"][real])).sum()
        row.append((token, said["lm"][token], log_q[token], kl, [r[token] for r in rewards]))
    return row


@pytest.mark.parametrize("name", CASES)
def test_scan_equals_a_naive_loop(name):
    decoded = finished_runs(name)
    for row, (prompt, number) in enumerate(zip(PROMPTS, NUMBERS, strict=True)):
        expected = naive(CASES[name], prompt, number)
        assert decoded.tokens[row].tolist() == [step[0] for step in expected] + [PAD] * (STEPS - len(expected))
        for found, part in ((decoded.trace.log_probs, 1), (decoded.trace.guided_log_probs, 2), (decoded.trace.kls, 3)):
            np.testing.assert_allclose(found[row, : len(expected)], [step[part] for step in expected], atol=1e-4)
        for j in range(len(CASES[name].guides)):
            given = [step[4][j] for step in expected]
            np.testing.assert_allclose(decoded.trace.rewards[row, : len(expected), j], given, atol=1e-4)
            total = 0.0 if not given else sum(given) if CASES[name].decoder.guides[j].adds_up else given[-1]
            assert decoded.rewards[row, j] == pytest.approx(total, abs=1e-3)


def test_the_cases_differ_and_end_in_both_ways():
    runs = [finished_runs(name) for name in CASES]
    assert len({decoded.tokens.tobytes() for decoded in runs}) > len(CASES) - 3
    assert any(decoded.finished.any() for decoded in runs) and any((decoded.lengths == STEPS).any() for decoded in runs)
    # What VAS keeps beside its candidates is drawn, and told apart from them.
    outside = [v for row in finished_runs("vas").trace.guided_log_probs for v in row if v]
    assert min(outside) < -3


@pytest.mark.parametrize("name", CASES)
def test_a_row_alone_equals_the_row_in_a_batch(name):
    batch = finished_runs(name)
    for row in (0, 2):
        alone = run(CASES[name], PROMPTS[row : row + 1], NUMBERS[row : row + 1], width=9)
        np.testing.assert_array_equal(alone.tokens[0], batch.tokens[row])
        np.testing.assert_allclose(alone.trace.rewards[0], batch.trace.rewards[row], atol=1e-4)
        np.testing.assert_allclose(alone.trace.kls[0], batch.trace.kls[row], atol=1e-4)


def plain(case, **changes):
    """The language model's own answers, drawn as the method draws at weight 0."""
    decoder = case.decoder
    proposer = AllTokens() if decoder.keeps_rest else decoder.proposer
    decoder = dataclasses.replace(decoder, guides=(), proposer=proposer, keeps_rest=False, reward_form="plain")
    if case.method == "contrastive":
        decoder = dataclasses.replace(decoder, rule=METHODS["greedy"].rule)
    return run(dataclasses.replace(case, guides=(), weights=()), decoder=decoder, **changes)


@pytest.mark.parametrize("name", GUIDED)
def test_weight_zero_is_the_language_models_own_answer(name):
    case = CASES[name]
    expected = plain(case)
    found = run(case, weights=[0.0] * len(case.weights))
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_allclose(found.trace.kls, expected.trace.kls, atol=1e-5)
    np.testing.assert_allclose(found.trace.guided_log_probs, expected.trace.guided_log_probs, atol=1e-5)
    if name != "vas, greedy":
        assert (finished_runs(name).tokens != expected.tokens).any()


@pytest.mark.parametrize("name", ["farma", "vas", "genarm"])
def test_the_gate_is_guided_at_zero_and_unguided_at_infinity(name):
    case = CASES[name]
    np.testing.assert_array_equal(run(case, gate_entropy=0.0).tokens, finished_runs(name).tokens)
    np.testing.assert_array_equal(run(case, gate_entropy=np.inf).tokens, plain(case).tokens)
    # Between the two, each step by its own entropy, and each row by its own threshold.
    entropies = finished_runs(name).trace.entropies
    median = np.median(entropies[entropies > 0])
    gates = np.asarray([median, 0.0, np.inf, median, 0.0], np.float32)
    found = run(case, row_settings=settings(case, 5)._replace(gate_entropy=jnp.asarray(gates)))
    unguided = dataclasses.replace(case, weights=(0.0,) * len(case.weights))
    guided_steps = []
    for row, prompt in enumerate(PROMPTS[:4]):
        text = list(prompt)
        for step in range(found.lengths[row]):
            is_guided = bool(found.trace.entropies[row, step] >= gates[row])
            scores, _ = naive_scores(case if is_guided else unguided, tuple(text))
            log_q = scores / case.temperature - np.logaddexp.reduce(scores / case.temperature)
            token = int(found.tokens[row, step])
            assert found.trace.guided_log_probs[row, step] == pytest.approx(log_q[token], abs=1e-4)
            guided_steps += [is_guided] if gates[row] == median else []
            text.append(token)
    assert len(set(guided_steps)) == 2


def test_dividing_by_the_sum_of_weights_with_t_one_over_it_is_the_plain_sum():
    """GenARM's code draws from (log p + a log pi_r) / (1 + a) at temperature 1 / (1 + a): the plain sum at 1."""
    said, a = read(tuple(PROMPTS[0])), 1.5
    product = np.exp(said["lm"]) * np.exp(said["one"]) ** a
    divided = (said["lm"] + a * said["one"]) / (1 + a) / (1 / (1 + a))
    np.testing.assert_allclose(np.exp(divided) / np.exp(divided).sum(), product / product.sum(), atol=1e-12)
    case = dataclasses.replace(CASES["genarm"], weights=(a,))
    decoder = dataclasses.replace(case.decoder, keeps_candidates=True)
    found = run(case, decoder=decoder).trace.candidates
    np.testing.assert_array_equal(found.tokens[0, 0], np.arange(V))
    np.testing.assert_allclose(np.exp(found.guided_log_probs[0, 0]), product / product.sum(), atol=1e-5)


def test_every_row_has_weights_of_its_own():
    case = CASES["genarm, two"]
    weights = jnp.asarray([[0.7, 0.4], [2.0, 0.0], [0.0, 1.0], [0.0, 0.0], [1.0, 1.0]])
    mixed = run(case, row_settings=settings(case, 5)._replace(weights=weights))
    for row in range(4):
        alone = run(case, PROMPTS[row : row + 1], NUMBERS[row : row + 1], width=9, weights=weights[row])
        np.testing.assert_array_equal(alone.tokens[0], mixed.tokens[row])


def test_the_nucleus_is_the_fewest_tokens_and_mass_one_is_all():
    logits = jnp.log(jnp.asarray([[0.1, 0.4, 0.2, 0.2, 0.1]]))
    counts = jnp.asarray([5])

    def nucleus(mass):
        return np.flatnonzero(TopP(mass)(logits, logits, counts)[1][0]).tolist()

    assert [nucleus(mass) for mass in (0.1, 0.39, 0.41, 0.75, 1.0)] == [[1], [1], [1, 2, 3], [1, 2, 3], [0, 1, 2, 3, 4]]
    with pytest.raises(InputError, match="top_p: got 0, must be above 0 and at most 1"):
        TopP(0)


@pytest.mark.parametrize("name", ["contrastive", "vas", "farma", "genarm, two", "expert_ratio"])
def test_rows_that_are_copied_replaced_and_taken_back_go_on_as_they_would_have(name):
    case, expected = CASES[name], finished_runs(name)
    decoder, params = case.decoder, (model("lm")[1], case.params)
    keys = row_keys(0, jnp.asarray(NUMBERS, jnp.uint32))
    state = start(decoder, params, *padded(PROMPTS), keys, settings(case, 5), STEPS)
    state = advance(decoder, params, state, 4)
    other = start(decoder, params, *padded(PROMPTS[2:3]), keys[2:3], settings(case, 1), STEPS)
    state = take(state, jnp.asarray([1, 0, 3, 3, 4]))
    state = insert(state, other, jnp.asarray([2]))
    state = decoder.rewind(state, jnp.asarray([2, 0, 0, 3, 0]))
    found = jax.device_get(decoder.read(advance(decoder, params, state, STEPS)))
    np.testing.assert_array_equal(found.tokens[:4], expected.tokens[[1, 0, 2, 3]])
    np.testing.assert_allclose(found.trace.rewards[:4], expected.trace.rewards[[1, 0, 2, 3]], atol=1e-4)


def placed(params):
    return tuple(placed(part) if isinstance(part, tuple) else place_params(part) for part in params)


@pytest.mark.parametrize("name", ["top_p", "contrastive", "vas", "farma", "genarm, two", "expert_ratio"])
def test_four_devices_equal_one(name):
    case = CASES[name]
    mesh = make_mesh("cpu-4,data=2,tensor=2", "decode")
    with jax.set_mesh(mesh):
        prompts, lengths = padded([*PROMPTS, []])
        found = decode(
            case.decoder, place_params(model("lm")[1]), placed(case.params), prompts, lengths,
            row_keys(0, jnp.asarray([*NUMBERS, 0], jnp.uint32)), settings(case, 6), STEPS,
        )  # fmt: skip
        found = jax.device_get(found)
    np.testing.assert_array_equal(found.tokens[:5], finished_runs(name).tokens)
    np.testing.assert_allclose(found.trace.kls[:5], finished_runs(name).trace.kls, atol=1e-4)


def test_a_smaller_vocabulary_than_the_language_models_is_refused():
    with pytest.raises(InputError, match="scores 61 tokens, the language model proposes 64; they must share a vocab"):
        AutoregressiveGuide(model("one")[0], 64)


def test_vas_with_every_token_a_candidate_has_no_rest():
    """If all tokens are candidates, centring subtracts a constant and changes nothing."""
    case = dataclasses.replace(CASES["vas, table"], temperature=0.7)
    decoder = dataclasses.replace(case.decoder, proposer=METHODS["vas"].proposer(V))
    plain_sum = dataclasses.replace(case.decoder, proposer=AllTokens(), reward_form="plain", keeps_rest=False)
    found, expected = run(case, decoder=decoder), run(case, decoder=plain_sum)
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_allclose(found.trace.kls, expected.trace.kls, atol=1e-5)
    assert np.isfinite(found.trace.kls).all() and found.trace.kls.max() > 0.01


def test_the_trace_of_many_candidates_has_the_chosen_and_the_likeliest(monkeypatch):
    monkeypatch.setattr(loop, "MAX_TRACED", 4)
    case = CASES["genarm"]
    found = run(case, decoder=dataclasses.replace(case.decoder, keeps_candidates=True, pad_id=59))
    candidates = found.trace.candidates
    assert candidates.tokens.shape == (5, STEPS, 4)
    scores, _ = naive_scores(case, tuple(PROMPTS[0]))
    chosen = found.tokens[0, 0]
    others = [v for v in np.argsort(-scores) if v != chosen][:3]
    assert candidates.tokens[0, 0].tolist() == [chosen, *others]
    assert candidates.guided_log_probs[0, 0, 0] == found.trace.guided_log_probs[0, 0]
