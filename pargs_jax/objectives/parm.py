"""Autoregressive reward models that depend on a preference vector: PARM (Lin et al., 2025, arXiv 2505.06274)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pargs_jax.errors import InputError
from pargs_jax.objectives.arm import AutoregressiveReward
from pargs_jax.objectives.contract import LossResult, Outputs
from pargs_jax.options import option, shown

if TYPE_CHECKING:
    from jaxtyping import Array, Float, PRNGKeyArray

    from pargs_jax.data.batches import Batch


@dataclass(frozen=True)
class PreferenceAwareReward(AutoregressiveReward):
    """`sum_i a_i l_i`, where `l_i` is the loss of `AutoregressiveReward` with the labels of objective i, and the model
    is conditioned on the preference vector `a`. The constants are those of the published code.

    The vectors are drawn from a Dirichlet distribution in each step, one for each pair; the published code draws one
    for the whole batch. An evaluation always draws the same ones. Only the additions that depend on the vector are
    trained.
    """

    name = "parm"
    meaning = "one autoregressive reward model for all weightings of several objectives (PARM)"
    usual_beta = 0.01

    labels: int = option(2, "how many labels a pair has in the column labels, one for each objective", at_least=2)
    concentration: float = option(
        0.5,
        "parameter of the Dirichlet distribution of preference vectors; below 1, most favour one objective",
        above=0,
    )
    rank: int = option(4, "rank of both parts of the trained additions", at_least=1, at_most=8192)
    alpha: float = option(8.0, "the additions are scaled by alpha / rank", above=0)
    layers: str = option(
        "query|key|value", "regular expression for the names of the layers that get additions", metavar="REGEX"
    )

    @property
    def preference_lora(self) -> dict[str, Any]:
        return {"objectives": self.labels, "rank": self.rank, "alpha": self.alpha, "layers": self.layers}

    def validate(self, max_length: int) -> None:
        try:
            re.compile(self.layers)
        except re.error as error:
            raise InputError(f"objective.layers: {shown(self.layers)} is not a regular expression ({error})") from None

    def preferences(self, batch: Batch, key: PRNGKeyArray | None) -> Float[Array, "B M"]:
        import jax
        import jax.numpy as jnp

        key = jax.random.key(0) if key is None else key
        return jax.random.dirichlet(key, jnp.full(self.labels, self.concentration), batch.weights.shape)

    def __call__(self, outputs: Outputs, batch: Batch, key: PRNGKeyArray | None = None) -> LossResult:
        from pargs_jax.objectives.bradley_terry import labelled_bradley_terry
        from pargs_jax.objectives.likelihood import prefix_log_probs, token_log_probs

        whole = prefix_log_probs(outputs.map_logits(token_log_probs), batch.answer_lengths)[..., -1]
        gains = self.factor * (whole[:, 0] - whole[:, 1])
        loss, metrics = labelled_bradley_terry(gains, batch.labels, self.preferences(batch, key), batch.weights)
        return LossResult(loss, metrics, batch.weights.sum())
