"""The text of an answer, divided among its tokens."""

import random

import pytest

from pargs_jax.text.answer_text import added_text, fastest_reader, shares_of, texts_as_they_grow
from pargs_jax.text.tokenization import TextTokenizer

KINDS = ["llama", "gpt2", "deberta"]


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(tokenizer_folder, request):
    return TextTokenizer.load(tokenizer_folder(request.param))


def test_the_shares_of_any_tokens_are_the_answer(tokenizer):
    reader, rng = fastest_reader(tokenizer), random.Random(0)
    prompt = tokenizer.encode_prompt("good cat:")
    in_a_character = tokenizer.encode_answer("🙂日")
    for _ in range(60):
        tokens = [rng.choice([rng.randrange(tokenizer.vocab_size), *in_a_character[:2]]) for _ in range(12)]
        answer = tokenizer.decode_answer(prompt, tokens)
        growing = texts_as_they_grow(reader, prompt, tokens)
        assert [each.text for each in growing] == [tokenizer.decode_answer(prompt, tokens[:n]) for n in range(13)]
        shares = shares_of(answer, growing)
        assert len(shares) == 12 and "".join(shares) == answer


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_character_belongs_to_the_token_that_completes_it(tokenizer_folder, name):
    tokenizer = TextTokenizer.load(tokenizer_folder(name))
    reader = fastest_reader(tokenizer)
    prompt = tokenizer.encode_prompt("good cat:")
    good, smile, bad = (tokenizer.encode_answer(text) for text in (" good", "🙂", " bad"))
    assert len(smile) == 4
    tokens = [*good, *smile, *bad, tokenizer.eos_id]
    growing = texts_as_they_grow(reader, prompt, tokens)
    shares = shares_of(" good🙂 bad", growing)
    assert "".join(shares[: len(good)]) == " good" and "".join(shares[len(good) + 4 :]) == " bad"
    assert shares[len(good) : len(good) + 4] == ["", "", "", "🙂"] and shares[-1] == ""
    # A candidate has the text that it would add, whatever comes then.
    before = growing[len(good) + 3]
    assert (added_text(before, smile[3]), added_text(before, smile[0]), added_text(before, tokenizer.eos_id)) == (
        "🙂", "", ""
    )  # fmt: skip
    assert added_text(growing[len(good)], bad[0]).startswith(" ")
