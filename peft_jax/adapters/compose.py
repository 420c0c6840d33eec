"""Compositions of adapters in one tree: one after another, their outputs averaged, fused by
attention, or weighed by a router.

AdapterFusion: Pfeiffer et al. 2021 (arXiv:2005.00247), section 3. The router: X-LoRA (Buehler and
Buehler 2024, arXiv:2402.07148), with a gate at each module from that module's own input. Adapters
of one shape whose rows differ are a bank (`peft_jax.core.bank`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from peft_jax.adapters.adapter import Adapter, affine
from peft_jax.adapters.bottleneck import Bottleneck
from peft_jax.core.adapters import replaced
from peft_jax.core.attachment import Attachment
from peft_jax.core.partition import freeze
from peft_jax.core.reparametrised import Reparametrised, node
from peft_jax.core.select import nearest
from peft_jax.core.tree import data_fields, is_node, map_places, places
from peft_jax.core.weight import Axes, matmul, static
from peft_jax.low_rank.algebra import plain_loras


@dataclasses.dataclass(frozen=True, kw_only=True)
class Composition(Attachment):
    """Several adapters beside one module, in `members`."""

    members: tuple[Any, ...]
    name: str = static(default="composed")
    frozen: bool = static(default=False)

    @property
    def lead(self) -> tuple[int, ...]:
        """Sizes of the leading axes."""
        return self.members[0].lead

    def outputs(self, x: jax.Array, y: jax.Array) -> list[jax.Array]:
        """What each adapter makes of the module's output y, given its input x."""
        return [m.gated(m.change(x, y), y).astype(y.dtype) for m in self.members]

    def combine(self, x: jax.Array, y: jax.Array) -> jax.Array:
        """The composition's output."""
        raise NotImplementedError

    def around(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        output = call(*args, **kwargs)
        if isinstance(output, tuple):
            return (self.combine(args[0], output[0]), *output[1:])
        return self.combine(args[0], output)


@node
class Stack(Composition):
    """One adapter after another: each works on what the one before it made."""

    def combine(self, x: jax.Array, y: jax.Array) -> jax.Array:
        for member in self.members:
            y = member.gated(member.change(x, y), y).astype(y.dtype)
        return y


@node
class Average(Composition):
    """The adapters' outputs, each times its entry of `weights` [*lead, n]."""

    weights: jax.Array

    def combine(self, x: jax.Array, y: jax.Array) -> jax.Array:
        return sum(
            w.astype(y.dtype) * out for w, out in zip(self.weights, self.outputs(x, y), strict=True)
        )  # type: ignore[return-value]


@node
class Fusion(Composition):
    """Attention over the adapters' outputs z_i, with what they got, h, as the query: softmax_i(h Q
    . z_i K) z_i V (equation 4).

    query and key [*lead, D, D] with biases [*lead, D], value [*lead, D, D]. As in AdapterHub z_i is
    an adapter's update and the residual h is added at the end.
    """

    trainable: ClassVar[tuple[str, ...]] = (
        "query",
        "query_bias",
        "key_weight",
        "key_bias",
        "value",
    )
    query: jax.Array
    query_bias: jax.Array
    key_weight: jax.Array
    key_bias: jax.Array
    value: jax.Array

    def weights(self, x: jax.Array, y: jax.Array) -> jax.Array:
        """The attention on each adapter [..., n], float32."""
        return self._attention(y, self._updates(x, y))

    def _updates(self, x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.stack([out - y for out in self.outputs(x, y)], axis=-2)  # [..., n, D]

    def _attention(self, y: jax.Array, updates: jax.Array) -> jax.Array:
        query, key = (
            affine(y, self.query, self.query_bias),
            affine(updates, self.key_weight, self.key_bias),
        )
        return jax.nn.softmax(
            jnp.einsum("...d,...nd->...n", query, key, preferred_element_type=jnp.float32), axis=-1
        )

    def combine(self, x: jax.Array, y: jax.Array) -> jax.Array:
        updates = self._updates(x, y)
        weights = self._attention(y, updates).astype(y.dtype)
        return y + jnp.einsum("...n,...nd->...d", weights, affine(updates, self.value, None))


@node
class Router(Reparametrised):
    """A base and several LoRAs (in `members`, without their base), weighed by softmax(x `routing`).

    routing [*lead, in, n], routing_bias [*lead, n]. The weights add up to n, so that even ones
    leave every adapter whole. They are a token's own, or with `by_sequence` the mean over a row's
    tokens.
    """

    trainable: ClassVar[tuple[str, ...]] = ("routing", "routing_bias")
    members: tuple[Any, ...]
    routing: jax.Array
    routing_bias: jax.Array
    by_sequence: bool = static(default=False)

    def weights(self, x: jax.Array) -> jax.Array:
        """The weight of each adapter [..., T or 1, n] for inputs x [..., T, in], float32."""
        weights = jax.nn.softmax(
            affine(x, self.routing, self.routing_bias).astype(jnp.float32), axis=-1
        )
        return weights.mean(-2, keepdims=True) if self.by_sequence else weights

    def matmul(
        self, x: jax.Array, *, in_axes: Axes, out_axes: Axes, precision: Any = None
    ) -> jax.Array:
        if (in_axes, out_axes) != (self.in_axes, self.out_axes):
            raise ValueError(
                "a routed mixture is not multiplied transposed; leave a tied embedding out of the "
                "adapters' targets"
            )
        y = matmul(x, self.base, in_axes=in_axes, out_axes=out_axes, precision=precision)
        flat = x.reshape(*x.shape[: x.ndim - len(in_axes)], -1)
        weights = self.weights(flat).astype(x.dtype) * len(self.members)
        update = sum(weights[..., i : i + 1] * m.update(flat) for i, m in enumerate(self.members))
        return y + jnp.reshape(update, y.shape)

    def adapt(self, w: jax.Array) -> jax.Array:
        raise ValueError(
            "a routed mixture of adapters depends on its input, so that no one weight stands for it"
        )


def _pick(
    params: Any, names: Sequence[str], make: Callable[[str, dict[str, Any]], Any], kind: str
) -> Any:
    """The tree with the adapters `names` beside each module replaced by what `make` makes of them,
    under `<kind>_<names>`.
    """
    found: set[str] = set()

    def walk(tree: Any, path: str) -> Any:
        if not isinstance(tree, Mapping):
            return tree
        mine = {k: x for k, x in tree.items() if isinstance(x, Adapter) and x.name in names}
        by_kind: dict[str, dict[str, Any]] = {}
        for k, x in mine.items():
            by_kind.setdefault(k.removesuffix(f"_{x.name}"), {})[x.name] = x
        rest = {k: walk(x, f"{path}/{k}".strip("/")) for k, x in tree.items() if k not in mine}
        for what, members in by_kind.items():
            found.update(members)
            rest[f"{what}_{kind}"] = make(path, members)
        return rest

    result = walk(params, "")
    if missing := [n for n in names if n not in found]:
        raise ValueError(
            "the tree holds no adapter beside modules named "
            f"{missing[0]!r}.{nearest(missing[0], _names(params))}"
        )
    return result


def _names(params: Any) -> list[str]:
    return sorted({x.name for x in places(params).values() if isinstance(x, Adapter)})


def stack_adapters(params: Any, names: Sequence[str], *, into: str = "stacked") -> Any:
    """The adapters `names` beside each module one after another in this order, as one called
    `into`.

    Raises ValueError for a name that the tree lacks.
    """
    order = list(names)
    return _pick(
        params,
        order,
        lambda _, m: Stack(members=tuple(m[n] for n in order if n in m), name=into),
        into,
    )


def average_adapters(
    params: Any,
    weights: Mapping[str, float],
    *,
    of: Literal["outputs", "weights"] = "outputs",
    into: str = "averaged",
) -> Any:
    """The adapters that `weights` names combined with these weights: what they put out, or their
    own arrays, into one.

    Raises ValueError for a name that the tree lacks, a module that some of them leave out, and (of
    weights) differing shapes or layers.
    """
    names = list(weights)
    if of not in ("outputs", "weights"):
        raise ValueError(f"an average is of outputs or of weights, not {of!r}")

    def make(path: str, members: dict[str, Any]) -> Any:
        _check_all(path, members, names)
        factors = jnp.asarray([weights[n] for n in names], jnp.float32)
        if of == "outputs":
            lead = members[names[0]].lead
            return Average(
                members=tuple(members[n] for n in names),
                weights=jnp.broadcast_to(factors, (*lead, len(names))),
                name=into,
            )
        return _mean(path, [members[n].replace(name=into) for n in names], factors)

    return _pick(params, names, make, into)


def _mean(path: str, members: Sequence[Any], factors: jax.Array) -> Any:
    """One adapter whose trained arrays are the members', each times its factor; the others must be
    the same in all of them.
    """
    first = members[0]
    fixed = [f for f in data_fields(first) if f not in first.trainable]
    bare = [m.replace(**dict.fromkeys(fixed)) if type(m) is type(first) else m for m in members]
    forms = {str((jax.tree.structure(m), [a.shape for a in jax.tree.leaves(m)])) for m in bare}
    if len(forms) > 1:
        raise ValueError(
            f"the adapters at {path} differ in kind, options or shapes, so that their weights have "
            "no average"
        )
    if any(not _same(getattr(first, f), getattr(m, f)) for f in fixed for m in members[1:]):
        raise ValueError(
            f"the adapters at {path} adapt different layers, so that their weights have no "
            "average; average their outputs"
        )

    def mean(*a):
        return sum(w * x for w, x in zip(factors, a, strict=True))

    return jax.tree.map(mean, *bare).replace(**{f: getattr(first, f) for f in fixed})


def _same(a: Any, b: Any) -> bool:
    """Whether two parts of nodes hold the same numbers."""
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        map(np.array_equal, jax.tree.leaves(a), jax.tree.leaves(b))
    )


def fuse_adapters(params: Any, key: jax.Array, names: Sequence[str], *, into: str = "fused") -> Any:
    """The adapters `names` frozen, and an AdapterFusion over them that trains, called `into`.

    It starts as their mean: value is the identity, query and key are N(0, 0.02^2). Raises
    ValueError for fewer than two names, one that the tree lacks, and a module that some of them
    leave out.
    """
    names, keys = list(names), iter(jax.random.split(key, 4096))
    if len(names) < 2:
        raise ValueError(f"a fusion is of two adapters at least, got {names}")

    def make(path: str, members: dict[str, Any]) -> Fusion:
        _check_all(path, members, names)
        first = members[names[0]]
        lead, D = first.lead, _features(path, first)

        def normal():
            return 0.02 * jax.random.normal(next(keys), (*lead, D, D))

        zeros = jnp.zeros((*lead, D))
        held = tuple(freeze({"a": members[n]})["a"] for n in names)
        value = jnp.broadcast_to(jnp.eye(D), (*lead, D, D))
        return Fusion(
            members=held,
            query=normal(),
            query_bias=zeros,
            key_weight=normal(),
            key_bias=zeros,
            value=value,
            name=into,
        )

    return _pick(params, names, make, into)


def _features(path: str, adapter: Any) -> int:
    if not isinstance(adapter, Bottleneck):
        raise ValueError(
            f"a fusion is of bottleneck adapters, and {path} has a {type(adapter).__name__}"
        )
    up: Any = adapter.up
    return (
        up.shape[-1] if not isinstance(up, dict) else up["right"].shape[-1] * up["right"].shape[-3]
    )


def _check_all(path: str, members: Mapping[str, Any], names: Sequence[str]) -> None:
    if missing := [n for n in names if n not in members]:
        raise ValueError(f"{path} has no adapter {missing[0]!r}, while it has {', '.join(members)}")


def route_adapters(
    params: Any,
    key: jax.Array,
    names: Sequence[str],
    *,
    by: Literal["token", "sequence"] = "token",
    into: str = "routed",
) -> Any:
    """The LoRAs `names` frozen, and a router at each place that weighs them by its input, called
    `into`.

    The router starts even. By sequence all tokens of a row have its mean weights, later tokens
    included: for encoders, not for generation. Raises ValueError for fewer than two names, one that
    a place lacks, and an adapter that is no LoRA (convert it with `to_lora`).
    """
    names, keys, found = list(names), iter(jax.random.split(key, 4096)), []
    if len(names) < 2:
        raise ValueError(f"a router weighs two adapters at least, got {names}")
    if by not in ("token", "sequence"):
        raise ValueError(f"a router weighs by token or by sequence, not {by!r}")

    def route(path: str, w: Any) -> Any:
        members: dict[str, Any] = {n.name: n for n in plain_loras(path, w, names)}
        if not members:
            return w
        _check_all(path, members, names)
        found.append(path)
        first = members[names[0]]
        lead, n_in = first.lead, first.a.shape[-2]
        held = tuple(freeze({"a": members[n].plain().replace(base=None)})["a"] for n in names)
        if any(m.gate is not None for m in held):
            raise ValueError(
                f"{path} has an adapter that leaves out some of the layers stacked there; "
                "unstack_layers first"
            )
        routing = 0.02 * jax.random.normal(next(keys), (*lead, n_in, len(names)))
        bias = jnp.zeros((*lead, len(names)))
        where = {"in_axes": first.in_axes, "out_axes": first.out_axes, "name": into}
        router = Router(
            base=None,
            **where,
            members=held,
            routing=routing,
            routing_bias=bias,
            by_sequence=by == "sequence",
        )
        return replaced(w, names, lambda base: router.replace(base=base))

    result = map_places(lambda p, w: route(p, w) if is_node(w) else w, params)
    if not found:
        raise ValueError(f"the tree holds no LoRAs named {', '.join(names)}")
    return result
