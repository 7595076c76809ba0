"""Reports: read from a compiler's messages, of a program for CPUs, and for a TPU that is not there."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from pargs_jax.aot.chips import CHIPS, GIB
from pargs_jax.aot.collectives import CollectiveTraffic
from pargs_jax.aot.operations import count_operations
from pargs_jax.aot.report import Allocation, Report, compile_report, read_shortage

V4 = CHIPS["v4"]
X = jax.ShapeDtypeStruct((256, 512), jnp.float32)
W = jax.ShapeDtypeStruct((512, 128), jnp.float32)

BEFORE_LAYOUT = (
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (36.12G) exceeds "
    "available HBM (30.75G)."
)
AFTER_LAYOUT = """RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. \
Used 31.50G of 30.75G hbm. Exceeded hbm capacity by 768.00M.

Total hbm usage >= 31.75G:
    reserved        256.00M
    program          31.50G
    arguments            0B

Largest program allocations in hbm:

  1. Size: 16.00G
     Operator: op_name="jit(step)/dot_general"
     Shape: f32[262144,16384]{1,0:T(8,128)}
     Unpadded size: 16.00G
     Allocation type: HLO temp
     ==========================

  2. Size: 512.00M
     Shape: bf16[16384,16384]{1,0:T(8,128)(2,1)}
     Unpadded size: 512.00M
     Allocation type: HLO temp
     ==========================
"""


def report_here(chip=V4):
    operations = count_operations(jnp.matmul, X, W)
    return compile_report(jax.jit(jnp.matmul).lower(X, W), chip=chip, devices=1, operations=(operations, operations))


def test_a_program_that_fits():
    report = report_here()
    assert report.fits
    assert report.memory.arguments == (256 * 512 + 512 * 128) * 4
    assert report.memory.outputs == 256 * 128 * 4
    assert report.peak_bytes == report.memory.peak >= report.memory.arguments + report.memory.outputs
    assert report.traffic[1].sent == {}
    assert report.advice(["a larger mesh"]) == []


def test_bounds_are_work_over_peak_rates():
    report = report_here()
    assert report.seconds() == {
        "operations": 2 * 256 * 512 * 128 / 275e12,
        "memory": (report.memory.arguments + report.memory.outputs) / 1.2e12,
        "interconnect": 0.0,
    }
    assert report.run_seconds() == report.seconds()["memory"]


def test_donated_arguments_are_not_counted_twice():
    lowered = jax.jit(lambda x: x + 1, donate_argnums=0).lower(X)
    report = compile_report(lowered, chip=V4, devices=1, operations=(0.0, 0.0))
    assert report.memory.aliased == report.memory.outputs == 256 * 512 * 4
    assert report.peak_bytes < 2 * 256 * 512 * 4


def test_a_program_larger_than_the_chip_does_not_fit():
    report = report_here(V4._replace(memory_bytes=1000))
    assert not report.fits
    first, part, option = report.advice(["a larger mesh"])
    assert "GiB more than the 0.00 GiB of a v4" in first
    assert part.startswith("most of it: arguments")
    assert option == "try: a larger mesh"


def test_shortage_found_before_memory_is_laid_out():
    used, limit, largest = read_shortage(BEFORE_LAYOUT)
    assert (used / GIB, limit / GIB) == pytest.approx((36.12, 30.75))
    assert largest == ()


def test_shortage_found_after_memory_is_laid_out():
    used, limit, largest = read_shortage(AFTER_LAYOUT)
    assert (used, limit) == (31.5 * GIB, 30.75 * GIB)
    assert largest == (
        Allocation(16 * GIB, "f32[262144,16384]"),
        Allocation(0.5 * GIB, "bf16[16384,16384]"),
    )


class Failing:
    def __init__(self, message):
        self.message = message

    def compile(self):
        raise jax.errors.JaxRuntimeError(self.message)


def test_out_of_memory_is_a_report_and_other_errors_propagate():
    report = compile_report(Failing(AFTER_LAYOUT), chip=V4, devices=4, operations=(4 * 275e12, 8 * 275e12))
    assert not report.fits
    assert (report.seconds(), report.seconds(most=True)) == ({"operations": 1.0}, {"operations": 2.0})
    assert report.as_row()["operations"] == "1.1e+15 to 2.2e+15"
    assert report.as_row()["peak GiB"] == "31.50"
    assert report.as_row()["ms at peak rates"] == ""
    assert report.advice(["remat"]) == [
        "needs 31.50 GiB a device, 0.75 GiB more than the 30.75 GiB of a v4",
        "large: 16.00 GiB, f32[262144,16384]",
        "large: 0.50 GiB, bf16[16384,16384]",
        "try: remat",
    ]
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        compile_report(Failing("INTERNAL: something else"), chip=V4, devices=4, operations=(1.0, 1.0))


def test_rows_of_programs_that_fit_and_do_not_have_the_same_columns():
    missing = Report(V4, 4, (1.0, 1.0), 40.0 * GIB, V4.memory_bytes, 1.0)
    assert report_here().as_row().keys() == missing.as_row().keys()


def test_a_row_says_when_loops_may_send_more():
    traffic = CollectiveTraffic({}, 0), CollectiveTraffic({"all-reduce": 2e9}, 1)
    report = dataclasses.replace(report_here(), traffic=traffic)
    assert report.as_row()["sent GB"] == "at least all-reduce 0 to 2"


TPU_PROGRAMS = """
import json
import jax, jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec as P
from pargs_jax.aot.chips import CHIPS
from pargs_jax.aot.report import compile_report

topology = topologies.get_topology_desc(
    platform="tpu", topology_name="v4:2x2x1", chip_config_name="megacore", chips_per_host_bounds=(2, 2, 1),
    num_slices=1, wrap=(False,) * 3,
)
mesh = jax.make_mesh((4,), ("d",), devices=topology.devices)


def report(rows):
    rows = jax.ShapeDtypeStruct((rows, 1024), jnp.float32, sharding=NamedSharding(mesh, P("d")))
    sharded = jax.shard_map(
        lambda x: jax.lax.all_gather(x, "d", tiled=True), mesh=mesh, in_specs=P("d"), out_specs=P("d"), check_vma=False
    )
    found = compile_report(jax.jit(sharded).lower(rows), chip=CHIPS["v4"], devices=4, operations=(0.0, 0.0))
    return found.fits, found.peak_bytes, found.limit_bytes, found.traffic and found.traffic[1].sent


print(json.dumps([report(4096), report(2**24)]))
"""


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the compiler for TPUs (the `tpu` extra)")
def test_a_program_for_a_tpu_on_a_machine_without_one():
    settings = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    done = subprocess.run(
        [sys.executable, "-c", TPU_PROGRAMS], env=os.environ | settings, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    small, large = json.loads(done.stdout.splitlines()[-1])
    part = 1024 * 1024 * 4
    assert small[0]
    assert 5 * part <= small[1] < 6 * part  # its part in, all four out, and the program
    assert small[3] == {"all-gather": 3 * part}
    assert not large[0]
    assert large[1] > large[2] == pytest.approx(30.75 * GIB)
    assert large[3] is None
