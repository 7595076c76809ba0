"""Counts the operations of a function in its jaxpr, before compilation."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn

Choice = Callable[[list[float]], float]


def count_operations(function: Callable[..., Any], *args: Any, choice: Choice = max, **kwargs: Any) -> float:
    """Operations of the matrix products and convolutions of one call, on all devices together.

    A multiply-add is two operations; elementwise work is not counted. Recomputation in the backward pass
    (`jax.checkpoint`) is in the jaxpr, so it is counted. Of a `cond`, the more expensive branch counts. The body of a
    `while_loop` counts once, because the number of iterations is not known here; a `scan` counts every step. A Pallas
    kernel counts every block, although it may skip some. cuDNN's attention counts its products, scores that the
    backward pass computes again among them.

    Args:
        function: anything that `jax.make_jaxpr` traces.
        args, kwargs: its arguments: arrays or `jax.ShapeDtypeStruct`s.
        choice: `max` or `min`: which branch of a `switch` with three or more counts. Ours choose between widths.
    """
    return _jaxpr_operations(jax.make_jaxpr(function)(*args, **kwargs).jaxpr, choice)


def _jaxpr_operations(jaxpr: Jaxpr, choice: Choice) -> float:
    return math.fsum(_equation_operations(equation, choice) for equation in jaxpr.eqns)


def _equation_operations(equation: JaxprEqn, choice: Choice) -> float:
    params = equation.params
    match equation.primitive.name:
        case "dot_general":
            return _product_operations(equation)
        case "conv_general_dilated":
            return _convolution_operations(equation)
        case "dot_product_attention_fwd_wrapper":
            return _attention_operations(equation, products=2)
        case "dot_product_attention_bwd_wrapper":
            return _attention_operations(equation, products=5)
        case "cond":
            branches = [_jaxpr_operations(branch.jaxpr, choice) for branch in params["branches"]]
            return choice(branches) if len(branches) > 2 else max(branches)
        case "scan":
            repeats = params["length"]
        case "pallas_call":
            repeats = math.prod(params["grid_mapping"].grid)
        case "shard_map":
            # The body is the work of one device; the axes of an outer shard_map were counted there.
            axes = params["newly_manual_axes"]
            repeats = math.prod(params["mesh"].shape[axis] for axis in axes)
        case _:
            repeats = 1
    return repeats * math.fsum(_jaxpr_operations(inner, choice) for inner in _inner_jaxprs(params))


def _inner_jaxprs(params: dict[str, Any]) -> Iterator[Jaxpr]:
    """The jaxprs that an equation runs. Differentiation rules are callables until they are used, so they are not among
    them."""
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, Jaxpr):
                yield item


def _product_operations(equation: JaxprEqn) -> float:
    """Every element of the result is a sum over the contracted dimensions."""
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)


def _attention_operations(equation: JaxprEqn, products: int) -> float:
    """Each product is of all queries `[B T N D]` with all keys `[B S K D]`, or as large."""
    queries, keys = (variable.aval.shape for variable in equation.invars[:2])
    return 2.0 * products * math.prod(queries) * keys[1]


def _convolution_operations(equation: JaxprEqn) -> float:
    """Every element of the result is a sum over the kernel's window and input channels. Padding counts like data. The
    kernel's channels are already those of one feature group."""
    kernel = equation.invars[1].aval.shape
    output_channels = kernel[equation.params["dimension_numbers"].rhs_spec[0]]
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) / output_channels
