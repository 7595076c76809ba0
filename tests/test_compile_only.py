"""`--compile-only`: a report without devices, weights or data, and the documented one for the smallest case."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
SMALLEST = "train the demo's model, 8 pairs"

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="compiling for a TPU needs libtpu: pip install -e '.[tpu]'"
)


def run(*words):
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, *words], cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300
    )


@needs_libtpu
def test_the_documented_table_is_still_true_of_its_smallest_case():
    done = run("benchmarks/compile_only.py", "--only", SMALLEST)
    assert done.returncode == 0, done.stderr
    found = next(line for line in done.stdout.splitlines() if line.startswith(f"| {SMALLEST}"))
    page = (REPOSITORY / "docs" / "machines.md").read_text()
    documented = next(line for line in page.splitlines() if line.startswith(f"| {SMALLEST}"))
    *said, _ = (cell.strip() for cell in documented.strip("|").split("|"))  # the last is the time to compile
    *seen, _ = (cell.strip() for cell in found.strip("|").split("|"))
    assert [re.sub(r"[\d.e+]+", "#", cell) for cell in said] == [re.sub(r"[\d.e+]+", "#", cell) for cell in seen]
    numbers = [[float(x) for x in re.findall(r"\d[\d.e+-]*", " ".join(cells[2:]))] for cells in (said, seen)]
    assert numbers[0] == pytest.approx(numbers[1], rel=0.2, abs=0.01)


@needs_libtpu
def test_what_does_not_fit_says_so_and_what_would_help():
    shape = str(REPOSITORY / "configs" / "shapes" / "llama-2-7b")
    options = ("--mesh", "tpu-v5e-1", "--compile-only", "--prompt-length", "8", "--max-new-tokens", "4")
    done = run("decode.py", "--lm", shape, "--method", "greedy", *options)
    assert done.returncode == 1, done.stderr
    assert "GiB of a v5e" in done.stdout
    assert "try: --dtype bfloat16" in done.stdout


@pytest.mark.parametrize("command", ["train.py", "decode.py"])
def test_a_mesh_that_cannot_be_compiled_for_is_one_line(command):
    done = run(command, "--compile-only", "--mesh", "cpu-4")
    assert done.returncode == 2
    assert done.stderr == (
        "error: mesh cpu-4: what is only compiled needs a TPU slice, such as tpu-v4-8, or one H100, gpu-1\n"
    )
