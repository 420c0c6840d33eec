"""The key/value cache, and what a stack of layers is called with: an attachment around a stack
changes some of it by name, and leaves the rest.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np

CACHE_DTYPES: dict[str, Any] = {"int8": jnp.dtype(jnp.int8), "fp8": jnp.dtype(jnp.float8_e4m3fn)}


class Record:
    """A dataclass whose fields are changed by name."""

    def replace(self, **changes: Any) -> Self:
        """This with some fields changed."""
        return dataclasses.replace(self, **changes)  # type: ignore[type-var]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots(Record):
    """Keys and values [L, B, S, K, d] of all layers, or [B, S, K, d] of one.

    In int8 and float8_e4m3fn each token's head has a scale of its own, [L, B, S, K], bfloat16.
    """

    keys: jax.Array
    values: jax.Array
    key_scales: jax.Array | None = None
    value_scales: jax.Array | None = None

    def write(self, k: jax.Array, v: jax.Array, index: Any) -> Slots:
        """One layer's with k and v [B, T, K, d] of new tokens in the slots from `index` on."""
        keys, key_scales = _stored(k, self.keys.dtype, self.key_scales)
        values, value_scales = _stored(v, self.values.dtype, self.value_scales)
        new = Slots(keys, values, key_scales, value_scales)

        def put(old: jax.Array, x: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_slice_in_dim(old, x, index, axis=1)

        return jax.tree.map(put, self, new)

    def read(self, dtype: Any, count: int | None = None) -> tuple[jax.Array, jax.Array]:
        """k and v [B, S, K, d] of one layer in `dtype`, of its first `count` slots or all."""

        def of(x: jax.Array, scales: jax.Array | None) -> jax.Array:
            x = x[:, :count]
            if scales is None:
                return x.astype(dtype)
            scale = scales[:, :count].astype(jnp.float32)
            return (x.astype(jnp.float32) * scale[..., None]).astype(dtype)

        return of(self.keys, self.key_scales), of(self.values, self.value_scales)


def _stored(
    x: jax.Array, dtype: Any, scales: jax.Array | None
) -> tuple[jax.Array, jax.Array | None]:
    """Keys or values as a cache has them, with their scales where it has such."""
    if scales is None:
        return x.astype(dtype), None
    largest = 127.0 if dtype == jnp.int8 else float(jnp.finfo(dtype).max)
    x = x.astype(jnp.float32)
    scale = (jnp.abs(x).max(-1) / largest).astype(jnp.bfloat16)
    x = jnp.clip(x / jnp.maximum(scale.astype(jnp.float32), 1e-30)[..., None], -largest, largest)
    x = jnp.round(x) if dtype == jnp.int8 else x
    return x.astype(dtype), scale


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache(Record):
    """The slots with their positions and segments [B, S], and the next slot's number.

    `empty` says that nothing was written yet: tokens then look among themselves alone.
    """

    slots: Slots
    positions: jax.Array
    segment_ids: jax.Array
    index: Any
    empty: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def length(self) -> int:
        """How many slots there are."""
        return self.positions.shape[1]


def empty_cache(
    layers: int, batch: int, length: int, kv_heads: int, head_dim: int, dtype: Any = jnp.float32
) -> Cache:
    """A key/value cache of `length` slots for `batch` rows."""
    shape = (layers, batch, length, kv_heads, head_dim)
    scales: tuple[Any, ...] = ()
    if jnp.dtype(dtype) in CACHE_DTYPES.values():
        scales = (jnp.zeros(shape[:-1], jnp.bfloat16), jnp.zeros(shape[:-1], jnp.bfloat16))
    slots = Slots(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), *scales)
    where = (jnp.zeros((batch, length), jnp.int32), jnp.zeros((batch, length), jnp.int32))
    return Cache(slots, *where, index=np.zeros((), np.int32), empty=True)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Inputs(Record):
    """What a stack of layers is called with: tokens, positions, segments and types [B, T].

    The segment 0 is padding. Tokens of the segment -1 are seen by all segments of their row, and
    `common` says that there may be some.
    """

    tokens: jax.Array
    positions: jax.Array | None = None
    segment_ids: jax.Array | None = None
    token_type_ids: jax.Array | None = None
    cache: Any = None
    common: bool = dataclasses.field(default=False, metadata={"static": True})


class Hidden(NamedTuple):
    """What the stack of an encoder puts out: the tokens' states [B, T, D], and the state that
    stands first [B, D], of which heads make a sequence's vector.
    """

    states: jax.Array
    first: jax.Array
