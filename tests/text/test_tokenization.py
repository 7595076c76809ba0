"""Tokenizers: prompts and answers apart, and back to the same text."""

from pathlib import Path

import pytest

from pargs_jax.errors import InputError
from pargs_jax.text.tokenization import TextTokenizer

SHARED = Path(__file__).parents[3] / "shared"
FOLDERS = {
    "stories": "models/stories260k",
    "gpt2": "tokenizers/gpt2",
    "mistral": "tokenizers/mistral_v1",
    "deberta": "tokenizers/deberta_v3",
}

pytestmark = pytest.mark.skipif(not SHARED.is_dir(), reason="needs the tokenizers in ../shared")


@pytest.fixture(scope="module")
def tokenizers():
    return {name: TextTokenizer.load(SHARED / folder) for name, folder in FOLDERS.items()}


@pytest.mark.parametrize("name", ["stories", "gpt2", "mistral"])
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
def test_prompt_and_answer_ids_decode_to_both_texts(tokenizers, name, prompt, answer):
    tokenizer = tokenizers[name]
    ids = tokenizer.encode_answer(answer, starts_text=not prompt)
    # SentencePiece cannot tell a text that begins with a space from one that does not.
    expected = answer.removeprefix(" ") if not prompt and name != "gpt2" else answer
    assert tokenizer.decode_answer(tokenizer.encode_prompt(prompt), ids) == expected
    assert not {tokenizer.bos_id, *tokenizer.eos_ids} & set(ids)


def test_known_ids(tokenizers):
    assert tokenizers["gpt2"].encode_prompt("Hello world") == [15496, 995]
    assert tokenizers["mistral"].encode_prompt("Hello") == [1, 22557]
    assert tokenizers["mistral"].encode_answer("Hello", starts_text=True) == [22557]  # ▁Hello
    assert tokenizers["mistral"].encode_answer(" Hello") == [22557]
    assert tokenizers["mistral"].encode_answer("Hello") == [16230]  # Hello, without the space


def test_prompts_begin_with_bos_once_and_never_end_with_eos(tokenizers):
    assert [tokenizers[name].encode_prompt("") for name in FOLDERS] == [[1], [50256], [1], [1, 2]]
    assert tokenizers["mistral"].encode_prompt("<s>Hello")[:2].count(1) == 1
    for name in ("stories", "gpt2", "mistral"):
        assert not tokenizers[name].is_pair_encoder
        assert tokenizers[name].encode_prompt("Hello")[-1] not in tokenizers[name].eos_ids


@pytest.mark.parametrize("prompt", ["\n\nHuman: hi\n\nAssistant:", "Why? ", "", "[CLS]日本 [SEP]"])
@pytest.mark.parametrize("answer", ["Hello there", " Hello", "tail \n", "🙂👍🏽 ok", ": 0|"])
def test_a_sentence_pair_is_what_the_tokenizer_makes_of_one(tokenizers, prompt, answer):
    tokenizer = tokenizers["deberta"]
    assert tokenizer.is_pair_encoder and (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    ids = [*tokenizer.encode_prompt(prompt), *tokenizer.encode_answer(answer), tokenizer.eos_id]
    assert ids == tokenizer._tokenizer(prompt, answer)["input_ids"]
    assert tokenizer.encode_answer(answer) == tokenizer.encode_answer(answer, starts_text=True)


def test_the_second_of_a_sentence_pair_cannot_quote_special_tokens(tokenizers):
    tokenizer = tokenizers["deberta"]
    ids = tokenizer.encode_answer("so [SEP] it [CLS][MASK] goes [UNK]")
    assert not {0, 1, 2, 3, 128000} & set(ids)
    assert "".join(tokenizer._tokenizer.convert_ids_to_tokens(ids)) == "▁so▁[SEP]▁it▁[CLS][MASK]▁goes▁[UNK]"


@pytest.mark.parametrize("name", FOLDERS)
def test_parts_are_encoded_as_whole_texts_are(tokenizers, name):
    tokenizer = tokenizers[name]
    texts = ["Hello there", " Hello", "", "\n\n1", "</s> [SEP]", "🙂"]
    parts = [(text, "text") for text in texts] + [(text, "answer") for text in texts]
    expected = [tokenizer.encode_answer(text, starts_text=place == "text") for text, place in parts]
    assert tokenizer.encode_parts(parts) == expected
    assert tokenizer.encode_parts(parts * 5) == expected * 5
    first, rest = tokenizer.encode_parts([("Why", "answer"), (" not go?", "word")])
    assert first + rest == tokenizer.encode_answer("Why not go?")


def test_an_unfinished_character_is_dropped_and_what_stands_before_it_stays(tokenizers):
    for name in ("stories", "gpt2"):
        tokenizer = tokenizers[name]
        prompt = tokenizer.encode_prompt("Why?\n")
        ids = tokenizer.encode_answer("ok\n🙂")
        texts = [tokenizer.decode_answer(prompt, ids[:length]) for length in range(len(ids) + 1)]
        assert set(texts) <= {"", "o", "ok", "ok\n", "ok\n🙂"}
        assert texts[-1] == "ok\n🙂"


def test_saved_and_loaded_again_it_is_the_same(tokenizers, tmp_path):
    for name, tokenizer in tokenizers.items():
        tokenizer.save(tmp_path / name)
        again = TextTokenizer.load(tmp_path / name, extra_eos_ids=[7])
        assert again.same_vocabulary(tokenizer)
        assert again.encode_answer("Hello") == tokenizer.encode_answer("Hello")
        assert again.eos_ids == (*tokenizer.eos_ids, 7)
        assert again.vocab_size == tokenizer.vocab_size


def gpt2(special_tokens=(), **options):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(SHARED / FOLDERS["gpt2"], **options)
    tokenizer.add_special_tokens(dict(special_tokens))
    return TextTokenizer(tokenizer)


def test_a_vocabulary_is_the_same_up_to_a_padding_token_only(tokenizers):
    assert tokenizers["gpt2"].same_vocabulary(gpt2({"pad_token": "[PAD]"}))
    assert not tokenizers["gpt2"].same_vocabulary(gpt2({"cls_token": "[CLS]"}))
    assert not tokenizers["gpt2"].same_vocabulary(gpt2(add_prefix_space=True))
    assert not tokenizers["stories"].same_vocabulary(tokenizers["mistral"])


def test_chat_templates_become_special_tokens(tokenizers):
    turns = [{"role": "user", "content": "Hi"}]
    template = "{{ bos_token }}[{{ messages[0].role }}]{{ messages[0].content }}"
    prompt = gpt2(chat_template=template).render_chat(turns)
    assert prompt == "<|endoftext|>[user]Hi"
    assert tokenizers["gpt2"].encode_prompt(prompt)[0] == tokenizers["gpt2"].bos_id
    with pytest.raises(InputError, match="has no chat template"):
        tokenizers["gpt2"].render_chat(turns)
    with pytest.raises(InputError, match="rejects the conversation: only one"):
        gpt2(chat_template="{{ raise_exception('only one\nturn') }}").render_chat(turns)


@pytest.mark.parametrize("source", ["no/such/folder", "/nowhere", SHARED / "data"])
def test_what_is_no_tokenizer_is_one_line_of_error(source):
    with pytest.raises(InputError, match=r"\Atokenizer '[^\n]+\Z"):
        TextTokenizer.load(source)
