"""Banks: many adapters of one shape in a tree, each row of a batch using its own (Sheng et al.
2023, S-LoRA, arXiv:2311.03285).

One compiled program serves all: which adapter a row uses is an array (`bind(model)(params, tokens,
adapter_ids=ids)`), and so are the adapters, so putting one in, or in another's place, compiles
nothing. An id of -1 is the base alone. Weights (LoRA, IA3, ...) and attachments (bottleneck
adapters, prefixes, prompts, ...) are banked alike.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from peft_jax.core.adapters import stack_of
from peft_jax.core.attachment import Attachment
from peft_jax.core.reparametrised import Product, Reparametrised, node
from peft_jax.core.select import nearest
from peft_jax.core.tree import map_places, places
from peft_jax.core.weight import Axes, Weight, materialize, matmul, take

_FREE = (
    "name",
    "frozen",
    "dropout",
    "rslora",
)  # static fields in which a bank's adapters may differ


def _chosen(adapters: Any, ids: jax.Array) -> Any:
    """One adapter for each row: arrays [n, ...] -> [B, ...]."""
    return jax.tree.map(lambda a: a[jnp.maximum(ids, 0)], adapters)


def _needed(ids: jax.Array | None) -> jax.Array:
    if ids is None:
        raise ValueError(
            "a bank of adapters needs apply(params, tokens, adapter_ids=ids), one id for each row"
        )
    return ids


def _on(active: jax.Array, ids: jax.Array) -> jax.Array:
    """[B], 1 where a row's adapter is there."""
    return jnp.where(ids >= 0, active[jnp.maximum(ids, 0)], 0.0)


@node
class WeightBank(Reparametrised):
    """`adapters` is a reparametrised weight without its base, each array [*lead, n, ...]; active
    [*lead, n] is 1 where there is an adapter. `ids` [*lead, B] is filled by `bind`, as is `key`, of
    which each row's dropout gets its own.
    """

    trainable: ClassVar[tuple[str, ...]] = ("adapters",)
    routed: ClassVar[bool] = True
    adapters: Any
    active: jax.Array
    ids: jax.Array | None = None

    def field_specs(self, spec: P) -> dict[str, P]:
        return {"base": spec}

    def _by_row(
        self, run: Callable[[Any, jax.Array], jax.Array], x: jax.Array, plain: jax.Array
    ) -> jax.Array:
        """`run(the row's weight, the row)` for x [..., n], whose rows of the batch are runs,
        `plain` where a row has no adapter.
        """
        ids = _needed(self.ids)
        B = ids.shape[0]
        rows = (
            x.reshape(B, -1, *x.shape[-1:])
            if jnp.issubdtype(x.dtype, jnp.floating)
            else x.reshape(B, -1)
        )

        def one(adapter, row, key):
            return run(adapter.replace(base=self.base, key=key), row)

        keys = None if self.key is None else jax.random.split(self.key, B)
        y = jax.vmap(one)(_chosen(self.adapters, ids), rows, keys).reshape(plain.shape)
        on = _on(self.active, ids)
        flat = plain.reshape(B, -1)
        return (
            jnp.where(on[:, None] > 0, y.reshape(B, -1), flat)
            .reshape(plain.shape)
            .astype(plain.dtype)
        )

    def product(self, x: jax.Array, base: Product) -> jax.Array:
        return self._by_row(lambda w, row: w.product(row, base), x, base(x))

    def transposed(
        self, x: jax.Array, *, in_axes: Axes, out_axes: Axes, precision: Any = None
    ) -> jax.Array:
        how: Any = {"in_axes": in_axes, "out_axes": out_axes, "precision": precision}
        return self._by_row(lambda w, row: w.transposed(row, **how), x, matmul(x, self.base, **how))

    def take(self, ids: jax.Array, dtype: Any = None) -> jax.Array:
        return self._by_row(lambda w, row: w.take(row, dtype), ids, take(self.base, ids, dtype))

    def rows(self) -> jax.Array:
        """Each row's array, [B, ...], without leading axes."""
        ids = _needed(self.ids)
        arrays = jax.vmap(lambda adapter: adapter.replace(base=self.base).materialize())(
            _chosen(self.adapters, ids)
        )
        return self._where_on(arrays, materialize(self.base))

    def bias(self, bias: jax.Array) -> jax.Array:
        """The bias [*out] or each row's [B, *out]; each row's where the adapters change it."""
        by_row = bias.ndim > len(self.out_axes)
        under = self.base.bias if isinstance(self.base, Weight) else lambda b: b
        plain = jax.vmap(under)(bias) if by_row else under(bias)
        if not self.adapters.changes_output:
            return plain
        ids = _needed(self.ids)
        each, plain = (
            b if by_row else jnp.broadcast_to(b, (len(ids), *b.shape)) for b in (bias, plain)
        )
        changed = jax.vmap(lambda adapter, b: adapter.replace(base=self.base).bias(b))(
            _chosen(self.adapters, ids), each
        )
        return self._where_on(changed, plain)

    def _where_on(self, changed: jax.Array, plain: jax.Array) -> jax.Array:
        on = _on(self.active, _needed(self.ids))
        return jnp.where(on.reshape(-1, *[1] * (changed.ndim - 1)) > 0, changed, plain)

    def adapt(self, w: jax.Array) -> jax.Array:
        raise ValueError(
            "a bank of adapters is no one weight; take an adapter out with bank_adapter "
            "before merging"
        )


@node
class AttachmentBank(Attachment):
    """`adapters` is an attachment, each array [*lead, n, ...]; active [*lead, n]. `bind` fills
    `ids` [*lead, B] and `key`.
    """

    trainable: ClassVar[tuple[str, ...]] = ("adapters",)
    stochastic: ClassVar[bool] = True
    routed: ClassVar[bool] = True
    adapters: Any
    active: jax.Array
    ids: jax.Array | None = None
    key: jax.Array | None = None
    frozen: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def method(self) -> str:  # type: ignore[override]
        return self.adapters.method

    @property
    def slots(self) -> int:  # type: ignore[override]
        return self.adapters.slots

    @property
    def name(self) -> str:
        """The name of the adapters."""
        return self.adapters.name

    @property
    def lead(self) -> tuple[int, ...]:
        """Sizes of the leading axes."""
        return self.active.shape[:-1]

    def moves(self, path: str) -> int:
        return self.adapters.moves(path)

    def linked(self, params: Any, path: str) -> Any:
        def link(adapter: Any) -> Any:
            return adapter.linked(params, path)

        at = len(self.lead)
        if not jax.tree.leaves(self.adapters):
            return self
        return self.replace(adapters=jax.vmap(link, in_axes=at, out_axes=at)(self.adapters))

    def around(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        ids = _needed(self.ids)
        drops = {"key": self.key} if hasattr(self.adapters, "key") else {}
        return (
            _chosen(self.adapters, ids)
            .replace(gate=_on(self.active, ids), **drops)
            .around(call, *args, **kwargs)
        )

    def drawn(self, rng: jax.Array) -> Any:
        gate = getattr(self.adapters.drawn(rng), "gate", None)
        return self if gate is None else self.replace(active=self.active * gate)


def bank(params: Any, size: int, *, adapter: str = "default") -> Any:
    """`params` with room for `size` adapters wherever the tree has the adapter of that name, each a
    copy of it at first.

    A bank can be trained as it is, every row teaching its own adapter. Raises ValueError for a size
    below 1, a name that the tree lacks, and adapters that share arrays over the tree, which a bank
    cannot hold.
    """
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}")
    found = []

    def banked(path: str, x: Any) -> Any:
        _only_one(path, x, adapter)
        if isinstance(x, Reparametrised) and x.name != adapter:
            return x.replace(base=banked(path, x.base))
        if getattr(x, "name", None) != adapter or not isinstance(x, Reparametrised | Attachment):
            return x
        if getattr(x, "group", ""):
            raise ValueError(
                f"the {type(x).__name__} at {path} shares arrays with other places, which a bank "
                "cannot hold"
            )
        if not _differs(x):
            return x
        found.append(path)
        x, lead = x.plain(), x.lead
        active = jnp.broadcast_to(
            jnp.float32(1) if x.gate is None else x.gate[..., None], (*lead, size)
        )
        if isinstance(x, Reparametrised):
            fields = {"base": x.base, "in_axes": x.in_axes, "out_axes": x.out_axes, "name": adapter}
            return WeightBank(
                **fields,
                adapters=_repeat(x.replace(base=None, gate=None), lead, size),
                active=active,
            )
        return AttachmentBank(adapters=_repeat(x.replace(gate=None), lead, size), active=active)

    result = map_places(banked, params)
    if not found:
        raise ValueError(f"the tree holds no adapter named {adapter!r}")
    return result


def _only_one(path: str, w: Any, adapter: str) -> None:
    """Raise ValueError where the adapter has several nodes at one place."""
    mine = [
        type(n).__name__ for n in stack_of(w) if isinstance(n, Reparametrised) and n.name == adapter
    ]
    if len(mine) > 1:
        raise ValueError(
            f"{path} has {' over '.join(mine)} of the adapter {adapter!r}, and a bank holds one "
            "node at a place"
        )


def _differs(x: Any) -> bool:
    """Whether a node may differ by row: not so one that merely moves the positions."""
    return bool(jax.tree.leaves(x)) or hasattr(x, "gate")


def _repeat(x: Any, lead: tuple[int, ...], size: int) -> Any:
    at = len(lead)
    return jax.tree.map(lambda a: jnp.repeat(jnp.expand_dims(a, at), size, axis=at), x)


Bank = (WeightBank, AttachmentBank)


def _adapters(tree: Any, adapter: str) -> dict[str, Any]:
    """path -> the node called `adapter`."""

    def mine(n):
        return (
            isinstance(n, Reparametrised | Attachment)
            and getattr(n, "name", None) == adapter
            and _differs(n)
        )

    for path, w in places(tree).items():
        _only_one(path, w, adapter)
    found = {p: next(filter(mine, stack_of(w)), None) for p, w in places(tree).items()}
    return {p: n for p, n in found.items() if n is not None}


def set_adapter(params: Any, index: int, tree: Any, *, adapter: str = "default") -> Any:
    """The bank in `params` with the adapter of that name in `tree` at `index`. Places that the
    adapter lacks get none.

    Arrays change and shapes do not, so a compiled program goes on. A smaller one (a LoRA of lower
    rank, a narrower bottleneck) is filled up with zeros. Raises ValueError for an index outside the
    bank, an adapter that is larger or of another kind, and one with a place that the bank lacks.
    """
    banked = {p: b for p, w in places(params).items() if (b := _bank_in(w)) is not None}
    given = _adapters(tree, adapter)
    if not given:
        raise ValueError(f"the tree holds no adapter named {adapter!r}")
    if missing := set(given) - set(banked):
        path = sorted(missing)[0]
        raise ValueError(f"the adapter has {path}, which the bank lacks.{nearest(path, banked)}")

    def put(path: str, b: Any) -> Any:
        size = b.active.shape[-1]
        if not 0 <= index < size:
            raise ValueError(f"index must lie between 0 and {size - 1}, got {index}")
        if path not in given:
            return b.replace(active=b.active.at[..., index].set(0.0))
        x = given[path]
        active = b.active.at[..., index].set(1.0 if getattr(x, "gate", None) is None else x.gate)
        return b.replace(
            adapters=_put(path, b.adapters, x, index, len(b.active.shape) - 1), active=active
        )

    return _map_banks(params, put)


def _put(path: str, bank: Any, x: Any, index: int, at: int) -> Any:
    """The bank's arrays with those of the node x at `index` of the axis `at`."""
    if type(x) is not type(bank):
        raise ValueError(f"{path} holds a {type(x).__name__}, the bank a {type(bank).__name__}")
    bare = x.plain().replace(**{f: None for f in ("base", "gate") if hasattr(x, f)})
    for field in dataclasses.fields(bank):
        if field.metadata.get("static") and field.name not in _FREE:
            mine, theirs = getattr(bank, field.name), getattr(bare, field.name)
            if mine != theirs:
                raise ValueError(f"{path} has {field.name}={theirs!r}, the bank {mine!r}")
    if jax.tree.structure(bare.replace(**_free(bank))) != jax.tree.structure(bank):
        raise ValueError(
            f"{path} has other arrays than the bank's: one has an option (a bias, a norm, a start) "
            "that the other lacks"
        )

    def put(banked: jax.Array, a: jax.Array) -> jax.Array:
        room = (*banked.shape[:at], *banked.shape[at + 1 :])
        pads = [(0, n - m) for n, m in zip(room, np.shape(a), strict=True)]
        if any(n < 0 for _, n in pads) or (any(n for _, n in pads) and not x.zero_padded):
            raise ValueError(
                f"the adapter has an array {np.shape(a)} at {path}, the bank {room}; resize "
                "it first"
            )
        padded = jnp.pad(jnp.asarray(a), pads) if pads else jnp.asarray(a)
        return banked.at[(*[slice(None)] * at, index)].set(padded.astype(banked.dtype))

    return jax.tree.map(put, bank, bare.replace(**_free(bank)))


def _free(bank: Any) -> dict[str, Any]:
    return {f: getattr(bank, f) for f in _FREE if hasattr(bank, f)}


def clear_adapter(params: Any, index: int) -> Any:
    """The bank without the adapter at `index`: rows that name it use the base alone."""
    return _map_banks(params, lambda _, b: b.replace(active=b.active.at[..., index].set(0.0)))


def bank_adapter(params: Any, index: int, *, adapter: str = "default") -> Any:
    """The tree with the adapter at `index` of the bank as an ordinary one called `adapter`, and no
    bank.
    """

    def out(path: str, b: Any) -> Any:
        at = len(b.active.shape) - 1
        one = jax.tree.map(lambda a: jnp.take(a, index, axis=at), b.adapters)
        gate = b.active[..., index]
        base = {"base": b.base} if isinstance(b, WeightBank) else {}
        return one.replace(name=adapter, gate=None if gate.ndim == 0 and gate > 0 else gate, **base)

    return _map_banks(params, out)


def _bank_in(w: Any) -> Any:
    return next((n for n in stack_of(w) if isinstance(n, Bank)), None)


def _map_banks(params: Any, fn: Callable[[str, Any], Any]) -> Any:
    def inner(path: str, w: Any) -> Any:
        if isinstance(w, Bank):
            return fn(path, w)
        return w.replace(base=inner(path, w.base)) if isinstance(w, Reparametrised) else w

    return map_places(inner, params)


def run_parallel(
    apply: Callable[..., Any], params: Any, tokens: jax.Array, ids: Any, **fields: Any
) -> jax.Array:
    """The same rows through several adapters of a bank at once: tokens [B, T] -> [n, B, ...] for
    the n adapters `ids`.

    Batch fields [B, ...] (positions, segment_ids) go along.
    """
    ids = jnp.asarray(ids, jnp.int32)

    def repeat(x):
        return jnp.tile(jnp.asarray(x), (len(ids), *[1] * (jnp.ndim(x) - 1)))

    batch: Mapping[str, Any] = {k: repeat(v) for k, v in fields.items()}
    y = apply(params, repeat(tokens), adapter_ids=jnp.repeat(ids, tokens.shape[0]), **batch)
    return y.reshape(len(ids), tokens.shape[0], *y.shape[1:])
