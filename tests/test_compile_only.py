"""`--compile-only`: a report without devices, weights or data, and the documented one for the smallest case."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from pargs_jax.aot.gpu import is_installed
from pargs_jax.commands.compile_only import bytes_of
from pargs_jax.commands.decode import describe_program
from pargs_jax.config import DecodeConfig
from pargs_jax.mesh import make_mesh

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


def test_int8_halves_the_weights():
    """What a program takes is known without compiling it: the bytes of its arguments."""
    shape = str(REPOSITORY / "configs" / "shapes" / "llama-2-7b")
    options = {"lm": shape, "rm": (shape,), "method": "pargs", "dtype": "bfloat16", "prompt_length": 64}
    with jax.set_mesh(mesh := make_mesh("cpu-4", "decode")):
        plain, int8 = (
            sum(map(bytes_of, describe_program(DecodeConfig(**options, **more), mesh)[1][0]))
            for more in ({}, {"lm_dtype": "int8", "rm_dtype": "int8"})
        )
    assert 0.5 < int8 / plain < 0.53


@needs_libtpu
def test_the_step_on_packed_batches_is_described():
    done = run("train.py", "--mesh", "tpu-v4-8", "--compile-only", "--pack", "256", "--optim.accumulation", "2")
    assert done.returncode == 0, done.stderr
    assert "2 answers of 64 each, packed in 8 rows of 256; computed in float32" in done.stdout


@needs_libtpu
def test_a_program_that_does_not_fit_says_so_and_what_would_help():
    shape = str(REPOSITORY / "configs" / "shapes" / "llama-2-7b")
    options = ("--mesh", "tpu-v5e-1", "--compile-only", "--prompt-length", "8", "--max-new-tokens", "4")
    done = run("decode.py", "--lm", shape, "--method", "greedy", *options)
    assert done.returncode == 1, done.stderr
    assert "GiB of a v5e" in done.stdout
    assert "try: --dtype bfloat16" in done.stdout


def decode_for_an_h100():
    shape = str(REPOSITORY / "pargs_jax" / "assets" / "demo_lm")
    options = ("--mesh", "gpu-1", "--compile-only", "--prompt-length", "8", "--max-new-tokens", "4")
    return run("decode.py", "--lm", shape, "--rm", shape, "--batch-size", "2", *options)


@pytest.mark.skipif(not is_installed(), reason="compiling for a GPU needs the extra: pip install -e '.[compile-gpu]'")
def test_a_program_for_an_h100_tells_kernels_and_bytes():
    done = decode_for_an_h100()
    assert done.returncode == 0, done.stderr
    cells = dict(re.findall(r"^ +(\S[^\n]*?\S) {2,}(\S[^\n]*?) *$", done.stdout, re.MULTILINE))
    assert cells["fits"] == "yes" and cells["limit GiB"] == "79.11"
    assert 50 < float(cells["kernels a step"]) < 500
    assert 1 < float(cells["times the least"]) < 5


@pytest.mark.skipif(is_installed(), reason="the compiler for GPUs is here")
def test_without_a_compiler_for_gpus_one_line_says_where_it_comes_from():
    done = decode_for_an_h100()
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: compiling for a GPU needs") and "'pargs-jax[compile-gpu]'" in line


@pytest.mark.parametrize("command", ["train.py", "decode.py"])
def test_a_mesh_that_cannot_be_compiled_for_is_one_line(command):
    done = run(command, "--compile-only", "--mesh", "cpu-4")
    assert done.returncode == 2
    assert done.stderr == ("error: mesh cpu-4: compile_only needs a TPU slice, such as tpu-v4-8, or one H100, gpu-1\n")
