"""The retokeniser: always the tokens of the decoded text, and of the whole text no more than needed."""

import random
from functools import cache

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from pargs_jax.errors import InputError
from pargs_jax.text.answer_text import fastest_reader
from pargs_jax.text.retokenisation import Retokeniser
from pargs_jax.text.tokenization import TextTokenizer
from tests.text.stored import FOLDERS, load_stored

WIDTH, FRESH = 600, 3

ENGLISH = (
    " The little girl went to the park with her mother, and saw a big red ball. It wasn't hers; it cost 42 dollars!"
)
NASTY = [
    ENGLISH,
    " It isn't aaaa aaaaaaaa (a_b) 'll we'll ... 1000 2e5",
    "👍🏽 ok 🙂🙂 日本語。 中文 a 語 x e\u0301 \u0301 l'été \u00a0 \u200b\u2028z",
    "Он сказал: «Привет!» مرحبا، हिन्दी में。我们今天🙂",
    "\ndef f(x):\n\t return x  # two   spaces \r\n\r\n    if a == 'b' : pass\n",
    " <|endoftext|> it [SEP] is</s> <s> so [CLS][MASK] <unk> [UNK] <0x41> ▁x ▁ y",
    "\ufffd \ufffd\ufffd a \ufffd",
    " ",
    "   \n \n",
]


def wrapped(backend, **special_tokens):
    return TextTokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, **special_tokens))


def trained(backend, trainer):
    backend.train_from_iterator([ENGLISH, *NASTY] * 4, trainer)
    return backend


def byte_level():
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return trained(backend, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=["<eos>"]))


def metaspace_unigram():
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Strip(left=True, right=True)])
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    specials = ["[UNK]", "[CLS]", "[SEP]"]
    backend = trained(backend, trainers.UnigramTrainer(vocab_size=300, unk_token="[UNK]", special_tokens=specials))
    return backend


def pair():
    backend = metaspace_unigram()
    backend.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", "[CLS] $A [SEP] $B [SEP]", [("[CLS]", 1), ("[SEP]", 2)]
    )
    return wrapped(backend, cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]")


def joining_bpe():
    """A BPE over whole texts, with merges across spaces."""
    letters = ["</s>", *sorted({char for text in NASTY for char in text.replace(" ", "▁")} - {" "})]
    merges = [("d", "▁"), ("d▁", "b"), ("t", "h"), ("r", "▁"), ("r▁", "m"), ("▁", "a")]
    vocab = {token: index for index, token in enumerate([*letters, *map("".join, merges)])}
    backend = Tokenizer(models.BPE(vocab, merges, unk_token="</s>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    backend.decoder = decoders.Metaspace(prepend_scheme="never", split=False)
    return wrapped(backend, eos_token="</s>")


@cache
def tokenizer(name):
    if name in FOLDERS:
        return load_stored(name)
    makers = {
        "bytes": lambda: wrapped(byte_level(), eos_token="<eos>"),
        "unigram": lambda: wrapped(metaspace_unigram(), eos_token="[SEP]", unk_token="[UNK]"),
        "pair": pair,
        "joining": joining_bpe,
    }
    return makers[name]()


@cache
def retokeniser(lm, rm):
    return Retokeniser(tokenizer(lm), tokenizer(rm))


def arrays(prompts, answers):
    """Texts, each a prompt and its answer with others' tokens behind it, and how long both are."""
    texts = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
    width = max(map(len, texts)) + 2
    tokens = np.array([text + [5] * (width - len(text)) for text in texts], np.int32)
    return tokens, np.array(list(map(len, prompts)), np.int32), np.array(list(map(len, texts)), np.int32)


PAIRS = [
    ("gpt2", "deberta"),
    ("stories", "deberta"),
    ("gpt2", "stories"),
    ("gpt2", "mistral"),
    ("mistral", "gpt2"),
    ("demo", "bytes"),
    ("bytes", "demo"),
    ("demo", "pair"),
    ("bytes", "pair"),
    ("unigram", "demo"),
    ("demo", "joining"),
]


def nasty_tokens(lm, rng):
    while True:
        yield from lm.encode_answer("".join(rng.choices(NASTY, k=2)))


@pytest.mark.parametrize(("lm", "rm"), PAIRS, ids=map("-".join, PAIRS))
def test_tokens_are_those_of_the_whole_decoded_text(lm, rm):
    retokenise, lm, rm = retokeniser(lm, rm), tokenizer(lm), tokenizer(rm)
    rng = random.Random(1)
    upcoming = nasty_tokens(lm, rng)
    any_token = [token for token in range(lm.vocab_size + 3) if token not in lm.eos_ids]  # models may have more tokens
    in_a_character = lm.encode_answer("🙂")[:-1] or any_token
    for prompt in ["", "Why?\n", "日 🙂", " ", "unfinished"]:
        prompts = [lm.encode_prompt(prompt), [*lm.encode_prompt("Why?"), *in_a_character[:1]]]
        answers, cached = [[], []], [[], []]
        for _ in range(42):
            candidates = [
                [next(upcoming), lm.eos_id, rng.choice(in_a_character), *rng.choices(any_token, k=2)] for _ in prompts
            ]
            settled = np.array(list(map(len, cached)))
            call = *arrays(prompts, answers), np.array(candidates, np.int32), settled, WIDTH, FRESH
            split = retokenise.candidates(*call)
            for b, answer in enumerate(answers):
                cached[b] += split.fresh[b, : split.fresh_lengths[b]].tolist()
                for k, candidate in enumerate(candidates[b]):
                    ends = candidate in lm.eos_ids
                    text = lm.decode_answer(prompts[b], answer if ends else [*answer, candidate])
                    expected = rm.encode_answer(text, starts_text=not lm.decode(prompts[b])) + [rm.eos_id] * ends
                    tail = split.tails[b, k, : split.tail_lengths[b, k]].tolist()
                    assert cached[b] + tail == expected, (text, candidate)
                answer.append(candidates[b][rng.choice([0, 0, 0, 0, 2, 3])])


def written(lm, rm, steps, fresh_width=FRESH, text=ENGLISH):
    """Each step's call and result, for two rows that write the same text, by default in English."""
    retokenise, lm = retokeniser(lm, rm), tokenizer(lm)
    prompts = [lm.encode_prompt("Why?"), lm.encode_prompt("Once upon a time")]
    tokens = lm.encode_answer(text * 9)[:steps]
    settled = np.zeros(2, np.int32)
    for count, token in enumerate(tokens):
        answers = [tokens[:count]] * 2
        call = *arrays(prompts, answers), np.array([[token, lm.eos_id]] * 2, np.int32), settled, WIDTH, fresh_width
        split = retokenise.candidates(*call)
        yield call, split
        settled = settled + split.fresh_lengths


@pytest.mark.parametrize(
    ("lm", "rm", "text"),
    [
        ("demo", "bytes", ENGLISH),
        ("demo", "pair", ENGLISH),
        ("demo", "unigram", ENGLISH),
        ("gpt2", "deberta", "我们今天去公园玩，天气很好。他说：“你想看什么书？”这本书的作者住在北京！"),
        ("gpt2", "deberta", " ذهبنا اليوم إلى الحديقة، وكان الجو جميلاً. كيف حالك؟"),
        ("mistral", "gpt2", " Мы долго гуляли по городу. Он сказал: «Привет, мир!»"),
    ],
)
def test_all_but_the_last_words_are_settled(lm, rm, text):
    assert retokeniser(lm, rm).settles
    steps = list(written(lm, rm, steps=200, text=text))
    last_words = 20  # tokens
    assert max(split.tail_lengths.max() for _, split in steps) <= last_words
    (*_, settled, _, _), _ = steps[-1]
    assert settled.min() >= 3 * last_words


def test_bytes_that_later_ones_may_make_invalid_are_not_settled():
    retokenise, lm, rm = retokeniser("demo", "bytes"), tokenizer("demo"), tokenizer("bytes")
    prompt = lm.encode_prompt("Why?")
    *valid, broken = [lm.definition()["model"]["vocab"][f"<0x{byte:02X}>"] for byte in b" to be or not\xf0"]
    word = lm.encode_answer(" to")[0]
    settled = []
    for answer in (valid, [*valid, broken], [*valid, broken, word]):
        have = np.array([len(settled)])
        split = retokenise.candidates(*arrays([prompt], [answer]), np.array([[word]]), have, WIDTH, FRESH)
        settled += split.fresh[0, : split.fresh_lengths[0]].tolist()
        tail = split.tails[0, 0, : split.tail_lengths[0, 0]].tolist()
        assert settled + tail == rm.encode_answer(lm.decode_answer(prompt, [*answer, word]))
    assert lm.decode_answer(prompt, answer) == "\ufffd" * len([*valid, broken]) + " to"


def test_earlier_calls_change_nothing():
    new = Retokeniser(tokenizer("demo"), tokenizer("pair"))
    for call, split in list(written("demo", "pair", steps=40))[::13]:
        for known, unknown in zip(split, new.candidates(*call), strict=True):
            np.testing.assert_array_equal(known, unknown)
    assert len({new, retokeniser("demo", "pair")}) == 2


def test_settled_tokens_wait_in_the_tails_until_there_is_room():
    wide = [(call[4] + s.fresh_lengths, s) for call, s in written("demo", "pair", steps=60, fresh_width=60)]
    narrow = [(call[4] + s.fresh_lengths, s) for call, s in written("demo", "pair", steps=60, fresh_width=1)]
    assert max(s.fresh_lengths.max() for _, s in wide) > 1 == max(s.fresh_lengths.max() for _, s in narrow)
    for (had, some), (had_fewer, fewer) in zip(wide, narrow, strict=True):
        np.testing.assert_array_equal(had[:, None] + some.tail_lengths, had_fewer[:, None] + fewer.tail_lengths)


def test_filler_and_finished_rows_are_left_alone():
    lm, rm = tokenizer("demo"), tokenizer("pair")
    prompt = lm.encode_prompt("Why?")
    answers = [lm.encode_answer(" no")] * 2 + [[lm.eos_id, *lm.encode_answer(" no")[1:]]]
    tokens, prompt_lengths, lengths = arrays([prompt] * 3, answers)
    prompt_lengths[0] = 0
    candidates = np.full((3, 2), lm.encode_answer("x")[-1])
    split = retokeniser("demo", "pair").candidates(
        tokens, prompt_lengths, lengths, candidates, np.array([9, 0, 9]), WIDTH, FRESH
    )
    np.testing.assert_array_equal(split.fresh_lengths, 0)
    length = len(rm.encode_answer(" nox"))
    assert split.tail_lengths.tolist() == [[0, 0], [length, length], [0, 0]]


def test_an_answer_that_does_not_fit_is_cut_and_says_what_it_needs():
    (*texts, candidates, settled, _, _), split = list(written("demo", "pair", steps=30))[-1]
    cut = retokeniser("demo", "pair").candidates(*texts, candidates, settled, 1, FRESH)
    np.testing.assert_array_equal(cut.needed, split.needed)
    np.testing.assert_array_equal(split.needed, settled + split.fresh_lengths + split.tail_lengths.max(axis=1))
    assert cut.tails.shape == (2, 2, 1)
    with pytest.raises(InputError, match=r"\Arow 1: 400 tokens cannot be settled, there are \d+\Z"):
        retokeniser("demo", "pair").candidates(*texts, candidates, np.array([0, 400]), WIDTH, FRESH)


@pytest.mark.parametrize(("name", "is_fast"), [("demo", True), ("bytes", True), ("unigram", False)])
def test_text_is_looked_up_where_tokens_have_a_text_of_their_own(name, is_fast):
    assert (type(fastest_reader(tokenizer(name))).__name__ == "_PieceReader") is is_fast
