"""Loads reward models, matches them with the language model's tokenizer, and turns them into guides."""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from pargs_jax.data.preferences import Prompt
from pargs_jax.decoding.guides import (
    AutoregressiveGuide,
    CausalGuide,
    EncoderGuide,
    Guide,
    NextTokenGuide,
    PreferenceGuide,
    Prompts,
    RetokenisedGuide,
)
from pargs_jax.decoding.guides.retokenised import Retokeniser as RetokeniserContract
from pargs_jax.errors import InputError, input_errors_named_after
from pargs_jax.models.hf import Pretrained, load_model
from pargs_jax.models.model import AnyRewardModel, HeadName, Params, unstack_layers
from pargs_jax.models.sources import tokenizer_folder
from pargs_jax.sharding import on_every_device
from pargs_jax.text.prompts import turns_in
from pargs_jax.text.retokenisation import Retokeniser
from pargs_jax.text.tokenization import TextTokenizer

Role = Literal["scalar", "table", "log_probs", "preference"]
"""The meaning of a reward model's outputs: the reward of a text; rewards of a text with each next token;
log-probabilities of next tokens; or log-probabilities that depend on a preference vector."""

_HEAD_OF: dict[Role, str] = {
    "scalar": "reward", "table": "table", "log_probs": "vocabulary", "preference": "vocabulary"
}  # fmt: skip
_NEXT_TOKEN_GUIDES = {"table": NextTokenGuide, "log_probs": AutoregressiveGuide, "preference": PreferenceGuide}

SMALLEST_WIDTH = 16
WIDTH_STEP = 64


def load_with_tokenizer(
    source: str, head: HeadName, dtype: str, weights: str | None = None
) -> tuple[Pretrained, TextTokenizer]:
    """A model and its tokenizer. `dtype` is that of parameters and computation; `weights` is another one for this
    model's parameters: `float32`, `bfloat16`, or `int8` for the matrices of its layers.

    Raises InputError if it is not a model with this head, or if they do not fit."""
    is_int8 = weights == "int8"
    loaded = load_model(source, head, dtype=dtype if weights is None or is_int8 else weights, int8=is_int8)
    if loaded.new_head:
        raise InputError(f"{source}: has no reward head, so it is not a reward model; train one with train.py")
    tokenizer = TextTokenizer.load(tokenizer_folder(source), loaded.eos_ids)
    tokenizer.check_embeddings(loaded.model.config.vocab_size, source)
    return loaded, tokenizer


@dataclasses.dataclass(frozen=True)
class RewardModel:
    """A reward model and how it reads the language model's texts: in the same tokens or, with a `retokeniser`, in its
    own.

    `has_own_template` says that its chat template differs from the language model's, and `renders_all` that it renders
    every prompt in its template, even if the language model reads another form. `closing_ids` end an answer in its
    tokens. `prompt_form` is the form that it
    was trained with, if it says so. `lm_vocab_size` is the number of tokens that the language model proposes.
    """

    source: str
    model: AnyRewardModel
    params: Params
    tokenizer: TextTokenizer
    retokeniser: Retokeniser | None
    has_own_template: bool = False
    renders_all: bool = False
    prompt_form: str | None = None
    role: Role = "scalar"
    lm_vocab_size: int = 0

    @classmethod
    def load(
        cls,
        source: str,
        lm_tokenizer: TextTokenizer,
        lm_vocab_size: int,
        *,
        dtype: str,
        unroll: bool,
        role: Role = "scalar",
        weights: str | None = None,
        prefers_template: bool = False,
    ) -> "RewardModel":
        """Loads from a folder or the hub; `load_with_tokenizer` explains the dtypes. With `prefers_template`, a scalar
        reward model that has a chat template, and does not remember another form, reads all prompts and the ends of
        answers as its template writes them. Raises InputError if it is not a reward model of this role, or does not fit
        its tokenizer or the language model's."""
        if role != "scalar" and not lm_tokenizer.same_vocabulary(TextTokenizer.load(tokenizer_folder(source))):
            raise InputError(
                f"{source}: does not have the language model's tokenizer; a model that scores all next tokens at once "
                "must share it"
            )
        loaded, tokenizer = load_with_tokenizer(source, _HEAD_OF[role], dtype, weights)
        if (loaded.model.lora is not None) != (role == "preference"):
            raise InputError(
                f"{source}: needs a preference vector, which only the method parm provides"
                if loaded.model.lora
                else f"{source}: takes no preference vector (pargs_preference_lora in config.json)"
            )
        model, params = unstack_layers(loaded.model, loaded.params) if unroll else (loaded.model, loaded.params)
        shares = shares_tokens(source, model, lm_vocab_size, (tokenizer, lm_tokenizer))
        form = loaded.prompt_form
        renders_all = prefers_template and role == "scalar" and reads_own_template(tokenizer, form)
        closing_ids = tokenizer.closing_ids if renders_all else (tokenizer.eos_id,)
        # The language model's end of an answer is one token. What more the template has there is read as text.
        ends_alike = not renders_all or (len(closing_ids) == 1 and closing_ids[0] in lm_tokenizer.eos_ids)
        retokeniser = None if shares and ends_alike else Retokeniser(lm_tokenizer, tokenizer, closing_ids)
        has_own_template = tokenizer.chat_template not in (None, lm_tokenizer.chat_template)
        return cls(
            source, model, params, tokenizer, retokeniser, has_own_template, renders_all, form, role, lm_vocab_size
        )

    def encode_prompt(self, prompt: Prompt, lm_ids: list[int]) -> list[int]:
        """A prompt in this model's tokens, rendered in its own chat template if the prompt has turns.

        Args:
            prompt: the prompt.
            lm_ids: its ids for the language model; they are returned if this model has the same tokens and template.

        Raises InputError if the model needs a chat template that it does not have, or turns that are not known.
        """
        turns, differs = prompt.turns, self.has_own_template
        if turns is None and self.renders_all:
            turns, differs = turns_in(prompt.text), True
        if self.retokeniser is None and (turns is None or not differs):
            return lm_ids
        if turns is None:
            return self.tokenizer.encode_prompt(prompt.text)
        if not turns:
            raise InputError(
                f"prompt {prompt.id!r} is already written in the language model's chat template, but {self.source} has "
                "another one; give the plain question or a list of turns"
            )
        with input_errors_named_after(f"prompt {prompt.id!r} for {self.source}"):
            return self.tokenizer.encode_prompt(self.tokenizer.render_chat(turns))

    def check_prompt(self, prompt: Prompt, ids: Sequence[int], max_new_tokens: int, look_ahead: int = 0) -> None:
        """Raises InputError if a prompt, in this model's tokens, may not fit this model together with its answer and
        the tokens that an aligned model writes after a candidate."""
        if len(ids) + max_new_tokens + look_ahead > self.model.config.max_positions:
            ahead = f" and {look_ahead} tokens of look-ahead" if look_ahead else ""
            raise InputError(
                f"prompt {prompt.id!r} has {len(ids)} tokens for {self.source}; with {max_new_tokens} new tokens"
                f"{ahead} it exceeds that model's context of {self.model.config.max_positions} tokens; in "
                "decoding, the option cut_prompts cuts it"
            )

    def pad_prompts(self, prompts: Sequence[Sequence[int]], rows: int, least: int = 0) -> Prompts:
        """Prompts in this model's tokens as a batch, at the smallest of a few widths that holds them, or at `least` if
        that is more."""
        longest = max(map(len, prompts))
        width = padded_width(longest)
        if self.retokeniser is not None:
            # An encoder reads padding again at every step for every candidate, so a few more compilations are worth it.
            step = max(SMALLEST_WIDTH, width // 4) if self.model.one_pass else SMALLEST_WIDTH
            width = min(-(-longest // step) * step, self.model.config.max_positions)
        return left_pad(prompts, rows, max(width, least))

    def guide(self, max_new_tokens: int, min_answer_width: int = 0) -> Guide:
        """The guide that this model makes. Its answers may have at least `min_answer_width` of its own tokens."""
        if self.role != "scalar":
            return _NEXT_TOKEN_GUIDES[self.role](self.model, self.lm_vocab_size)
        return make_guide(self.model, self.retokeniser, max_new_tokens, self.tokenizer.eos_id, min_answer_width)

    def guide_prompts(self, prompts: Prompts, lm_prompts: Prompts) -> Prompts | None:
        """A batch of prompts in this model's tokens, as its guide takes them; None if they equal the language
        model's."""
        shares = self.retokeniser is None and np.array_equal(prompts.tokens, lm_prompts.tokens)
        return None if shares else prompts

    def tokens_read(self, prompt: int, answer: int, candidates: int) -> int:
        """The number of tokens that it reads as a guide (see `TokensRead`)."""
        if self.role != "scalar":
            return prompt - 1 + answer
        if self.model.one_pass:
            return prompt + candidates * answer
        return candidates * (answer * prompt + answer * (answer + 1) // 2)

    def fits(self, guide: Guide, needed: int, prompt: int) -> bool:
        """Whether an answer that needed `needed` of this model's tokens with its candidates, after a prompt of `prompt`
        of them, was read whole by this guide, which has its own tokenizer. Raises InputError if the model has too few
        positions for it."""
        positions = table_of_positions(self.model)
        most = None if positions is None else positions - prompt - (not self.model.one_pass)
        if most is not None and needed > most:
            raise InputError(
                f"{self.source}: an answer with a candidate needs {needed} of its tokens, but after a prompt of "
                f"{prompt} only {most} fit its context; ask for fewer new tokens"
            )
        return needed <= guide.answer_width

    def score(
        self,
        prompts: Prompts,
        tokens: Int[np.ndarray, "B N"],
        counts: Int[np.ndarray, "B"],
        texts: Sequence[str],
        finished: Sequence[bool],
    ) -> Float[np.ndarray, "B"]:
        """Rewards of whole answers.

        Args:
            prompts: in this model's tokens.
            tokens, counts: the answers, `tokens[b, :counts[b]]`, in the language model's tokens.
            texts: their texts.
            finished: whether each ended with an end-of-sequence token.

        Raises:
            InputError: if a text has more of the model's own tokens than its table of positions.
        """
        if self.retokeniser is None:
            return self._answer_rewards(prompts, tokens, counts)
        answers: list[list[int]] = [[] for _ in prompts.lengths]
        for row, (text, ended) in enumerate(zip(texts, finished, strict=True)):
            prompt_ids = prompts.tokens[row, prompts.tokens.shape[1] - prompts.lengths[row] :].tolist()
            ids = self.tokenizer.encode_answer(text, starts_text=not self.tokenizer.decode(prompt_ids))
            answers[row] = [*ids, *self.retokeniser.closing_ids] if ended else ids
        padded, counts = right_pad(answers)
        longest = int((prompts.lengths + counts).max()) + (not self.model.one_pass)
        if (positions := table_of_positions(self.model)) is not None and longest > positions:
            raise InputError(
                f"{self.source}: a prompt with its answer has {longest} of its tokens, but its context is {positions}; "
                "ask for fewer new tokens"
            )
        return self._answer_rewards(prompts, padded, counts)

    def _answer_rewards(self, prompts: Prompts, *answers: Int[np.ndarray, "..."]) -> Float[np.ndarray, "B"]:
        return np.asarray(answer_rewards(self.model, self.params, *prompts, *answers, self.tokenizer.eos_id))


def reads_own_template(tokenizer: TextTokenizer, prompt_form: str | None) -> bool:
    """Whether a reward model that is to read its own chat template, if it can, does so: it has one, and does not
    remember another prompt form."""
    return tokenizer.chat_template is not None and prompt_form in (None, "chat")


def shares_tokens(
    source: str, model: AnyRewardModel, lm_vocab_size: int, tokenizers: tuple[TextTokenizer, TextTokenizer] | None
) -> bool:
    """Whether a reward model can read the language model's tokens directly: it is causal, and the vocabularies are
    equal. Without tokenizers (models that are only described), vocabularies of equal size count as equal.

    Raises InputError if the vocabularies are equal but the reward model lacks embeddings for some tokens.
    """
    if not model.reads_candidates:
        return False
    vocab_size = model.config.vocab_size
    if tokenizers is None:
        return vocab_size == lm_vocab_size
    shares = tokenizers[0].same_vocabulary(tokenizers[1])
    if shares and vocab_size < lm_vocab_size:
        raise InputError(
            f"{source}: has {vocab_size} token embeddings, must have {lm_vocab_size} as the language model"
        )
    return shares


def make_guide(
    model: AnyRewardModel,
    retokeniser: RetokeniserContract | None,
    max_new_tokens: int,
    closing_id: int,
    min_answer_width: int = 0,
) -> Guide:
    """The guide of a reward model. With a `retokeniser`, the model has its own tokenizer, and `min_answer_width` counts
    its tokens."""
    if retokeniser is None:
        return CausalGuide(model)
    answer_width = max(first_answer_width(max_new_tokens), min_answer_width)
    if model.one_pass:
        return RetokenisedGuide(model, retokeniser, answer_width)
    return EncoderGuide(model, retokeniser, answer_width, closing_id)


def first_answer_width(max_new_tokens: int) -> int:
    """The first answer width to try, in the reward model's tokens: usually they are fewer than twice the language
    model's. Answers that need more are decoded again with a larger width."""
    return 2 * max_new_tokens + SMALLEST_WIDTH


def table_of_positions(model: AnyRewardModel) -> int | None:
    """The size of a model's table of positions; None if positions are rotary or relative, which have no limit except
    the range that they were trained on."""
    return model.config.max_positions if "positions" in model.abstract_params()["backbone"] else None


@partial(jax.jit, static_argnums=0)
def answer_rewards(model: AnyRewardModel, params: Params, *answers: Any) -> Float[Array, "B"]:
    """`AnyRewardModel.answer_rewards`, compiled."""
    return on_every_device(model.answer_rewards(params, *answers))


def left_pad(prompts: Sequence[Sequence[int]], rows: int, width: int) -> Prompts:
    """Left-padded token ids and lengths. Missing rows are filler of length 0."""
    ids = np.zeros((rows, width), np.int32)
    lengths = np.zeros(rows, np.int32)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = prompt
        lengths[row] = len(prompt)
    return Prompts(ids, lengths)


def right_pad(answers: Sequence[Sequence[int]]) -> tuple[Int[np.ndarray, "B R"], Int[np.ndarray, "B"]]:
    """Right-padded token ids and lengths."""
    lengths = np.array(list(map(len, answers)), np.int32)
    ids = np.zeros((len(answers), padded_width(lengths.max())), np.int32)
    for row, answer in enumerate(answers):
        ids[row, : len(answer)] = answer
    return ids, lengths


def padded_width(length: int) -> int:
    """The width that texts are padded to: 16, 32, 64, or the next multiple of 64.

    Every width is compiled separately; a context of C tokens has at most 2 + C / 64 of them. Texts longer than 64
    tokens get less than 64 tokens of padding.
    """
    if length > WIDTH_STEP:
        return -(-int(length) // WIDTH_STEP) * WIDTH_STEP
    return next(width for width in (SMALLEST_WIDTH, 32, WIDTH_STEP) if length <= width)
