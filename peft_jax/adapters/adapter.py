"""What adapters beside a module have in common: a gate per layer, dropout, AdapterDrop, and rows
with adapters of their own.

An adapter's arrays are [*lead, ...]; inside a call the leading axes are gone, and in a bank there
is one of each array for every row of the batch, so its formulas take both [n] and [B, n] (see
`rows`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp

from peft_jax.core.attachment import Attachment
from peft_jax.core.reparametrised import dropped, token_axes
from peft_jax.core.weight import static


def rows(v: jax.Array) -> jax.Array:
    """A vector [n] as it is, one for each row [B, n] as [B, 1, n]: what goes beside activations [B,
    T, n].
    """
    return v if v.ndim == 1 else v[:, None, :]


def per_row(v: jax.Array) -> jax.Array:
    """A number as it is, one for each row [B] as [B, 1, 1]."""
    return v if v.ndim == 0 else v[:, None, None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adapter(Attachment):
    """Something that changes what a module puts out.

    `gate` [*lead] is 1 where a layer is adapted and 0 where it is not. In training AdapterDrop
    (Rücklé et al. 2021, arXiv:2010.11918) leaves out the adapters of the layers below one drawn
    anew for each step from 0 to `drop_layers`; `depth` [*lead] has the layers' numbers. `key` is
    filled by `bind` where it is given an rng.
    """

    stochastic: ClassVar[bool] = True
    gate: jax.Array | None = None
    depth: jax.Array | None = None
    key: jax.Array | None = None
    dropout: float = static(default=0.0)
    drop_layers: int = static(default=0)
    name: str = static(default="default")
    frozen: bool = static(default=False)

    @property
    def lead(self) -> tuple[int, ...]:
        """Sizes of the leading axes."""
        raise NotImplementedError

    def change(self, x: jax.Array, y: jax.Array) -> jax.Array:
        """The module's new output, given its input x and its output y."""
        raise NotImplementedError

    def around(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        output = call(*args, **kwargs)
        y, rest = (output[0], output[1:]) if isinstance(output, tuple) else (output, None)
        changed = self.gated(self.change(args[0], y), y).astype(y.dtype)
        return changed if rest is None else (changed, *rest)

    def gated(self, changed: jax.Array, y: jax.Array) -> jax.Array:
        """`changed` where the gate is open, y where it is not."""
        return changed if self.gate is None else jnp.where(per_row(self.gate) > 0, changed, y)

    def drop(self, x: jax.Array) -> jax.Array:
        """`x` with dropout, where it is on."""
        return dropped(x, self.dropout, self.key)

    def drawn(self, rng: jax.Array) -> Self:
        if not self.drop_layers or self.depth is None:
            return self
        first = jax.random.randint(rng, (), 0, self.drop_layers + 1)
        kept = (self.depth >= first).astype(jnp.float32)
        return self.replace(gate=kept if self.gate is None else self.gate * kept)


def normalized(x: jax.Array, norm: tuple[jax.Array, jax.Array], eps: float = 1e-5) -> jax.Array:
    """Layer normalisation over the last axis in float32, with (scale, bias)."""
    y = x.astype(jnp.float32)
    y = (y - y.mean(-1, keepdims=True)) * jax.lax.rsqrt(y.var(-1, keepdims=True) + eps)
    scale, bias = (rows(v.astype(jnp.float32)) for v in norm)
    return (y * scale + bias).astype(x.dtype)


def affine(x: jax.Array, w: jax.Array, b: jax.Array | None) -> jax.Array:
    """x [..., n] times w [n, m] plus b [m], in x's dtype; or, with an array for each row, [B, n, m]
    and [B, m].
    """
    if w.ndim == 2:
        y = jnp.matmul(x.reshape(*token_axes(x.shape[:-1]), x.shape[-1]), w.astype(x.dtype))
        y = y.reshape(*x.shape[:-1], w.shape[-1])
    else:
        y = jnp.matmul(x, w.astype(x.dtype))
    return y if b is None else y + rows(b.astype(x.dtype))
