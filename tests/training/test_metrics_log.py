"""Where metrics go, with the packages that take them; skipped where these are not installed."""

import struct

import pytest

from pargs_jax.config import LogConfig, TrainConfig
from pargs_jax.training.metrics_log import MetricsLog


def write_twice(config):
    """Three reports, then a resumed run that has lost the last of them."""
    with MetricsLog(config, 0) as log:
        for step in (1, 2, 3):
            log.write(step, "train", {"loss": 1.0 / step})
    with MetricsLog(config, 2) as log:
        log.write(3, "train", {"loss": 0.25})
        log.write(3, "eval", {"loss": 0.5, "accuracy": 1.0})


def test_tensorboard_reads_what_is_written(tmp_path):
    pytest.importorskip("tensorboardX")
    from tensorboardX.proto.event_pb2 import Event

    write_twice(TrainConfig(out=str(tmp_path), log=LogConfig(tensorboard=True)))
    found = []
    for path in sorted((tmp_path / "tensorboard").iterdir(), key=lambda path: path.stat().st_mtime_ns):
        content = path.read_bytes()
        while content:  # a record: its length, a checksum, an event, a checksum
            (length,) = struct.unpack("<Q", content[:8])
            event = Event.FromString(content[12 : 12 + length])
            found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
            content = content[16 + length :]
    assert (3, "train/loss", 0.25) in found and (3, "eval/accuracy", 1.0) in found
    assert [step for step, tag, _ in found if tag == "train/loss"] == [1, 2, 3, 3]


def test_weights_and_biases_takes_a_run_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    write_twice(TrainConfig(out=str(tmp_path), log=LogConfig(wandb="guides")))
    run_id = (tmp_path / "wandb_run_id").read_text()
    files = list((tmp_path / "wandb").glob(f"offline-run-*-{run_id}/run-{run_id}.wandb"))
    assert files and b"train/loss" in b"".join(path.read_bytes() for path in files)
