"""Answers for training on a model's own samples: drawn by the decode loop, scored by a reward model."""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, PRNGKeyArray

from pargs_jax.data.batches import Batch
from pargs_jax.decoding.loop import Decoder
from pargs_jax.decoding.proposals import AllTokens
from pargs_jax.decoding.state import RowSettings
from pargs_jax.errors import InputError
from pargs_jax.generation.reward_models import RewardModel
from pargs_jax.models.causal import CausalModel
from pargs_jax.models.model import Params, unrolls_by_default, unstack_layers
from pargs_jax.sharding import on_every_device
from pargs_jax.text.tokenization import TextTokenizer


@dataclasses.dataclass(frozen=True, eq=False)
class Rollouts:
    """Samples answers to training prompts, and has them scored (`pargs_jax.training.on_policy.Sampler`).

    Attributes:
        tokenizer: of the model in training.
        reward_model: scores whole answers.
        own_prompts: the reward model's token ids of every prompt, by the bytes of its ids (int32) for the model in
            training.
        dtype: of the computation while sampling.
        temperature: of sampling, from the whole vocabulary.
        max_new_tokens: the longest answer.
    """

    tokenizer: TextTokenizer
    reward_model: RewardModel
    own_prompts: Mapping[bytes, list[int]]
    dtype: str
    temperature: float
    max_new_tokens: int

    def __call__(
        self, model: CausalModel, params: Params, prompts: Batch, key: PRNGKeyArray
    ) -> tuple[Batch, Bool[np.ndarray, "B"]]:
        """The batch with answers (R is `max_new_tokens`) and rewards, and which answers ended. Raises InputError for a
        reward that is not finite."""
        options = self.tokenizer.eos_ids, self.dtype, self.temperature, self.max_new_tokens
        sampled = sample(model, *options, params, prompts, key)
        answers, lengths, finished, *padded, weights = jax.device_get(sampled)
        lm_ids = [ids[len(ids) - length :] for ids, length in zip(*padded, strict=True)]
        own = self.reward_model.pad_prompts([self.own_prompts[ids.tobytes()] for ids in lm_ids], len(lm_ids))
        texts = [
            self.tokenizer.decode_answer(ids.tolist(), tokens[:length].tolist())
            for ids, tokens, length in zip(lm_ids, answers, lengths, strict=True)
        ]
        rewards = self.reward_model.score(own, answers, lengths, texts, finished)
        if not np.isfinite(rewards).all():
            raise InputError(f"{self.reward_model.source}: a reward is not finite; its weights may be damaged")
        answered = Batch(*padded, answers[:, None], lengths[:, None], weights, rewards=rewards[:, None])
        return answered, finished


@partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def sample(
    model: CausalModel,
    eos_ids: tuple[int, ...],
    dtype: str,
    temperature: float,
    max_new_tokens: int,
    params: Params,
    prompts: Batch,
    key: PRNGKeyArray,
) -> tuple[Array, ...]:
    """Samples an answer to each prompt from softmax(logits / temperature); row b's key is `key` with b folded in.
    Returns answers `[B N]`, their lengths, which of them ended, and the batch's prompts, lengths and weights, all whole
    on every device."""
    params = jax.tree.map(lambda x: x.astype(dtype), params)
    model = dataclasses.replace(model, config=dataclasses.replace(model.config, dropout=0.0, remat="none"))
    if unrolls_by_default(jax.default_backend()):
        model, params = unstack_layers(model, params)
    decoder = Decoder(model, proposer=AllTokens(), eos_ids=eos_ids, pad_id=eos_ids[0])
    rows = len(prompts.weights)
    settings = RowSettings.alike(
        rows, temperature=temperature, candidates=model.config.vocab_size, max_new_tokens=max_new_tokens
    )
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(rows))
    everything: Any = (params, ())
    texts = prompts.prompts, prompts.prompt_lengths
    state = decoder.start(everything, *texts, keys, settings, max_new_tokens)
    answers = decoder.read(decoder.advance(everything, state, max_new_tokens))
    return on_every_device((answers.tokens, answers.lengths, answers.finished, *texts, prompts.weights))
