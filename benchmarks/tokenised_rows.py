"""How long a run takes to have its rows, and how much memory: in memory, tokenised into the cache, and from the cache.

    python benchmarks/tokenised_rows.py --rows 200000 --batch-size 64 --steps 200

Each measurement is a process of its own, which makes some batches as a run does. Memory is what the process itself
allocated at most (its anonymous memory); mapped files are not in it, since the system may drop them at any time.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

from pargs_jax.data.batches import Batches
from pargs_jax.data.example_cache import ExampleCache
from pargs_jax.data.example_sets import ExampleSet
from pargs_jax.data.examples import Cutting, digest_of
from pargs_jax.data.sources import Share
from pargs_jax.demo.task import DEMO_LM
from pargs_jax.text.prompts import get_form
from pargs_jax.text.tokenization import TextTokenizer

MAX_LENGTH = 512
KINDS = ("in memory", "into the cache", "from the cache")


def write_rows(folder: Path, count: int) -> list[Path]:
    """Pairs of random words, as JSONL and as Parquet."""
    import pyarrow
    import pyarrow.parquet

    rng = np.random.default_rng(0)
    words = np.array(["order", "lamp", "please", "refund", "arrived", "broken", "thank", "you", "agent", "customer"])

    def text(most: int) -> str:
        return " ".join(rng.choice(words, rng.integers(most // 4, most)))

    schema = pyarrow.schema([(name, pyarrow.string()) for name in ("prompt", "chosen", "rejected")])
    paths = [folder / "rows.jsonl", folder / "rows.parquet"]
    with paths[0].open("w") as file, pyarrow.parquet.ParquetWriter(paths[1], schema) as parquet:
        for first in range(0, count, 10_000):
            numbers = range(first, min(first + 10_000, count))
            rows = [{"prompt": f"{i} {text(80)}?", "chosen": text(120), "rejected": text(120)} for i in numbers]
            file.writelines(json.dumps(row) + "\n" for row in rows)
            parquet.write_table(pyarrow.Table.from_pylist(rows, schema))
    return paths


def measure(source: Path, cache: Path, kind: str, batch_size: int, steps: int) -> None:
    """Prints what one process needs, as JSON."""
    tokenizer = TextTokenizer.load(DEMO_LM)
    wanted = ExampleSet(str(source), "train", {}, get_form("plain"), True, None, 0, Cutting(tokenizer, MAX_LENGTH))
    memory = PeakMemory()
    began = time.perf_counter()
    if kind == "in memory":
        examples = wanted.load()[0]
        digest = digest_of(examples)
    else:
        cached = ExampleCache(cache, Share(), print, "").get(wanted, wanted.key(), str(time.time_ns()))
        examples, digest = cached.examples, cached.examples.digest
    batches = Batches(examples, batch_size, MAX_LENGTH, seed=0)
    batches.batch(0)
    first = time.perf_counter() - began
    began, total = time.perf_counter(), 0
    for step in range(steps):
        total += int(batches.batch(step).answers.sum())
    per_batch = (time.perf_counter() - began) / steps
    print(json.dumps([first, memory.stop(), per_batch, digest, total]))


class PeakMemory:
    """The most bytes that this process has besides those it had, looked at every hundredth of a second."""

    def __init__(self) -> None:
        self._before = self._most = allocated()
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def stop(self) -> int:
        self._is_over.set()
        self._thread.join()
        return self._most - self._before

    def _watch(self) -> None:
        while not self._is_over.wait(0.01):
            self._most = max(self._most, allocated())


def allocated() -> int:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["RssAnon"].split()[0]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        source, cache, kind = given.measure
        measure(Path(source), Path(cache), kind, given.batch_size, given.steps)
        return
    print(f"{given.rows} pairs\n\n| file | rows | first batch, s | memory, MiB | a batch of {given.batch_size}, ms |")
    print("|---|---|---:|---:|---:|")
    seen = set()
    with tempfile.TemporaryDirectory() as folder:
        for path in write_rows(Path(folder), given.rows):
            size = path.stat().st_size / 2**20
            for kind in KINDS:
                command = [sys.executable, __file__, "--batch-size", str(given.batch_size), "--steps", str(given.steps)]
                command += ["--measure", str(path), str(Path(folder) / "cache"), kind]
                said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
                first, memory, per_batch, *content = json.loads(said.splitlines()[-1])
                seen.add(tuple(content))
                print(
                    f"| {path.suffix[1:]}, {size:.0f} MiB | {kind} | {first:.1f} | {memory / 2**20:.0f} | "
                    f"{1000 * per_batch:.1f} |",
                    flush=True,
                )
    if len(seen) != 1:
        raise SystemExit("the batches differ")


if __name__ == "__main__":
    main()
