"""Bytes sent: real programs on four virtual devices, and excerpts of what the TPU's compiler writes."""

import json
import os
import subprocess
import sys

import pytest

from pargs_jax.aot.collectives import CollectiveTraffic, collective_bytes

PROGRAMS = """
import json
import jax, jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from pargs_jax.aot.collectives import collective_bytes

mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
sharding = lambda *spec: NamedSharding(mesh, P(*spec))
abstract = lambda shape, *spec: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding(*spec))
rows = abstract((64, 32), "d")


def traffic(function, *args):
    return collective_bytes(jax.jit(function).lower(*args).compile().as_text())


def by_hand(body, out=P("d")):
    return traffic(jax.shard_map(body, mesh=mesh, in_specs=P("d"), out_specs=out, check_vma=False), rows)


def layer(x, w):
    whole = jax.lax.with_sharding_constraint(w, sharding())
    return jax.lax.with_sharding_constraint(jnp.tanh(x @ whole), sharding("d")), None


def fsdp(layers, x):
    return jax.lax.scan(jax.checkpoint(layer), x, layers)[0]


layers = abstract((6, 32, 32), None, "d")
halves = [[0, 1], [2, 3]]
print(json.dumps({
    "all-gather": by_hand(lambda x: jax.lax.all_gather(x, "d", tiled=True)),
    "all-reduce": by_hand(lambda x: jax.lax.psum(x, "d")),
    "all-reduce of halves": by_hand(lambda x: jax.lax.psum(x, "d", axis_index_groups=halves)),
    "reduce-scatter": by_hand(lambda x: jax.lax.psum_scatter(x, "d", tiled=True)),
    "all-to-all": by_hand(lambda x: jax.lax.all_to_all(x, "d", 0, 0, tiled=True)),
    "collective-permute": by_hand(lambda x: jax.lax.ppermute(x, "d", [(i, (i + 1) % 4) for i in range(4)])),
    "branches": by_hand(lambda x: jax.lax.switch(
        x[0, 0].astype(int), [lambda: x, lambda: jax.lax.psum(x, "d"), lambda: jax.lax.psum(x[:1], "d") + x]
    )),
    "unknown": by_hand(lambda x: jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: jax.lax.psum(x, "d"), x)),
    "nothing": traffic(jnp.tanh, rows),
    "fsdp": traffic(fsdp, layers, abstract((64, 32), "d")),
    "fsdp gradient": traffic(jax.grad(lambda w, x: fsdp(w, x).sum()), layers, abstract((64, 32), "d")),
}))
"""
PART = 16 * 32 * 4
"""Bytes of one device's rows."""
LAYER = 32 * 32 * 4


@pytest.fixture(scope="module")
def traffic():
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAMS], env=os.environ | flags, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return {name: CollectiveTraffic(*value) for name, value in json.loads(done.stdout).items()}


@pytest.mark.parametrize(
    ("kind", "sent"),
    [
        ("all-gather", 3 * PART),
        ("all-reduce", 2 * PART * 3 / 4),
        ("reduce-scatter", PART * 3 / 4),
        ("all-to-all", PART * 3 / 4),
        ("collective-permute", PART),
    ],
)
def test_each_kind_sends_what_its_formula_says(traffic, kind, sent):
    assert traffic[kind] == CollectiveTraffic({kind: sent}, 0)


def test_groups_are_those_of_the_collective_not_all_devices(traffic):
    assert traffic["all-reduce of halves"].sent == {"all-reduce": 2 * PART / 2}


def test_the_most_expensive_branch_counts(traffic):
    assert traffic["branches"].sent == {"all-reduce": 2 * PART * 3 / 4}


def test_a_loop_of_unknown_length_counts_once_and_is_reported(traffic):
    assert traffic["unknown"] == CollectiveTraffic({"all-reduce": 2 * PART * 3 / 4}, 1)


def test_a_program_without_collectives_sends_nothing(traffic):
    assert traffic["nothing"] == CollectiveTraffic({}, 0)


def test_fsdp_gathers_every_layer_in_each_pass(traffic):
    gathered = 6 * LAYER * 3 / 4
    assert traffic["fsdp"].sent == {"all-gather": gathered}
    gradient = traffic["fsdp gradient"].sent
    assert gradient["all-gather"] == 2 * gathered
    # CPUs have no reduce-scatter of their own: gradients are all-reduced, then sliced.
    assert gradient["all-reduce"] + gradient.get("reduce-scatter", 0) >= gathered


TPU_PROGRAM = """\
HloModule jit_step, is_scheduled=true, num_partitions=4

%all-reduce-scatter.clone.1 (input.2: bf16[2048,2048]) -> bf16[512,2048] {
  %input.2 = bf16[2048,2048]{1,0:T(8,128)(2,1)} parameter(0)
  %all-reduce.3 = bf16[2048,2048]{1,0:T(8,128)(2,1)} all-reduce(%input.2), channel_id=3, \
replica_groups={{0,1,2,3}}, use_global_device_ids=true, to_apply=%add.clone
  %partition-id.1 = u32[] partition-id()
  %constant.2 = u32[] constant(512)
  %multiply.9 = u32[]{:T(128)} multiply(%partition-id.1, %constant.2)
  %constant.3 = u32[] constant(0)
  ROOT %dynamic-slice.5 = bf16[512,2048]{1,0:T(8,128)(2,1)S(1)} dynamic-slice(%all-reduce.3, %multiply.9, %constant.3)
}

%fused_computation.45 (p.1: bf16[512,2048]) -> (bf16[512,2048], bf16[2048,2048]) {
  %p.1 = bf16[512,2048]{1,0:T(8,128)(2,1)} parameter(0)
  %all-gather.15 = bf16[2048,2048]{1,0:T(8,128)(2,1)} all-gather(%p.1), channel_id=2, \
replica_groups=mesh['axis_0'=1,'axis_1'=4,'axis_2'=1] {'axis_1'}, dimensions={0}
  ROOT %tuple.1 = (bf16[512,2048]{1,0:T(8,128)(2,1)}, bf16[2048,2048]{1,0:T(8,128)(2,1)}) tuple(%p.1, %all-gather.15)
}

%async_collective_fusion.64 (p.2: bf16[512,2048]) -> bf16[2048,2048] {
  %p.2 = bf16[512,2048]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.17 = bf16[2048,2048]{1,0:T(8,128)(2,1)} all-gather(%p.2), channel_id=2, \
replica_groups=mesh['axis_0'=1,'axis_1'=4,'axis_2'=1] {'axis_1'}, dimensions={0}
}

%fused_computation.47 (p.3: bf16[512,2048]) -> bf16[2048,2048] {
  %p.3 = bf16[512,2048]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.19 = bf16[2048,2048]{1,0:T(8,128)(2,1)} all-gather(%p.3), channel_id=2, \
replica_groups=mesh['axis_0'=1,'axis_1'=4,'axis_2'=1] {'axis_1'}, dimensions={0}
}

%body (carry.1: (s32[], bf16[512,2048])) -> (s32[], bf16[512,2048]) {
  %carry.1 = (s32[]{:T(128)}, bf16[512,2048]{1,0:T(8,128)(2,1)}) parameter(0)
  %gte.0 = s32[]{:T(128)} get-tuple-element(%carry.1), index=0
  %gte.1 = bf16[512,2048]{1,0:T(8,128)(2,1)} get-tuple-element(%carry.1), index=1
  %constant.5 = s32[]{:T(128)} constant(1)
  %add.1 = s32[]{:T(128)} add(%gte.0, %constant.5)
  %async-collective-start = (bf16[512,2048]{1,0:T(8,128)(2,1)}, /*index=1*/bf16[2048,2048]{1,0:T(8,128)(2,1)}) \
fusion(%gte.1), kind=kCustom, calls=%fused_computation.45
  %fusion.64 = bf16[2048,2048]{1,0:T(8,128)(2,1)} fusion(%gte.1), kind=kOutput, calls=%async_collective_fusion.64
  %async-collective-done = bf16[2048,2048]{1,0:T(8,128)(2,1)} fusion(%gte.1), kind=kCustom, calls=%fused_computation.47
  %fusion.42 = bf16[512,2048]{1,0:T(8,128)(2,1)S(1)} fusion(%async-collective-done), kind=kCustom, \
calls=%all-reduce-scatter.clone.1
  %collective-permute-start = (bf16[512,2048]{1,0}, bf16[512,2048]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) \
collective-permute-start(%fusion.42), channel_id=1, source_target_pairs={{0,1},{1,2},{2,3}}
  %collective-permute-done = bf16[512,2048]{1,0} collective-permute-done(%collective-permute-start)
  ROOT %tuple.2 = (s32[]{:T(128)}, bf16[512,2048]{1,0:T(8,128)(2,1)}) tuple(%add.1, %collective-permute-done)
}

%condition (carry.2: (s32[], bf16[512,2048])) -> pred[] {
  %constant.6 = s32[]{:T(128)} constant(6)
  %carry.2 = (s32[]{:T(128)}, bf16[512,2048]{1,0:T(8,128)(2,1)}) parameter(0)
  %gte.2 = s32[]{:T(128)} get-tuple-element(%carry.2), index=0
  ROOT %lt.10 = pred[]{:T(512)} compare(%gte.2, %constant.6), direction=LT
}

ENTRY %main.1_spmd (param.4: bf16[512,2048]) -> bf16[512,2048] {
  %param.4 = bf16[512,2048]{1,0:T(8,128)(2,1)} parameter(0)
  %constant.7 = s32[]{:T(128)} constant(0)
  %copy.1 = s32[]{:T(128)} copy(%constant.7)
  %tuple.3 = (s32[]{:T(128)}, bf16[512,2048]{1,0:T(8,128)(2,1)}) tuple(%copy.1, %param.4)
  %while.1 = (s32[]{:T(128)}, bf16[512,2048]{1,0:T(8,128)(2,1)}) while(%tuple.3), condition=%condition, body=%body
  ROOT %gte.3 = bf16[512,2048]{1,0:T(8,128)(2,1)} get-tuple-element(%while.1), index=1
}
"""
WHOLE = 2048 * 2048 * 2


def test_a_tpu_program():
    """Its loop has no noted length; its reduce-scatter is a fused all-reduce and slice; its all-gather, overlapped with
    computation, is written three times."""
    assert collective_bytes(TPU_PROGRAM) == CollectiveTraffic(
        {"all-gather": 6 * WHOLE * 3 / 4, "reduce-scatter": 6 * WHOLE * 3 / 4, "collective-permute": 6 * WHOLE / 4}, 0
    )


def test_a_loop_whose_end_is_computed_is_of_unknown_length():
    text = TPU_PROGRAM.replace("constant(6)", "partition-id()")
    assert collective_bytes(text) == CollectiveTraffic(
        {"all-gather": WHOLE * 3 / 4, "reduce-scatter": WHOLE * 3 / 4, "collective-permute": WHOLE / 4}, 1
    )


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("{{0,1},{2,3}}", 2),
        ("{}", 4),
        ("[2,2]<=[4]", 2),
        ("[1,4]<=[2,2]T(1,0)", 4),
        ("mesh['a'=2,'b'=2] {'a','b'}", 4),
        ("mesh['a'=4] {'a':(2)2}", 2),
        ("[4,1]<=[4]", 1),
    ],
)
def test_groups_in_every_form(groups, size):
    text = f"""HloModule m, num_partitions=4

ENTRY %main (p: f32[8]) -> f32[8] {{
  %p = f32[8]{{0}} parameter(0)
  ROOT %all-reduce = f32[8]{{0}} all-reduce(%p), channel_id=1, replica_groups={groups}, to_apply=%add
}}
"""
    expected = {"all-reduce": 2 * 32 * (size - 1) / size} if size > 1 else {}
    assert collective_bytes(text).sent == expected


def test_an_asynchronous_start_counts_and_its_end_does_not():
    text = """HloModule m, num_partitions=4

%wrapped (q: f32[8]) -> f32[2] {
  %q = f32[8]{0} parameter(0)
  ROOT %reduce-scatter = f32[2]{0} reduce-scatter(%q), replica_groups=[1,4]<=[4], dimensions={0}, to_apply=%add
}

ENTRY %main (p: f32[8]) -> f32[32] {
  %p = f32[8]{0} parameter(0)
  %async-start = ((f32[8]{0}), f32[2]{0}, u32[]) async-start(%p), calls=%wrapped
  %async-done = f32[2]{0} async-done(%async-start), calls=%wrapped
  %all-gather-start = (f32[8]{0}, f32[32]{0}) all-gather-start(%p), replica_groups=[1,4]<=[4], dimensions={0}
  ROOT %all-gather-done = f32[32]{0} all-gather-done(%all-gather-start)
}
"""
    assert collective_bytes(text).sent == {"all-gather": 3 * 32, "reduce-scatter": 32 * 3 / 4}


def test_text_that_is_not_a_program_is_refused():
    with pytest.raises(ValueError, match="not the text of a compiled program"):
        collective_bytes("")
    with pytest.raises(ValueError, match=r"groups of all-reduce.*unknown form"):
        collective_bytes(TPU_PROGRAM.replace("replica_groups={{0,1,2,3}}", "replica_groups=?"))
