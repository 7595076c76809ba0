"""Tokenizers: prompts and answers apart, and back to the same text."""

from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest

from pargs_jax.errors import InputError
from pargs_jax.text.tokenization import TextTokenizer

SHARED = Path(__file__).parents[3] / "shared"
REAL = {
    "stories": "models/stories260k",
    "gpt2": "tokenizers/gpt2",
    "mistral": "tokenizers/mistral_v1",
    "deberta": "tokenizers/deberta_v3",
}
SMALL = {"small llama": "llama", "small gpt2": "gpt2", "small deberta": "deberta"}
GENERATORS = ["small llama", "small gpt2", "stories", "gpt2", "mistral"]
"""The tokenizers of language models."""
PAIR_ENCODERS = ["small deberta", "deberta"]


@pytest.fixture(scope="module")
def tokenizer_of(tokenizer_folder):
    """The real ones are not in every clone; the small ones are trained here."""

    @cache
    def load(name):
        if name in SMALL:
            return TextTokenizer.load(tokenizer_folder(SMALL[name]))
        if not (SHARED / REAL[name]).is_dir():
            pytest.skip(f"needs ../shared/{REAL[name]}")
        return TextTokenizer.load(SHARED / REAL[name])

    return load


@pytest.mark.parametrize("name", GENERATORS)
@pytest.mark.parametrize("prompt", ["\n\nHuman: hi\n\nAssistant:", "Why? ", "日本 🙂", ""])
@pytest.mark.parametrize(
    "answer",
    [
        "Hello there",
        "",
        "\n",
        "\n\nHello",
        "🙂👍🏽 ok",
        ": 0|",
        "tail \n",
        "</s> and <|endoftext|>",
        " Hello",
        "  two",
        " ",
    ],
)
def test_prompt_and_answer_ids_decode_to_both_texts(tokenizer_of, name, prompt, answer):
    tokenizer = tokenizer_of(name)
    ids = tokenizer.encode_answer(answer, starts_text=not prompt)
    # SentencePiece cannot tell a text that begins with a space from one that does not.
    expected = answer.removeprefix(" ") if not prompt and "gpt2" not in name else answer
    assert tokenizer.decode_answer(tokenizer.encode_prompt(prompt), ids) == expected
    assert not {tokenizer.bos_id, *tokenizer.eos_ids} & set(ids)


def test_known_ids(tokenizer_of):
    gpt2, mistral = tokenizer_of("gpt2"), tokenizer_of("mistral")
    assert gpt2.encode_prompt("Hello world") == [15496, 995]
    assert mistral.encode_prompt("Hello") == [1, 22557]
    assert mistral.encode_answer("Hello", starts_text=True) == [22557]  # ▁Hello
    assert mistral.encode_answer(" Hello") == [22557]
    assert mistral.encode_answer("Hello") == [16230]  # Hello, without the space


def test_the_space_that_starts_a_text_is_not_added_in_mid_text(tokenizer_of):
    pieces = {
        name: [tokenizer_of(name)._tokenizer.convert_ids_to_tokens(ids) for ids in (
            tokenizer_of(name).encode_answer("good cat", starts_text=True),
            tokenizer_of(name).encode_answer(" good cat"),
            tokenizer_of(name).encode_answer("good cat"),
        )] for name in ("small llama", "small gpt2", "small deberta")
    }  # fmt: skip
    texts = {name: ["".join(tokens) for tokens in split] for name, split in pieces.items()}
    assert texts == {
        "small llama": ["▁good▁cat", "▁good▁cat", "good▁cat"],
        "small gpt2": ["goodĠcat", "ĠgoodĠcat", "goodĠcat"],
        "small deberta": ["▁good▁cat"] * 3,
    }


@pytest.mark.parametrize("name", [*SMALL, *REAL])
def test_prompts_begin_with_bos_once_and_never_end_with_eos(tokenizer_of, name):
    tokenizer = tokenizer_of(name)
    nothing = {"small gpt2": [0], "gpt2": [50256]}.get(name, [1, 2] if name in PAIR_ENCODERS else [1])
    assert tokenizer.encode_prompt("") == nothing
    assert tokenizer.is_pair_encoder == (name in PAIR_ENCODERS)
    if name in GENERATORS:
        assert tokenizer.encode_prompt("Hello")[-1] not in tokenizer.eos_ids
    if "gpt2" not in name and name in GENERATORS:
        assert tokenizer.encode_prompt("<s>Hello").count(1) == tokenizer.encode_prompt("Hello").count(1) == 1


@pytest.mark.parametrize("name", PAIR_ENCODERS)
@pytest.mark.parametrize("prompt", ["\n\nHuman: hi\n\nAssistant:", "Why? ", "", "[CLS]日本 [SEP]"])
@pytest.mark.parametrize("answer", ["Hello there", " Hello", "tail \n", "🙂👍🏽 ok", ": 0|"])
def test_a_sentence_pair_is_what_the_tokenizer_makes_of_one(tokenizer_of, name, prompt, answer):
    tokenizer = tokenizer_of(name)
    assert tokenizer.is_pair_encoder and (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    ids = [*tokenizer.encode_prompt(prompt), *tokenizer.encode_answer(answer), tokenizer.eos_id]
    assert ids == tokenizer._tokenizer(prompt, answer)["input_ids"]
    assert tokenizer.encode_answer(answer) == tokenizer.encode_answer(answer, starts_text=True)


@pytest.mark.parametrize("name", PAIR_ENCODERS)
def test_the_second_of_a_sentence_pair_cannot_quote_special_tokens(tokenizer_of, name):
    tokenizer = tokenizer_of(name)
    text = "so [SEP] it [CLS][MASK] goes [UNK]"
    ids = tokenizer.encode_answer(text)
    assert not {0, 1, 2, tokenizer._tokenizer.mask_token_id} & set(ids)
    if name == "deberta":  # the small one has no brackets, and they are unknown to it
        assert 3 not in ids
        assert "".join(tokenizer._tokenizer.convert_ids_to_tokens(ids)) == "▁" + text.replace(" ", "▁")


@pytest.mark.parametrize("name", [*SMALL, *REAL])
def test_parts_are_encoded_as_whole_texts_are(tokenizer_of, name):
    tokenizer = tokenizer_of(name)
    texts = ["Hello there", " Hello", "", "\n\n1", "</s> [SEP]", "🙂"]
    parts = [(text, "text") for text in texts] + [(text, "answer") for text in texts]
    expected = [tokenizer.encode_answer(text, starts_text=place == "text") for text, place in parts]
    assert tokenizer.encode_parts(parts) == expected
    assert tokenizer.encode_parts(parts * 5) == expected * 5
    first, rest = tokenizer.encode_parts([("Why", "answer"), (" not go?", "word")])
    assert first + rest == tokenizer.encode_answer("Why not go?")


@pytest.mark.parametrize("name", ["small llama", "small gpt2", "stories", "gpt2"])
def test_an_unfinished_character_is_dropped_and_the_text_before_it_stays(tokenizer_of, name):
    tokenizer = tokenizer_of(name)
    prompt = tokenizer.encode_prompt("Why?\n")
    ids = tokenizer.encode_answer("ok\n🙂")
    texts = [tokenizer.decode_answer(prompt, ids[:length]) for length in range(len(ids) + 1)]
    assert set(texts) <= {"", "o", "ok", "ok\n", "ok\n🙂"}
    assert texts[-1] == "ok\n🙂"


@pytest.mark.parametrize("name", [*SMALL, *REAL])
def test_saved_and_loaded_again_it_is_the_same(tokenizer_of, tmp_path, name):
    tokenizer = tokenizer_of(name)
    tokenizer.save(tmp_path)
    again = TextTokenizer.load(tmp_path, extra_eos_ids=[7])
    assert again.same_vocabulary(tokenizer)
    assert again.encode_answer("Hello") == tokenizer.encode_answer("Hello")
    assert again.eos_ids == (*tokenizer.eos_ids, 7)
    assert again.vocab_size == tokenizer.vocab_size


@pytest.fixture
def gpt2(tokenizer_folder):
    """A small GPT-2 tokenizer with changes."""
    from transformers import AutoTokenizer

    def make(special_tokens=(), **options):
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder("gpt2"), **options)
        tokenizer.add_special_tokens(dict(special_tokens))
        return TextTokenizer(tokenizer)

    return make


def test_a_vocabulary_is_the_same_up_to_a_padding_token_only(tokenizer_of, gpt2):
    plain = tokenizer_of("small gpt2")
    assert plain.same_vocabulary(gpt2({"pad_token": "[PAD]"}))
    assert not plain.same_vocabulary(gpt2({"cls_token": "[CLS]"}))
    assert not plain.same_vocabulary(gpt2(add_prefix_space=True))
    assert not plain.same_vocabulary(tokenizer_of("small llama"))


TEMPLATES = {
    # As those of Qwen, Llama 3 and Gemma are for such conversations.
    "qwen": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        "<|im_end|>\n",
    ),
    "llama": (
        "{% for m in messages %}<|start|>{{ m.role }}<|end|>\n\n{{ m.content | trim }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant<|end|>\n\n{% endif %}",
        "<|eot_id|>",
    ),
    "thinking": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}<think></think>{% endif %}"
        "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        "<|im_end|>\n",
    ),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_finished_answer_ends_as_the_chat_template_says(gpt2, name):
    template, closing = TEMPLATES[name]
    special = ["<|im_start|>", "<|im_end|>", "<|start|>", "<|end|>", "<|eot_id|>"]
    tokenizer = gpt2({"additional_special_tokens": special}, chat_template=template)
    original = tokenizer._tokenizer
    assert tokenizer.closing_ids == tuple(original.encode(closing, add_special_tokens=False))
    turns = [{"role": "user", "content": "Hi"}]
    prompt, answer = tokenizer.encode_prompt(tokenizer.render_chat(turns)), tokenizer.encode_answer("Yes.")
    whole = original.apply_chat_template([*turns, {"role": "assistant", "content": "Yes."}], tokenize=False)
    if name != "thinking":
        assert [*prompt, *answer, *tokenizer.closing_ids] == original.encode(whole, add_special_tokens=False)


def test_without_a_template_that_says_it_an_answer_ends_with_eos(tokenizer_of, gpt2):
    plain = tokenizer_of("small gpt2")
    assert plain.closing_ids == (plain.eos_id,)
    for template in ("{{ raise_exception('no') }}", "{% for m in messages %}{{ m.content }}{% endfor %}"):
        assert gpt2(chat_template=template).closing_ids == (plain.eos_id,)


def test_chat_templates_become_special_tokens(tokenizer_of, gpt2):
    turns = [{"role": "user", "content": "Hi"}]
    template = "{{ bos_token }}[{{ messages[0].role }}]{{ messages[0].content }}"
    prompt = gpt2(chat_template=template).render_chat(turns)
    assert prompt == "<|endoftext|>[user]Hi"
    assert tokenizer_of("small gpt2").encode_prompt(prompt)[0] == tokenizer_of("small gpt2").bos_id
    with pytest.raises(InputError, match="has no chat template"):
        tokenizer_of("small gpt2").render_chat(turns)
    with pytest.raises(InputError, match="rejects the conversation: only one"):
        gpt2(chat_template="{{ raise_exception('only one\nturn') }}").render_chat(turns)


@pytest.mark.parametrize("source", ["no/such/folder", "/nowhere", Path(__file__).parent])
def test_folders_without_a_tokenizer_are_one_line_of_error(source):
    with pytest.raises(InputError, match=r"\Atokenizer '[^\n]+\Z"):
        TextTokenizer.load(source)


def test_threads_that_read_prompts_and_answers_do_not_disturb_each_other(tokenizer_of):
    """A prompt's `</s>` is one token, an answer's is text; transformers keeps which of them in the tokenizer."""
    tokenizer, text = tokenizer_of("small llama"), "good</s> answer" * 20
    ways = (tokenizer.encode_prompt, tokenizer.encode_answer) * 2
    expected = [way(text) for way in ways]
    assert len(expected[0]) != len(expected[1])
    with ThreadPoolExecutor(len(ways)) as pool:
        found = list(pool.map(lambda way: [way(text) for _ in range(100)], ways))
    assert all(ids == right for many, right in zip(found, expected, strict=True) for ids in many)
