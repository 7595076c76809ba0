"""From prompts to answers: what an answer says of itself is true, and does not depend on its batch."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pargs_jax.data.preferences import Prompt
from pargs_jax.decoding.methods import METHODS
from pargs_jax.errors import InputError
from pargs_jax.generation import reward_models, scheduler
from pargs_jax.generation.reward_models import padded_width
from pargs_jax.generation.session import Session, Settings
from pargs_jax.models.encoder import EncoderModel
from pargs_jax.models.hf import load_model, save_model
from pargs_jax.models.prefix_causal import PrefixCausalModel
from pargs_jax.testing import TINY_DEBERTA, random_params, tiny_tokenizer
from pargs_jax.text.prompts import get_form
from pargs_jax.text.tokenization import TextTokenizer

PROMPTS = [Prompt(str(i), text) for i, text in enumerate(("Hi", "My lamp broke. What now?", "", "Thank you, Eva."))]
TOKENS = 12


@pytest.fixture(scope="module")
def session(lm, rm):
    return Session(lm, [rm])


def answers(session, prompts=PROMPTS, method="pargs", **changes):
    settings = Settings(METHODS[method], **{"max_new_tokens": TOKENS} | changes)
    return {answer.id: answer for batch in session.answer(prompts, settings) for answer in batch}


@pytest.fixture(scope="module")
def rewards_of(rm):
    """By one full pass: the rewards of all prefixes of a text."""
    model, params = load_model(rm, "reward")[:2]
    read = jax.jit(lambda tokens: model.rewards(params, model.encode(params, tokens))[0])
    return lambda ids: np.asarray(read(jnp.asarray([ids + [0] * (64 - len(ids))])))[: len(ids)]


@pytest.fixture(scope="module")
def log_probs_of(lm):
    """By one full pass: the log-probabilities of all tokens after each prefix of a text."""
    model, params = load_model(lm, "vocabulary")[:2]
    read = jax.jit(lambda tokens: jax.nn.log_softmax(model.logits(params, model.encode(params, tokens)[0])))
    return lambda ids: np.asarray(read(jnp.asarray([ids + [0] * (64 - len(ids))])))[: len(ids)]


@pytest.fixture(scope="module")
def guided(session):
    return answers(session, temperature=3.0)


def without_time(answer):
    log_probability, kl = round(answer.log_probability, 3), round(answer.kl, 3)
    return dataclasses.replace(answer, seconds=0.0, log_probability=log_probability, kl=kl, guide_rewards=())


def test_an_answer_does_not_depend_on_its_batch(session, guided):
    assert guided.keys() == {"0", "1", "2", "3"}
    alone = answers(session, PROMPTS[::-1], temperature=3.0, batch_size=1)
    for prompt_id, answer in guided.items():
        assert without_time(alone[prompt_id]) == without_time(answer)
        assert alone[prompt_id].guide_rewards == pytest.approx(answer.guide_rewards, abs=1e-4)
    assert answers(session, temperature=3.0, seed=1)["1"].response != guided["1"].response
    assert len({answer.response for answer in guided.values()}) == 4


def test_a_stream_gives_the_same_answers_piece_by_piece(session, guided):
    settings = Settings(METHODS["pargs"], max_new_tokens=TOKENS, temperature=3.0)
    pieces = list(session.stream(PROMPTS, settings))
    for prompt_id, answer in guided.items():
        mine = [piece for piece in pieces if piece.id == prompt_id]
        assert "".join(piece.text for piece in mine) == answer.response
        assert [piece.answer is None for piece in mine] == [True] * (len(mine) - 1) + [False]
        assert without_time(mine[-1].answer) == without_time(answer)
    assert len(pieces) > len(PROMPTS)
    with pytest.raises(InputError, match="is a search, whose answers cannot be streamed"):
        next(session.stream(PROMPTS, Settings(METHODS["best_of_n"])))


def test_an_answer_ends_before_the_first_text_that_ends_it(session, guided):
    stop = (guided["1"].response[5:8], guided["3"].response[2:4], "never")
    found = answers(session, temperature=3.0, stop=stop)
    for prompt_id, whole in guided.items():
        answer = found[prompt_id]
        at = min((place for each in stop if (place := whole.response.find(each)) >= 0), default=None)
        assert answer.response == whole.response[:at]
        if at is not None:
            assert answer.finish_reason == "stop" and answer.tokens <= whole.tokens
            assert answer.kl <= whole.kl + 1e-3
    assert found["1"].tokens < guided["1"].tokens
    with pytest.raises(InputError, match="stop: got an empty text"):
        Settings(METHODS["pargs"], stop=("",))
    with pytest.raises(InputError, match="stop: is not supported"):
        Settings(METHODS["best_of_n"], stop=("a",))


def test_the_numbers_of_an_answer_are_those_of_full_passes(session, guided, log_probs_of, rewards_of):
    """An independent check: greedy answers, each token from a full pass."""
    greedy = answers(session, method="greedy")
    for prompt in PROMPTS:
        answer = greedy[prompt.id]
        prompt_ids = session.tokenizer.encode_prompt(prompt.text)
        tokens, log_probability = list(prompt_ids), 0.0
        while len(tokens) < len(prompt_ids) + TOKENS and tokens[-1] != session.tokenizer.eos_id:
            log_probs = log_probs_of(tokens)[-1]
            tokens.append(int(log_probs.argmax()))
            log_probability += float(log_probs.max())
        answer_ids = tokens[len(prompt_ids) :]
        assert answer.tokens == len(answer_ids)
        assert answer.response == session.tokenizer.decode_answer(prompt_ids, answer_ids)
        assert answer.finish_reason == ("stop" if answer_ids[-1] == session.tokenizer.eos_id else "length")
        assert answer.log_probability == pytest.approx(log_probability, abs=1e-3)
        assert answer.kl == pytest.approx(-log_probability, abs=1e-3)  # all probability on one token
        assert answer.guide_rewards == pytest.approx([float(rewards_of(tokens)[-1])], abs=1e-4)
    assert guided["1"].prompt == PROMPTS[1].text


def test_in_bfloat16_numbers_are_those_of_float32_up_to_its_rounding(session, lm, rm, log_probs_of, rewards_of):
    """A number has 8 bits there, a part in 256; log-probabilities here are about 6, and rewards about 1."""
    rounded = Session(lm, [rm], dtype="bfloat16")
    errors = []
    for answer in answers(rounded, method="pargs_greedy", k=4, trace="candidates").values():
        text = rounded.tokenizer.encode_prompt(answer.prompt)
        for token in answer.trace.tokens:
            candidates = [each.id for each in token.candidates]
            log_probs = log_probs_of(text)[-1]
            rewards = np.array([rewards_of([*text, each])[-1] for each in candidates])
            errors += (log_probs[candidates] - [each.log_p for each in token.candidates]).tolist()
            errors += (rewards - [each.rewards[0] for each in token.candidates]).tolist()
            # The token chosen is the best one, or one that rounding cannot tell from it; so are the candidates.
            scores = log_probs[candidates] + rewards
            assert scores[candidates.index(token.id)] > scores.max() - 0.1
            assert log_probs[candidates].min() > np.sort(log_probs)[-4] - 0.1
            text.append(token.id)
    assert 1e-4 < np.abs(errors).max() < 0.05  # rounded indeed, and no more than that
    assert {leaf.dtype for leaf in jax.tree.leaves(rounded.reward_models[0].params)} == {jnp.dtype("bfloat16")}


def test_each_sample_of_a_prompt_is_a_separate_answer(session, guided):
    """The first is the one that there is without others, in any batch; those that are there already are left out."""
    settings = Settings(METHODS["pargs"], max_new_tokens=TOKENS, temperature=3.0, n=3, batch_size=5)
    found = [answer for batch in session.answer(PROMPTS, settings) for answer in batch]
    by_row = {(answer.id, answer.sample): answer.response for answer in found}
    assert by_row.keys() == {(prompt.id, sample) for prompt in PROMPTS for sample in range(3)}
    assert all(by_row[prompt_id, 0] == answer.response for prompt_id, answer in guided.items())
    assert len(set(by_row.values())) == 12
    answered = np.array([[True, False, True], [True] * 3, [False, True, True], [True] * 3])
    left = [answer for batch in session.answer(PROMPTS, settings, answered) for answer in batch]
    assert {(answer.id, answer.sample): answer.response for answer in left} == {
        row: by_row[row] for row in (("0", 1), ("2", 0))
    }
    with pytest.raises(
        InputError, match=r"\An: got 2, but greedy decoding does not sample, so all answers would be the same"
    ):
        Settings(METHODS["greedy"], n=2)


@dataclasses.dataclass(frozen=True)
class EveryToken:
    """A guide of a user: a token is worth its id, in hundredths; an answer, the sum of its tokens."""

    adds_up: bool
    scores_vocabulary = False

    def prefill(self, params, prompts, capacity, own_prompts):
        return ()

    def score(self, params, state, text, candidates):
        return candidates / 100, ()

    def commit(self, params, state, pending, chosen):
        return state

    def rewind(self, state, text, dropped):
        return state


@pytest.mark.parametrize("adds_up", [True, False])
def test_the_reward_of_an_answer_is_the_sum_or_the_last_as_its_guide_says(lm, rm, adds_up, monkeypatch):
    session = Session(lm, [rm])
    monkeypatch.setattr(type(session.reward_models[0]), "guide", lambda *_: EveryToken(adds_up))
    for answer in answers(session, trace="tokens", temperature=3.0).values():
        worth = [token.id / 100 for token in answer.trace.tokens]
        assert [token.rewards for token in answer.trace.tokens] == [pytest.approx((each,)) for each in worth]
        assert answer.guide_rewards == answer.trace.guide_rewards
        assert answer.guide_rewards == pytest.approx([sum(worth) if adds_up else worth[-1]])


@dataclasses.dataclass(frozen=True)
class OneIsNotANumber(EveryToken):
    """Of the candidates, the least likely."""

    def score(self, params, state, text, candidates):
        return jnp.where(jnp.arange(candidates.shape[1]) == candidates.shape[1] - 1, jnp.nan, 0.0) + 0 * candidates, ()


def test_a_candidates_reward_that_is_not_finite_ends_the_run_also_where_another_is_chosen(lm, rm, monkeypatch):
    session = Session(lm, [rm])
    monkeypatch.setattr(type(session.reward_models[0]), "guide", lambda *_: OneIsNotANumber(True))
    with pytest.raises(InputError, match=r"prompt '2': a (candidate's reward|reward of .*) is not finite"):
        answers(session)


def test_prompts_are_padded_to_few_widths():
    widths = {length: padded_width(length) for length in range(1, 4097)}
    assert all(length <= width < length + max(16, min(64, length)) for length, width in widths.items())
    assert set(widths.values()) == {16, 32, *range(64, 4097, 64)}


def test_prompts_of_all_lengths_compile_once_a_width(lm):
    session = Session(lm)
    prompts = [Prompt(str(length), "1 " * length) for length in range(24)]
    settings = Settings(METHODS["greedy"], max_new_tokens=1, batch_size=1)
    lengths = {len(session.tokenizer.encode_prompt(prompt.text)) for prompt in prompts}
    assert len(lengths) == 24 and len(list(session.answer(prompts, settings))) == 24
    assert session._programs.count(scheduler._start) == len({padded_width(length) for length in lengths}) == 3
    assert session._programs.count(scheduler._advance) == 2  # for caches of 64 and of 128 slots


def test_two_reward_models_weigh_in_separately(lm, rm, save_tiny):
    both = Session(lm, [rm, save_tiny("reward", seed=2)])
    one = answers(Session(lm, [rm]), weights=(2.0,))
    with_nothing = answers(both, weights=(2.0, 0.0))
    assert [a.response for a in with_nothing.values()] == [a.response for a in one.values()]
    assert all(len(answer.guide_rewards) == 2 for answer in with_nothing.values())
    assert [a.response for a in answers(both, weights=(2.0, 9.0)).values()] != [a.response for a in one.values()]


def test_a_reward_model_with_another_tokenizer_scores_the_text(lm, rm, rewards_of, monkeypatch):
    """Taken for foreign, the same tokenizer leads to the rewards of the answers' texts, as it splits them."""
    shared = answers(Session(lm, [rm]), method="args", max_new_tokens=1)
    monkeypatch.setattr(TextTokenizer, "same_vocabulary", lambda *_: False)
    session = Session(lm, [rm])
    assert session.reward_models[0].retokeniser is not None
    for method in ("args", "greedy"):
        for prompt_id, answer in answers(session, method=method).items():
            prompt = PROMPTS[int(prompt_id)].text
            ids = session.tokenizer.encode_answer(answer.response, starts_text=not prompt)
            ids += [session.tokenizer.eos_id] * (answer.finish_reason == "stop")
            expected = rewards_of(session.tokenizer.encode_prompt(prompt) + ids)[-1]
            assert answer.guide_rewards == pytest.approx([expected], abs=1e-4)
    # The texts of single tokens are split into the same tokens, so that both ways must agree.
    alike = [shared[prompt_id] for prompt_id in "013"]
    assert all(len(session.tokenizer.encode_answer(answer.response)) == answer.tokens for answer in alike)
    found = answers(session, method="args", max_new_tokens=1)
    for answer in alike:
        assert found[answer.id].response == answer.response
        assert found[answer.id].guide_rewards == pytest.approx(answer.guide_rewards, abs=1e-4)


def test_answers_are_decoded_again_when_texts_exceed_the_answer_width(lm, tmp_path, monkeypatch):
    """To the same answers; or, where a model has no positions for them, to one line."""
    tokenizer = tiny_tokenizer()
    config = dataclasses.replace(TINY_DEBERTA, vocab_size=tokenizer.vocab_size, attention="prefix_causal")
    model = PrefixCausalModel(config)
    save_model(tmp_path, model, random_params(model))
    tokenizer.save(tmp_path)
    session = Session(lm, [str(tmp_path)])
    longest = max(len(tokenizer.encode_prompt(prompt.text)) for prompt in PROMPTS)
    expected = answers(session)
    monkeypatch.setattr(reward_models, "first_answer_width", lambda _: 2)
    assert [a.response for a in answers(session).values()] == [a.response for a in expected.values()]
    monkeypatch.setattr(reward_models, "table_of_positions", lambda _: longest + 4)
    with pytest.raises(
        InputError, match=r"needs \d+ of its tokens, but after a prompt of \d+ only \d+ fit its context;"
    ):
        answers(session)


@pytest.mark.parametrize("attention", ["full", "prefix_causal"])
def test_a_deberta_guides_by_the_text(lm, tmp_path, attention):
    """The rewards of guided answers are those of the finished texts, read in one pass."""
    tokenizer = tiny_tokenizer()
    config = dataclasses.replace(TINY_DEBERTA, vocab_size=tokenizer.vocab_size, attention=attention)
    model = (EncoderModel if attention == "full" else PrefixCausalModel)(config)
    save_model(tmp_path, model, random_params(model))
    tokenizer.save(tmp_path)
    session = Session(lm, [str(tmp_path)])
    (reward_model,) = session.reward_models
    for prompt_id, answer in answers(session, method="pargs_greedy").items():
        prompts = reward_model.pad_prompts([tokenizer.encode_prompt(PROMPTS[int(prompt_id)].text)], 1)
        ended = answer.finish_reason == "stop"
        nothing = np.zeros((1, 1), np.int32), np.zeros(1, np.int32)
        expected = reward_model.score(prompts, *nothing, [answer.response], [ended])
        assert answer.guide_rewards == pytest.approx(expected.tolist(), abs=1e-4)


CHAT = [
    Prompt("0", "", ({"role": "user", "content": "My lamp broke."},)),
    Prompt("1", "", ({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"},
                     {"role": "user", "content": "What now?"})),
]  # fmt: skip


def with_template(folder, template, tmp_path):
    """A copy of a model's folder whose tokenizer has this chat template."""
    copy = shutil.copytree(folder, tmp_path / template[:2])
    (copy / "chat_template.jinja").write_text("{% for turn in messages %}" + template + "{% endfor %}")
    return str(copy)


@pytest.mark.parametrize("shares_tokens", [True, False])
def test_each_model_reads_a_conversation_in_its_own_chat_template(lm, rm, shares_tokens, tmp_path, monkeypatch):
    """A reward model's rewards are those of the texts that its own template makes."""
    if not shares_tokens:
        monkeypatch.setattr(TextTokenizer, "same_vocabulary", lambda *_: False)
    session = Session(
        with_template(lm, "L {{turn.role}}: {{turn.content}}\n", tmp_path),
        [with_template(rm, "R {{turn.content}}|", tmp_path)],
    )
    prompts = [dataclasses.replace(prompt, text=session.tokenizer.render_chat(prompt.turns)) for prompt in CHAT]
    assert prompts[0].text == "L user: My lamp broke.\n"
    (reward_model,) = session.reward_models
    assert (reward_model.retokeniser is None) == shares_tokens
    written, decode_answer = {}, session.tokenizer.decode_answer

    def noted(prompt_ids, ids):
        text = decode_answer(prompt_ids, ids)
        written[text] = ids
        return text

    monkeypatch.setattr(session.tokenizer, "decode_answer", noted)
    for method in ("pargs_greedy", "greedy"):
        for prompt_id, answer in answers(session, prompts, method=method).items():
            own_prompt = {"0": "R My lamp broke.|", "1": "R Hi|R Hello|R What now?|"}[prompt_id]
            if shares_tokens:
                ids = written[answer.response]
            else:
                ids = reward_model.tokenizer.encode_answer(answer.response)
                ids += [reward_model.tokenizer.eos_id] * (answer.finish_reason == "stop")
            text = [*reward_model.tokenizer.encode_prompt(own_prompt), *ids]
            hidden = reward_model.model.encode(reward_model.params, jnp.asarray([text + [0] * (64 - len(text))]))
            expected = float(reward_model.model.rewards(reward_model.params, hidden)[0, len(text) - 1])
            assert answer.guide_rewards == pytest.approx([expected], abs=1e-4)


def test_a_reward_model_reads_every_prompt_and_ending_as_its_template_writes_them(lm, rm, tmp_path):
    """One with the language model's tokens too; a template that ends answers as it does leaves it the faster guide."""
    alike = Session(lm, [with_template(rm, "{{turn.content}}</s>", tmp_path)], rm_format="auto")
    assert alike.reward_models[0].retokeniser is None
    session = Session(lm, [with_template(rm, "R {{turn.role}} {{turn.content}}|", tmp_path)], rm_format="auto")
    (reward_model,) = session.reward_models
    tokenizer = reward_model.tokenizer
    assert tokenizer.decode(tokenizer.closing_ids) == "|" and reward_model.retokeniser is not None
    prompts = [Prompt("0", "Hi"), Prompt("1", "\n\nHuman: Hi\n\nAssistant: Yes\n\nHuman: Bye\n\nAssistant:")]
    rendered = ["R user Hi|", "R user Hi|R assistant Yes|R user Bye|"]

    def expected(number, *ids):
        text = [*tokenizer.encode_prompt(rendered[number]), *ids]
        hidden = reward_model.model.encode(reward_model.params, jnp.asarray([text + [0] * (64 - len(text))]))
        return float(reward_model.model.rewards(reward_model.params, hidden)[0, len(text) - 1])

    for number, answer in answers(session, prompts).items():
        ids = tokenizer.encode_answer(answer.response)
        assert answer.finish_reason == "length"
        assert answer.guide_rewards == pytest.approx([expected(int(number), *ids)], abs=1e-4)
    own = reward_model.pad_prompts([reward_model.encode_prompt(prompt, []) for prompt in prompts], 2)
    nothing = np.zeros((2, 1), np.int32), np.zeros(2, np.int32)
    found = reward_model.score(own, *nothing, ["Yes", "No"], [True, False])
    yes, no = map(tokenizer.encode_answer, ("Yes", "No"))
    assert found.tolist() == pytest.approx([expected(0, *yes, *tokenizer.closing_ids), expected(1, *no)], abs=1e-4)
    # The candidate that ends an answer is read as this ending.
    ends = reward_model.retokeniser.candidates(
        np.array([[5, 6]]), np.array([2]), np.array([2]), np.array([[session.tokenizer.eos_id]]), np.zeros(1, int), 8, 1
    )
    assert ends.tails[0, 0, : ends.tail_lengths[0, 0]].tolist() == list(tokenizer.closing_ids)


def test_a_prompt_in_the_language_models_template_cannot_be_put_in_another(lm, rm, tmp_path, monkeypatch):
    monkeypatch.setattr(TextTokenizer, "same_vocabulary", lambda *_: False)
    chatty = with_template(lm, "L {{turn.content}}\n", tmp_path)
    form = get_form("chat")
    tokenizer = TextTokenizer.load(chatty)
    rendered = Prompt("7", "L Hi\n", form.turns_of("L Hi\n", tokenizer))
    assert rendered.turns == () and form.turns_of("Hi", tokenizer) == ({"role": "user", "content": "Hi"},)
    with pytest.raises(InputError, match="prompt '7' is already written in the language model's chat template"):
        answers(Session(chatty, [with_template(rm, "R {{turn.content}}|", tmp_path)]), [rendered])
    with pytest.raises(InputError, match=r"prompt '0' for .*: tokenizer .* has no chat template"):
        answers(Session(chatty, [rm]), CHAT)


@pytest.mark.parametrize("method", ["pargs", "greedy"])
def test_a_reward_that_is_not_finite_ends_the_run_with_the_rows_id(lm, rm, method, tmp_path):
    folder = shutil.copytree(rm, tmp_path / "rm")
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "score.weight": np.full_like(tensors["score.weight"], 3e38)}, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"prompt '2': a reward of .*/rm is not finite"):
        answers(Session(lm, [str(folder)]), method=method)


def test_a_label_of_a_reward_model_is_chosen_by_name(rm, tmp_path):
    folder = shutil.copytree(rm, tmp_path / "rm")
    tensors = load_file(folder / "model.safetensors")
    both = np.concatenate([tensors["score.weight"], 2 * tensors["score.weight"]])
    save_file({**tensors, "score.weight": both}, folder / "model.safetensors")
    loaded, _ = reward_models.load_with_tokenizer(f"{folder}#LABEL_1", "reward", "float32")
    np.testing.assert_array_equal(loaded.params["head"]["linear"]["kernel"].T, both[1:])
    with pytest.raises(InputError, match=r"rm: this classifier has 2 labels \(LABEL_0, LABEL_1\); choose one"):
        reward_models.load_with_tokenizer(str(folder), "reward", "float32")


def test_a_head_that_no_model_has_is_named(lm):
    with pytest.raises(InputError) as error:
        load_model(lm, "value")
    assert str(error.value) == "head: got 'value', must be one of vocabulary, table, reward"


def test_the_demo_is_a_word_of_the_commands():
    with pytest.raises(InputError, match=r"in Python give pargs_jax\.demo\.task\.DEMO_LM"):
        Session("demo")
