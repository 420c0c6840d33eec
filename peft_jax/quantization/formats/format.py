"""Storage formats: which numbers a code can stand for, and how a block of weights gets its scale.

A weight is a matrix [*lead, in, out]; `block_size` consecutive inputs of one output share a scale
(None: all inputs do). So blocks never straddle outputs, and agree with those of Hugging Face's
[out, in] weights flattened. A value is `scale * decode(code, zero)`.

Each format's record stands at the end of a file of its own in this package, as `FORMAT`; another
package offers its own as an entry point of the group `peft_jax.formats`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from peft_jax.core.registry import Registry
from peft_jax.core.select import nearest

Activations = Literal["dynamic", "static"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Format:
    """What the formats have in common. `bits` a code; `block_size` inputs share a scale, None: all
    inputs of an output.
    """

    kind: ClassVar[str]
    bits: int
    block_size: int | None = None

    @property
    def name(self) -> str:
        """What `make_format` takes: "nf4", "int4" and the like."""
        return self.kind

    def fit(self, w: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """(scale, zero point or None), each [..., 1, out], of blocks w [..., block, out],
        float32.
        """
        raise NotImplementedError

    def encode(
        self, w: jax.Array, scale: jax.Array, zero: jax.Array | None, noise: jax.Array | None = None
    ) -> jax.Array:
        """Codes of `w`; the others broadcast to its shape. `noise` in [0, 1) rounds stochastically,
        None to the nearest.
        """
        raise NotImplementedError

    def decode(self, codes: jax.Array, zero: jax.Array | None) -> jax.Array:
        """What codes stand for in units of the scale, float32."""
        raise NotImplementedError

    def store_scale(self, scale: jax.Array) -> Any:
        """Scales [*lead, groups, out] as they are kept: an array like them, or a `DoubleScale`."""
        return scale

    def load_scale(self, stored: Any) -> jax.Array:
        """The scales [*lead, groups, out] behind what `store_scale` kept, float32."""
        return stored.astype(jnp.float32)

    def round_trip(self, w: jax.Array, scale: jax.Array, zero: jax.Array | None) -> jax.Array:
        """`w` as it comes back: rounded and decoded."""
        return self.decode(self.encode(w, scale, zero), zero) * scale


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class StorageFormat:
    """What is said of a format; `name` is that of `make_format` and of configurations.

    `made` is its class and `bits` the numbers of bits that may end the name ("int4"), none where
    the name says all. `follows` is the paper or the program that its numbers are held to.
    `examples` are what the matrix of formats goes through, small blocks and each option of its own;
    `reference` gives what comes back of a matrix [in, out] in one of them, computed in another way,
    in NumPy or by another library. The matrix fails a format that it has no reference for.
    """

    name: str
    made: type[Format]
    follows: str
    examples: tuple[Format, ...]
    bits: tuple[int, ...] = ()
    reference: Callable[[np.ndarray, Any], np.ndarray] | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """What `make_format` takes."""
        return tuple(f"{self.name}{b}" for b in self.bits) or (self.name,)


FORMATS: Registry[StorageFormat] = Registry(
    "format", ("peft_jax.quantization.formats",), "FORMAT", "peft_jax.formats"
)


def format_names() -> list[str]:
    """The names that `make_format` takes."""
    return [name for record in FORMATS.values() for name in record.names]


def make_format(spec: Format | str, **options: Any) -> Format:
    """A format from its name (one of `format_names`) and options.

    Raises ValueError for an unknown name or option.
    """
    if isinstance(spec, Format):
        return dataclasses.replace(spec, **options) if options else spec
    record, bits = _record(spec)
    known = [f.name for f in dataclasses.fields(record.made) if f.name != "bits"]
    if unknown := sorted(set(options) - set(known)):
        raise ValueError(
            f"format {spec!r} has no option {unknown[0]!r}; its options: {', '.join(known)}"
        )
    return record.made(**bits, **options)


def _record(name: str) -> tuple[StorageFormat, dict[str, int]]:
    """The record that a name means, and the bits that end the name."""
    if name in FORMATS and not FORMATS[name].bits:
        return FORMATS[name], {}
    stem = name.rstrip("0123456789")
    if stem != name and stem in FORMATS and FORMATS[stem].bits:
        return FORMATS[stem], {"bits": int(name[len(stem) :])}
    known = format_names()
    raise ValueError(
        f"unknown format {name!r}.{nearest(name, known)} Those there are: {', '.join(known)}"
    )
