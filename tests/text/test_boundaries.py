"""Cuts in a text: each part has the tokens of the whole, and no text without spaces is one long part."""

import json
import random
import unicodedata
from functools import cache

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from pargs_jax.text.boundaries import Boundaries, kind_of
from pargs_jax.text.tokenization import TextTokenizer
from tests.text.stored import FOLDERS, load_stored

SCRIPTS = {
    "Chinese": "我们今天去公园玩，天气很好。他说：“你想看什么书？”这本书的作者住在北京！",
    "Japanese": "それは、本当です」と言った。東京タワーへ行きましょう。人々がたくさんいますね",
    "Russian": "Он сказал: «Привет, мир!» Потом мы долго гуляли по городу и говорили. ",
    "Arabic": "مرحبا بالعالم، كيف حالك؟ ذهبنا اليوم إلى الحديقة، وكان الجو جميلاً. ",
    "Hindi": "हिन्दी में लिखा है। आज मौसम अच्छा है और हम बाहर खेल रहे हैं। ",
    "Thai": "สวัสดีครับวันนี้อากาศดีมากเราไปเที่ยวสวนสาธารณะกันเถอะน้ำ",
    "Korean": "안녕하세요 세계 오늘은 날씨가 좋아서 공원에 갔습니다. ",
    "emoji": "🙂🙃🎉🎉👍🏽👍🏽👍❤️🇺🇸👨\u200d👩\u200d👧🔥🔥✨😂",
    "code": "\ndef f(x):\n\t return x  # two   spaces \r\n\r\n    if a == 'b' : pass\n it's 'LL we'll 1000 2e5 ①½",
    "odd": "\u0301e\u0301 \u00a0\u200b\u2028\u3000\ufeff\ufffd▁ ▁x \u0344\u1100\u1161\u11a8각\uff76\uff9e\u0600\u00a8 ǅ"
    "\u017fqのq中:文 </s> <s>[SEP][UNK]<unk><0x41>\u06dd\u212b\u0e33\u0f73\U0001f3fd\ufe0f\u200d\u200c\u1e9e",
}
CHARACTERS = "".join(SCRIPTS.values())


def wrapped(backend):
    return TextTokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", unk_token="<unk>"))


def trained(backend, trainer):
    backend.train_from_iterator([text[i : i + 9] for text in SCRIPTS.values() for i in range(len(text))], trainer)
    return wrapped(backend)


def byte_level(split=None, normalizer=None, vocab_size=700):
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizer
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if split:
        parts = [pre_tokenizers.Split(Regex(split), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
        backend.pre_tokenizer = pre_tokenizers.Sequence(parts)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, special_tokens=["<eos>", "<unk>"])
    return trained(backend, trainer)


def characters(normalizer=None, **options):
    """A BPE on characters, some of which are unknown."""
    backend = Tokenizer(models.BPE(**options))
    backend.normalizer = normalizer
    backend.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    backend.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=300, limit_alphabet=150, special_tokens=["<eos>", "<unk>"])
    tokenizer = trained(backend, trainer)
    return redefined(tokenizer, lambda it: it["model"].update(without_joined_words(it["model"])))


def without_joined_words(model):
    vocab = {token: index for token, index in model["vocab"].items() if "▁" not in token.lstrip("▁")}
    return {"vocab": vocab, "merges": [pair for pair in model["merges"] if "".join(pair) in vocab]}


def unigram(normalizer=None, *, exact=True, split=True):
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizer
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    specials = ["<unk>", "<eos>"]
    trainer = trainers.UnigramTrainer(vocab_size=400, unk_token="<unk>", special_tokens=specials)
    tokenizer = trained(backend, trainer)

    def change(definition):
        vocab = [(piece, round(score) / 4 if exact else score) for piece, score in definition["model"]["vocab"]]
        if exact:  # with ties between paths, and unknown characters
            vocab = [(piece, score) for piece, score in vocab if piece not in ("园", "今", "🎉", "に")]
            vocab += [(piece, -2.0) for piece in ("ааа", "аа", "公园", "園園", "q") if piece not in dict(vocab)]
        definition["model"]["vocab"] = vocab
        definition["pre_tokenizer"]["split"] = split

    return redefined(tokenizer, change)


def redefined(tokenizer, change):
    definition = tokenizer.definition()
    change(definition)
    return wrapped(Tokenizer.from_str(json.dumps(definition)))


LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN = LLAMA_3.replace("{1,3}", "")
MAKERS = {
    "bytes": byte_level,
    "llama 3": lambda: byte_level(LLAMA_3),
    "llama 3, whole words first": lambda: redefined(
        tokenizer("llama 3"), lambda it: it["model"].update(ignore_merges=True)
    ),
    "qwen": lambda: byte_level(QWEN, normalizers.NFC()),
    "characters": lambda: characters(normalizers.NFKC(), unk_token="<unk>"),
    "characters, joined unknowns": lambda: characters(unk_token="<unk>", fuse_unk=True),
    "unigram": lambda: unigram(normalizers.NFD()),
    "unigram, whole texts": lambda: unigram(
        normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")]), split=False
    ),
    "unigram, rounded": lambda: unigram(exact=False),
}


@cache
def tokenizer(name):
    if name in FOLDERS:
        return load_stored(name)
    return MAKERS[name]()


@cache
def boundaries(name):
    return Boundaries.of(tokenizer(name))


def parts_of(text, name, start=0):
    """The parts of a text that is read one character at a time, each with its place."""
    starts = [0]
    for end in range(1, len(text) + 1):
        cut = boundaries(name).last(text[:end], starts[-1])
        if cut > starts[-1]:
            starts.append(cut)
    return [
        (text[at:until], ("word" if text[at] == " " else "inside") if at else "answer")
        for at, until in zip(starts, [*starts[1:], None], strict=True)
    ]


def random_text(rng, length=40):
    """Parts of the scripts' texts, and single characters of all of them."""
    text = ""
    while len(text) < length:
        script = rng.choice(list(SCRIPTS.values()))
        at = rng.randrange(len(script))
        few = "".join(rng.choices(script if rng.random() < 0.5 else CHARACTERS, k=2)) * rng.choice([1, 1, 3])
        text += rng.choice([script[at : at + rng.randrange(12)], few, " "])
    return text


@pytest.mark.parametrize("name", [*FOLDERS, *MAKERS])
def test_parts_have_the_tokens_of_the_whole(name):
    rng = random.Random(0)
    places = set()
    for text in [random_text(rng) for _ in range(400)]:
        parts = parts_of(text, name)
        found = [token for part in tokenizer(name).encode_parts(parts) for token in part]
        assert found == tokenizer(name).encode_answer(text), parts
        places |= {place for _, place in parts}
    assert places == {"answer", "word"} | ({"inside"} if name != "unigram, rounded" else set())


@pytest.mark.parametrize("name", ["gpt2", "mistral", "deberta", "bytes", "qwen", "characters"])
@pytest.mark.parametrize("script", [script for script in SCRIPTS if script not in ("code", "odd")])
def test_parts_are_short_in_every_script(name, script):
    longest = max(len(part) for part, _ in parts_of(SCRIPTS[script] * 8, name))
    assert longest <= 40 < len(SCRIPTS[script] * 8)


def test_a_cut_does_not_depend_on_where_the_search_began():
    rng = random.Random(1)
    for text in [random_text(rng) for _ in range(100)]:
        for name in ("deberta", "gpt2"):
            for end in range(len(text)):
                cut = boundaries(name).last(text[:end], 0)
                assert boundaries(name).last(text, cut) >= cut == boundaries(name).last(text[:end], cut)


def test_letters_and_signs_are_graphemes_that_compose_with_nothing_before_them():
    regex = pytest.importorskip("regex")
    kinds = {chr(code): kind_of(chr(code)) for code in range(0x80, 0x110000) if not 0xD800 <= code < 0xE000}
    alone = [char for char, kind in kinds.items() if kind in ("L", "S")]
    assert len(alone) > 70_000
    for mate in ("a", "각", "🙂", "क", "e\u0301"):
        assert len(regex.findall(r"\X", "".join(mate + char for char in alone))) == 2 * len(alone)
    harmless = [char for char, kind in kinds.items() if kind in ("m", "n", "o")]
    assert regex.findall(r"\X", "".join(char + "中\n" for char in harmless)).count("中") == len(harmless)
    decompositions = (unicodedata.decomposition(chr(code)).split() for code in range(0x110000))
    seconds = {chr(int(pair[1], 16)) for pair in decompositions if len(pair) == 2 and "<" not in pair[0]}
    assert "\u0301" in seconds and not seconds & {*alone}
    classes = {"L": r"\p{L}", "S": r"[^\s\p{L}\p{N}]", "m": r"[^\s\p{L}\p{N}]"}
    wrong = [char for char, kind in kinds.items() if kind in classes and not regex.match(classes[kind], char)]
    assert not wrong


def pre_tokenized_by(pattern):
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return lambda definition: definition.update(
        pre_tokenizer={"type": "Sequence", "pretokenizers": [split, byte_level]}
    )


def with_added_token(content, **options):
    token = {"id": 1000, "content": content, "special": False, "normalized": False}
    token |= {"single_word": False, "lstrip": False, "rstrip": False, **options}
    return lambda definition: definition["added_tokens"].append(token)


NOWHERE, AT_SPACES, BEFORE_SIGNS, ANYWHERE = "nowhere", "at spaces", "at spaces and before signs", "anywhere"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (pre_tokenized_by(LLAMA_3), ANYWHERE),
        (pre_tokenized_by(r"\w+ \w+|."), NOWHERE),
        (with_added_token("dog"), ANYWHERE),
        (with_added_token("猫。"), AT_SPACES),
        (with_added_token("hot dog"), NOWHERE),
        (with_added_token("dog", lstrip=True), NOWHERE),
        (with_added_token("q"), NOWHERE),
        (lambda definition: definition["model"].update(dropout=0.1), NOWHERE),
        (lambda definition: definition["model"].update(ignore_merges=True), BEFORE_SIGNS),
        (
            lambda definition: definition.update(
                normalizer={"type": "Replace", "pattern": {"String": "a b"}, "content": "c"}
            ),
            NOWHERE,
        ),
    ],
)
def test_text_is_cut_only_where_the_definition_allows_it(change, expected):
    found = Boundaries.of(redefined(tokenizer("bytes"), change))
    cuts = found and [found.last(text, 0) for text in ("a dog ", "犬犬犬犬犬", "猫。 ")]
    places = {NOWHERE: None, AT_SPACES: [1, 0, 0], BEFORE_SIGNS: [1, 0, 1], ANYWHERE: [1, 3, 1]}
    assert cuts == places[expected]


def test_unigram_is_cut_inside_words_only_if_scores_add_up_exactly():
    text = SCRIPTS["Japanese"]
    assert boundaries("unigram").last(text, 0) > len(text) // 2
    assert boundaries("unigram, whole texts").last(text, 0) > len(text) // 2
    assert boundaries("unigram, rounded").last(text, 0) == 0
    assert boundaries("unigram, rounded").last(text + " ok ", 0) == len(text)
    assert Boundaries.of(unigram(exact=False, split=False)) is None


def test_a_model_that_drops_unknown_characters_is_not_cut():
    assert Boundaries.of(characters()) is None
