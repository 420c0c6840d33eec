"""Binding for Flax NNX: the model is split and merged, and modules whose parameters are Weights
change their class.

The merged model exists only while tracing, so giving one of its modules a subclass with another
`__call__` touches nothing of the user's. The subclass is an NNX module like any other, so
`nnx.scan`, `nnx.vmap` and `nnx.remat` carry it.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx

from peft_jax.core.attachment import Attachment, key_of, module_at
from peft_jax.core.bind.rules import (
    MissingRuleError,
    Rule,
    attend,
    bias_of,
    by_row,
    einsum_layer,
    embed,
    find_rule,
    is_routed,
    linear,
    rows_of,
    say_fallback,
)
from peft_jax.core.capture import RECORDER, Recorder
from peft_jax.core.mesh import row_axes, rows_in, split_outputs
from peft_jax.core.prepare import prepare
from peft_jax.core.sharding import gathered
from peft_jax.core.tree import is_node, places
from peft_jax.core.weight import Weight, materialize

RULES: dict[tuple[type, str], Rule] = {}
Names = tuple[str, ...]  # a path within a module
_MADE = "_made_by_binding"  # what the subclasses have that binding makes
_CONTAINERS = (nnx.List, nnx.Dict)  # modules for the graph, which are never called


def register_rule(module_class: type[nnx.Module], rule: Rule, *, method: str = "__call__") -> None:
    """As `peft_jax.core.bind.linen.register_rule`, for an NNX module."""
    RULES[module_class, method] = rule


def nnx_params(model: nnx.Module) -> Any:
    """The parameters of an NNX model as a plain tree of dicts; a list of modules has numbers for
    keys.
    """
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


Templates = tuple[tuple[tuple[Any, ...], nnx.Variable], ...]


def split(model: nnx.Module, strict: bool, said: set[str]) -> tuple[NNXRun, nnx.State]:
    """(how the model is run, what it holds beside its parameters), as it is now."""
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    templates = tuple((path, v.replace(None)) for path, v in nnx.to_flat_state(params))
    return NNXRun(graph, templates, strict, said), rest


@dataclasses.dataclass(frozen=True, eq=False)
class NNXRun:
    """How an NNX model is run, see `peft_jax.bind`: its graph, and its parameters without their
    values. Those of equal graphs are equal.
    """

    graph: nnx.GraphDef[nnx.Module]
    templates: Templates
    strict: bool
    said: set[str]  # of weights without a rule

    def __call__(
        self,
        state: nnx.State,
        params: Any,
        *args: Any,
        rng: jax.Array | None = None,
        method: str | None = None,
        adapter_ids: Any = None,
        variables: Any = None,
        mutable: Any = False,
        **kwargs: Any,
    ) -> Any:
        params = nnx.to_pure_dict(params) if isinstance(params, nnx.State) else params
        params = prepare(params, rng, adapter_ids)
        others = _reseeded(state if variables is None else nnx.merge_state(state, variables), rng)
        merged = nnx.merge(self.graph, _filled(self.templates, params), others, copy=True)
        _place(merged, params, self.strict, self.said)
        _split_rows(merged, rows_in(args))
        out = getattr(merged, method or "__call__")(*args, **kwargs)
        return (out, nnx.state(merged, nnx.All(nnx.Not(nnx.Param), mutable))) if mutable else out

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, NNXRun) or self.strict != other.strict:
            return False
        return self.graph is other.graph or self.graph == other.graph

    def __hash__(self) -> int:  # a graph may hold lists, which have no hash
        return hash((len(self.graph.nodes), self.graph.num_leaves, self.strict))


def _filled(templates: Templates, params: Any) -> nnx.State:
    """The state of the model's parameters with the values that `params` has. Raises ValueError for
    one that it lacks.
    """
    filled = []
    for path, variable in templates:
        *module, name = map(str, path)
        own = module_at(params, "/".join(module))
        if not isinstance(own, Mapping) or (key := key_of(own, name)) not in own:
            raise ValueError(f"the tree has no {'/'.join(map(str, path))}, which the model has")
        filled.append((path, variable.replace(own[key])))
    return nnx.from_flat_state(filled)


def _reseeded(rest: nnx.State, rng: jax.Array | None) -> nnx.State:
    """The state of a model beside its parameters with the keys of its random streams drawn anew
    from `rng`.
    """
    if rng is None:
        return rest
    drawn = []
    for i, (path, variable) in enumerate(nnx.to_flat_state(rest)):
        if isinstance(variable, nnx.RngKey):
            key, shape = jax.random.fold_in(rng, i), variable.get_raw_value().shape
            variable = variable.replace(jax.random.split(key, shape) if shape else key)
        drawn.append((path, variable))
    return nnx.from_flat_state(drawn)


def _place(merged: nnx.Module, params: Any, strict: bool, said: set[str]) -> None:
    """Substitute the modules of a merged model that have nodes of their own, or are recorded.

    Raises ValueError for an attachment where no module is called.
    """
    recorder = RECORDER.get()
    modules = {
        "/".join(map(str, path)): m
        for path, m in nnx.iter_modules(merged)
        if not isinstance(m, _CONTAINERS)
    }
    weights: dict[str, list[Names]] = {}
    attached: dict[str, dict[str, Attachment]] = {}
    for place, x in places(params).items():
        owner, _, name = place.rpartition("/")
        if isinstance(x, Weight):
            owner = _owner(owner, modules)
            weights.setdefault(owner, []).append(
                tuple(place.removeprefix(owner).strip("/").split("/"))
            )
        elif isinstance(x, Attachment) and x.method:
            if not hasattr(modules.get(owner), x.method):
                raise ValueError(
                    f"{place} stands beside no module that has {x.method}; name modules that "
                    "are called"
                )
            attached.setdefault(owner, {})[name] = x
    for path, module in modules.items():
        beside = attached.get(path, {})
        if path in weights or beside:
            _substitute(
                module,
                weights.get(path, []),
                [beside[k] for k in sorted(beside)],
                path,
                strict,
                said,
            )
        if recorder is not None and recorder.wants(path):
            _record(module, path, recorder)


def _owner(path: str, modules: Mapping[str, nnx.Module]) -> str:
    """The module that a parameter below `path` is of: lists and dicts of parameters are a module's
    own.
    """
    while path not in modules:
        path = path.rpartition("/")[0]
    return path


def _split_rows(merged: nnx.Module, rows: int | None) -> None:
    """On a mesh, give the modules of a merged model subclasses whose outputs' rows are split."""
    if rows is None or not row_axes(rows):
        return
    for _, module in nnx.iter_modules(merged):
        if callable(module) and not isinstance(module, _CONTAINERS):
            _split_outputs(module, rows)


def _split_outputs(module: Any, rows: int) -> None:
    original = type(module)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return split_outputs(original.__call__(self, *args, **kwargs), rows)

    _become(module, {"__call__": call})


def _become(module: Any, body: Mapping[str, Any]) -> None:
    """Give `module` a subclass of its class with these methods."""
    original = type(module)
    module.__class__ = type(original.__name__, (original,), {**body, _MADE: True})


def _own_class(module: Any) -> type:
    """The class that a module had before it was given others."""
    return next(c for c in type(module).__mro__ if _MADE not in vars(c))


def _record(module: nnx.Module, path: str, recorder: Recorder) -> None:
    """Give `module` a subclass whose calls are recorded."""
    original = type(module)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = original.__call__(self, *args, **kwargs)  # type: ignore[operator]
        for name, value in recorder.of(path, args, out).items():
            recorder.put(name, path, value)
        return out

    _become(module, {"__call__": call})


def _substitute(
    module: nnx.Module,
    weights: list[Names],
    attached: list[Attachment],
    where: str,
    strict: bool,
    said: set[str],
) -> None:
    """Give `module` a subclass whose methods use the rules, materialise what has none, and run
    attachments.
    """
    original = type(module)
    for index, attachment in enumerate(
        attached
    ):  # they travel as the module's state, so that nnx.scan slices them
        attachment.check(module)
        setattr(module, f"_attached_{index}", nnx.Param(attachment))
    body: dict[str, Any] = {}
    for method in _methods(original) if weights else {a.method for a in attached}:
        rule = find_rule(RULES, original, method)
        if weights and rule is None and method == "__call__":
            say_fallback(
                strict, said, where, original, method, ["/".join(names) for names in weights]
            )
        beside = [a.method for a in attached]
        body[method] = _make_method(original, method, rule, weights, beside, where)
    _become(module, body)


def _methods(module_class: type) -> set[str]:
    """The names of what may be called on a module of this class and reads its parameters."""
    own = [c for c in module_class.__mro__ if issubclass(c, nnx.Module) and c is not nnx.Module]
    functions = {n for c in own for n, f in vars(c).items() if inspect.isfunction(f)}
    return {n for n in functions if n == "__call__" or not n.startswith("__")}


def _make_method(
    original: type,
    method: str,
    rule: Rule | None,
    weights: list[Names],
    attached: list[str],
    where: str,
) -> Callable[..., Any]:
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        call = functools.partial(_materialized_call, self, original, method, weights)
        if rule is not None and weights:
            own = {k: v.get_raw_value() for k, v in vars(self).items() if isinstance(v, nnx.Param)}
            own = gathered(where, own, args[0] if args else 0)
            call = functools.partial(rule, self, own)
        for index in reversed([i for i, m in enumerate(attached) if m == method]):
            call = functools.partial(
                getattr(self, f"_attached_{index}").get_raw_value().around, call
            )
        return call(*args, **kwargs)

    return run


def _variable(module: Any, names: Names) -> Any:
    """The parameter of a module that a path within it leads to, or into whose value."""
    for name in names:
        if isinstance(module, nnx.Variable):
            break
        module = module[int(name)] if isinstance(module, nnx.List) else getattr(module, name)
    return module


def _materialized_call(
    module: Any, original: type, method: str, weights: list[Names], *args: Any, **kwargs: Any
) -> Any:
    """The original method while the module's Weights are arrays."""
    held = [(v, v.get_raw_value()) for v in (_variable(module, names) for names in weights)]

    def run(arrays: Any, *args: Any) -> Any:
        for (variable, _), array in zip(held, arrays, strict=True):
            variable.set_raw_value(array)
        return getattr(original, method)(module, *args, **kwargs)

    try:
        if bank := next((value for _, value in held if is_routed(value)), None):
            return by_row(run, [rows_of(value, bank.ids.shape[0]) for _, value in held], args)
        return run([jax.tree.map(materialize, value, is_leaf=is_node) for _, value in held], *args)
    finally:
        for variable, value in held:
            variable.set_raw_value(value)


# Rules of Flax's own modules.


def _linear(
    module: nnx.Linear, params: Mapping[str, Any], inputs: jax.Array, **_: Any
) -> jax.Array:
    return linear(
        inputs, params["kernel"], bias_of(params), dtype=module.dtype, precision=module.precision
    )


def _linear_general(
    module: nnx.LinearGeneral, params: Mapping[str, Any], inputs: jax.Array, **_: Any
) -> jax.Array:
    if module.batch_axis:
        raise MissingRuleError(
            "LinearGeneral with batch_axis has no rule; leave it out of the targets"
        )
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


def _einsum(
    module: nnx.Einsum,
    params: Mapping[str, Any],
    inputs: jax.Array,
    einsum_str: str | None = None,
    **_: Any,
):
    kernel, bias, equation = params["kernel"], bias_of(params), einsum_str or module.einsum_str
    return einsum_layer(
        equation, inputs, kernel, bias, dtype=module.dtype, precision=module.precision
    )


def _embed(module: nnx.Embed, params: Mapping[str, Any], inputs: jax.Array, **_: Any) -> jax.Array:
    return embed(inputs, params["embedding"], dtype=module.dtype)


def _attend(module: nnx.Embed, params: Mapping[str, Any], query: jax.Array, **_: Any) -> jax.Array:
    return attend(query, params["embedding"], dtype=module.dtype)


def _materialized(module: nnx.Module, params: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
    """Convolution kernels are small beside their activations, and norms act element by element."""
    weights = [(name,) for name, w in params.items() if isinstance(w, Weight)]
    return _materialized_call(module, _own_class(module), "__call__", weights, *args, **kwargs)


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
