"""What a training step minimises: a model with a loss on batches."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from pargs_jax.data.batches import Batch
from pargs_jax.models.casting import is_stored
from pargs_jax.models.lora import NAMES as LORA_NAMES
from pargs_jax.models.lora import split_params
from pargs_jax.models.model import Model, Params, run_one_by_one
from pargs_jax.models.preference_lora import with_preferences
from pargs_jax.objectives.contract import Loss
from pargs_jax.sharding import current_device
from pargs_jax.training.critic import CRITIC, values_of

Metrics = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class Objective:
    """A model with a loss on batches. Static and hashable.

    Attributes:
        model: the model that is trained; a reward model of any kind, or a language model.
        loss: the objective, with its options.
        dtype: the dtype of matrix products.
        closing_id: the token that closes a text; encoders need it to read a prefix as a finished text.
        chunk: the number of prefixes that encoders read together.
        frozen: the other models that the loss reads (`Loss.frozen`), by name. Their parameters are passed together with
            the trained ones, under these names. A model without parameters there is the trained model without its
            low-rank additions.
        unrolls: whether the trained model's layers run one by one on a CPU, not in a scan. Then the backward pass reads
            what the forward pass left in place, without copies in and out of stacks. Parameters stay stacked.
    """

    model: Any
    loss: Loss
    dtype: str = "float32"
    closing_id: int | None = None
    chunk: int = 8
    frozen: tuple[tuple[str, Any], ...] = ()
    unrolls: bool = False

    def __call__(
        self, params: Params, batch: Batch, key: PRNGKeyArray | None = None, step: Int[Array, ""] | None = None
    ) -> tuple[Float[Array, ""], tuple[Metrics, Float[Array, ""]]]:
        """The loss, its metrics, and the weight of the batch in a mean over batches (pairs, or answer tokens).

        `step` is the number of the training step; None in an evaluation.
        """
        dropout_key, loss_key = (None, None) if key is None else jax.random.split(key)
        outputs, more = self.read(params, batch, dropout_key, self.loss.preferences(batch, loss_key))
        if self.loss.reads_step:
            more["step"] = step
        loss, metrics, weight = self.loss(outputs, batch, loss_key, **more)
        return loss, (metrics, weight)

    def read(
        self,
        params: Params,
        batch: Batch,
        key: PRNGKeyArray | None = None,
        preferences: Float[Array, "B M"] | None = None,
    ) -> tuple[Any, dict[str, Any]]:
        """The trained model's outputs for a batch, and what the loss gets besides: the frozen models' by their names,
        and the critic's `values`. A key turns dropout on; `preferences` are for a model that takes such vectors."""
        params = self.cast(params)
        critic = params.pop(CRITIC, None)
        options = {"closing_id": self.closing_id, "chunk": self.chunk}
        others = {name: params.pop(name) for name, _ in self.frozen if name in params}
        base = split_params(params, LORA_NAMES)[1] if len(others) < len(self.frozen) else None
        if preferences is not None:  # every answer of a row is read with the row's vector
            params = with_preferences(params, _of_texts(preferences, batch))
        more = {name: model.read_answers(others.get(name, base), batch, **options) for name, model in self.frozen}
        model = self.model
        if self.runs_one_by_one:
            model, params = run_one_by_one(model, params)
        outputs = model.read_answers(params, batch, key, **options)
        if critic is not None:
            more["values"] = values_of(critic, outputs.states(before=1))
        return outputs, more

    @property
    def runs_one_by_one(self) -> bool:
        """Whether the trained model's layers run one by one on the present device."""
        return self.unrolls and current_device().platform == "cpu"

    @property
    def converts_by_layer(self) -> bool:
        """Whether the layers of the trained model convert their matrices for themselves (`pargs_jax.models.casting`).
        Layers that run one by one would have to keep them all for the backward pass anyway."""
        is_stacked = isinstance(self.model, Model) and not self.model.unrolled
        return self.dtype == "bfloat16" and is_stacked and not self.runs_one_by_one

    @property
    def loss_of_chance(self) -> float:
        """The loss of a model that cannot tell anything apart."""
        return self.loss.chance(self.model.config.vocab_size)

    def cast(self, params: Params) -> Params:
        """Casts the parameters to the dtype of matrix products; fp32 heads, such as reward heads, and the critic are
        not cast."""
        others = {name: self._cast(model, params[name]) for name, model in self.frozen if name in params}
        own = {name: part for name, part in params.items() if name not in others}
        return self._cast(self.model, own) | others

    def _cast(self, model: Any, params: Params) -> Params:
        return {
            name: part
            if name == CRITIC or (name == "head" and model.head_kind.is_fp32)
            else jax.tree.map(lambda x: x if is_stored(x) else x.astype(self.dtype), part, is_leaf=is_stored)
            for name, part in params.items()
        }


def _of_texts(preferences: Float[Array, "B M"], batch: Batch) -> Float[Array, "BA M"] | Float[Array, "G N M"]:
    """The vector of each text that models read for a batch, or of each packed token."""
    count = batch.answers.shape[1]
    if batch.packed is None:
        return jnp.repeat(preferences, count, axis=0)
    return preferences[jnp.maximum(batch.packed.segments, 0) // count]
