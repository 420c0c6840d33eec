"""Floating-point operations of a traced program: those of its matrix products, 2 m n k each.

They are counted in the program as it is traced, so that a product that is not there (a frozen
weight's gradient, a factorized weight's full matrix) is not counted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any


def flops_of(jaxpr: Any) -> float:
    """The operations of all matrix products and convolutions of a jaxpr.

    The body of a scan counts as often as it runs, that of a while loop once, and of a condition's
    branches the largest one.
    """
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    return float(sum(_of_equation(equation) for equation in jaxpr.eqns))


def _of_equation(equation: Any) -> float:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        left = equation.invars[0].aval.shape
        return 2.0 * math.prod(_result(equation)) * math.prod(left[i] for i in contracted)
    if name.startswith("ragged_dot"):  # each row meets the matrix of its own group
        return 2.0 * math.prod(_result(equation)) * equation.invars[0].aval.shape[-1]
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval.shape
        out = params["dimension_numbers"].rhs_spec[0]
        return 2.0 * math.prod(_result(equation)) * math.prod(kernel) / kernel[out]
    inner = [flops_of(x) for x in _inner(params)]
    if name == "cond":
        return max(inner, default=0.0)
    return sum(inner) * (params["length"] if name == "scan" else 1)


def _result(equation: Any) -> tuple[int, ...]:
    return equation.outvars[0].aval.shape


def _inner(params: dict[str, Any]) -> Iterator[Any]:
    """The jaxprs that an equation holds."""
    for value in params.values():
        for x in value if isinstance(value, tuple | list) else (value,):
            if hasattr(getattr(x, "jaxpr", x), "eqns"):
                yield x
