"""Models in which answer tokens see only what precedes them, so one pass over an answer reads all its prefixes."""

from typing import Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from pargs_jax.models.model import Params, PromptsWithAnswers
from pargs_jax.models.outputs import AnswerOutputs, OnePassOutputs, PackedOutputs


class OnePass:
    """What causal and prefix-causal models share; each defines its own `encode`, `rewards` and `logits`.

    `shares_prompts` says whether a packed prompt may have several answers (`pargs_jax.data.packing.Packing`).
    """

    one_pass: ClassVar[bool] = True
    shares_prompts: ClassVar[bool] = True
    encode: Any
    encode_packed: Any
    rewards: Any
    logits: Any
    encode_with_next: Any
    encode_packed_with_next: Any

    def read_answers(
        self,
        params: Params,
        batch: PromptsWithAnswers,
        key: PRNGKeyArray | None = None,
        *,
        closing_id: int | None = None,
        chunk: int = 1,
    ) -> AnswerOutputs:
        """Reads all answers in one pass, packed if the batch is. A key turns dropout on; `closing_id` and `chunk`
        matter only to encoders."""
        if batch.packed is not None:
            return PackedOutputs(self, params, batch, self.encode_packed(params, batch.packed, key))
        rows, answers, width = batch.answers.shape
        prompts = jnp.repeat(batch.prompts, answers, axis=0)
        texts = jnp.concatenate([prompts, batch.answers.reshape(rows * answers, width)], axis=1)
        prompt_width = prompts.shape[1]
        start = jnp.repeat(prompt_width - batch.prompt_lengths, answers)
        hidden = self.encode(params, texts, start, key, prompt_width=prompt_width)[:, prompt_width - 1 :]
        hidden = hidden.reshape(rows, answers, width + 1, -1)
        return OnePassOutputs(self, params, batch, hidden, texts, start)

    def answer_rewards(
        self,
        params: Params,
        prompts: Int[Array, "B P"],
        prompt_lengths: Int[Array, "B"],
        answers: Int[Array, "B R"],
        lengths: Int[Array, "B"],
        closing_id: int | Int[Array, ""] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "B"]:
        """Rewards (fp32) of the first `lengths[b]` tokens of answers to left-padded prompts, read at the last of them.
        `closing_id` matters only to encoders."""
        width = prompts.shape[1]
        texts = jnp.concatenate([prompts, answers], axis=1)
        hidden = self.encode(params, texts, width - prompt_lengths, key, prompt_width=width)
        last = jnp.take_along_axis(hidden, (width + lengths - 1)[:, None, None], axis=1)[:, 0]
        return self.rewards(params, last)
