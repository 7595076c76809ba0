"""The objectives of training: one file per objective, with its loss and its options (see `contract`)."""

from pargs_jax.objectives.arm import AutoregressiveReward
from pargs_jax.objectives.bt import BradleyTerry
from pargs_jax.objectives.cd_q import ControlledDecoding
from pargs_jax.objectives.contract import Loss
from pargs_jax.objectives.ctl import ContrastiveTwist
from pargs_jax.objectives.distill import Distillation
from pargs_jax.objectives.dpo import DirectPreference
from pargs_jax.objectives.farma import FasterReward
from pargs_jax.objectives.fudge import PrefixRegression
from pargs_jax.objectives.parm import PreferenceAwareReward
from pargs_jax.objectives.partial_bt import PartialBradleyTerry
from pargs_jax.objectives.ppo import ProximalPolicy
from pargs_jax.objectives.rad import RewardAugmented
from pargs_jax.objectives.rloo import LeaveOneOut
from pargs_jax.objectives.sft import SupervisedFineTuning
from pargs_jax.objectives.td_lambda import TemporalDifference

OBJECTIVES: dict[str, type[Loss]] = {
    loss.name: loss
    for loss in (
        SupervisedFineTuning,
        BradleyTerry,
        PartialBradleyTerry,
        AutoregressiveReward,
        PreferenceAwareReward,
        DirectPreference,
        RewardAugmented,
        PrefixRegression,
        TemporalDifference,
        ControlledDecoding,
        ContrastiveTwist,
        FasterReward,
        Distillation,
        ProximalPolicy,
        LeaveOneOut,
    )
}
"""Every objective by its name. Add a new one here."""
