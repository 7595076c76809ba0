"""Where a growing text may be cut so that each part keeps the tokens that it has in the whole text.

A cut is allowed only if this follows from the tokenizer's definition, whatever text comes later. There are three kinds:

- before a single space between two words, where the pre-tokenizer, or the lack of tokens across it, keeps words apart;
- before a sign (such as a full stop or an emoji) that follows a letter, where a known pattern splits there;
- between two characters, both not ASCII, that no token of the vocabulary holds side by side. No merge of a BPE can then
  cross the cut, and every path of a Unigram model passes through it. This is the only kind in texts without spaces.

Normalisers must not look across the cut either. So the characters next to it are such that a grapheme and a normalised
form end between them, in every version of Unicode.
"""

import re
import unicodedata
from collections.abc import Callable, Iterable
from functools import cached_property
from typing import Any

from pargs_jax.text.tokenization import INSIDE_LEAD, WORD_LEAD, TextTokenizer, byte_letters, stages

_SPLITS = frozenset(
    {
        # GPT-2's, Llama 3's and Qwen 2's. No match has a space except as its first character or in a run of white
        # space, and a run before a printable character is never joined to what precedes it. A letter and a following
        # sign are never in one match. Between other characters that are not ASCII, a run that is cut matches as two.
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+",
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+",
    }
)

_LOCAL_NORMALISERS = frozenset({"NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Precompiled", "Strip", "Prepend"})
"""Normalisers whose effect on a character depends only on its grapheme and on the text's two ends."""

_LOCAL_REPLACEMENTS = (
    ({"String": " "}, "▁"),
    ({"Regex": " {2,}"}, " "),
    ({"Regex": " {2,}"}, "▁"),
    ({"Regex": r"\s{2,}|[\n\r\t]"}, " "),
)

_PROBES = (
    "The cat sat on the mat, didn't it? (No. 42: it's 3.5 kg!)",
    " def f(x):\n\treturn x  # two  spaces\r\n\r\n if a_b == 'c' : d",
    "l'été 日本 a 語 🙂 ok 👍🏽 e\u0301 x \u200b y\u00a0z </s> <s> [SEP] [CLS] <|endoftext|> end. ",
    "aaaa aaaa aaaaaaaa ~ ! \" # $ % & ' ( ) * + , - . / : ; < = > ? @ [ ] ^ _ ` { | } \\ 0 00 000 1e5",
    "我们今天去公园玩，天气很好。「それは、本当です」と言った。 Он сказал: «Привет, мир!» 안녕하세요 세계",
    " مرحبا بالعالم، كيف حالك؟ हिन्दी में लिखा है। สวัสดีครับ 🙂🙃🎉🎉 ok 👍🏽👍 αβγ. été, Größe",
)
"""Texts that every tokenizer is tested on, in case one does not do what its definition says."""

_CANDIDATES = re.compile(r"(?:(?<=[aLSm])_|(?<=[LSm])(?=[LS]))(?=(a|[LS]m{0,8}(?=[aLS_n])))")
"""Possible cuts in a text of kinds of characters (`_Kinds`): before the space between two words, or between two
characters that are not ASCII. The group is the grapheme after that; what comes next is there too, so that no later
character can join the grapheme."""

_LAST_GRAPHEME = re.compile(r"(?:^|(?<=[aLSm_no]))[aLS]m{0,8}\Z")

_JOINED = re.compile(
    rb"(?=([\xc2-\xf4][\x80-\xbf]{1,3}|\A[\x80-\xbf]{1,3}|" + INSIDE_LEAD.encode() + rb")"
    rb"([\xc2-\xf4][\x80-\xbf]{0,3}))"
)
"""Two characters of a token, the second one not ASCII, as far as the token holds them: byte-level tokens may begin and
end inside a character."""

_BYTE_TOKEN = re.compile("<0x[0-9A-Fa-f]{2}>")

_EXACT_SCORES = 2.0**30
"""Scores that are multiples of 1 / this, as float32 ones are, add up without rounding in float64. So ties between paths
are broken alike, whatever precedes them."""


class Boundaries:
    """Finds the places where texts of one tokenizer may be cut. Immutable except for caches."""

    def __init__(self, tokenizer: TextTokenizer, definition: dict[str, Any]) -> None:
        """Use `Boundaries.of`, which checks that the tokenizer's definition allows this."""
        self._definition = definition
        self._kinds = _Kinds(tokenizer.normalise)
        self._splits_by_pattern = not _has_metaspace(definition)
        # Added tokens are found in the text before all else, across any cut.
        self._added_are_ascii = all(
            token["special"] or token["content"].isascii() for token in definition["added_tokens"]
        )
        self._cuts_inside = _can_cut_inside_words(definition)

    @classmethod
    def of(cls, tokenizer: TextTokenizer) -> "Boundaries | None":
        """The boundaries for a tokenizer; None if nothing can be shown about it, or if test texts do not agree."""
        definition = tokenizer.definition()
        if definition is None or not _keeps_words_apart(definition):
            return None
        boundaries = cls(tokenizer, definition)
        return boundaries if _probes_agree(tokenizer, boundaries) else None

    def last(self, text: str, start: int) -> int:
        """The last allowed cut after `start`, which is itself one (or 0); `start` if there is none.

        A cut stays allowed whatever text follows. Each part must be encoded in its place, `"word"` if it begins with a
        space and `"inside"` otherwise (`TextTokenizer.encode_parts`).
        """
        text = text[start:]
        kinds = text.translate(self._kinds)
        for match in reversed(list(_CANDIDATES.finditer(kinds, 1))):
            at = match.start()
            before = _LAST_GRAPHEME.search(kinds, max(0, at - 9), at)
            if before and self._allows(
                text, kinds, at, [text[slice(*span)] for span in (before.span(), match.span(1))]
            ):
                return start + at
        return start

    def _allows(self, text: str, kinds: str, at: int, graphemes: list[str]) -> bool:
        """Whether a possible cut is one, given the graphemes before and after it."""
        if kinds[at] == "_":
            return all(map(self._kinds.is_word, graphemes))
        return all(map(self._kinds.is_kept, graphemes)) and self._splits_inside(text, kinds, at)

    def _splits_inside(self, text: str, kinds: str, at: int) -> bool:
        """Whether a cut between two characters that are not ASCII changes no token."""
        if not self._added_are_ascii:
            return False
        if self._splits_by_pattern:
            before, after, next_one = kinds[at - 1 : at + 2]
            if before == "L" and after == "S":
                return True
            if before != "L" and after == "S" and next_one not in "Sm":
                return False
        return self._cuts_inside and self._are_apart(text[at - 1], text[at])

    def _are_apart(self, left: str, right: str) -> bool:
        """Whether no token holds both characters, nor the lead that a part inside a word is encoded after and `right`;
        and unknown characters next to each other are not joined."""
        if self._known is not None and left not in self._known and right not in self._known:
            return False
        before, after = left.encode(), right.encode()
        lefts = [INSIDE_LEAD.encode(), *(before[i:] for i in range(len(before)))]
        rights = [after[:i] for i in range(1, len(after) + 1)]
        return not any((x, y) in self._joined for x in lefts for y in rights)

    @cached_property
    def _joined(self) -> frozenset[tuple[bytes, bytes]]:
        tokens = _vocabulary(self._definition["model"])
        if self._splits_by_pattern:
            letters = {ord(letter): byte for letter, byte in byte_letters().items()}
            spelled = (token.translate(letters).encode("latin-1", "ignore") for token in tokens)
        else:
            spelled = (token.encode() for token in tokens if not token.isascii())
        return frozenset(match.groups() for token in spelled for match in _JOINED.finditer(token))

    @cached_property
    def _known(self) -> frozenset[str] | None:
        """The characters that are tokens; None if no character is unknown."""
        model = self._definition["model"]
        if self._splits_by_pattern or _falls_back_to_bytes(model):
            return None
        return frozenset(token for token in _vocabulary(model) if len(token) == 1)


class _Kinds(dict[int, str]):
    """The kind of each character, for `str.translate`: "_" a space, "a" other printable ASCII, "L" a letter, "S" a
    sign, "m" a mark on the character before it, "n" white space, "o" others that never join the next character, "?" the
    rest.

    Letters and signs are always graphemes of their own if the next one is not a mark, and never compose with what
    precedes them; the tokenizer's normaliser leaves them as they are. Their class in patterns is the same in all
    versions of Unicode since 3.2.
    """

    def __init__(self, normalise: Callable[[str], str]) -> None:
        super().__init__({ord(" "): "_"} | {code: "a" for code in range(0x21, 0x7F)})
        self._normalise = normalise
        self._graphemes: dict[str, str | None] = {}

    def __missing__(self, code: int) -> str:
        char = chr(code)
        kind = kind_of(char)
        self[code] = kind = "o" if kind in ("L", "S") and not self.is_kept(char) else kind
        return kind

    def is_word(self, grapheme: str) -> bool:
        """Whether the normalised grapheme neither begins nor ends in white space, and is not empty."""
        normal = self._normal(grapheme) or " "
        return not any(char.isspace() or char == "▁" for char in (normal[0], normal[-1]))

    def is_kept(self, grapheme: str) -> bool:
        """Whether normalising does not change the grapheme."""
        return self._normal(grapheme) == grapheme

    def _normal(self, grapheme: str) -> str | None:
        if grapheme not in self._graphemes:
            self._graphemes[grapheme] = self._between(grapheme)
        return self._graphemes[grapheme]

    def _between(self, text: str) -> str | None:
        """The normalised text in the middle of a word; None if the word around it changes too."""
        around = self._normalise("qq")
        normal = self._normalise(f"q{text}q")
        fits = around.endswith("qq") and normal.startswith(around[:-1]) and normal.endswith("q")
        return normal[len(around) - 1 : -1] if fits and len(normal) >= len(around) else None


def kind_of(char: str) -> str:
    """The kind of a character that is not printable ASCII, before normalisation (`_Kinds`)."""
    now, then = unicodedata.category(char), unicodedata.ucd_3_2_0.category(char)
    if now[0] == "M" or "\U0001f3fb" <= char <= "\U0001f3ff":
        return "m"  # also the colours of skin
    is_stable = now == then
    if char in "\n\r\t" or (is_stable and now[0] == "Z"):
        return "n"
    if char == "\ufffd" or "\u1100" <= char <= "\u11ff":
        return "?"  # one that may not last; conjoining jamo
    if char in "▁\u0e33\u0eb3" or "\U0001f1e6" <= char <= "\U0001f1ff":
        return "o"  # a space already; vowels that belong to the character before; halves of flags
    if is_stable and now in ("Lu", "Ll", "Lt", "Lo"):
        return "L"
    was_sign = then[0] in "PS" or (then == "Cn" and now == "So")
    if was_sign and now in ("Pd", "Ps", "Pe", "Pi", "Pf", "Po", "Sm", "Sc", "So"):
        return "S"
    return "o" if is_stable and now in ("Nd", "Nl", "No", "Lm", "Sk") else "?"


def _keeps_words_apart(definition: dict[str, Any]) -> bool:
    """Whether the tokenizer never looks across the space between two words."""
    normalisers = stages(definition["normalizer"])
    is_local = all(
        (stage["pattern"], stage["content"]) in _LOCAL_REPLACEMENTS
        if stage["type"] == "Replace"
        else stage["type"] in _LOCAL_NORMALISERS
        for stage in normalisers
    )
    model = definition["model"]
    if not is_local or model.get("dropout") or any(map(_crosses_words, definition["added_tokens"])):
        return False
    # When the text is split into words, spaces are either still spaces, or already SentencePiece's mark for them.
    has_marks = any(stage["type"] == "Replace" and stage["content"] == "▁" for stage in normalisers)
    splits = stages(definition["pre_tokenizer"])
    if _has_metaspace(definition):
        if any(stage["split"] for stage in splits):
            return True
        # Without a token across the beginning of a word, no merge crosses it, and every path passes through it.
        tokens = _vocabulary(model)
        joins_words = "▁" not in tokens or any("▁" in token.lstrip("▁") for token in tokens)
        return (bool(splits) or has_marks) and _reads_characters(model) and not joins_words
    return not has_marks and _splits_before_words(splits[0]) and all(s["type"] == "ByteLevel" for s in splits[1:])


def _has_metaspace(definition: dict[str, Any]) -> bool:
    splits = stages(definition["pre_tokenizer"])
    return all(stage["type"] == "Metaspace" and stage["replacement"] == "▁" for stage in splits)


def _crosses_words(added_token: dict[str, Any]) -> bool:
    """Whether an added token may hold a space, or be found in the leads that parts are encoded after."""
    takes_spaces = not added_token["special"] and (added_token["lstrip"] or added_token["rstrip"])
    content = added_token["content"]
    return takes_spaces or content in (WORD_LEAD, INSIDE_LEAD) or re.search(r"[\s▁]", content) is not None


def _splits_before_words(stage: dict[str, Any]) -> bool:
    if stage["type"] == "ByteLevel":
        return stage["use_regex"]
    is_plain_split = stage["type"] == "Split" and stage["behavior"] == "Isolated" and not stage["invert"]
    return is_plain_split and stage["pattern"].get("Regex") in _SPLITS


def _can_cut_inside_words(definition: dict[str, Any]) -> bool:
    """Whether a word may be cut between characters that no token holds side by side."""
    model = definition["model"]
    tokens = _vocabulary(model)
    if not _has_metaspace(definition):
        return _parts_are_independent(model) and all(letter in tokens for letter in byte_letters())
    merges_bytes = model["type"] == "BPE" and any(
        _BYTE_TOKEN.search(token) and not _BYTE_TOKEN.fullmatch(token) for token in tokens
    )
    return _reads_characters(model) and INSIDE_LEAD in tokens and not merges_bytes


def _parts_are_independent(model: dict[str, Any]) -> bool:
    """Whether the model gives two parts of a text the tokens of the whole, if no token can cross the cut.

    A plain BPE does, because no merge crosses the cut. A Unigram model does if adding up scores does not round: ties
    between paths are otherwise broken by rounding, which depends on the preceding text.
    """
    if model["type"] == "Unigram":
        return all((score * _EXACT_SCORES).is_integer() for _, score in model["vocab"])
    return model["type"] == "BPE" and not (
        model["ignore_merges"] or model["continuing_subword_prefix"] or model["end_of_word_suffix"]
    )


def _reads_characters(model: dict[str, Any]) -> bool:
    """Whether the parts of a text of characters, not bytes, are independent. A BPE without an unknown token drops
    unknown characters, which makes their neighbours adjacent."""
    loses_characters = model["type"] == "BPE" and model["unk_token"] is None and not _falls_back_to_bytes(model)
    return _parts_are_independent(model) and not loses_characters


def _falls_back_to_bytes(model: dict[str, Any]) -> bool:
    tokens = _vocabulary(model)
    return model["byte_fallback"] and all(f"<0x{byte:02X}>" in tokens for byte in range(0x100))


def _vocabulary(model: dict[str, Any]) -> Iterable[str]:
    return {piece for piece, _ in model["vocab"]} if model["type"] == "Unigram" else model["vocab"].keys()


def _probes_agree(tokenizer: TextTokenizer, boundaries: Boundaries) -> bool:
    for text in _PROBES:
        whole = tokenizer.encode_answer(text)
        for end in range(len(text) + 1):
            cut = boundaries.last(text[:end], 0)
            if cut:
                parts = [(text[:cut], "answer"), (text[cut:], "word" if text[cut] == " " else "inside")]
                before, after = tokenizer.encode_parts(parts)
                if before + after != whole:
                    return False
    return True
