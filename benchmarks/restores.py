"""Saves a training state on every layout of devices, and restores each on every other.

    python benchmarks/restores.py

Layouts are 1, 2 or 4 virtual devices of 1 or 2 processes, along one axis of the mesh. A restored state must have the
bits and the places that it should have, and its next step the loss that it had where it was saved. The table is in
docs/runs_that_cannot_be_lost.md.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from pargs_jax.commands.train import training_program
from pargs_jax.config import ModelConfig, OptimConfig, TrainConfig
from pargs_jax.data.batches import Batches
from pargs_jax.data.examples import Example
from pargs_jax.mesh import start
from pargs_jax.models.hf import load_model, save_model
from pargs_jax.processes_config import ProcessesConfig
from pargs_jax.sharding import place_rows, place_whole, to_host
from pargs_jax.testing import tiny_model, tiny_tokenizer
from pargs_jax.training.checkpoint import Checkpoints
from pargs_jax.training.program import TrainingProgram
from pargs_jax.training.step import TrainState, begin

REPOSITORY = Path(__file__).parents[1]
TOLERANCE = 1e-4  # of the next loss, relative: devices add in another order


class Layout(NamedTuple):
    devices: int
    processes: int
    axis: str

    def __str__(self) -> str:
        return f"{self.axis}={self.devices}, {self.processes} process{'es' * (self.processes > 1)}"

    @property
    def folder(self) -> str:
        return f"{self.axis}-{self.devices}-{self.processes}"


LAYOUTS = [Layout(1, 1, "data")] + [
    Layout(devices, processes, axis)
    for devices in (2, 4)
    for processes in (1, 2)
    for axis in ("data", "fsdp", "tensor")
]


class Worker:
    """One process of a layout."""

    def __init__(self, work: Path, layout: Layout, index: int, address: str) -> None:
        several = layout.processes > 1
        self.layout, self.work = layout, work
        self.config = TrainConfig(
            mesh=f"cpu-{layout.devices},{layout.axis}={layout.devices}",
            distributed=several,
            processes=ProcessesConfig(address, layout.processes, index) if several else ProcessesConfig(),
            model=ModelConfig(init=str(work / "lm")),
            optim=OptimConfig(moment_dtype="bfloat16", square_dtype="bfloat16"),
            max_length=32,
        )
        self.mesh = start(self.config)

    def program(self) -> tuple[TrainingProgram, dict]:
        pretrained = load_model(self.config.model.init, "reward", seed=0)
        return training_program(self.config, pretrained.model, closing_id=2), pretrained.params

    def batch(self, number: int) -> object:
        rng = np.random.default_rng(0)

        def ids() -> np.ndarray:
            return rng.integers(3, 100, 12).astype(np.int32)

        examples = [Example(ids(), (ids(), ids())) for _ in range(16)]
        return place_rows(self.mesh, Batches(examples, 8, 32, seed=0).batch(number))

    def save(self) -> None:
        program, params = self.program()
        optimizer, _ = program.make_optimizer(10)
        trained, frozen = program.begin_params(params, 0)
        state = begin(optimizer, trained)
        step, key = program.make_step(optimizer, state), place_whole(self.mesh, lambda: jax.random.key(0))
        for number in range(2):
            state, _ = step(state, self.batch(number), key, frozen)
        folder = self.work / self.layout.folder
        with Checkpoints(folder / "checkpoints", 1) as checkpoints:
            checkpoints.save(state)
        arrays = {name: bits(x) for name, x in named(state).items()}
        _, metrics = step(state, self.batch(2), key, frozen)
        if jax.process_index() == 0:
            np.savez(folder / "arrays.npz", **arrays)
            (folder / "loss.json").write_text(json.dumps(float(metrics["loss"])))

    def restore(self, layouts: list[Layout]) -> None:
        program, _ = self.program()
        optimizer, _ = program.make_optimizer(10)
        key, step, found = place_whole(self.mesh, lambda: jax.random.key(0)), None, {}
        for saved in layouts:
            like, frozen = program.abstract_state(optimizer, self.mesh)
            warnings: list[str] = []
            with Checkpoints(self.work / saved.folder / "checkpoints", 1) as checkpoints:
                state = checkpoints.restore(like, warnings.append)
            expected = np.load(self.work / saved.folder / "arrays.npz")
            is_same = all([np.array_equal(bits(x), expected[name]) for name, x in named(state).items()])
            in_place = jax.tree.map(lambda x, wanted: x.sharding == wanted.sharding, state, like)
            step = step or program.make_step(optimizer, state)
            _, metrics = step(state, self.batch(2), key, frozen)
            loss = json.loads((self.work / saved.folder / "loss.json").read_text())
            difference = abs(float(metrics["loss"]) - loss) / loss
            problems = ["other bits"] * (not is_same) + ["other places"] * (not all(jax.tree.leaves(in_place)))
            problems += ["warned"] * bool(warnings) + [f"loss differs by {difference:.1e}"] * (difference > TOLERANCE)
            found[str(saved)] = ", ".join(problems)
        if jax.process_index() == 0:
            (self.work / f"{self.layout.folder}.json").write_text(json.dumps(found))


def named(state: TrainState) -> dict[str, jax.Array]:
    leaves = jax.tree_util.tree_flatten_with_path(state._asdict())[0]
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def bits(x: jax.Array) -> np.ndarray:
    return np.atleast_1d(to_host(x)).view(np.uint8)


def launch(work: Path, layout: Layout, what: str, layouts: list[Layout]) -> None:
    only = ["--layouts", *(str(LAYOUTS.index(each)) for each in layouts)]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    environment = os.environ | {
        "PYTHONPATH": str(REPOSITORY),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, *only,
             "--worker", what, str(LAYOUTS.index(layout)), str(index), address, str(work)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for index in range(layout.processes)
    ]  # fmt: skip
    printed = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise SystemExit(f"{layout}, {what}:\n" + "\n".join(text[-3000:] for text in printed))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    everything = range(len(LAYOUTS))
    parser.add_argument(
        "--layouts", nargs="+", type=int, default=[*everything], choices=everything, help="only these, by number"
    )
    parser.add_argument("--worker", nargs=5, help=argparse.SUPPRESS)
    given = parser.parse_args()
    layouts = [LAYOUTS[number] for number in given.layouts]
    if given.worker:
        what, number, index, address, work = given.worker
        worker = Worker(Path(work), LAYOUTS[int(number)], int(index), address)
        with jax.set_mesh(worker.mesh):
            if what == "save":
                worker.save()
            else:
                worker.restore(layouts)
        return
    began, found = time.monotonic(), {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        tokenizer = tiny_tokenizer()
        model, params = tiny_model("llama", "reward", vocab_size=tokenizer.vocab_size)
        save_model(work / "lm", model, params, special_tokens={"bos_token_id": 1, "eos_token_id": 2})
        tokenizer.save(work / "lm")
        for layout in layouts:
            launch(work, layout, "save", layouts)
            print(f"saved: {layout}", flush=True)
        for layout in layouts:
            launch(work, layout, "restore", layouts)
            found[str(layout)] = json.loads((work / f"{layout.folder}.json").read_text())
            print(f"restored on {layout}: {found[str(layout)]}", flush=True)
    wrong = {f"{saved} -> {layout}": said for layout, of in found.items() for saved, said in of.items() if said}
    count = sum(map(len, found.values()))
    print(f"\n{count} pairs of layouts in {time.monotonic() - began:.0f} s; {len(wrong)} of them wrong")
    for pair, said in wrong.items():
        print(f"{pair}: {said}")
    if wrong:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
