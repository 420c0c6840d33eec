"""What binding of Linen and of NNX share: the products of a layer's weights, and the notice of a
fallback.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from peft_jax.core.select import OUTPUT_EMBEDDING
from peft_jax.core.weight import Weight, einsum, materialize, matmul, take

logger = logging.getLogger("peft_jax")
Rule = Callable[
    ..., Any
]  # (module, its own parameters with Weights in them, *args, **kwargs) -> output


class MissingRuleError(TypeError):
    """A Weight lies in a module that has no rule (raised by `bind(..., strict=True)`)."""


def compute_dtype(dtype: Any, *arrays: Any) -> Any:
    """The dtype a Flax layer computes in: its `dtype`, or what its operands promote to."""
    return (
        dtype if dtype is not None else jnp.result_type(*(a.dtype for a in arrays if a is not None))
    )


def linear(
    x, kernel, bias, *, axis=(-1,), features: int = 1, dtype: Any, precision: Any
) -> jax.Array:
    """A dense layer over the axes `axis` of `x`, with `features` output axes."""
    dtype = compute_dtype(dtype, x, kernel, bias)
    x = x.astype(dtype)
    x = jnp.moveaxis(x, axis, range(x.ndim - len(axis), x.ndim))
    axes = range(-(len(axis) + features), 0)
    y = matmul(
        x,
        kernel,
        in_axes=tuple(axes[: len(axis)]),
        out_axes=tuple(axes[len(axis) :]),
        precision=precision,
    )
    if bias is None:
        return y
    bias = changed_bias(kernel, bias, features).astype(y.dtype)
    each = bias.shape[: bias.ndim - features]
    return y + bias.reshape(
        *each, *[1] * (y.ndim - features - 1 if each else 0), *bias.shape[len(each) :]
    )


def changed_bias(kernel: Any, bias: jax.Array, features: int) -> jax.Array:
    """A layer's bias, [*out] or each row's [B, *out], as the Weight in the place of its kernel has
    it.
    """
    if not isinstance(kernel, Weight):
        return bias
    return (
        jax.vmap(kernel.bias)(bias)
        if bias.ndim > features and not kernel.routed
        else kernel.bias(bias)
    )


def einsum_layer(equation: str, x, kernel, bias, *, dtype: Any, precision: Any) -> jax.Array:
    """An einsum layer; the axes of `bias` are those of the output that come from the kernel, in the
    output's order.
    """
    dtype = compute_dtype(dtype, x, kernel, bias)
    y = einsum(equation, x.astype(dtype), kernel, precision=precision)
    if bias is None:
        return y
    operands, out = equation.replace(" ", "").split("->")
    kernel_labels = operands.split(",")[1].replace("...", "")
    out = out.replace("...", "?" * (y.ndim - len(out.replace("...", ""))))
    shape = [n if label in kernel_labels else 1 for label, n in zip(out, y.shape, strict=True)]
    features = sum(label in kernel_labels for label in out)
    bias = changed_bias(kernel, bias, features)
    if bias.ndim > features:  # a bias for each row
        shape[0] = bias.shape[0]
    return y + bias.reshape(shape).astype(y.dtype)


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
    """What a head that is tied to an embedding multiplies with: the embedding, unless the tree
    holds something else for it.
    """
    return params.get(OUTPUT_EMBEDDING, params.get("embedding"))


def bias_of(params: Mapping[str, Any]) -> jax.Array | None:
    """The `bias` among a module's own parameters as an array, [*out] or each row's [B, *out], None
    without one.
    """
    bias = params.get("bias")
    return None if bias is None else bias.rows() if is_routed(bias) else materialize(bias)


def is_routed(w: Any) -> bool:
    """Whether w is a bank, of which each row of the batch has its own."""
    return isinstance(w, Weight) and w.routed


def by_row(run: Callable[..., Any], arrays: Any, args: Any) -> Any:
    """`run(arrays, *args)` for each row of the batch; every array of `arrays` has a leading axis of
    rows.
    """
    B = jax.tree.leaves(arrays)[0].shape[0]
    axes = [0 if jnp.shape(a)[:1] == (B,) else None for a in args]
    return jax.vmap(run, in_axes=(0, *axes))(arrays, *args)


def rows_of(w: Any, rows: int) -> jax.Array:
    """The array of w for each of the batch's rows, [B, ...]."""
    if is_routed(w):
        return w.rows()
    array = materialize(w)
    return jnp.broadcast_to(array, (rows, *array.shape))


def find_rule(
    rules: Mapping[tuple[type, str], Rule], module_class: type, method: str
) -> Rule | None:
    """The rule of the class that defines `method`; None where a subclass overrides it."""
    for base in module_class.__mro__:
        if (base, method) in rules:
            return rules[base, method]
        if method in vars(base):
            return None
    return None


def say_fallback(
    strict: bool, said: set[str], where: str, module_class: type, method: str, names: list[str]
) -> None:
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
        f"no rule for {module_class.__name__}.{method} at {where or 'the top'}: the weights "
        f"{', '.join(names)} are "
        f"materialised for each call; peft_jax.core.register_rule({module_class.__name__}, rule, "
        f"method={method!r}) avoids it"
    )
