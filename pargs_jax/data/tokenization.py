"""Text to token ids and back, with prompts and answers tokenised apart.

In decoding the prompt's tokens are fixed before the answer's first token exists, so a token never spans the boundary.
Training has to see the same boundary: `encode_prompt` and `encode_answer` are the only two ways from text to ids in
this package, and `decode_answer` is the way back.
"""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pargs_jax.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
"""What the name of a model or data set on the hub looks like: `name` or `owner/name`."""

_SENTINELS = ("\n", ":", "|", "0")
"""Put in front of an answer to learn its tokens in mid-text; several, as a tokenizer may join one to what follows."""

_PROBES = ("Hello world", " two  spaces", "\n\nHuman: hi\n\nAssistant:", "l'été 42 日本語", "🙂👍🏽", "\tdef f(x):\r\n")
"""Texts that tokenizers with one vocabulary but different normalisers, pre-tokenizers or merges split differently."""


class TextTokenizer:
    """A Hugging Face tokenizer, seen as this package needs it.

    Attributes:
        vocab_size: number of tokens, added ones included.
        bos_id: the beginning-of-sequence token, or None.
        eos_ids: the tokens that end an answer, the tokenizer's own first.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", extra_eos_ids: Iterable[int] = ()) -> None:
        """Wraps a loaded tokenizer.

        Args:
            tokenizer: a transformers tokenizer.
            extra_eos_ids: more tokens that end an answer, such as those of a model's generation config.

        Raises:
            InputError: if nothing can end an answer.
        """
        self._tokenizer = tokenizer
        own_eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        self.vocab_size: int = len(tokenizer)
        self.bos_id: int | None = tokenizer.bos_token_id
        self.eos_ids: tuple[int, ...] = tuple(dict.fromkeys([*own_eos, *extra_eos_ids]))
        if not self.eos_ids:
            raise InputError(f"tokenizer {tokenizer.name_or_path!r} has no end-of-sequence token: set eos_token")
        with_specials = tokenizer.encode("a", add_special_tokens=True)
        self._prepends_bos = self.bos_id is not None and with_specials[0] == self.bos_id
        # SentencePiece tokenizers put a space before a text that has none, which is wrong in mid-text.
        self._prepends_space = tokenizer.tokenize("a")[0].startswith("▁")
        # One that the tokenizer normalises away would leave the answer at the text's beginning: it must survive.
        sentinels = [(text, self._encode_raw(text)) for text in _SENTINELS]
        self._sentinels = [(text, ids) for text, ids in sentinels if self._decode(ids) == text]

    @classmethod
    def load(cls, source: str | Path, extra_eos_ids: Iterable[int] = ()) -> "TextTokenizer":
        """Loads from a local folder, or else from the hub; code that comes with a tokenizer is never run.

        Raises:
            InputError: if `source` is neither, or holds no readable tokenizer.
        """
        is_folder = Path(source).is_dir()
        if not is_folder and not HUB_ID.fullmatch(str(source)):
            raise InputError(
                f"tokenizer {str(source)!r}: no such folder, and not a hub id such as openai-community/gpt2"
            )
        from transformers import AutoTokenizer  # slow to import

        try:
            tokenizer = AutoTokenizer.from_pretrained(
                str(source), trust_remote_code=False, local_files_only=is_folder, use_fast=True
            )
        except Exception as error:  # transformers raises OSError, ValueError, KeyError and plain Exception here
            reason = (
                "this folder has no readable tokenizer.json, tokenizer.model, or vocab.json with merges.txt"
                if is_folder
                else f"no such folder, and the hub gave none: {''.join(str(error).splitlines()[:1])}"
            )
            raise InputError(f"tokenizer {str(source)!r}: {reason}") from error
        return cls(tokenizer, extra_eos_ids)

    def save(self, folder: str | Path) -> None:
        """Writes the tokenizer's files; `load(folder)` gives an equal tokenizer.

        Raises:
            InputError: if the folder cannot be written.
        """
        try:
            self._tokenizer.save_pretrained(str(folder))
        except OSError as error:
            raise InputError(f"tokenizer folder {str(folder)!r} cannot be written: {error.strerror}") from error

    @property
    def eos_id(self) -> int:
        """The token that ends an answer in training."""
        return self.eos_ids[0]

    def same_vocabulary(self, other: "TextTokenizer") -> bool:
        """Whether both tokenizers split every text into the same ids.

        Both must map the same tokens to the same ids and split a set of probing texts alike. A padding token that only
        one of them has is no difference: no model here ever reads one.
        """
        mine, theirs = self._tokenizer, other._tokenizer
        differing = {token for token, _ in mine.get_vocab().items() ^ theirs.get_vocab().items()}
        return differing <= {mine.pad_token, theirs.pad_token} and all(
            self.encode_prompt(text) == other.encode_prompt(text) for text in _PROBES
        )

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a prompt: begins with BOS if this tokenizer adds one, and is never ended by EOS or SEP.

        Special tokens spelled out in the text, such as those of a chat template, become those tokens. An empty prompt
        is BOS alone, or EOS for tokenizers without BOS, so that a model always has a token to start from.
        """
        ids = self._tokenizer.encode(text, add_special_tokens=False, verbose=False)
        if self._prepends_bos and ids[:1] != [self.bos_id]:
            ids = [self.bos_id, *ids]
        return ids or [self.eos_id if self.bos_id is None else self.bos_id]

    def encode_answer(self, text: str, *, starts_text: bool = False) -> list[int]:
        """Ids of an answer, without BOS and EOS, that continue a prompt's ids: decoded together they are both texts.

        Special tokens spelled out in the text stay text: an answer cannot end itself by quoting EOS.

        Args:
            text: the answer.
            starts_text: the prompt is empty, so that the answer is encoded as a text of its own. For SentencePiece
                tokenizers this is the difference between `▁Once` and `Once`; they take a space there for their own.

        Raises:
            InputError: if the tokenizer joins the answer's beginning to whatever stands before it.
        """
        if starts_text or not self._prepends_space:
            return self._encode_raw(text)
        for sentinel, sentinel_ids in self._sentinels:
            ids = self._encode_raw(sentinel + text)
            if ids[: len(sentinel_ids)] == sentinel_ids:
                return ids[len(sentinel_ids) :]
        raise InputError(f"answer {text[:40]!r} cannot be tokenised apart from its prompt by this tokenizer")

    def decode_answer(self, prompt_ids: Sequence[int], answer_ids: Sequence[int]) -> str:
        """Text of an answer in its context: what it adds to the text of the prompt.

        Special tokens are skipped. A last character of which only some bytes are there is dropped.
        """
        prompt_ids, answer_ids = list(prompt_ids), list(answer_ids)
        start = len(self._decode(prompt_ids))
        text = self._decode(prompt_ids + answer_ids)[start:]
        # An unfinished UTF-8 character has at most three bytes. Cut ids, not text: bytes beside it become U+FFFD too.
        for cut in range(1, min(3, len(answer_ids)) + 1):
            if not text.endswith("\ufffd"):
                break
            text = self._decode(prompt_ids + answer_ids[:-cut])[start:]
        return text.rstrip("\ufffd")

    def render_chat(self, turns: Sequence[dict[str, str]]) -> str:
        """The conversation in the tokenizer's own chat template, up to where the assistant's answer begins.

        Raises:
            InputError: if there is no template, or it rejects these turns.
        """
        if not self._tokenizer.chat_template:
            raise InputError(
                f"tokenizer {self._tokenizer.name_or_path!r} has no chat template: use another prompt form, such as hh"
            )
        try:
            return self._tokenizer.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=True)
        except Exception as error:  # jinja2's errors, and whatever the template itself raises
            raise InputError(
                f"the chat template rejects the conversation: {''.join(str(error).splitlines()[:1])}"
            ) from error

    def _encode_raw(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True, verbose=False)

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
