"""Binding for Flax NNX: the model is split and merged, and modules whose parameters are Weights change their class.

The merged model exists only while tracing, so giving one of its modules a subclass with another `__call__` touches
nothing of the user's. The subclass is an NNX module like any other, so `nnx.scan`, `nnx.vmap` and `nnx.remat` carry it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx

from peft_jax.core.attachment import Attachment
from peft_jax.core.bind.rules import (
    MissingRuleError,
    Rule,
    attend,
    bias_of,
    einsum_layer,
    embed,
    find_rule,
    linear,
    say_fallback,
)
from peft_jax.core.capture import RECORDER, Recorder
from peft_jax.core.tree import is_node, prepare
from peft_jax.core.weight import Weight, materialize

RULES: dict[tuple[type, str], Rule] = {}


def register_rule(module_class: type[nnx.Module], rule: Rule, *, method: str = "__call__") -> None:
    """As `peft_jax.core.bind.linen.register_rule`, for an NNX module."""
    RULES[module_class, method] = rule


def nnx_params(model: nnx.Module) -> Any:
    """The parameters of an NNX model as a plain tree of dicts."""
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def bind_nnx(model: nnx.Module, *, strict: bool = False) -> Callable[..., Any]:
    """See `peft_jax.bind`. State other than parameters is taken as it is now and left alone."""
    graph, state, rest = nnx.split(model, nnx.Param, ...)
    said: set[str] = set()

    def apply(
        params: Any, *args: Any, rng: jax.Array | None = None, method: str | None = None, adapter_ids: Any = None, **kwargs: Any
    ) -> Any:
        params = prepare(params, rng, adapter_ids)
        merged = nnx.merge(graph, state, rest, copy=True)
        for path, module in list(nnx.iter_modules(merged)):
            own = _own(params, path)
            recorder = RECORDER.get()
            if any(is_node(w) for w in own.values()):
                _substitute(module, own, "/".join(map(str, path)), strict, said)
            if recorder is not None and recorder.wants("/".join(map(str, path))):
                _record(module, "/".join(map(str, path)), recorder)
            for name, value in own.items():
                if not isinstance(value, (Mapping, Attachment)) and isinstance(getattr(module, name, None), nnx.Param):
                    getattr(module, name).set_raw_value(value)
        return getattr(merged, method or "__call__")(*args, **kwargs)

    apply.model = model  # type: ignore[attr-defined]
    return apply


def _record(module: nnx.Module, path: str, recorder: Recorder) -> None:
    """Give `module` a subclass whose calls are recorded."""
    original = type(module)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = original.__call__(self, *args, **kwargs)  # type: ignore[operator]
        for name, value in recorder.of(path, args, out).items():
            recorder.put(name, path, value)
        return out

    module.__class__ = type(original.__name__, (original,), {"__call__": call})


def _own(params: Any, path: tuple[Any, ...]) -> Mapping[str, Any]:
    for part in path:
        if not isinstance(params, Mapping) or part not in params:
            return {}
        params = params[part]
    return params if isinstance(params, Mapping) else {}


def _substitute(module: nnx.Module, own: Mapping[str, Any], where: str, strict: bool, said: set[str]) -> None:
    """Give `module` a subclass whose methods use the rules, materialise what has none, and run attachments."""
    original = type(module)
    weights = [k for k, w in own.items() if isinstance(w, Weight)]
    attached = [own[k] for k in sorted(own) if isinstance(own[k], Attachment)]
    methods = {"__call__"} | {m for c, m in RULES if issubclass(original, c)} | {a.method for a in attached}
    for index, attachment in enumerate(attached):  # they travel as the module's state, so that nnx.scan slices them
        setattr(module, f"_attached_{index}", nnx.Param(attachment))
    body: dict[str, Any] = {}
    for method in methods:
        rule = find_rule(RULES, original, method)
        if weights and rule is None and method == "__call__":
            say_fallback(strict, said, where, original, method, weights)
        body[method] = _make_method(original, method, rule, weights, [a.method for a in attached])
    module.__class__ = type(original.__name__, (original,), body)


def _make_method(original: type, method: str, rule: Rule | None, weights: list[str], attached: list[str]) -> Callable[..., Any]:
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        call = functools.partial(_materialized_call, self, original, method, weights)
        if rule is not None and weights:
            own = {k: v.get_raw_value() for k, v in vars(self).items() if isinstance(v, nnx.Param)}
            call = functools.partial(rule, self, own)
        for index in reversed([i for i, m in enumerate(attached) if m == method]):
            call = functools.partial(getattr(self, f"_attached_{index}").get_raw_value().around, call)
        return call(*args, **kwargs)

    return run


def _materialized_call(module: Any, original: type, method: str, weights: list[str], *args: Any, **kwargs: Any) -> Any:
    """The original method while the module's Weights are arrays."""
    held = {name: getattr(module, name).get_raw_value() for name in weights}
    try:
        for name, weight in held.items():
            getattr(module, name).set_raw_value(materialize(weight))
        return getattr(original, method)(module, *args, **kwargs)
    finally:
        for name, weight in held.items():
            getattr(module, name).set_raw_value(weight)


# Rules of Flax's own modules.


def _linear(module: nnx.Linear, params: Mapping[str, Any], inputs: jax.Array, **_: Any) -> jax.Array:
    return linear(inputs, params["kernel"], bias_of(params), dtype=module.dtype, precision=module.precision)


def _linear_general(module: nnx.LinearGeneral, params: Mapping[str, Any], inputs: jax.Array, **_: Any) -> jax.Array:
    if module.batch_axis:
        raise MissingRuleError("LinearGeneral with batch_axis has no rule; leave it out of the targets")
    features = len(module.out_features)
    return linear(
        inputs,
        params["kernel"],
        bias_of(params),
        axis=module.axis,
        features=features,
        dtype=module.dtype,
        precision=module.precision,
    )


def _einsum(module: nnx.Einsum, params: Mapping[str, Any], inputs: jax.Array, einsum_str: str | None = None, **_: Any):
    kernel, bias, equation = params["kernel"], bias_of(params), einsum_str or module.einsum_str
    return einsum_layer(equation, inputs, kernel, bias, dtype=module.dtype, precision=module.precision)


def _embed(module: nnx.Embed, params: Mapping[str, Any], inputs: jax.Array, **_: Any) -> jax.Array:
    return embed(inputs, params["embedding"], dtype=module.dtype)


def _attend(module: nnx.Embed, params: Mapping[str, Any], query: jax.Array, **_: Any) -> jax.Array:
    return attend(query, params["embedding"], dtype=module.dtype)


def _materialized(module: nnx.Module, params: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
    """Convolution kernels are small beside their activations, and norms act element by element."""
    weights = [name for name, w in params.items() if isinstance(w, Weight)]
    return _materialized_call(module, type(module).__mro__[1], "__call__", weights, *args, **kwargs)


for _class, _rule in {
    nnx.Conv: _materialized,
    nnx.ConvTranspose: _materialized,
    nnx.LayerNorm: _materialized,
    nnx.RMSNorm: _materialized,
    nnx.Linear: _linear,
    nnx.LinearGeneral: _linear_general,
    nnx.Einsum: _einsum,
    nnx.Embed: _embed,
}.items():
    register_rule(_class, _rule)
register_rule(nnx.Embed, _attend, method="attend")
