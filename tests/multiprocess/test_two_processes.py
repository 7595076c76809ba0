"""Two processes of two devices each do what one process of four does: training, resuming, decoding.

What one process does, the process of the tests does itself: it need not start and import everything again.
"""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pargs_jax.commands import doors
from pargs_jax.models.encoder import EncoderModel
from pargs_jax.models.hf import save_model
from pargs_jax.testing import TINY_DEBERTA, random_params, tiny_model, tiny_tokenizer

REPOSITORY = Path(__file__).parents[2]
TRAINING = ("--steps", "4", "--max-length", "48", "--batch-size", "8", "--save-every", "2",
            "--log-every", "1", "--optim.eps", "1e-3", "--optim.lr", "1e-2", "--optim.schedule", "constant",
            "--optim.warmup", "0")  # fmt: skip
DEMO = ("--data.demo-pairs", "64")
DECODING = ("--method", "pargs", "--max-new-tokens", "6", "--batch-size", "4", "--temperature", "3")

# What Gloo's threads print as their connections are made; they write parts of lines, which come in any order.
GLOO = re.compile(r"\[Gloo\]|Rank|Expected number of|connected|peer ranks|is|to|[\s\d.:]")
# What XLA of jax 0.12 says of the gradient of the embeddings (see docs/machines.md, "Versions").
REPLICATED = re.compile(r"W.*\[SPMD\] Involuntary full rematerialization.*\n")


@contextlib.contextmanager
def started(command, *options):
    """Starts a front door in two processes, with piped outputs."""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "JAX_PLATFORMS": "cpu"}
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    together = ("--distributed", "--processes.coordinator", address, "--processes.count", "2", "--processes.index")
    running = [
        subprocess.Popen(
            [sys.executable, str(REPOSITORY / command), *options, *together, str(index)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for index in range(2)
    ]  # fmt: skip
    try:
        yield running
    finally:
        for process in running:
            process.kill()
            process.communicate()


def ended(running, code=0):
    """Waits for both processes, which have to end so; returns what the first one printed, unwrapped."""
    printed = [process.communicate(timeout=300)[0] for process in running]
    assert [process.returncode for process in running] == [code] * 2, "\n".join(printed)
    said = GLOO.sub("", REPLICATED.sub("", printed[1])).strip()
    assert code or not said  # each says what ended it
    return " ".join(printed[0].split())


def run_here(monkeypatch, command, *options):
    """Runs a front door in this process."""
    with monkeypatch.context() as patched:
        patched.setattr(sys, "argv", [command, *options])
        {"train.py": doors.train, "decode.py": doors.decode}[command]()


def losses(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["split"] == "train"]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A random Llama with the demo's tokenizer."""
    folder = tmp_path_factory.mktemp("start")
    model, params = tiny_model("llama", vocab_size=tiny_tokenizer().vocab_size)
    save_model(folder, model, params, special_tokens={"bos_token_id": 1, "eos_token_id": 2})
    tiny_tokenizer().save(folder)
    return str(folder)


def test_weights_that_are_not_finite_end_every_process(start, tmp_path):
    """The one NaN lies on a device of the second process."""
    shutil.copytree(start, tmp_path / "damaged")
    weights = tmp_path / "damaged" / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.layers.1.mlp.down_proj.weight"][-1, -1] = np.nan
    save_file(tensors, weights, metadata={"format": "pt"})
    options = ("--model.init", str(tmp_path / "damaged"), *TRAINING, *DEMO, "--out", str(tmp_path / "out"))
    with started("train.py", *options, "--mesh", "cpu-4,fsdp=2,tensor=2") as running:
        printed = ended(running, code=2)
    assert "NaN or infinite numbers, read as float32, in layers.1.mlp.down_proj.weight" in printed


def test_training_and_going_on_in_one_process_on_another_mesh(start, tmp_path, monkeypatch):
    """From a file, of which each of two processes tokenises a half."""
    (tmp_path / "pairs.jsonl").write_text("".join(
        json.dumps({"prompt": f"Help {i}", "chosen": "Yes. " * (1 + i % 5), "rejected": f"No {i}."}) + "\n"
        for i in range(64)
    ))  # fmt: skip
    options = ("--model.init", start, *TRAINING, "--data.train", str(tmp_path / "pairs.jsonl"))
    two = ("--out", str(tmp_path / "two"), "--data.cache", str(tmp_path / "cache"))
    with started("train.py", *options, "--mesh", "cpu-4,fsdp=2,tensor=2", *two, "--steps", "2") as running:
        run_here(monkeypatch, "train.py", *options, "--mesh", "cpu-4", "--out", str(tmp_path / "one"))
        ended(running)
    (rows,) = (tmp_path / "cache").glob("*/part-1")
    assert rows.with_name("part-0").is_dir() and not rows.with_name("part-2").exists()
    run_here(monkeypatch, "train.py", *options, "--mesh", "cpu-2,data=2", *two, "--resume")
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-5)
    one, two = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, expected in one.items():
        np.testing.assert_allclose(two[name], expected, atol=2e-5, err_msg=name)


def test_training_on_the_models_own_answers(start, tmp_path, monkeypatch):
    model, params = tiny_model("llama", "reward", seed=1, vocab_size=tiny_tokenizer().vocab_size)
    save_model(tmp_path / "rm", model, params, special_tokens={"bos_token_id": 1, "eos_token_id": 2})
    tiny_tokenizer().save(tmp_path / "rm")
    objective = ("--objective.name", "ppo", "--objective.rm", str(tmp_path / "rm"), "--objective.max-new-tokens", "6")
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": "Help " * i}) + "\n" for i in range(4)))
    data = ("--data.train", str(tmp_path / "prompts.jsonl"), "--batch-size", "4", "--steps", "2", "--max-length", "32")
    options = ("--model.init", start, *data, *objective, "--optim.eps", "1e-3", "--log-every", "1")
    mesh = ("--mesh", "cpu-4,fsdp=2,tensor=2")
    with started("train.py", *options, *mesh, "--out", str(tmp_path / "two")) as running:
        run_here(monkeypatch, "train.py", *options, *mesh, "--out", str(tmp_path / "one"))
        ended(running)
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-4)


def wait_for_a_step(running, out):
    metrics, deadline = out / "metrics.jsonl", time.monotonic() + 200
    while not (metrics.exists() and metrics.stat().st_size):
        assert time.monotonic() < deadline and running[0].poll() is None
        time.sleep(0.1)


def test_when_one_of_them_is_killed_the_other_names_it(start, tmp_path):
    out = tmp_path / "run"
    options = ("--model.init", start, *TRAINING, *DEMO, "--steps", "1000000", "--save-every", "0", "--out", str(out))
    with started("train.py", *options, "--mesh", "cpu-2") as running:
        wait_for_a_step(running, out)
        running[1].kill()
        printed = running[0].communicate(timeout=20)[0]
    assert running[0].returncode == 2
    assert "error: processes: of 2, number 1 is gone; it was killed" in printed
    assert printed.count("error:") == 1 and "Traceback" not in printed


def test_both_end_after_the_same_step_when_one_of_them_is_told_to(start, tmp_path):
    out = tmp_path / "run"
    options = ("--model.init", start, *TRAINING, *DEMO, "--steps", "1000000", "--save-every", "0", "--out", str(out))
    with started("train.py", *options, "--mesh", "cpu-2") as running:
        wait_for_a_step(running, out)
        running[1].send_signal(signal.SIGTERM)
        printed = [process.communicate(timeout=120)[0] for process in running]
    assert [process.returncode for process in running] == [143, 143], "\n".join(printed)
    (saved,) = (int(path.name) for path in (out / "checkpoints").iterdir())
    assert f"stopped; step {saved} of 1000000 is saved" in " ".join(printed[0].split())
    assert "stopping after this step; send SIGTERM again to stop at once\nterminated\n" in printed[1]
    assert "stopping" not in printed[0] and printed[0].endswith("terminated\n")


def test_decoding_a_file_of_prompts_by_the_text(start, tmp_path, monkeypatch):
    """Two processes go on after three answers of one."""
    config = dataclasses.replace(TINY_DEBERTA, vocab_size=tiny_tokenizer().vocab_size)
    save_model(tmp_path / "rm", EncoderModel(config), random_params(EncoderModel(config)))
    tiny_tokenizer().save(tmp_path / "rm")
    prompts = [{"id": str(i), "prompt": "Help " * i} for i in range(6)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    common = ("--lm", start, "--rm", str(tmp_path / "rm"), "--prompts", str(tmp_path / "prompts.jsonl"), *DECODING)
    run_here(monkeypatch, "decode.py", *common, "--mesh", "cpu-1", "--out", str(tmp_path / "one.jsonl"))
    for name in ("two.jsonl", "two.jsonl.config.yaml"):
        shutil.copy(tmp_path / name.replace("two", "one"), tmp_path / name)
    lines = (tmp_path / "one.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "two.jsonl").write_text("".join(lines[:3]))
    two = (*common, "--mesh", "cpu-4,data=2,tensor=2", "--out", str(tmp_path / "two.jsonl"))
    with started("decode.py", *two) as running:
        assert "3 of 6 answers are already there" in ended(running)
    one, two = (
        {row["id"]: row for row in map(json.loads, (tmp_path / name).read_text().splitlines())}
        for name in ("one.jsonl", "two.jsonl")
    )
    assert sorted(two) == sorted(one) == list("012345")
    for row_id, expected in one.items():
        assert two[row_id]["response"] == expected["response"]
        assert two[row_id]["guide_reward"] == pytest.approx(expected["guide_reward"], abs=1e-4)
