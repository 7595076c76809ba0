"""What models say of texts that are there already: rewards of answers and of their prefixes, and likelihoods."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pargs_jax.data.batches import Batch
from pargs_jax.errors import InputError
from pargs_jax.generation.reward_models import (
    answer_rewards,
    left_pad,
    load_with_tokenizer,
    padded_width,
    reads_own_template,
    right_pad,
)
from pargs_jax.models.causal import CausalModel
from pargs_jax.models.model import HeadName, Params
from pargs_jax.models.one_pass import OnePass
from pargs_jax.objectives.likelihood import prefix_log_probs, token_log_probs
from pargs_jax.sharding import current_mesh, on_every_device, row_shards
from pargs_jax.text.prompts import turns_in
from pargs_jax.text.tokenization import TextTokenizer


@dataclass(frozen=True)
class TokenisedAnswer:
    """A prompt and an answer in a model's tokens, and the prefixes of the answer that are asked for, in tokens."""

    prompt: Sequence[int]
    answer: Sequence[int]
    prefixes: Sequence[int]


@dataclass
class ScoringModel:
    """A model that reads texts in batches. `load` makes one."""

    source: str
    model: Any
    params: Params
    tokenizer: TextTokenizer
    prompt_form: str | None = None
    renders_all: bool = False
    """Whether it reads all prompts in its own chat template."""
    batch_size: int = 16
    read: Callable[[str], None] = field(default=lambda note: None, repr=False)
    """Called with a note after every batch, for progress."""

    @classmethod
    def load(
        cls,
        source: str,
        head: HeadName,
        *,
        dtype: str = "float32",
        weights: str | None = None,
        batch_size: int = 16,
        prefers_template: bool = False,
    ) -> "ScoringModel":
        """Loads a reward model or a language model; `load_with_tokenizer` explains the dtypes, `RewardModel.load` what
        `prefers_template` does. Raises InputError if it is not one or does not suit its tokenizer."""
        loaded, tokenizer = load_with_tokenizer(source, head, dtype, weights)
        form = loaded.prompt_form
        renders_all = prefers_template and reads_own_template(tokenizer, form)
        return cls(source, loaded.model, loaded.params, tokenizer, form, renders_all, batch_size)

    def tokenise(self, prompt: str, response: str, *, closed: bool) -> TokenisedAnswer | None:
        """A text as the model reads it, with the whole answer as the only prefix; `closed` adds the end-of-sequence
        token, or what ends an answer in the model's chat template. None if it does not fit the model's context."""
        closing = [self.tokenizer.eos_id]
        if self.renders_all:
            prompt, closing = self.tokenizer.render_chat(turns_in(prompt)), self.tokenizer.closing_ids
        ids = self.tokenizer.encode_prompt(prompt)
        answer = self.tokenizer.encode_answer(response, starts_text=not prompt)
        if closed:
            answer = [*answer, *closing]
        # A model that reads prefixes as finished texts closes what is open.
        needed = len(ids) + len(answer) + (not self.model.one_pass and not closed)
        return TokenisedAnswer(ids, answer, (len(answer),)) if needed <= self.model.config.max_positions else None

    def rewards(self, texts: Sequence[TokenisedAnswer]) -> list[Float[np.ndarray, "F"]]:
        """The rewards of each text's prefixes.

        A causal model reads a text once for all of them, an encoder once for each. Raises InputError if one is not
        finite.
        """
        if self.model.one_pass:
            rewards = self._in_batches(texts, self._rewards_in_one_pass)
        else:
            asked = [(i, prefix) for i, text in enumerate(texts) for prefix in dict.fromkeys(text.prefixes)]
            single = [TokenisedAnswer(texts[i].prompt, texts[i].answer[:n], (n,)) for i, n in asked]
            found = dict(zip(asked, self._in_batches(single, self._whole_rewards), strict=True))
            rewards = [np.array([found[i, prefix] for prefix in text.prefixes]) for i, text in enumerate(texts)]
        if not all(np.isfinite(each).all() for each in rewards):
            raise InputError(f"{self.source}: a reward is not finite; its weights may be damaged")
        return rewards

    def log_likelihoods(self, texts: Sequence[TokenisedAnswer]) -> list[float]:
        """The log-probability of each text's answer after its prompt under a language model, in nats."""
        found = self._in_batches(texts, self._log_likelihoods)
        if not np.isfinite(found).all():
            raise InputError(f"{self.source}: a log-probability is not finite; its weights may be damaged")
        return [float(each) for each in found]

    def _in_batches(self, texts: Sequence[TokenisedAnswer], read: Callable[[list[TokenisedAnswer]], Any]) -> list[Any]:
        """What `read` gives for each text, from batches of texts of like length; each is filled up with its last."""
        order = sorted(range(len(texts)), key=lambda i: (len(texts[i].answer), len(texts[i].prompt)))
        shards = row_shards(current_mesh())
        rows = -(-self.batch_size // shards) * shards
        found: list[Any] = [None] * len(texts)
        for first in range(0, len(order), rows):
            chosen = order[first : first + rows]
            filled = [texts[i] for i in chosen] + [texts[chosen[-1]]] * (rows - len(chosen))
            results = read(filled)
            for i, result in zip(chosen, results, strict=False):
                found[i] = result
            self.read(f"{first + len(chosen)}/{len(order)} texts")
        return found

    def _batch(self, texts: list[TokenisedAnswer]) -> Batch:
        longest = max(len(text.prompt) for text in texts)
        prompts = left_pad([text.prompt for text in texts], len(texts), padded_width(longest))
        answers, counts = right_pad([text.answer for text in texts])
        return Batch(*prompts, answers[:, None], counts[:, None], np.ones(len(texts), np.float32))

    def _rewards_in_one_pass(self, texts: list[TokenisedAnswer]) -> Float[np.ndarray, "B F"]:
        prefixes = np.array([text.prefixes for text in texts], np.int32)
        return np.asarray(_rewards_of_prefixes(self.model, self.params, self._batch(texts), prefixes))

    def _whole_rewards(self, texts: list[TokenisedAnswer]) -> Float[np.ndarray, "B"]:
        batch = self._batch(texts)
        answers = batch.prompts, batch.prompt_lengths, batch.answers[:, 0], batch.answer_lengths[:, 0]
        return np.asarray(answer_rewards(self.model, self.params, *answers, self.tokenizer.eos_id))

    def _log_likelihoods(self, texts: list[TokenisedAnswer]) -> Float[np.ndarray, "B"]:
        return np.asarray(_answer_log_likelihoods(self.model, self.params, self._batch(texts)))


@partial(jax.jit, static_argnums=0)
def _rewards_of_prefixes(
    model: OnePass, params: Params, batch: Batch, prefixes: Int[Array, "B F"]
) -> Float[Array, "B F"]:
    """Rewards of the answers' first so many tokens, which may be none, all in one pass."""
    hidden = model.read_answers(params, batch).hidden[:, 0]  # from the prompt's last token on
    return on_every_device(model.rewards(params, jnp.take_along_axis(hidden, prefixes[..., None], axis=1)))


@partial(jax.jit, static_argnums=0)
def _answer_log_likelihoods(model: CausalModel, params: Params, batch: Batch) -> Float[Array, "B"]:
    """`sum_i log p(y_i | x, y_<i)` over each answer's tokens."""
    log_probs = model.read_answers(params, batch).map_logits(token_log_probs)
    return on_every_device(prefix_log_probs(log_probs, batch.answer_lengths)[:, 0, -1])
