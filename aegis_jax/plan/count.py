"""FLOPs of a program from its jaxpr: products and convolutions, a multiply-add as two, as chips' peaks are given.

XLA's own account holds elementwise arithmetic too, some percent more at the size of Stable Diffusion, and takes a loop
for one turn of it.
"""

import math

from aegis_jax.erasure.batched import Program
from aegis_jax.plan.liveness import inner, needed


def flops(program: Program) -> tuple[float, float]:
    """(outside of loops whose length the program is told when it runs, within one turn of those).

    Of code that depends on the platform the plain variant counts: a kernel has the same products.
    """
    return _flops(needed(program))


def _flops(jaxpr) -> tuple[float, float]:
    fixed = turn = 0.0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            operand = equation.invars[0].aval.shape
            fixed += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(operand[axis] for axis in contracted)
        elif name == "conv_general_dilated":
            fixed += _convolution(equation)
        elif name == "while":
            body = _flops(params["body_jaxpr"].jaxpr)
            turn += sum(body)
        elif name == "cond":
            branches = [_flops(branch.jaxpr) for branch in params["branches"]]
            platforms = params.get("branches_platforms")
            if platforms is not None:
                branches = [branches[n] for n, names in enumerate(platforms) if names is None] or branches
            more = max(branches)
            fixed, turn = fixed + more[0], turn + more[1]
        elif name == "scan":
            body = _flops(params["jaxpr"].jaxpr)
            fixed, turn = fixed + params["length"] * body[0], turn + params["length"] * body[1]
        elif (jaxpr := inner(equation)) is not None:
            more = _flops(jaxpr)
            fixed, turn = fixed + more[0], turn + more[1]
    return fixed, turn


def _convolution(equation) -> float:
    """Every product whose operand is no padding's or dilation's zero, as XLA counts them."""
    params = equation.params
    numbers = params["dimension_numbers"]
    (operand, kernel), result = (v.aval.shape for v in equation.invars), equation.outvars[0].aval.shape
    total = 2.0 * result[numbers.out_spec[0]] * result[numbers.out_spec[1]] * kernel[numbers.rhs_spec[1]]
    for axis in range(len(numbers.lhs_spec) - 2):
        sizes = (
            operand[numbers.lhs_spec[2 + axis]],
            kernel[numbers.rhs_spec[2 + axis]],
            result[numbers.out_spec[2 + axis]],
        )
        how = (params[key][axis] for key in ("window_strides", "padding", "lhs_dilation", "rhs_dilation"))
        total *= _pairs(*sizes, *how)
    return total / params["batch_group_count"]


def _pairs(size: int, window: int, results: int, stride: int, padding, dilation: int, spread: int) -> int:
    """How many (result, place in the window) of an axis read an element of the operand."""
    low, last = padding[0], (size - 1) * dilation
    places = (result * stride + place * spread - low for result in range(results) for place in range(window))
    return sum(0 <= place <= last and place % dilation == 0 for place in places)
