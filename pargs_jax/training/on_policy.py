"""Steps on the trained model's own answers: sample and score them, then make a few optimizer updates on all of them.

What a step samples depends only on the seed, the step and the parameters, so a resumed run needs nothing else.
"""

import dataclasses
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, PRNGKeyArray

from pargs_jax.data.batches import Batch, Batches
from pargs_jax.models.lora import join_params
from pargs_jax.models.model import Params
from pargs_jax.objectives.policy_gradients import PolicyNumbers, policy_numbers, weighted_mean
from pargs_jax.sharding import current_mesh, on_every_device, place_rows, place_whole
from pargs_jax.training.meter import SAMPLED, stack_metrics
from pargs_jax.training.objective import Metrics, Objective
from pargs_jax.training.program import REFERENCE, TrainingProgram
from pargs_jax.training.step import StepFunction, TrainState, cut_rows, merge_metrics

EVALUATION = 2**32 - 1
"""Stands for the step in the randomness of evaluations; no run has as many."""


class Sampler(Protocol):
    """Samples answers from a language model in training, and scores them."""

    def __call__(
        self, model: Any, params: Params, prompts: Batch, key: PRNGKeyArray
    ) -> tuple[Batch, Bool[np.ndarray, "B"]]:
        """The batch with an answer to each prompt and its reward, and which answers ended with an end-of-sequence
        token; all on the host. Row b's randomness is the key's with b folded in."""
        ...


@dataclasses.dataclass(frozen=True)
class OnPolicy:
    """The steps and evaluations of a run whose loss is an `OnPolicyLoss`."""

    program: TrainingProgram
    sampler: Sampler

    def make_step(self, update: StepFunction) -> StepFunction:
        """A step that samples answers to a batch of prompts and calls `update` on them. Its metrics are means over the
        updates, and those of the answers: `reward`, `kl` (from the reference, in nats per answer), `length` (tokens),
        `finished` (the share of answers that ended) and `sampled_tokens`."""
        updates = self.program.objective.loss.updates_per_step

        def step(state: TrainState, prompts: Batch, key: PRNGKeyArray, frozen: Params) -> tuple[TrainState, Metrics]:
            sampling = _folded(key, state.step)
            answered, metrics = self._roll_out(state.params, frozen, prompts, sampling)
            others = {name: part for name, part in frozen.items() if name != REFERENCE}
            parts = []
            for _ in range(updates):
                state, of_update = update(state, answered, key, others)
                parts.append(of_update)
            return state._replace(step=_one_step(state.step, updates)), metrics | _means(parts)

        return step

    def evaluate(self, params: Params, batches: Batches) -> dict[str, float]:
        """The metrics of answers to all held-out prompts, one each, with the same randomness every time. Their loss is
        minus the mean of `reward - kl_weight kl`."""
        parts = []
        key = place_whole(current_mesh(), lambda: jax.random.key(self.program.config.seed))
        for number, prompts in enumerate(batches.evaluation()):
            sampling = _folded(_folded(key, np.uint32(EVALUATION)), np.uint32(number))
            _, metrics = self._roll_out(params, {}, place_rows(current_mesh(), prompts), sampling)
            parts.append(metrics | {"weight": prompts.weights.sum()})
        stacked = stack_metrics(jax.device_get(parts))
        weights, _ = stacked.pop("weight"), stacked.pop(SAMPLED)
        values = {name: float(value) for name, value in merge_metrics(stacked, weights).items()}
        return {"loss": self.program.objective.loss.kl_weight * values["kl"] - values["reward"], **values}

    def _roll_out(self, trained: Params, frozen: Params, prompts: Batch, key: PRNGKeyArray) -> tuple[Batch, Metrics]:
        """Answers to prompts with their rollout, and metrics of these answers."""
        objective, parts = self.program.objective, self.program.config.optim.accumulation
        params = self.program.model_params(trained, frozen)
        answered, finished = self.sampler(objective.model, params, prompts, key)
        placed = place_rows(current_mesh(), (answered, finished))
        return _read(objective, parts, trained, frozen, *placed)


@partial(jax.jit, static_argnums=(0, 1))
def _read(
    objective: Objective, parts: int, trained: Params, frozen: Params, batch: Batch, finished: Bool[Array, "B"]
) -> tuple[Batch, Metrics]:
    """Reads sampled answers with policy, reference and critic, in `parts` micro-batches."""
    loss, params = objective.loss, join_params(trained, frozen)

    def read(batch: Batch) -> tuple[PolicyNumbers, Array | None]:
        outputs, more = objective.read(params, batch)
        logits, reference = outputs.logits()[:, 0], more[REFERENCE].logits()[:, 0]
        lengths, values = batch.answer_lengths[:, 0], more.get("values")
        numbers = policy_numbers(logits, reference, batch.answers[:, 0], lengths, loss.temperature)
        return numbers, None if values is None else values[:, 0]

    if parts == 1:
        numbers, values = read(batch)
    else:
        read_parts = jax.lax.map(read, cut_rows(batch, parts))
        numbers, values = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), read_parts)
    lengths, rewards = batch.answer_lengths[:, 0], batch.rewards[:, 0]
    penalised = rewards - loss.unfinished_penalty * ~finished
    rollout = loss.learn_from(penalised, numbers.log_probs, numbers.log_ratios, lengths, values)
    each = {"reward": rewards, "kl": numbers.kls.sum(axis=1), "length": lengths, "finished": finished}
    metrics = {name: weighted_mean(values, batch.weights) for name, values in each.items()}
    metrics[SAMPLED] = (lengths * batch.weights).sum()
    return batch._replace(rewards=None, rollout=rollout), on_every_device(metrics)


@jax.jit
def _folded(key: PRNGKeyArray, number: Int[Array, ""]) -> PRNGKeyArray:
    return on_every_device(jax.random.fold_in(key, number))


@partial(jax.jit, static_argnums=1)
def _one_step(step: Int[Array, ""], updates: int) -> Int[Array, ""]:
    """The number of the step after this one, where each update has counted as a step."""
    return step - (updates - 1)


@jax.jit
def _means(parts: list[Metrics]) -> Metrics:
    return jax.tree.map(lambda *x: jnp.stack(x).mean(), *parts)
