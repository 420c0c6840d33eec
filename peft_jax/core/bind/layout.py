"""Which axes of a model's weights are inputs and outputs, read off its layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
from flax import nnx

from peft_jax.core.weight import Axes, Layout


def layout_of(model: Any, *args: Any, **kwargs: Any) -> Layout:
    """path -> (in_axes, out_axes) for the weights of the model's Dense, DenseGeneral, Einsum, Embed
    and Conv layers.

    `args` are what the model is called with (arrays or ShapeDtypeStructs; not needed for NNX).
    Methods take the result as `layout`, which they need where a weight is not [*leading, in, out]:
    attention of `DenseGeneral`, einsums, convolutions.
    """
    return (
        _nnx_layout(model) if isinstance(model, nnx.Module) else _linen_layout(model, args, kwargs)
    )


def _linen_layout(model: nn.Module, args: Any, kwargs: Any) -> Layout:
    layout: dict[str, tuple[Axes, Axes]] = {}

    def record(call: Callable[..., Any], call_args: Any, call_kwargs: Any, context: Any) -> Any:
        if context.method_name == "__call__" and (
            found := _linen_axes(context.module, call_args, call_kwargs)
        ):
            name, axes = found
            layout["/".join([*context.module.path, name])] = axes
        return call(*call_args, **call_kwargs)

    with nn.intercept_methods(record):
        jax.eval_shape(lambda key, a, k: model.init(key, *a, **k), jax.random.key(0), args, kwargs)
    return layout


def _split(n_in: int, n_out: int) -> tuple[Axes, Axes]:
    axes = tuple(range(-(n_in + n_out), 0))
    return axes[:n_in], axes[n_in:]


def _count(value: Any) -> int:
    return len(value) if isinstance(value, tuple | list) else 1


def _linen_axes(module: nn.Module, args: Any, kwargs: Any) -> tuple[str, tuple[Axes, Axes]] | None:
    if isinstance(module, nn.Dense):
        return "kernel", _split(1, 1)
    if isinstance(module, nn.DenseGeneral):
        return "kernel", _split(_count(module.axis), _count(module.features))
    if isinstance(module, nn.Embed):
        return "embedding", _split(1, 1)
    if isinstance(module, nn.Conv):
        return "kernel", _split(_count(module.kernel_size) + 1, 1)
    if isinstance(module, nn.Einsum):
        given = args[1] if len(args) > 1 else kwargs.get("einsum_str")
        return "kernel", _einsum_axes(given or module.einsum_str or "")
    return None


def _einsum_axes(equation: str) -> tuple[Axes, Axes]:
    inputs, out = equation.replace(" ", "").split("->")
    _, ws = inputs.split(",")
    ws = ws.replace("...", "")
    axes = {label: i - len(ws) for i, label in enumerate(ws)}
    shared = [label for label in ws if label in inputs.split(",")[0]]
    return (
        tuple(axes[label] for label in shared if label not in out),
        tuple(axes[label] for label in ws if label in out and label not in shared),
    )


def _nnx_layout(model: nnx.Module) -> Layout:
    layout: dict[str, tuple[Axes, Axes]] = {}
    for path, module in nnx.iter_modules(model):
        found = _nnx_axes(module)
        if found is not None:
            name, axes = found
            layout["/".join([*map(str, path), name])] = axes
    return layout


def _nnx_axes(module: Any) -> tuple[str, tuple[Axes, Axes]] | None:
    if isinstance(module, nnx.Linear):
        return "kernel", _split(1, 1)
    if isinstance(module, nnx.LinearGeneral):
        return "kernel", _split(_count(module.axis), _count(module.out_features))
    if isinstance(module, nnx.Embed):
        return "embedding", _split(1, 1)
    if isinstance(module, nnx.Conv):
        return "kernel", _split(_count(module.kernel_size) + 1, 1)
    if isinstance(module, nnx.Einsum) and module.einsum_str:
        return "kernel", _einsum_axes(module.einsum_str)
    return None
