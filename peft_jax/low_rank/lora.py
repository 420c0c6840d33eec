"""LoRA (Hu et al. 2021, arXiv:2106.09685): W + s * A B, with A [in, r] and B [r, out] trained and W frozen.

s = alpha / r, or alpha / sqrt(r) with rank stabilisation (rsLoRA, Kalajdzievski 2023, arXiv:2312.03732). A starts as
Hugging Face PEFT starts it, B at zero, so nothing changes at first. Dropout acts on the input of A.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from peft_jax.core.tree import Targets, by_pattern, check_patterns, map_places, select
from peft_jax.core.weight import (
    Axes,
    Layout,
    Trainable,
    Weight,
    from_matrix,
    materialize,
    matmul,
    matrix_shape,
    static,
    take,
)

MATRIX: tuple[Axes, Axes] = ((-2,), (-1,))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LoRA(Weight):
    """`base` + scale * a b. a [*lead, in, r], b [*lead, r, out], scale [*lead]; in and out are flattened sizes."""

    trainable: ClassVar[tuple[str, ...]] = ("a", "b")
    stochastic: ClassVar[bool] = True
    base: Any
    a: jax.Array
    b: jax.Array
    scale: jax.Array
    key: jax.Array | None = None  # set by `bind` when an rng is given: dropout is on
    in_axes: Axes = static(default=(-2,))
    out_axes: Axes = static(default=(-1,))
    dropout: float = static(default=0.0)
    rslora: bool = static(default=False)  # how `scale` was made from alpha; kept for export
    name: str = static(default="default")
    frozen: bool = static(default=False)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def dtype(self) -> Any:
        return self.base.dtype

    @property
    def lead(self) -> tuple[int, ...]:
        """Sizes of the leading axes."""
        return self.a.shape[:-2]

    @property
    def rank(self) -> int:
        return self.a.shape[-1]

    def field_specs(self, spec: P) -> dict[str, P]:
        lead = tuple(spec)[: len(self.lead)]
        into, out = spec[self.in_axes[0]], spec[self.out_axes[0]]
        return {"base": spec, "a": P(*lead, into, None), "b": P(*lead, None, out), "scale": P(*lead)}

    def delta(self) -> jax.Array:
        """The update s * A B in the base's logical shape, float32."""
        product = jnp.matmul(self.a, self.b, preferred_element_type=jnp.float32) * self.scale[..., None, None]
        return from_matrix(product, self.shape, self.in_axes, self.out_axes)

    def materialize(self) -> jax.Array:
        return (materialize(self.base).astype(jnp.float32) + self.delta()).astype(self.dtype)

    def unmerge(self, merged: Any) -> Self:
        return self.replace(base=(materialize(merged).astype(jnp.float32) - self.delta()).astype(self.dtype))

    def matmul(self, x: jax.Array, *, in_axes: Axes, out_axes: Axes, precision: Any = None) -> jax.Array:
        y = matmul(x, self.base, in_axes=in_axes, out_axes=out_axes, precision=precision)
        a, b = self._factors(in_axes, out_axes, x.dtype)
        x = x.reshape(*_token_axes(x.shape[: x.ndim - len(in_axes)]), a.shape[0])
        low = jnp.matmul(self._drop(x), a, precision=precision) * self.scale.astype(x.dtype)
        return y + jnp.matmul(low, b, precision=precision).reshape(y.shape)

    def _factors(self, in_axes: Axes, out_axes: Axes, dtype: Any) -> tuple[jax.Array, jax.Array]:
        a, b = self.a.astype(dtype), self.b.astype(dtype)
        if (in_axes, out_axes) == (self.in_axes, self.out_axes):
            return a, b
        if (out_axes, in_axes) == (self.in_axes, self.out_axes):  # the transposed product of a tied head
            return b.T, a.T
        raise ValueError(
            f"LoRA made for in_axes={self.in_axes}, out_axes={self.out_axes} lies in a module that multiplies with "
            f"in_axes={in_axes}, out_axes={out_axes}; pass layout=peft_jax.layout_of(model, ...) to lora"
        )

    def _drop(self, x: jax.Array) -> jax.Array:
        if self.key is None or self.dropout == 0.0:
            return x
        keep = jax.random.bernoulli(self.key, 1.0 - self.dropout, x.shape)
        return jnp.where(keep, x / (1.0 - self.dropout), 0)

    def take(self, ids: jax.Array, dtype: Any = None) -> jax.Array:
        rows = take(self.base, ids, dtype)
        a, b = self._factors((-2,), (-1,), rows.dtype)
        return rows + jnp.matmul(jnp.take(a, ids, axis=0) * self.scale.astype(rows.dtype), b)


def _token_axes(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Rows and tokens as one axis: on a CPU, products of rank r take half the time on two axes that they take on three.

    Axes that a mesh splits over `sequence` stay as they are, since joining two split axes would gather them.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return shape if not mesh.empty and mesh.shape.get("sequence", 1) > 1 else (math.prod(shape),)


def scaling(alpha: float, rank: int, rslora: bool) -> float:
    """alpha / r, or alpha / sqrt(r) with rank stabilisation."""
    return alpha / (math.sqrt(rank) if rslora else rank)


def _init_a(key: jax.Array, shape: tuple[int, ...], init: str) -> jax.Array:
    if init == "gaussian":
        return jax.random.normal(key, shape, jnp.float32) / shape[-1]
    if init == "kaiming":  # torch's kaiming_uniform_(a=sqrt(5)): a bound of 1/sqrt(in)
        bound = 1.0 / math.sqrt(shape[-2])
        return jax.random.uniform(key, shape, jnp.float32, -bound, bound)
    raise ValueError(f"init must be 'kaiming' or 'gaussian', not {init!r}")


def lora(
    params: Any,
    key: jax.Array,
    *,
    rank: int = 8,
    alpha: float | None = None,
    targets: Targets = "all-linear",
    exclude: Targets = (),
    dropout: float = 0.0,
    rslora: bool = False,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    bias: Literal["none", "all", "lora_only"] = "none",
    modules_to_save: Targets = (),
    init: Literal["kaiming", "gaussian"] = "kaiming",
    adapter: str = "default",
    layout: Layout | None = None,
) -> Any:
    """`params` with a LoRA node of rank `rank` at each place that `targets` name.

    `alpha` defaults to the rank (scale 1). `rank_pattern` and `alpha_pattern` override both for the places that their
    keys match. `bias` also trains biases, `modules_to_save` whole modules, as in PEFT; `adapter` names the adapter.
    `layout` (see `layout_of`) says which axes of a weight are inputs; without it a weight is [*leading, in, out].
    Raises ValueError for a rank below 1, dropout outside [0, 1), or a target or pattern that matches nothing.
    """
    rank_pattern, alpha_pattern = rank_pattern or {}, alpha_pattern or {}
    for r in (rank, *rank_pattern.values()):
        if r < 1:
            raise ValueError(f"rank must be at least 1, got {r}")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout must lie in [0, 1), got {dropout}")
    paths = select(params, targets, exclude)
    check_patterns(paths, rank_pattern=rank_pattern, alpha_pattern=alpha_pattern)
    keys = dict(zip(paths, jax.random.split(key, len(paths)), strict=True))

    def place(path: str, w: Any) -> Any:
        if path not in keys:
            return w
        in_axes, out_axes = (layout or {}).get(path, MATRIX)
        lead, n_in, n_out = matrix_shape(w.shape, in_axes, out_axes)
        r = by_pattern(path, rank, rank_pattern)
        s = scaling(by_pattern(path, rank if alpha is None else alpha, alpha_pattern), r, rslora)
        return LoRA(
            base=w,
            a=_init_a(keys[path], (*lead, n_in, r), init),
            b=jnp.zeros((*lead, r, n_out), jnp.float32),
            scale=jnp.full(lead, s, jnp.float32),
            in_axes=in_axes,
            out_axes=out_axes,
            dropout=dropout,
            rslora=rslora,
            name=adapter,
        )

    return train_extras(map_places(place, params), paths, bias=bias, modules_to_save=modules_to_save)


def train_extras(params: Any, paths: list[str], *, bias: str, modules_to_save: Targets) -> Any:
    """Biases ("all", or "lora_only": those beside `paths`) and whole modules marked as training, as PEFT does."""
    if bias not in ("none", "all", "lora_only"):
        raise ValueError(f"bias must be 'none', 'all' or 'lora_only', not {bias!r}")
    beside = {path.rpartition("/")[0] + "/bias" for path in paths}
    saved = set(select(params, modules_to_save, min_ndim=0)) if modules_to_save else set()
    if clash := saved & set(paths):
        raise ValueError(f"{sorted(clash)[0]} is both a target and in modules_to_save")

    def mark(path: str, w: Any) -> Any:
        if path in saved:
            return Trainable(materialize(w), saved_as="module")
        wanted = bias == "all" or (bias == "lora_only" and path in beside)
        return Trainable(w, saved_as="bias") if wanted and path.endswith("/bias") else w

    return map_places(mark, params)
