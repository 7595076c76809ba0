"""Kernels and bytes of a program for a GPU, counted by hand on a small one."""

import pytest

from pargs_jax.aot.kernels import count_launches, count_step_launches

# A loop of 5 turns. A turn writes 8 numbers into a cache of 100 x 8 where it lies, reads one row of a table of 50 x 8,
# multiplies a matrix of 8 x 8 with it, and chooses one of three ways to copy.
PROGRAM = """
HloModule step, is_scheduled=true, num_partitions=1

%fused_write (cache: f32[100,8], row: f32[1,8], at: s32[]) -> f32[100,8] {
  %cache = f32[100,8]{1,0} parameter(0)
  %row = f32[1,8]{1,0} parameter(1)
  %at = s32[] parameter(2)
  %zero = s32[] constant(0)
  ROOT %update = f32[100,8]{1,0} dynamic-update-slice(%cache, %row, %at, %zero)
}

%fused_look_up (table: f32[50,8], at: s32[]) -> f32[1,8] {
  %table = f32[50,8]{1,0} parameter(0)
  %at.1 = s32[] parameter(1)
  %zero.1 = s32[] constant(0)
  ROOT %slice = f32[1,8]{1,0} dynamic-slice(%table, %at.1, %zero.1), dynamic_slice_sizes={1,8}
}

%inner (left: f32[1,8], right: f32[8,8]) -> f32[1,8] {
  %left = f32[1,8]{1,0} parameter(0)
  %right = f32[8,8]{1,0} parameter(1)
  ROOT %dot = f32[1,8]{1,0} dot(%left, %right), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%fused_product (left.1: f32[1,8], right.1: f32[8,8]) -> f32[1,8] {
  %left.1 = f32[1,8]{1,0} parameter(0)
  %right.1 = f32[8,8]{1,0} parameter(1)
  ROOT %nested = f32[1,8]{1,0} fusion(%left.1, %right.1), kind=kCustom, calls=%inner
}

%narrow (n: f32[1,8]) -> f32[1,8] {
  ROOT %n = f32[1,8]{1,0} parameter(0)
}

%once (o: f32[1,8]) -> f32[1,8] {
  %o = f32[1,8]{1,0} parameter(0)
  ROOT %copied = f32[1,8]{1,0} copy(%o)
}

%twice (t: f32[1,8]) -> f32[1,8] {
  %t = f32[1,8]{1,0} parameter(0)
  %copied.1 = f32[1,8]{1,0} copy(%t)
  ROOT %copied.2 = f32[1,8]{1,0} copy(%copied.1)
}

%body (carry: (s32[], f32[100,8], f32[50,8], f32[8,8])) -> (s32[], f32[100,8], f32[50,8], f32[8,8]) {
  %carry = (s32[], f32[100,8]{1,0}, f32[50,8]{1,0}, f32[8,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%carry), index=0
  %kv = f32[100,8]{1,0} get-tuple-element(%carry), index=1
  %words = f32[50,8]{1,0} get-tuple-element(%carry), index=2
  %weights = f32[8,8]{1,0} get-tuple-element(%carry), index=3
  %word = f32[1,8]{1,0} fusion(%words, %i), kind=kLoop, calls=%fused_look_up
  %product = f32[1,8]{1,0} fusion(%word, %weights), kind=kCustom, calls=%fused_product
  %way = f32[1,8]{1,0} conditional(%i, %product, %product, %product), branch_computations={%narrow, %once, %twice}
  %written = f32[100,8]{1,0} fusion(%kv, %way, %i), kind=kLoop, calls=%fused_write
  ROOT %next = (s32[], f32[100,8]{1,0}, f32[50,8]{1,0}, f32[8,8]{1,0}) tuple(%i, %written, %words, %weights)
}

%condition (carry.1: (s32[], f32[100,8], f32[50,8], f32[8,8])) -> pred[] {
  %carry.1 = (s32[], f32[100,8]{1,0}, f32[50,8]{1,0}, f32[8,8]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%carry.1), index=0
  %end = s32[] constant(5)
  ROOT %goes_on = pred[] compare(%i.1, %end), direction=LT
}

ENTRY %main (first: (s32[], f32[100,8], f32[50,8], f32[8,8])) -> f32[100,8] {
  %first = (s32[], f32[100,8]{1,0}, f32[50,8]{1,0}, f32[8,8]{1,0}) parameter(0)
  %loop = (s32[], f32[100,8]{1,0}, f32[50,8]{1,0}, f32[8,8]{1,0}) while(%first), condition=%condition, \
body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %result = f32[100,8]{1,0} get-tuple-element(%loop), index=1
  ROOT %out = f32[100,8]{1,0} copy(%result)
}
"""
ROW, MATRIX, CACHE, NUMBER = 32, 256, 3200, 4
LOOK_UP = ROW + NUMBER + ROW
PRODUCT = ROW + MATRIX + ROW
WRITE = ROW + NUMBER + ROW
CONDITION = NUMBER + NUMBER + 1


@pytest.mark.parametrize(("choice", "copies"), [(min, 0), (max, 2)])
def test_an_iteration_reads_rows_of_tables_and_writes_the_cache_in_place(choice, copies):
    step = count_step_launches(PROGRAM, choice=choice)
    assert step == (3 + copies + 1, LOOK_UP + PRODUCT + WRITE + CONDITION + copies * 2 * ROW)
    assert count_launches(PROGRAM, choice=choice) == (5 * step.kernels + 1, 5 * step.bytes + 2 * CACHE)


def test_a_program_without_a_loop_has_no_step():
    entry = (
        PROGRAM[: PROGRAM.index("%body")] + "ENTRY %main (x: f32[8]) -> f32[8] {\n  ROOT %x = f32[8]{0} parameter(0)\n}"
    )
    assert count_launches(entry) == (0, 0)
    with pytest.raises(ValueError, match="no loop"):
        count_step_launches(entry)
