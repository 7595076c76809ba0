"""The objectives of training: one file per objective, with its loss and its options (see `contract`)."""

from pargs_jax.objectives.bt import BradleyTerry
from pargs_jax.objectives.contract import Loss
from pargs_jax.objectives.partial_bt import PartialBradleyTerry
from pargs_jax.objectives.sft import SupervisedFineTuning

OBJECTIVES: dict[str, type[Loss]] = {
    loss.name: loss
    for loss in (
        SupervisedFineTuning,
        BradleyTerry,
        PartialBradleyTerry,
    )
}
"""Every objective by its name. Add a new one here."""
