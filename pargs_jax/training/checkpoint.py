"""Checkpoints of a run: parameters, optimizer state and step, through Orbax.

The order of the data and the randomness of a step depend only on the seed and the step's number. So the step is also
the position in the data.
"""

import gc
import json
import logging
import math
import shutil
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import jax

from pargs_jax.durable_files import write_errors_named_after, write_whole
from pargs_jax.errors import InputError
from pargs_jax.json_text import parse_json
from pargs_jax.processes import largest, on_first
from pargs_jax.training.fingerprints import fingerprints
from pargs_jax.training.step import TrainState

FINGERPRINTS = "fingerprints.v2.json"  # those of another kind had no version
MEND_AND_RESUME = "the checkpoints are safe; fix that, then resume the run"


class Checkpoints(AbstractContextManager):
    """The newest `keep` checkpoints in a folder, and the `keep_best` with the best held-out metric.

    Saves run in the background. A checkpoint is written under a temporary name and renamed when it is complete. What a
    killed save leaves behind is removed when the folder is next opened.
    """

    def __init__(self, folder: Path, keep: int, keep_best: int = 0, metric: str = "loss") -> None:
        """Opens the folder, or creates it.

        Args:
            folder: holds one folder per checkpoint, named by its step.
            keep: the number of newest checkpoints to keep.
            keep_best: the number of further checkpoints to keep, among those saved with held-out metrics: the best
                ones.
            metric: the held-out metric that ranks them; for `loss` lower is better, for others higher.

        Raises InputError if the folder cannot be created.
        """
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        from orbax.checkpoint import v1 as ocp

        self.folder = folder
        self._keep_best = keep_best
        self._metric = metric
        self._save_in_progress: tuple[int, Future[None]] | None = None
        self._finisher = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        policies = ocp.training.preservation_policies
        best = policies.BestN(
            get_metric_fn=itemgetter(metric),
            reverse=metric == "loss",
            n=keep_best,
            keep_checkpoints_without_metrics=False,
        )
        with write_errors_named_after(folder, "use another output folder"):
            folder.mkdir(parents=True, exist_ok=True)
            _drop_unreadable_metrics(folder)
            self._writer = ocp.training.Checkpointer(
                folder.absolute(),
                preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep), best]),
                save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
                cleanup_tmp_directories=True,
            )

    def __exit__(self, kind: object, *error: object) -> None:
        try:
            self.wait()
            self._finisher.shutdown()
            self._writer.close()
        except Exception:
            # Orbax raises a failed save's error again at every later call; it has been reported already.
            if kind is None:
                raise

    @property
    def latest_step(self) -> int | None:
        """The step of the newest checkpoint, or of the save in progress; None if there is none."""
        latest = self._writer.latest
        return None if latest is None else latest.step

    @property
    def safe_state(self) -> str:
        """Names the checkpoint to continue from, for an error message; waits for the save in progress."""
        self.wait()
        if self.latest_step is None:
            return "no checkpoint has been written yet"
        return f"the checkpoint of step {self.latest_step} is safe"

    def _advice(self) -> str:
        return f"{self.safe_state}; fix that, then resume the run"

    def is_best(self, held_out: dict[str, float]) -> bool:
        """Whether a checkpoint with these held-out metrics would be among the best ones that are kept."""
        sign = 1 if self._metric == "loss" else -1
        scores = sorted(sign * known.metrics[self._metric] for known in self._writer.checkpoints if known.metrics)
        bound = scores[self._keep_best - 1] if 0 < self._keep_best <= len(scores) else math.inf
        return self._keep_best > 0 and sign * held_out[self._metric] < bound

    def save(self, state: TrainState, held_out: dict[str, float] | None = None) -> None:
        """Starts to write the state under its step, and returns as soon as the state may be donated.

        Does nothing if the step has a checkpoint already. Waits for the previous save. Raises InputError if the
        previous save failed or this one cannot be started.

        Args:
            state: the state to save.
            held_out: its metrics on the evaluation set, if it was evaluated.
        """
        self.wait()
        step = int(state.step)
        if step == self.latest_step:
            return
        with write_errors_named_after(self.folder / str(step), self._advice):
            marks = fingerprints(state._asdict())
            response = self._writer.save_async(step, state._asdict(), metrics=held_out)
            self._save_in_progress = step, self._finisher.submit(self._finish, step, response, marks)

    def wait(self) -> None:
        """Waits until the last save is complete. Raises InputError if it failed."""
        if self._save_in_progress is None:
            return
        (step, saving), self._save_in_progress = self._save_in_progress, None
        with write_errors_named_after(self.folder / str(step), self._advice):
            saving.result()

    def _finish(self, step: int, response: Any, marks: dict[str, int]) -> None:
        """Waits for a save and records its arrays' fingerprints, because Orbax does not notice altered files."""
        response.result()
        if jax.process_index() == 0:
            write_whole(self.folder / str(step) / FINGERPRINTS, json.dumps(marks))

    def _is_altered(self, step: int, restored: dict[str, Any]) -> bool:
        """Whether arrays differ from those that were saved. If the run was killed before their fingerprints were
        recorded, they are trusted."""
        marks = fingerprints(restored)
        try:
            return jax.process_index() == 0 and marks != parse_json(
                (self.folder / str(step) / FINGERPRINTS).read_bytes()
            )
        except FileNotFoundError:
            return False
        except (OSError, ValueError):
            return True

    def restore(self, like: TrainState, warn: Callable[[str], None]) -> TrainState:
        """The newest state that can be read, with the shapes, dtypes and shardings of `like` (`jax.ShapeDtypeStruct`s).

        Newer checkpoints that are damaged are renamed to `damaged-<step>`, and `warn` is called. Raises InputError if
        none can be read, or if the checkpoint belongs to another model.
        """
        target = like._asdict()
        steps = [known.step for known in reversed(self._writer.checkpoints)]
        for place, step in enumerate(steps):
            self._check_shapes(step, target)
            restored = self._load(step, target)
            if not largest(restored is None) and not largest(self._is_altered(step, restored)):
                for damaged in steps[:place]:
                    on_first(partial(self._put_aside, damaged))
                    self._writer.reload()
                    warn(
                        f"{self.folder}/{damaged}: is damaged; continuing from the previous checkpoint, of step {step}"
                    )
                return TrainState(**restored)
        raise InputError(
            f"{self.folder}: all {len(steps)} checkpoints are damaged; restore one, or use another output folder"
        )

    def _check_shapes(self, step: int, target: dict[str, Any]) -> None:
        """Raises InputError if the checkpoint's arrays do not match the target's; an unreadable checkpoint passes."""
        try:
            saved = self._writer.metadata(step).metadata
        except (ValueError, KeyError, OSError):
            return
        if saved is None:
            return
        saved_shapes, shapes = _shapes(saved), _shapes(target)
        for name in saved_shapes | shapes:
            found, wanted = (known.get(name, "none") for known in (saved_shapes, shapes))
            if found != wanted:
                raise InputError(
                    f"{self.folder}/{step}: not a checkpoint of this run's model "
                    f"({name} has shape {found}, must have {wanted}); use another output folder"
                )

    def _load(self, step: int, target: dict[str, Any]) -> dict[str, Any] | None:
        """The checkpoint's arrays; None if its files are damaged."""
        try:
            with _quiet_failure():
                return self._writer.load(step, target)
        except (ValueError, KeyError, TypeError, OSError) as error:  # Orbax raises one of these
            if any(isinstance(cause, MemoryError | jax.errors.JaxRuntimeError) for cause in _causes(error)):
                raise  # out of memory; the checkpoint is not damaged
            return None

    def _put_aside(self, step: int) -> None:
        """Renames a damaged checkpoint, which keeps its files for inspection and frees its step's name."""
        aside = self.folder / f"damaged-{step}"
        with write_errors_named_after(aside, self._advice):
            shutil.rmtree(aside, ignore_errors=True)
            (self.folder / str(step)).rename(aside)


def _drop_unreadable_metrics(folder: Path) -> None:
    """Removes files of held-out metrics that a crash truncated. Orbax would not open the folder with them, and a
    checkpoint is complete without them."""
    for path in folder.glob("*/metrics/metrics"):
        try:
            parse_json(path.read_bytes())
        except ValueError:
            path.unlink()


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """The shape of every array by name; names are spelled alike for a state and for Orbax's description of a saved
    one."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="."): tuple(leaf.shape) for path, leaf in leaves}


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yields an error and its causes."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__


@contextmanager
def _quiet_failure() -> Iterator[None]:
    """After a load has failed, keeps its other tasks from printing the same failure for every array to stderr."""
    logger = logging.getLogger("asyncio")
    level, hook = logger.level, sys.unraisablehook
    logger.setLevel(logging.CRITICAL + 1)
    sys.unraisablehook = lambda _: None
    try:
        yield
    except BaseException:

        def hook(unraisable: Any, show: Callable[[Any], Any] = hook) -> None:
            if str(unraisable.exc_value) != "Event loop is closed":  # reads that end long after the load has failed
                show(unraisable)

        raise
    finally:
        gc.collect()
        sys.unraisablehook = hook
        logger.setLevel(level)
