"""A bank of LoRA adapters of one rank, each row of a batch using its own (Sheng et al. 2023, S-LoRA, arXiv:2311.03285).

One compiled program serves all: which adapter a row uses is an array (`bind(model)(params, tokens, adapter_ids=ids)`), and
so are the adapters, so putting one in, or in another's place, compiles nothing. An id of -1 is the base alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from peft_jax.core.reparametrised import Product, Reparametrised, Site, node, place_nodes
from peft_jax.core.tree import Targets, map_places, places
from peft_jax.core.weight import Axes, Layout, matmul, take
from peft_jax.low_rank.algebra import stack_of
from peft_jax.low_rank.lora import LoRA


@node
class LoRABank(Reparametrised):
    """a [*lead, n, in, r], b [*lead, n, r, out], scale [*lead, n]; `ids` [*lead, B] is filled by `bind`."""

    trainable: ClassVar[tuple[str, ...]] = ("a", "b")
    stochastic: ClassVar[bool] = False
    routed: ClassVar[bool] = True
    a: jax.Array
    b: jax.Array
    scale: jax.Array
    ids: jax.Array | None = None

    def array_specs(self, into: Any, out: Any) -> dict[str, tuple[Any, ...]]:
        return {"a": (None, into, None), "b": (None, None, out), "scale": (None,)}

    def product(self, x: jax.Array, base: Product) -> jax.Array:
        return base(x) + self._change(x, self.a, self.b)

    def _change(self, x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        """Rows' updates for x [N, in], whose rows of the batch are runs of N / B."""
        ids = self._ids()
        rows = x.reshape(ids.shape[0], -1, x.shape[-1])
        scale = jnp.where(ids >= 0, self.scale[ids], 0.0).astype(x.dtype)
        low = jnp.matmul(rows, a[ids].astype(x.dtype)) * scale[:, None, None]
        return jnp.matmul(low, b[ids].astype(x.dtype)).reshape(*x.shape[:-1], -1)

    def _ids(self) -> jax.Array:
        if self.ids is None:
            raise ValueError("a bank of adapters needs apply(params, tokens, adapter_ids=ids), one id for each row")
        return self.ids

    def transposed(self, x: jax.Array, *, in_axes: Axes, out_axes: Axes, precision: Any = None) -> jax.Array:
        y = matmul(x, self.base, in_axes=in_axes, out_axes=out_axes, precision=precision)
        return y + self._change(x.reshape(-1, x.shape[-1]), self.b.mT, self.a.mT).reshape(y.shape)

    def take(self, ids: jax.Array, dtype: Any = None) -> jax.Array:
        rows, adapter = take(self.base, ids, dtype), self._ids()
        scale = jnp.where(adapter >= 0, self.scale[adapter], 0.0)
        chosen = self.a[adapter[:, None], ids.reshape(adapter.shape[0], -1)] * scale[:, None, None]  # [B, T, r]
        return rows + jnp.matmul(chosen, self.b[adapter]).reshape(rows.shape).astype(rows.dtype)

    def materialize(self) -> jax.Array:
        raise ValueError("a bank of adapters is no one weight; take an adapter out with bank_adapter before merging")


def bank(
    params: Any,
    key: jax.Array,
    *,
    size: int,
    rank: int = 8,
    targets: Targets = "all-linear",
    exclude: Targets = (),
    layers: Sequence[int] | None = None,
    adapter: str = "bank",
    layout: Layout | None = None,
) -> Any:
    """`params` with room for `size` LoRA adapters of rank up to `rank` at each place that `targets` name.

    Each starts as a fresh LoRA with scale 1, so a bank can be trained as it is, every row teaching its own adapter.
    """
    if size < 1 or rank < 1:
        raise ValueError(f"size and rank must be at least 1, got {size} and {rank}")

    def make(site: Site, key: jax.Array) -> LoRABank:
        lead, n_in, n_out = site.sizes
        return LoRABank(
            **site.common(name=adapter),
            a=jax.random.uniform(key, (*lead, size, n_in, rank), jnp.float32, -(n_in**-0.5), n_in**-0.5),
            b=jnp.zeros((*lead, size, rank, n_out)),
            scale=jnp.ones((*lead, size)),
        )

    return place_nodes(params, key, make, targets=targets, exclude=exclude, layers=layers, layout=layout)


def set_adapter(params: Any, index: int, tree: Any, *, adapter: str = "default") -> Any:
    """The bank in `params` with the LoRA `adapter` of `tree` at `index`. Places that the adapter lacks get none.

    Arrays change and shapes do not, so a compiled program goes on. Raises ValueError for an index outside the bank, an
    adapter of a higher rank, or one with a place that the bank lacks.
    """
    banked = {p: n for p, w in places(params).items() for n in stack_of(w) if isinstance(n, LoRABank)}
    given = {p: n for p, w in places(tree).items() for n in stack_of(w) if isinstance(n, LoRA) and n.name == adapter}
    if not given:
        raise ValueError(f"the tree holds no LoRA adapter named {adapter!r}")
    if missing := set(given) - set(banked):
        raise ValueError(f"the adapter has {sorted(missing)[0]}, which the bank lacks")

    def put(path: str, w: LoRABank) -> LoRABank:
        size, rank = w.scale.shape[-1], w.a.shape[-1]
        if not 0 <= index < size:
            raise ValueError(f"index must lie between 0 and {size - 1}, got {index}")
        if path not in given:
            return w.replace(scale=w.scale.at[..., index].set(0.0))
        lora = given[path]
        a, b = lora.factors()
        if a.shape[-1] > rank:
            raise ValueError(f"the adapter has rank {a.shape[-1]} at {path}, the bank {rank}; resize it first")
        pad = rank - a.shape[-1]
        a = jnp.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, pad)])
        b = jnp.pad(b, [(0, 0)] * (b.ndim - 2) + [(0, pad), (0, 0)])
        scale = lora.scale if lora.gate is None else lora.scale * lora.gate
        return w.replace(
            a=w.a.at[..., index, :, :].set(a),
            b=w.b.at[..., index, :, :].set(b),
            scale=w.scale.at[..., index].set(scale),
        )

    return _map_banks(params, put)


def clear_adapter(params: Any, index: int) -> Any:
    """The bank without the adapter at `index`: rows that name it use the base alone."""
    return _map_banks(params, lambda _, w: w.replace(scale=w.scale.at[..., index].set(0.0)))


def bank_adapter(params: Any, index: int, *, adapter: str = "default") -> Any:
    """The tree with the adapter at `index` of the bank as an ordinary LoRA called `adapter`, and no bank."""

    def out(path: str, w: LoRABank) -> LoRA:
        return LoRA(
            base=w.base, gate=w.gate, in_axes=w.in_axes, out_axes=w.out_axes, name=adapter,
            a=w.a[..., index, :, :], b=w.b[..., index, :, :], scale=w.scale[..., index],
        )  # fmt: skip

    return _map_banks(params, out)


def _map_banks(params: Any, fn: Callable[[str, LoRABank], Any]) -> Any:
    def inner(path: str, w: Any) -> Any:
        if isinstance(w, LoRABank):
            return fn(path, w)
        return w.replace(base=inner(path, w.base)) if isinstance(w, Reparametrised) else w

    return map_places(inner, params)
