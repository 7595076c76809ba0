"""Checkpoints of a run: parameters, optimizer state and step, through Orbax.

The data's order and the randomness of a step follow from the seed and the step's number, so the step is also the
position in the data.
"""

import logging
from pathlib import Path
from types import TracebackType

import jax

from pargs_jax.errors import InputError, first_line
from pargs_jax.training.step import TrainState


class Checkpoints:
    """The newest `keep` checkpoints in a folder, each written whole before it counts."""

    def __init__(self, folder: Path, keep: int) -> None:
        logging.getLogger("absl").setLevel(logging.ERROR)
        from orbax.checkpoint import v1 as ocp

        self.folder = folder
        self._writer = ocp.training.Checkpointer(
            folder.absolute(),
            preservation_policy=ocp.training.preservation_policies.LatestN(keep),
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            cleanup_tmp_directories=True,
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.close()

    @property
    def latest_step(self) -> int | None:
        """The step of the newest checkpoint; None if there is none."""
        latest = self._writer.latest
        return None if latest is None else latest.step

    def save(self, state: TrainState) -> None:
        """Writes the state under its step; a step that is already there is left alone."""
        step = int(state.step)
        if step != self.latest_step:
            self._writer.save(step, state._asdict())

    def restore(self, like: TrainState) -> TrainState:
        """The newest state, with the shapes, dtypes and places of `like`. Raises InputError if it does not fit."""
        step = self.latest_step
        target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like._asdict())
        try:
            return TrainState(**self._writer.load(step, target))
        except (ValueError, KeyError, TypeError) as error:
            reason = first_line(error)[:200]
            raise InputError(f"{self.folder}/{step}: not a checkpoint of this run's model ({reason})") from error
