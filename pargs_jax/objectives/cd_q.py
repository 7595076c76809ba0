"""Values of all next tokens by backups under the language model, on scored answers: CD-Q (Mudgal et al., 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pargs_jax.objectives.contract import LossResult, Outputs, ScoredLoss
from pargs_jax.options import option

if TYPE_CHECKING:
    from jaxtyping import PRNGKeyArray

    from pargs_jax.data.batches import Batch


@dataclass(frozen=True)
class ControlledDecoding(ScoredLoss):
    """`1/2 (V(y[:t]) - v_t)^2`, the mean over all prefixes of a batch. `v_t` is the value of what may come next, under
    the language model p (`backed_up`), and the reward at the answer's last token (CD, arXiv 2310.17022). No gradient
    flows through `v_t`. V has a head as wide as the vocabulary; p is the model that training starts from."""

    name = "cd_q"
    meaning = "scored answers: values of all next tokens, each the mean of what the language model may write next"
    head = "table"
    frozen = ("reference",)

    backup: Literal["expectation", "soft", "max"] = option(
        "expectation",
        "a prefix's value from those of the next tokens v: E_p V(v); log E_p exp V(v); or the largest V(v)",
    )

    def __call__(
        self, outputs: Outputs, batch: Batch, key: PRNGKeyArray | None = None, *, reference: Outputs
    ) -> LossResult:
        from pargs_jax.objectives.backups import backed_up, backup_loss, token_values

        values, nexts = outputs.map_logits(
            lambda table, tokens, logits: (token_values(table, tokens), backed_up(table, logits, self.backup)),
            reference,
        )
        return backup_loss(values[:, 0], nexts[:, 0], batch)
