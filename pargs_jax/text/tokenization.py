"""Text to token ids and back; prompts and answers are tokenised separately.

When decoding starts, the prompt's tokens are fixed, so no token spans the boundary between prompt and answer. Training
must see the same boundary. So `encode_prompt` and `encode_answer` (and `encode_parts`, which does the same for many
texts) are the only ways from text to ids in this package, and `decode_answer` is the way back.
"""

import json
import threading
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pargs_jax.errors import InputError, first_line, warn
from pargs_jax.text.tokenizer_files import load_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

Place = Literal["text", "answer", "word", "inside"]
"""What precedes a part of a text: nothing ("text"), a prompt ("answer"), another word ("word"; the part then begins
with a space), or a character that no token joins to the part ("inside")."""

WORD_LEAD, INSIDE_LEAD = ":", "q"
"""Texts that a part is encoded after in these places. Hardly any token joins the second one to another letter."""

_SENTINELS = ("\n", ":", "|", "0")
"""Texts put before an answer to find its tokens in mid-text; several, since a tokenizer may join one to the answer."""

_USUAL_PADDING = 128
"""Vocabularies are padded to multiples of up to this number."""

_FEW = 32
"""Up to this many short texts are encoded one by one, which is faster than waking the tokenizer's threads."""

_PROBES = ("Hello world", " two  spaces", "\n\nHuman: hi\n\nAssistant:", "l'été 42 日本語", "🙂👍🏽", "\tdef f(x):\r\n")
"""Texts that tokenizers with one vocabulary but different normalisers, pre-tokenizers or merges split differently."""

_ENCODING = threading.Lock()
"""transformers sets `split_special_tokens` in the tokenizer and then reads the text: one thread at a time may do so."""


class TextTokenizer:
    """A Hugging Face tokenizer with the interface that this package needs.

    Attributes:
        vocab_size: number of tokens, added ones included.
        needed_embeddings: the largest token id, and one.
        bos_id: the beginning-of-sequence token, or None.
        eos_ids: the tokens that end an answer, the tokenizer's own first.
        is_pair_encoder: whether prompt and answer are a sentence pair, `[CLS] prompt [SEP] answer [SEP]`, as DeBERTa
            reads them. If so, `[CLS]` is BOS, `[SEP]` is EOS, and a prompt's ids end in `[SEP]`.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", extra_eos_ids: Iterable[int] = ()) -> None:
        """Wraps a loaded tokenizer.

        Args:
            tokenizer: a transformers tokenizer.
            extra_eos_ids: more tokens that end an answer, such as those of a model's generation config.

        Raises InputError if no token can end an answer.
        """
        self._tokenizer = tokenizer
        self.vocab_size: int = len(tokenizer)
        self.needed_embeddings = max(tokenizer.get_vocab().values(), default=-1) + 1
        pair_ends = _sentence_pair_ends(tokenizer)
        self.is_pair_encoder: bool = pair_ends is not None
        self.bos_id: int | None
        self.bos_id, own_eos_id = pair_ends or (tokenizer.bos_token_id, tokenizer.eos_token_id)
        own_eos = [] if own_eos_id is None else [own_eos_id]
        self.eos_ids: tuple[int, ...] = tuple(dict.fromkeys([*own_eos, *extra_eos_ids]))
        if not self.eos_ids:
            raise InputError(f"tokenizer {tokenizer.name_or_path!r} has no end-of-sequence token: set eos_token")
        with_specials = tokenizer.encode("a", add_special_tokens=True)
        self._prepends_bos = self.bos_id is not None and with_specials[:1] == [self.bos_id]
        if self.bos_id is None and with_specials[:1] != tokenizer.encode("a", add_special_tokens=False)[:1]:
            first = tokenizer.convert_ids_to_tokens(with_specials[0])
            warn(
                f"tokenizer {tokenizer.name_or_path!r} begins texts with {first} but names no bos_token, so prompts "
                "have none; set bos_token in tokenizer_config.json"
            )
        # SentencePiece tokenizers prepend a space to a text without one, which is wrong in mid-text. The second text of
        # a pair is a separate text, so the space is right there.
        self._prepends_space = not self.is_pair_encoder and "".join(tokenizer.tokenize("a")).startswith("▁")
        # A sentinel that the normaliser removes would leave the answer at the beginning of the text, so it must
        # survive.
        sentinels = [(text, self._encode_raw(text)) for text in _SENTINELS if self._prepends_space]
        self._sentinels = [(text, ids) for text, ids in sentinels if self.decode(ids) == text]

    @classmethod
    def load(cls, source: str | Path, extra_eos_ids: Iterable[int] = ()) -> "TextTokenizer":
        """Loads a tokenizer as `load_tokenizer` does, and raises InputError as it does."""
        return cls(load_tokenizer(source), extra_eos_ids)

    def save(self, folder: str | Path) -> None:
        """Writes the tokenizer's files; `load(folder)` gives an equal tokenizer.

        Raises InputError if the folder cannot be written.
        """
        try:
            self._tokenizer.save_pretrained(str(folder))
        except OSError as error:
            raise InputError(f"tokenizer folder {str(folder)!r} cannot be written: {error.strerror}") from error

    def check_embeddings(self, count: int, source: str | Path) -> None:
        """Checks that a model from `source` with `count` embeddings fits this tokenizer.

        Models pad their vocabularies, so a few more embeddings than tokens are usual. Warns if over a tenth have no
        token.

        Raises InputError if a token has no embedding, or less than half of the embeddings have a token.
        """
        if self.needed_embeddings > count:
            raise InputError(
                f"{source}: its tokenizer needs {self.needed_embeddings} embeddings, but the model has {count}"
            )
        found = f"{source}: its tokenizer has {self.vocab_size} tokens, but the model has {count} embeddings"
        if 2 * self.vocab_size < count:
            raise InputError(f"{found}; the tokenizer is incomplete or belongs to another model")
        if count - self.vocab_size > max(count // 10, _USUAL_PADDING):
            warn(f"{found}; check that the tokenizer is complete and belongs to this model")

    @property
    def eos_id(self) -> int:
        """The token that ends an answer in training."""
        return self.eos_ids[0]

    def token(self, token_id: int) -> str:
        """A token as the vocabulary spells it."""
        return self._tokenizer.convert_ids_to_tokens(token_id)

    def same_vocabulary(self, other: "TextTokenizer") -> bool:
        """Whether both tokenizers turn every text into the same ids.

        They do if they map the same tokens to the same ids and tokenise a set of test texts alike. A padding token that
        only one of them has does not matter, because models here never read padding tokens.
        """
        mine, theirs = self._tokenizer, other._tokenizer
        differing = {token for token, _ in mine.get_vocab().items() ^ theirs.get_vocab().items()}
        return differing <= {mine.pad_token, theirs.pad_token} and all(
            self.encode_prompt(text) == other.encode_prompt(text) for text in _PROBES
        )

    def _encode(self, text: str, **options: bool) -> list[int]:
        with _ENCODING:
            return self._tokenizer.encode(text, add_special_tokens=False, verbose=False, **options)

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a prompt: they begin with BOS if this tokenizer adds one, and never end in EOS.

        Special tokens spelled out in the text, such as those of a chat template, become those tokens. An empty prompt
        is BOS alone, or EOS for tokenizers without BOS, so a model always has a token to start from. The first text of
        a sentence pair is `[CLS] prompt [SEP]`, empty or not.
        """
        ids = self._encode(text)
        if self.is_pair_encoder:
            return [self.bos_id, *ids, self.eos_id]
        if self._prepends_bos and ids[:1] != [self.bos_id]:
            ids = [self.bos_id, *ids]
        return ids or [self.eos_id if self.bos_id is None else self.bos_id]

    def encode_answer(self, text: str, *, starts_text: bool = False) -> list[int]:
        """Ids of an answer, without BOS and EOS. Appended to a prompt's ids, they decode to both texts.

        Special tokens spelled out in the text stay text: an answer cannot end itself by quoting EOS. The second text of
        a sentence pair is always encoded as a separate text.

        Args:
            text: the answer.
            starts_text: whether the prompt is empty; the answer is then encoded as a separate text. SentencePiece
                tokenizers prepend a space there: the answer starts with `▁Once`, otherwise with `Once`.

        Raises InputError if the tokenizer joins the answer's beginning to whatever precedes it.
        """
        if starts_text or not self._prepends_space:
            return self._encode_raw(text)
        for sentinel, sentinel_ids in self._sentinels:
            ids = self._encode_raw(sentinel + text)
            if ids[: len(sentinel_ids)] == sentinel_ids:
                return ids[len(sentinel_ids) :]
        raise InputError(f"this tokenizer cannot tokenise the answer {text[:40]!r} separately from its prompt")

    def encode_parts(self, parts: Sequence[tuple[str, Place]]) -> list[list[int]]:
        """Ids of many short texts, each with its place, by the fastest way. May be called from any thread.

        Args:
            parts: (text, place). "text" gives `encode_answer(text, starts_text=True)`, "answer" gives
                `encode_answer(text)`, and "word" gives the ids that a text that begins with a space has after another
                word. "inside" gives the ids after another character, if no token joins the text to `INSIDE_LEAD`.

        Raises InputError as `encode_answer` does.
        """
        leads = [self._leads[place] for _, place in parts]
        encoded = self._encode_literally([lead + text for (text, _), (lead, _) in zip(parts, leads, strict=True)])
        return [
            # The tokenizer joined this sentinel to the answer; it may not join another one.
            ids[len(lead_ids) :] if ids[: len(lead_ids)] == lead_ids else self.encode_answer(text)
            for ids, (text, _), (_, lead_ids) in zip(encoded, parts, leads, strict=True)
        ]

    def definition(self) -> dict[str, Any] | None:
        """The stages, vocabulary and added tokens as the `tokenizers` library's JSON; None for tokenizers not built on
        it."""
        return json.loads(self._tokenizer.backend_tokenizer.to_str()) if self._tokenizer.is_fast else None

    def normalise(self, text: str) -> str:
        """The text after the tokenizer's normaliser."""
        normaliser = self._tokenizer.backend_tokenizer.normalizer if self._tokenizer.is_fast else None
        return normaliser.normalize_str(text) if normaliser else text

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; special tokens are skipped."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def decode_answer(self, prompt_ids: Sequence[int], answer_ids: Sequence[int]) -> str:
        """Text of an answer in its context: the text that it adds to the prompt's.

        Special tokens are skipped. An incomplete last character (some of its bytes are missing) is dropped.
        """
        prompt_ids, answer_ids = list(prompt_ids), list(answer_ids)
        start = len(self.decode(prompt_ids))
        text = self.decode(prompt_ids + answer_ids)[start:]
        # An incomplete UTF-8 character has at most three bytes. Cut ids, not text: bytes next to it become U+FFFD too.
        for cut in range(1, min(3, len(answer_ids)) + 1):
            if not text.endswith("\ufffd"):
                break
            text = self.decode(prompt_ids + answer_ids[:-cut])[start:]
        return text.rstrip("\ufffd")

    @property
    def chat_template(self) -> Any:
        """The chat template from the tokenizer's files; None if there is none."""
        return self._tokenizer.chat_template or None

    def render_chat(self, turns: Sequence[dict[str, str]]) -> str:
        """The conversation in the tokenizer's own chat template, up to the beginning of the assistant's answer.

        Raises InputError if there is no template, or it rejects these turns.
        """
        if self.chat_template is None:
            raise InputError(
                f"tokenizer {self._tokenizer.name_or_path!r} has no chat template: use another format, such as hh"
            )
        try:
            return self._tokenizer.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=True)
        except Exception as error:  # jinja2's errors, and whatever the template itself raises
            raise InputError(f"the chat template rejects the conversation: {first_line(error)}") from error

    @cached_property
    def closing_ids(self) -> tuple[int, ...]:
        """What follows a finished answer in the chat template, such as `<|im_end|>` and a line break; the
        end-of-sequence token if there is no template, or nothing follows in it."""
        answer = "the answer"
        turns = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": answer}]
        if self.chat_template is None or self.is_pair_encoder:
            return (self.eos_id,)
        try:
            text = self._tokenizer.apply_chat_template(turns, tokenize=False)
        except Exception:  # jinja2's errors, and whatever the template itself raises
            return (self.eos_id,)
        _, found, closing = text.rpartition(answer)
        lead = ":" if self._prepends_space else ""
        before, ids = (self._encode(part) for part in (lead, lead + closing))
        return tuple(ids[len(before) :] if found else ()) or (self.eos_id,)

    @cached_property
    def _leads(self) -> dict[Place, tuple[str, list[int]]]:
        """For each place, the text to put before a part, and the ids that this text adds."""
        answer = ("", [])
        if self._prepends_space:
            no_sentinel = ("", [-1])  # matches no ids, so `encode_answer` is called, and raises
            answer = next(iter(self._sentinels), no_sentinel)
        word, inside = ((lead, self._encode_raw(lead)) for lead in (WORD_LEAD, INSIDE_LEAD))
        return {"text": ("", []), "answer": answer, "word": word, "inside": inside}

    @cached_property
    def _literal(self) -> "Tokenizer | None":
        """A tokenizer that finds no special tokens in a text; None for tokenizers not built on `tokenizers`.

        It is a copy, because calls of transformers change the original's settings, in any thread.
        """
        definition = self.definition()
        if definition is None:
            return None
        from tokenizers import Tokenizer  # slow to import

        if definition["model"]["type"] == "Unigram":
            _hide_special_tokens(definition)
        literal = Tokenizer.from_str(json.dumps(definition))
        literal.encode_special_tokens = True  # as plain text
        literal.no_padding()
        literal.no_truncation()
        return literal

    def _encode_literally(self, texts: list[str]) -> list[list[int]]:
        if self._literal is None:
            return [self._encode_raw(text) for text in texts]
        if len(texts) <= _FEW:
            return [self._literal.encode(text, add_special_tokens=False).ids for text in texts]
        return [encoding.ids for encoding in self._literal.encode_batch_fast(texts, add_special_tokens=False)]

    def _encode_raw(self, text: str) -> list[int]:
        if self._has_unigram_model:
            return self._encode_literally([text])[0]
        return self._encode(text, split_special_tokens=True)

    @property
    def _has_unigram_model(self) -> bool:
        return self._tokenizer.is_fast and type(self._tokenizer.backend_tokenizer.model).__name__ == "Unigram"


def cut_left(prompt_ids: list[int], most: int, bos_id: int | None) -> list[int]:
    """At most so many ids of a prompt, at least 1: those on its left are cut, but never BOS."""
    if len(prompt_ids) <= most:
        return prompt_ids
    head = prompt_ids[:1] if prompt_ids[0] == bos_id else []
    return head + prompt_ids[len(prompt_ids) - most + len(head) :]


def _sentence_pair_ends(tokenizer: "PreTrainedTokenizerBase") -> tuple[int, int] | None:
    """The ids of [CLS] and [SEP], if the tokenizer encodes texts as `[CLS] A [SEP]` and `[CLS] A [SEP] B [SEP]`."""
    text = tokenizer.encode("a", add_special_tokens=False)
    single = tokenizer("a")["input_ids"]
    cls_id, sep_id = single[0], single[-1]
    if single != [cls_id, *text, sep_id] or tokenizer("a", "a")["input_ids"] != [*single, *text, sep_id]:
        return None
    return cls_id, sep_id


def _hide_special_tokens(definition: dict[str, Any]) -> None:
    """Renames a Unigram model's special tokens; they are among its pieces, so it would find them in texts."""
    hidden = {token["content"] for token in definition["added_tokens"] if token["special"]}
    # The new name contains a space. No text that reaches the model does: spaces are "▁" by then.
    for token in definition["added_tokens"]:
        if token["content"] in hidden:
            token["content"] = " " + token["content"]
    definition["model"]["vocab"] = [
        (" " + piece if piece in hidden else piece, score) for piece, score in definition["model"]["vocab"]
    ]


def stages(stage: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The stages of a normaliser, pre-tokenizer or decoder, in order; nested sequences are flattened."""
    if stage is None:
        return []
    if stage["type"] != "Sequence":
        return [stage]
    inner = next(value for key, value in stage.items() if key != "type")
    return [leaf for part in inner for leaf in stages(part)]


def byte_letters() -> dict[str, int]:
    """Maps the letters that byte-level tokenizers write for bytes back to the bytes."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(0x100) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(0x100 + index): byte for index, byte in enumerate(hidden)}
