"""What binding of Linen and of NNX share: the products of a layer's weights, and the notice of a fallback."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from peft_jax.core.tree import OUTPUT_EMBEDDING
from peft_jax.core.weight import Weight, einsum, materialize, matmul, take

logger = logging.getLogger("peft_jax")
Rule = Callable[..., Any]  # (module, its own parameters with Weights in them, *args, **kwargs) -> output


class MissingRuleError(TypeError):
    """A Weight lies in a module that has no rule (raised by `bind(..., strict=True)`)."""


def compute_dtype(dtype: Any, *arrays: Any) -> Any:
    """The dtype a Flax layer computes in: its `dtype`, or what its operands promote to."""
    return dtype if dtype is not None else jnp.result_type(*(a.dtype for a in arrays if a is not None))


def linear(x, kernel, bias, *, axis=(-1,), features: int = 1, dtype: Any, precision: Any) -> jax.Array:
    """A dense layer over the axes `axis` of `x`, with `features` output axes."""
    dtype = compute_dtype(dtype, x, kernel, bias)
    x = x.astype(dtype)
    x = jnp.moveaxis(x, axis, range(x.ndim - len(axis), x.ndim))
    axes = range(-(len(axis) + features), 0)
    y = matmul(x, kernel, in_axes=tuple(axes[: len(axis)]), out_axes=tuple(axes[len(axis) :]), precision=precision)
    if bias is None:
        return y
    shape = (*[1] * (y.ndim - bias.ndim), *bias.shape)
    return y + changed_bias(kernel, bias, shape).astype(y.dtype)


def changed_bias(kernel: Any, bias: jax.Array, shape: Sequence[int]) -> jax.Array:
    """A layer's bias as the Weight in the place of its kernel has it, in this shape beside the layer's output.

    Where it is another one for each row of the batch, the rows are the first axis.
    """
    new = kernel.bias(bias) if isinstance(kernel, Weight) else bias
    rows = new.ndim - bias.ndim
    return new.reshape(*new.shape[:rows], *shape[rows:])


def einsum_layer(equation: str, x, kernel, bias, *, dtype: Any, precision: Any) -> jax.Array:
    """An einsum layer; the axes of `bias` are those of the output that come from the kernel, in the output's order."""
    dtype = compute_dtype(dtype, x, kernel, bias)
    y = einsum(equation, x.astype(dtype), kernel, precision=precision)
    if bias is None:
        return y
    operands, out = equation.replace(" ", "").split("->")
    kernel_labels = operands.split(",")[1].replace("...", "")
    out = out.replace("...", "?" * (y.ndim - len(out.replace("...", ""))))
    shape = [n if label in kernel_labels else 1 for label, n in zip(out, y.shape, strict=True)]
    return y + changed_bias(kernel, bias, shape).astype(y.dtype)


def embed(ids: jax.Array, embedding, *, dtype: Any) -> jax.Array:
    """Rows of an embedding."""
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(f"an embedding needs integer ids, got {ids.dtype}")
    return take(embedding, ids, compute_dtype(dtype, embedding))


def attend(query: jax.Array, embedding, *, dtype: Any) -> jax.Array:
    """Products of queries [..., D] with every row of an embedding [V, D]."""
    dtype = compute_dtype(dtype, query, embedding)
    return matmul(query.astype(dtype), embedding, in_axes=(-1,), out_axes=(-2,))


def output_embedding(params: Mapping[str, Any]) -> Any:
    """What a head that is tied to an embedding multiplies with: the embedding, unless the tree holds something else for it."""
    return params.get(OUTPUT_EMBEDDING, params.get("embedding"))


def bias_of(params: Mapping[str, Any]) -> jax.Array | None:
    """The `bias` among a module's own parameters as an array, None without one."""
    bias = params.get("bias")
    return None if bias is None else materialize(bias)


def find_rule(rules: Mapping[tuple[type, str], Rule], module_class: type, method: str) -> Rule | None:
    """The rule of the class that defines `method`; None where a subclass overrides it."""
    for base in module_class.__mro__:
        if (base, method) in rules:
            return rules[base, method]
        if method in vars(base):
            return None
    return None


def say_fallback(strict: bool, said: set[str], where: str, module_class: type, method: str, names: list[str]) -> None:
    """Log once that Weights without a rule are materialised, or raise MissingRuleError."""
    message = fallback_message(where, module_class, method, names)
    if strict:
        raise MissingRuleError(message)
    if message not in said:
        said.add(message)
        logger.warning(message)


def fallback_message(where: str, module_class: type, method: str, names: list[str]) -> str:
    """The sentence that says a Weight is materialised, or may not be."""
    return (
        f"no rule for {module_class.__name__}.{method} at {where or 'the top'}: the weights {', '.join(names)} are "
        f"materialised for each call; peft_jax.register_rule({module_class.__name__}, rule, method={method!r}) avoids it"
    )
