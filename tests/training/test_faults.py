"""Faults that really happen to a run: damaged files, full disks, signals, overflow, two runs on one folder."""

import contextlib
import dataclasses
import errno
import io
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from pargs_jax.commands import demo
from pargs_jax.commands import train as command
from pargs_jax.commands.process import run_as_command
from pargs_jax.config import DataConfig, LogConfig, ModelConfig, TrainConfig
from pargs_jax.data.batches import Batches
from pargs_jax.errors import InputError
from pargs_jax.training import metrics_log, program, run_folder
from pargs_jax.training.checkpoint import FINGERPRINTS, Checkpoints
from pargs_jax.training.prefetch import Prefetch
from pargs_jax.training.step import TrainState

pytestmark = pytest.mark.usefixtures("compiled_steps_are_reused")

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def config(lm, tmp_path, monkeypatch):
    """A run of six steps on four generated pairs."""
    monkeypatch.setattr(demo, "HELD_OUT_PAIRS", 4)
    return TrainConfig(
        out=str(tmp_path / "run"), steps=6, batch_size=4, max_length=64, save_every=2, log_every=1,
        model=ModelConfig(init=str(lm)), data=DataConfig(demo_pairs=4),
    )  # fmt: skip


def train(config):
    printed = io.StringIO()
    command.train(config, Console(file=printed, width=10_000))
    return printed.getvalue()


def resumed(config):
    return train(TrainConfig(**{**vars(config), "resume": True}))


def refused(call):
    with pytest.raises(InputError) as caught:
        call()
    message = str(caught.value)
    assert message and "\n" not in message
    return message


def state_of(step, size=20_000):
    """Random numbers, which do not compress, under `params`."""
    weights = jax.random.normal(jax.random.key(step), (size,))
    return TrainState({"w": weights}, ({"moment": jnp.ones(3)},), jnp.int32(step))


def steps_in(folder):
    return sorted(int(path.name) for path in Path(folder).iterdir() if path.name.isdigit())


@pytest.fixture
def saved(tmp_path):
    """A folder with checkpoints 1, 2 and 3."""
    with Checkpoints(tmp_path / "checkpoints", keep=3) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(state_of(step), {"loss": 1.0 / step})
    return tmp_path / "checkpoints"


@pytest.mark.parametrize(("metric", "best"), [("loss", 2), ("accuracy", 1)])
def test_the_newest_and_the_best_are_kept_also_by_a_run_that_goes_on(tmp_path, metric, best):
    evaluations = {
        1: {"loss": 0.5, "accuracy": 0.9}, 2: {"loss": 0.4, "accuracy": 0.8}, 3: {"loss": 0.6, "accuracy": 0.1},
        4: None, 5: {"loss": 0.7, "accuracy": 0.3},
    }  # fmt: skip
    for some in ((1, 2, 3), (4, 5)):
        with Checkpoints(tmp_path, keep=1, keep_best=1, metric=metric) as checkpoints:
            for step in some:
                checkpoints.save(state_of(step), evaluations[step])
            assert not checkpoints.is_best({"loss": 0.41, "accuracy": 0.89})
            assert checkpoints.is_best({"loss": 0.39, "accuracy": 0.91})
    assert steps_in(tmp_path) == [best, 5]


def damage(folder, how):
    files = [path for path in folder.rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    if how == "the largest file is cut":
        os.truncate(largest, largest.stat().st_size // 2)
    elif how == "a bit is flipped":
        content = bytearray(largest.read_bytes())
        content[len(content) // 2] ^= 1
        largest.write_bytes(content)
    elif how == "the description is missing":
        (folder / "state" / "_METADATA").unlink()
    else:
        for path in files:
            os.truncate(path, 0)


@pytest.mark.parametrize(
    "how", ["the largest file is cut", "a bit is flipped", "the description is missing", "all files are empty"]
)
def test_a_damaged_checkpoint_is_skipped_for_the_one_before(saved, how, capfd):
    damage(saved / "3", how)
    warnings = []
    with Checkpoints(saved, keep=3) as checkpoints:
        state = checkpoints.restore(state_of(0), warnings.append)
        assert int(state.step) == checkpoints.latest_step == 2
        np.testing.assert_array_equal(state.params["w"], state_of(2).params["w"])
        checkpoints.save(state_of(3))
    assert warnings == [f"{saved}/3: is damaged; continuing from the previous checkpoint, of step 2"]
    assert (saved / "damaged-3").is_dir()
    with Checkpoints(saved, keep=3) as checkpoints:
        assert int(checkpoints.restore(state_of(0), warnings.append).step) == 3
    assert len(warnings) == 1 and capfd.readouterr().err == ""


def test_only_damaged_checkpoints_and_one_of_another_model_are_refused(saved):
    with Checkpoints(saved, keep=3) as checkpoints:
        message = refused(lambda: checkpoints.restore(state_of(0, size=5), print))
    assert message.startswith(f"{saved}/3: not a checkpoint of this run's model (params.w has shape (20000,), must")
    for step in (1, 2, 3):
        damage(saved / str(step), "all files are empty")
    with Checkpoints(saved, keep=3) as checkpoints:
        assert "all 3 checkpoints are damaged" in refused(lambda: checkpoints.restore(state_of(0), print))
    assert steps_in(saved) == [1, 2, 3]


def test_the_remains_of_a_killed_save_are_not_a_checkpoint_and_are_removed(saved):
    (saved / "3").rename(saved / "3.orbax-checkpoint-tmp")
    with Checkpoints(saved, keep=3) as checkpoints:
        assert checkpoints.latest_step == 2
        checkpoints.save(state_of(3))
    assert sorted(path.name for path in saved.iterdir()) == ["1", "2", "3"]


@contextlib.contextmanager
def files_cannot_grow_beyond(size):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_save_that_fails_on_a_full_disk_leaves_the_previous_one(saved):
    def save():
        with files_cannot_grow_beyond(10_000), Checkpoints(saved, keep=3) as checkpoints:
            checkpoints.save(state_of(4))
            checkpoints.wait()

    message = refused(save)
    assert message.startswith(f"{saved}/4: cannot be written (File too large); the checkpoint of step 3 is safe;")
    with Checkpoints(saved, keep=3) as checkpoints:
        assert int(checkpoints.restore(state_of(0), print).step) == 3
    assert steps_in(saved) == [1, 2, 3]


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("module", "name", "place", "left"),
    [
        (metrics_log, "append_all", "metrics.jsonl", []),
        (command, "save_model", "model", [4, 6]),
        (run_folder, "write_whole", "", []),
    ],
    ids=["metrics", "export", "config"],
)
def test_a_full_disk_is_one_line_and_the_run_resumes_once_there_is_space(
    config, monkeypatch, module, name, place, left
):
    with monkeypatch.context() as patch:
        patch.setattr(module, name, full)
        message = refused(lambda: train(config))
    out = Path(config.out)
    assert message.startswith(f"{out / place}: cannot be written (No space left on device); ")
    assert (steps_in(out / "checkpoints") if left else []) == left
    resumed(config)
    assert (out / "model" / "model.safetensors").exists()


def change_step(monkeypatch, number, change):
    """Replaces the result of step `number` with `change(state, metrics)`."""
    make = program.make_train_step

    def make_changed(*args, **options):
        step = make(*args, **options)

        def changed(*inputs):
            state, metrics = step(*inputs)
            return change(state, metrics) if int(state.step) == number else (state, metrics)

        return changed

    monkeypatch.setattr(program, "make_train_step", make_changed)


def test_a_loss_that_explodes_ends_the_run_which_may_go_on_without_the_limit(config, monkeypatch):
    with monkeypatch.context() as patch:
        change_step(patch, 4, lambda state, metrics: (state, metrics | {"loss": 100 * metrics["loss"]}))
        message = refused(lambda: train(config))
        assert re.match(r"step 4: the loss is \d.*, over the limit of \d.* \(loss_limit\); the ", message)
        assert steps_in(Path(config.out) / "checkpoints") == [2]
        resumed(dataclasses.replace(config, loss_limit=0.0))
    assert steps_in(Path(config.out) / "checkpoints")[-1] == 6


def test_an_update_that_overflows_is_not_saved(config, monkeypatch):
    def overflow(state, metrics):
        return state._replace(params=jax.tree.map(lambda x: x * jnp.inf, state.params)), metrics

    change_step(monkeypatch, 4, overflow)
    message = refused(lambda: train(config))
    assert message.startswith("step 4: its update made weights or optimizer state infinite or NaN; the checkpoint")
    assert "of step 2 is safe" in message
    assert steps_in(Path(config.out) / "checkpoints") == [2]


@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "inte")]
)
def test_a_signal_ends_the_step_saves_and_says_how_to_go_on(config, monkeypatch, capsys, number, code, word):
    load = Batches.batch

    def signalled(self, index):
        if index == 2:
            os.kill(os.getpid(), number)  # comes from the thread that loads, while an earlier step runs
        return load(self, index)

    monkeypatch.setattr(Batches, "batch", signalled)
    with pytest.raises(SystemExit) as ended:
        run_as_command(lambda: train(config))
    assert ended.value.code == code and word in capsys.readouterr().err
    (stopped,) = steps_in(Path(config.out) / "checkpoints")[-1:]
    assert stopped < 6 and not (Path(config.out) / "model").exists()
    monkeypatch.undo()
    assert f"resuming after step {stopped} of 6" in resumed(config)


def test_a_signal_while_the_last_checkpoint_is_written_waits_for_it(config, monkeypatch):
    finish, printed = Checkpoints._finish, io.StringIO()

    def signalled(self, step, *saving):
        if step == config.steps:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.5)
        return finish(self, step, *saving)

    monkeypatch.setattr(Checkpoints, "_finish", signalled)
    with pytest.raises(SystemExit) as ended:
        run_as_command(lambda: command.train(config, Console(file=printed, width=10_000)))
    assert ended.value.code == 130 and "stopped; step 6 of 6 is saved" in printed.getvalue()
    assert (Path(config.out) / "checkpoints" / "6" / FINGERPRINTS).exists()
    assert not (Path(config.out) / "model").exists()
    resumed(config)
    assert (Path(config.out) / "model").exists()


@contextlib.contextmanager
def in_a_process(config, *front_door, **changes):
    """The run in a process of its own, with other options where changes say so."""
    options = {
        "--out": config.out, "--model.init": config.model.init, "--data.demo-pairs": 4, "--batch-size": 4,
        "--max-length": 64, "--steps": 6, "--log-every": 1, "--save-every": 2,
    }  # fmt: skip
    words = [str(word) for option in (options | changes).items() for word in option]
    environment = os.environ | {
        "PYTHONPATH": str(REPOSITORY),
        "JAX_PLATFORMS": "cpu",  # with libtpu there and no TPU, JAX would have something to say
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    process = subprocess.Popen(
        [sys.executable, *front_door, *words],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def test_a_process_that_is_terminated_exits_with_143_and_keeps_other_runs_out(config):
    metrics = Path(config.out) / "metrics.jsonl"
    endless = {"--steps": 1_000_000, "--save-every": 0}
    with in_a_process(config, str(REPOSITORY / "train.py"), **endless) as process:
        deadline = time.monotonic() + 90
        while not (metrics.exists() and metrics.stat().st_size) and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert "another run is writing to it" in refused(lambda: resumed(config))
        process.terminate()
        printed, errors = process.communicate(timeout=60)
    acknowledged = "stopping after this step; send SIGTERM again to stop at once\n"
    assert (process.returncode, errors) == (143, acknowledged + "terminated\n")
    (stopped,) = steps_in(Path(config.out) / "checkpoints")
    assert f"stopped; step {stopped} of 1000000 is saved in" in " ".join(printed.split())


def test_a_signal_during_the_export_ends_the_process_at_once_and_resuming_exports_again(config):
    program = (
        "import sys, time, runpy; from pargs_jax.commands import train; front_door = sys.argv.pop(1)\n"
        "train.save_model = lambda *_, **__: (print('exporting', flush=True), time.sleep(60))\n"
        "runpy.run_path(front_door, run_name='__main__')"
    )
    with in_a_process(config, "-c", program, str(REPOSITORY / "train.py")) as process:
        assert any(line == "exporting\n" for line in process.stdout)
        process.terminate()
        assert process.wait(10) == 143 and process.stderr.read() == "terminated\n"
    assert steps_in(Path(config.out) / "checkpoints") == [4, 6] and not (Path(config.out) / "model").exists()
    assert "resuming after step 6 of 6" in resumed(config)
    assert (Path(config.out) / "model" / "model.safetensors").exists()


def test_batches_come_in_order_and_errors_where_they_belong():
    made = []

    def make(number):
        made.append(number)
        if number == 7:
            raise OSError("a bad row")
        return number

    came = []
    with pytest.raises(OSError, match="a bad row"), Prefetch(make, range(3, 20), ahead=2) as items:
        for item in items:
            came.append(item)
            assert len(made) <= len(came) + 2
    assert came == [3, 4, 5, 6] and items.waited >= 0
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def test_metrics_go_to_tensorboard_and_wandb_too(config, monkeypatch):
    config = TrainConfig(**{**vars(config), "log": LogConfig(tensorboard=True, wandb="guides")})
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    message = "log.tensorboard: needs the package tensorboardX; install it with: pip install 'pargs-jax[tensorboard]'"
    assert refused(lambda: train(config)) == message
    assert not Path(config.out).exists()

    scalars, runs, logged = [], [], []
    writer = types.SimpleNamespace(
        add_scalar=lambda *scalar: scalars.append(scalar), flush=lambda: None, close=lambda: scalars.append("closed")
    )
    of_wandb = types.SimpleNamespace(
        log=lambda values, step: logged.append((step, values)), finish=lambda: logged.append("finished")
    )
    tensorboard = types.SimpleNamespace(SummaryWriter=lambda folder, purge_step: writer)
    wandb = types.SimpleNamespace(init=lambda **options: runs.append(options) or of_wandb)
    monkeypatch.setitem(sys.modules, "tensorboardX", tensorboard)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    train(config)
    assert [step for name, _, step in scalars[:-1] if name == "train/loss"] == [1, 2, 3, 4, 5, 6]
    assert [step for step, _ in logged[:-1]] == [1, 2, 3, 4, 5, 6, 6]
    assert logged[0][1]["train/loss"] == next(value for name, value, _ in scalars if name == "train/loss")
    assert "eval/loss" in logged[-2][1] and scalars[-1] == "closed" and logged[-1] == "finished"
    assert runs[0]["project"] == "guides" and runs[0]["id"] and runs[0]["resume"] == "allow"
