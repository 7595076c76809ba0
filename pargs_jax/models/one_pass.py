"""Models in which answer tokens see only what precedes them, so one pass over an answer reads all its prefixes."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from pargs_jax.models.model import Params, PromptsWithAnswers


@dataclasses.dataclass(frozen=True, eq=False)
class OnePassOutputs:
    """The outputs of one pass over a batch of prompts with answers.

    `hidden` are final hidden states, from each prompt's last token to its answer's last; `lengths` are the answers'
    lengths in tokens; `texts` are the prompts with their answers, and `starts` the numbers of padding tokens before
    them.
    """

    model: "OnePass"
    params: Params
    hidden: Float[Array, "B A R+1 D"]
    lengths: Int[Array, "B A"]
    texts: Int[Array, "BA T"]
    starts: Int[Array, "BA"]
    one_pass: ClassVar[bool] = True

    def states(self, before: int = 0) -> Float[Array, "B A R D"]:
        """Hidden states at the answers' tokens; `before=1` gives those one token earlier, which predict the answers'
        tokens."""
        return self.hidden[:, :, 1 - before : self.hidden.shape[2] - before]

    def logits(self) -> Float[Array, "B A R V"]:
        """Logits (fp32) that predict each answer token, for a model with a vocabulary head."""
        return self.model.logits(self.params, self.states(before=1))

    def rewards(self) -> Float[Array, "B A R"]:
        """Rewards (fp32) of all prefixes: entry i-1 is the reward of an answer's first i tokens."""
        return self.model.rewards(self.params, self.states())

    def rewards_of_next(self, candidates: Int[Array, "B A R K"]) -> Float[Array, "B A R K"]:
        """Rewards (fp32) of prefixes with other next tokens, for causal models: entry (i, k) is that of an answer's
        first i tokens followed by `candidates[..., i, k]`."""
        place = self.texts.shape[1] - candidates.shape[2]
        nexts = candidates.reshape(-1, *candidates.shape[2:])
        hidden = self.model.encode_with_next(self.params, self.texts, self.starts, place, nexts)
        return self.model.rewards(self.params, hidden).reshape(candidates.shape)

    def rewards_at(self, lengths: Int[Array, "B N"], *, descending: bool = False) -> Float[Array, "B N A"]:
        """Rewards of prefixes of these lengths (at least 1). Where an answer is shorter than the length, the reward of
        the whole answer is repeated."""
        rewards = self.rewards()

        def at(length: Int[Array, "B"]) -> Float[Array, "B A"]:
            last = jnp.minimum(length[:, None], self.lengths) - 1
            return jnp.take_along_axis(rewards, last[..., None], axis=-1)[..., 0]

        return jax.vmap(at, in_axes=1, out_axes=1)(lengths)


class OnePass:
    """What causal and prefix-causal models share; each defines its own `encode`, `rewards` and `logits`."""

    one_pass: ClassVar[bool] = True
    encode: Any
    rewards: Any
    logits: Any
    encode_with_next: Any

    def read_answers(
        self,
        params: Params,
        batch: PromptsWithAnswers,
        key: PRNGKeyArray | None = None,
        *,
        closing_id: int | None = None,
        chunk: int = 1,
    ) -> OnePassOutputs:
        """Reads all answers in one pass. A key turns dropout on; `closing_id` and `chunk` matter only to encoders."""
        rows, answers, width = batch.answers.shape
        prompts = jnp.repeat(batch.prompts, answers, axis=0)
        texts = jnp.concatenate([prompts, batch.answers.reshape(rows * answers, width)], axis=1)
        prompt_width = prompts.shape[1]
        start = jnp.repeat(prompt_width - batch.prompt_lengths, answers)
        hidden = self.encode(params, texts, start, key, prompt_width=prompt_width)[:, prompt_width - 1 :]
        hidden = hidden.reshape(rows, answers, width + 1, -1)
        return OnePassOutputs(self, params, hidden, batch.answer_lengths, texts, start)

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
