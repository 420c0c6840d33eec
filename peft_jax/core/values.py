"""Values of arrays, where there are any: under `jax.jit` and `jax.eval_shape` an array has a shape
and a dtype alone.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from peft_jax.core.sharding import fetch


def is_traced(*trees: Any) -> bool:
    """Whether some array of the trees is being traced."""
    return any(isinstance(x, Tracer) for x in jax.tree.leaves(trees))


def fetched(x: Any) -> Any:
    """The array on this host (see `fetch`); as it is where it is being traced."""
    return x if is_traced(x) else fetch(x)


def check_finite(x: jax.Array, message: str) -> None:
    """Raise ValueError of the message where `x` holds numbers that are not finite; what is traced
    is not looked at.
    """
    if not is_traced(x) and not bool(jnp.isfinite(x).all()):
        raise ValueError(message)


def check_concrete(message: str, *trees: Any) -> None:
    """Raise ValueError of the message, which says what needs values, where some array has none."""
    if is_traced(*trees):
        raise ValueError(f"{message} under jax.jit and jax.eval_shape, where arrays have no values")
