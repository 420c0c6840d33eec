"""Binding for Flax Linen: one interceptor that looks at the called module's own part of the
tree.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import flax.linen as nn
import jax

from peft_jax.core.attachment import Attachment
from peft_jax.core.bind.rules import (
    Rule,
    attend,
    bias_of,
    by_row,
    einsum_layer,
    embed,
    find_rule,
    is_routed,
    linear,
    output_embedding,
    rows_of,
    say_fallback,
)
from peft_jax.core.capture import CAPTURED, RECORDER, Recorder
from peft_jax.core.mesh import rows_in, split_outputs
from peft_jax.core.prepare import prepare
from peft_jax.core.select import OUTPUT_EMBEDDING
from peft_jax.core.sharding import gathered
from peft_jax.core.weight import Weight, materialize

RULES: dict[tuple[type, str], Rule] = {}
_OWN_METHODS = {"param", "variable", "make_rng", "has_rng", "sow", "perturb"}


def register_rule(module_class: type[nn.Module], rule: Rule, *, method: str = "__call__") -> None:
    """How `module_class.method` uses its parameters when some of them are Weights.

    `rule(module, params, *args, **kwargs)` returns what the method would; `params` maps the names
    of the module's own parameters to arrays or Weights. Subclasses inherit the rule unless they
    override the method.
    """
    RULES[module_class, method] = rule


@dataclasses.dataclass(frozen=True, eq=False)
class LinenRun:
    """How a Linen model is run, see `peft_jax.bind`. Those of equal models are equal."""

    model: nn.Module
    strict: bool
    said: set[str]  # of weights without a rule

    def __call__(
        self,
        state: None,
        params: Any,
        *args: Any,
        rng: jax.Array | None = None,
        method: str | None = None,
        adapter_ids: Any = None,
        variables: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        variables = {**(variables or {}), "params": prepare(params, rng, adapter_ids)}
        call = functools.partial(
            self.model.apply, variables, *args, rngs={} if rng is None else {"dropout": rng}
        )
        recorder = RECORDER.get()
        intercept = functools.partial(_intercept, self.strict, self.said, rows_in(args))
        with nn.intercept_methods(intercept):
            if recorder is None:
                return call(method=method, **kwargs)
            own = kwargs.pop("mutable", [])
            out, changed = call(method=method, mutable=[*own, CAPTURED], **kwargs)
        changed = dict(changed)
        _collect(recorder, changed.pop(CAPTURED, {}), "")
        return (out, changed) if own else out

    @functools.cached_property
    def key(self) -> Hashable:
        """The model where it is hashable, else what no other run has."""
        try:
            hash(self.model)
        except TypeError:
            return id(self)
        return self.model

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LinenRun) and self.strict == other.strict and self.key == other.key

    @functools.cached_property
    def _hash(self) -> int:
        return hash((self.key, self.strict))

    def __hash__(self) -> int:
        return self._hash


def _intercept(
    strict: bool,
    said: set[str],
    rows: int | None,
    call: Callable[..., Any],
    args: Any,
    kwargs: Any,
    context: Any,
) -> Any:
    module, method = context.module, context.method_name
    if module.scope is None or method in _OWN_METHODS or _is_super(context):
        return call(*args, **kwargs)
    own: Mapping[str, Any] = module.scope.variables().get("params", {})
    if method == "setup":
        return _setup(module, own, call)
    run = call
    if OUTPUT_EMBEDDING in own or any(isinstance(w, Weight) for w in own.values()):
        rule = find_rule(RULES, type(module), method)
        if rule is None:
            names = [k for k, w in own.items() if isinstance(w, Weight) or k == OUTPUT_EMBEDDING]
            say_fallback(strict, said, "/".join(module.path), type(module), method, names)
        run = (
            functools.partial(_materialized_call, module, method)
            if rule is None
            else functools.partial(_by_rule, rule, module, own)
        )
    for name in sorted(own, reverse=True):
        if isinstance(own[name], Attachment) and own[name].method == method:
            own[name].check(module)
            run = functools.partial(own[name].around, run)
    out = split_outputs(run(*args, **kwargs), rows)
    if method == "__call__" and (recorder := RECORDER.get()) is not None:
        for name, value in recorder.of("/".join(module.path), args, out).items():
            module.sow(CAPTURED, name, value, init_fn=lambda: None, reduce_fn=lambda _, new: new)
    return out


def _by_rule(
    rule: Rule, module: nn.Module, own: Mapping[str, Any], *args: Any, **kwargs: Any
) -> Any:
    """What a rule returns, with the module's parameters gathered for its inputs."""
    own = gathered("/".join(module.path), own, args[0] if args else 0)
    return rule(module, own, *args, **kwargs)


def _is_super(context: Any) -> bool:
    """Whether this is the call of a base class's version of a method that the module's class
    overrides.

    It is part of a call that is intercepted already.
    """
    name, called = context.method_name, inspect.unwrap(context.orig_method.func)
    versions = [
        inspect.unwrap(vars(c)[name]) for c in type(context.module).__mro__ if name in vars(c)
    ]
    return called in versions and called is not versions[0]


def _collect(recorder: Recorder, tree: Mapping[str, Any], path: str) -> None:
    """Hand what modules sowed to the recorder, with the numbers of their layers."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            _collect(recorder, value, f"{path}/{name}" if path else name)
        else:
            recorder.put(name, path, value)


def _setup(module: nn.Module, own: Mapping[str, Any], call: Callable[[], Any]) -> Any:
    """A module's `setup` with its packed Weights as arrays: Flax compares a declared parameter's
    shape with what is there.

    The module's methods go by their rules all the same; an array that nothing uses costs nothing
    once compiled.
    """
    declare = module.param

    def param(name: str, *args: Any, **kwargs: Any) -> Any:
        w = own.get(name)
        packed = (
            isinstance(w, Weight) and jax.tree.leaves(w)[0].shape != w.shape
        )  # Flax looks at the first array
        return materialize(w) if packed else declare(name, *args, **kwargs)

    object.__setattr__(module, "param", param)
    try:
        return call()
    finally:
        object.__delattr__(module, "param")


def _materialized_call(module: nn.Module, method: str, *args: Any, **kwargs: Any) -> Any:
    """The module's own method on a view of its parameters in which its own Weights are arrays (and
    nothing attached).
    """
    mine: Mapping[str, Any] = module.scope.variables().get("params", {})  # type: ignore[union-attr]
    if any(map(is_routed, mine.values())):
        return _call_by_row(module, method, mine, *args, **kwargs)

    def arrays(variables: Any) -> Any:
        own = {k: w for k, w in variables["params"].items() if not isinstance(w, Attachment)}
        if method == "attend":
            own["embedding"] = output_embedding(own)
        return {
            **variables,
            "params": {k: materialize(w) if isinstance(w, Weight) else w for k, w in own.items()},
        }

    run = nn.map_variables(
        lambda m, *a, **k: getattr(m, method)(*a, **k), "params", trans_in_fn=arrays, mutable=False
    )
    return run(module, *args, **kwargs)


def _call_by_row(
    module: nn.Module, method: str, own: Mapping[str, Any], *args: Any, **kwargs: Any
) -> Any:
    """The module's own method for each row of the batch with the row's arrays out of a bank."""
    if any(isinstance(w, Mapping) for w in own.values()):
        where = "/".join(module.path)
        raise ValueError(
            f"{where} has modules in it and no rule, so that a bank cannot stand there; register "
            "one for it"
        )
    rows = next(w for w in own.values() if is_routed(w)).ids.shape[0]
    arrays = {k: rows_of(w, rows) for k, w in own.items() if not isinstance(w, Attachment)}
    alone = module.clone(parent=None)
    return by_row(
        lambda a, *rest: alone.apply({"params": a}, *rest, method=method, **kwargs), arrays, args
    )


# Rules of Flax's own modules.


def _default_dot(module: Any) -> bool:
    return (
        getattr(module, "dot_general", None) is None
        and getattr(module, "dot_general_cls", None) is None
    )


def _dense(module: nn.Dense, params: Mapping[str, Any], inputs: jax.Array) -> jax.Array:
    if not _default_dot(module):
        return _materialized_call(module, "__call__", inputs)
    return linear(
        inputs, params["kernel"], bias_of(params), dtype=module.dtype, precision=module.precision
    )


def _dense_general(
    module: nn.DenseGeneral, params: Mapping[str, Any], inputs: jax.Array
) -> jax.Array:
    batch = module.batch_dims if isinstance(module.batch_dims, tuple) else (module.batch_dims,)
    if batch or not _default_dot(module):
        return _materialized_call(module, "__call__", inputs)
    axis = module.axis if isinstance(module.axis, tuple) else (module.axis,)
    features = module.features if isinstance(module.features, tuple) else (module.features,)
    return linear(
        inputs,
        params["kernel"],
        bias_of(params),
        axis=axis,
        features=len(features),
        dtype=module.dtype,
        precision=module.precision,
    )


def _einsum(
    module: nn.Einsum, params: Mapping[str, Any], inputs: jax.Array, einsum_str: str | None = None
) -> jax.Array:
    equation = nn.merge_param("einsum_str", module.einsum_str, einsum_str)
    kernel, bias = params["kernel"], bias_of(params)
    return einsum_layer(
        equation, inputs, kernel, bias, dtype=module.dtype, precision=module.precision
    )


def _embed(module: nn.Embed, params: Mapping[str, Any], inputs: jax.Array) -> jax.Array:
    return embed(inputs, params["embedding"], dtype=module.dtype)


def _attend(module: nn.Embed, params: Mapping[str, Any], query: jax.Array) -> jax.Array:
    return attend(query, output_embedding(params), dtype=module.dtype)


def _conv(module: nn.Conv, params: Mapping[str, Any], inputs: jax.Array) -> jax.Array:
    """A convolution kernel is small beside its activations, so it is materialised."""
    return _materialized_call(module, "__call__", inputs)


def _norm(module: nn.Module, params: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
    """Scales and biases act element by element: nothing is cheaper than the array."""
    return _materialized_call(module, "__call__", *args, **kwargs)


for _class, _rule in {
    nn.Dense: _dense,
    nn.DenseGeneral: _dense_general,
    nn.Einsum: _einsum,
    nn.Embed: _embed,
    nn.Conv: _conv,
    nn.ConvTranspose: _conv,
    nn.LayerNorm: _norm,
    nn.RMSNorm: _norm,
}.items():
    register_rule(_class, _rule)
register_rule(nn.Embed, _attend, method="attend")
