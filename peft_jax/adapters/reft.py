"""Representation fine-tuning (Wu et al. 2024, arXiv:2404.03592): hidden states edited in a low-rank
subspace.

LoReFT (equation 2): h + R^T (W h + b - R h), with the rows of R orthonormal; NoReFT drops the
constraint, and DiReFT (equation 3) makes h + W2^T (W1 h + b).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, Self, Unpack

import jax
import jax.numpy as jnp

from peft_jax.adapters.adapter import Adapter, affine
from peft_jax.adapters.bottleneck import ACTIVATIONS, check_options, common
from peft_jax.core.attachment import Attachment
from peft_jax.core.method import Method
from peft_jax.core.placing import Module, find_modules, place_attachments
from peft_jax.core.reparametrised import node
from peft_jax.core.select import Targets
from peft_jax.core.tree import places
from peft_jax.core.weight import static
from peft_jax.core.where import Modules, Selection

LAYERS = r"re:.*layers(_\d+)?"


@node
class ReFT(Adapter):
    """projection R [*lead, D, r], source W [*lead, D, r], source_bias b [*lead, r].

    `first` and `last` are how many tokens at either end of each sequence are edited, None both:
    all. Virtual tokens are none of them: `before`, which `linked` fills, is how many positions come
    before the first token.
    """

    trainable: ClassVar[tuple[str, ...]] = ("projection", "source", "source_bias")
    projection: jax.Array
    source: jax.Array
    source_bias: jax.Array
    orthogonal: bool = static(default=True)
    subtract: bool = static(default=True)
    activation: str = static(default="linear")
    first: int | None = static(default=None)
    last: int | None = static(default=None)
    before: int = static(default=0)

    @property
    def lead(self) -> tuple[int, ...]:
        return self.projection.shape[:-2]

    def rotation(self) -> jax.Array:
        """R [..., D, r], with orthonormal columns where they are to be: the Q of a QR decomposition
        with positive diagonal.
        """
        return (
            orthonormal(self.projection.astype(jnp.float32)) if self.orthogonal else self.projection
        )

    def change(self, x: jax.Array, y: jax.Array) -> jax.Array:
        if y.shape[-1] != self.projection.shape[-2]:
            raise ValueError(
                f"an intervention {self.name!r} made for {self.projection.shape[-2]} features "
                "stands beside a module that puts "
                f"out {y.shape[-1]}; name other targets, or give width="
            )
        rotation = self.rotation()
        source = ACTIVATIONS[self.activation](affine(y, self.source, self.source_bias))
        if self.subtract:
            source = source - affine(y, rotation, None)
        return y + self.drop(affine(source, rotation.mT, None))

    def linked(self, params: Any, path: str) -> Self:
        if self.first is None and self.last is None:
            return self
        return self.replace(
            before=sum(x.moves(path) for x in places(params).values() if isinstance(x, Attachment))
        )

    def around(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.first is None and self.last is None:
            return super().around(call, *args, **kwargs)
        output = call(*args, **kwargs)
        y = output[0] if isinstance(output, tuple) else output
        shared = next((a for a in args[1:] if isinstance(a, dict) and "positions" in a), {})
        chosen = edited(y.shape[1], self.first or 0, self.last or 0, self.before, shared)
        changed = self.gated(self.change(args[0], y), y).astype(y.dtype)
        changed = jnp.where(chosen[..., None], changed, y)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed


def orthonormal(m: jax.Array) -> jax.Array:
    """The Q of a QR decomposition of m [..., D, r] with a positive diagonal."""
    q, r = jnp.linalg.qr(m)
    return q * jnp.sign(jnp.diagonal(r, axis1=-2, axis2=-1))[..., None, :]


def edited(length: int, first: int, last: int, before: int, shared: Mapping[str, Any]) -> jax.Array:
    """[B or 1, T]: the first and the last of the `length` tokens of each sequence, by what layers
    share: positions, segments and the index of the cache's next slot. Positions count from
    `before`; what comes before that is virtual.
    """
    t = jnp.arange(length)
    positions = shared.get("positions", t[None])
    real, chosen = positions >= before, positions < before + first
    if last:
        segments = shared.get("segment_ids")
        if segments is None:
            ends = (t >= length - last)[None]
        else:
            later = (segments[:, :, None] == segments[:, None, :]) & (t[:, None] < t[None])
            ends = (later.sum(-1) < last) & (segments > 0)
        index = shared.get("index")
        chosen |= (
            ends if index is None else ends & (index == 0)
        )  # what goes on from a cache is generated, and ends nothing
    return real & chosen


def reft(
    params: Any,
    key: jax.Array,
    *,
    variant: Literal["loreft", "noreft", "direft"] = "loreft",
    rank: int = 4,
    first: int | None = None,
    last: int | None = None,
    activation: str = "linear",
    targets: Targets = LAYERS,
    dropout: float = 0.0,
    init: Literal["zero", "default"] = "zero",
    **where: Unpack[Modules],
) -> Any:
    """`params` with an intervention after each layer, or each module that `targets` name.

    `first` and `last` edit that many tokens at either end of each sequence (as it is given: a
    prompt when generating), None both: all. init: zero makes W the projection, or W1 zero, so that
    nothing changes at first; default draws it as pyreft does. Raises ValueError for an unknown
    variant, a rank above the features, and targets that match nothing.
    """
    if variant not in ("loreft", "noreft", "direft"):
        raise ValueError(f"unknown variant {variant!r}; there are loreft, noreft and direft")
    if any(n is not None and n < 0 for n in (first, last)):
        raise ValueError(f"first and last count tokens, got {first} and {last}")
    check_options(activation, "none", "zero", dropout)
    at = Selection.of(reft, where, targets=targets)
    modules = find_modules(params, **at.places, width=at.width)

    def make(m: Module, key: jax.Array) -> ReFT:
        n = m.n_out
        if not 1 <= rank <= n:
            raise ValueError(
                f"rank must lie between 1 and the {n} features of {m.path}, got {rank}"
            )
        keys = jax.random.split(key)
        projection = jax.random.uniform(
            keys[0], (*m.lead, n, rank), jnp.float32, -(n**-0.5), n**-0.5
        )
        if variant == "loreft":
            projection = orthonormal(jax.random.normal(keys[0], (*m.lead, n, rank)))
        source = jax.random.uniform(keys[1], (*m.lead, n, rank), jnp.float32, -(n**-0.5), n**-0.5)
        if init == "zero":
            source = jnp.zeros_like(source) if variant == "direft" else projection
        return ReFT(
            **common(m, at.adapter, dropout, 0),
            projection=projection,
            source=source,
            source_bias=jnp.zeros((*m.lead, rank)),
            orthogonal=variant == "loreft",
            subtract=variant != "direft",
            activation=activation,
            first=first,
            last=last,
        )

    if init not in ("zero", "default"):
        raise ValueError(f"unknown init {init!r}; there are zero and default")
    return place_attachments(params, key, make, "reft", at.adapter, modules)


METHOD = Method(
    name="reft",
    function=reft,
    nodes=(ReFT,),
    at="modules",
    title="LoReFT, NoReFT and DiReFT",
    follows="Wu et al. 2024, arXiv:2404.03592, equations 2 and 3; pyreft; AdapterHub `ReftConfig`",
    differs=(
        "`init=zero` changes nothing at first; `default` draws as pyreft does. First and last "
        "tokens are the row's own: virtual tokens are none of them, and a generated token is "
        "neither"
    ),
    example={"rank": 2, "first": 3, "last": 2},
)
