"""What a kernel is asked for, and what a kernel is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax

from peft_jax.core.devices import Device
from peft_jax.models.attention.mask import Mask


@dataclasses.dataclass(frozen=True)
class Part:
    """Which of the queries a device has where a mesh splits them: `index` (traced) of `count`
    parts. `balanced` ones are made of two pieces (see `context`).
    """

    index: jax.Array
    count: int
    balanced: bool


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of `attention`, whose arguments these are, on a kind of `device`.

    `shards` is how many parts a mesh splits the tokens into. With a `part` the queries are that of
    a sequence, and keys and values the whole of it.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    mask: Mask
    sliding: bool | jax.Array
    scale: float
    softcap: float | None
    bias: jax.Array | None
    device: Device
    shards: int = 1
    part: Part | None = None

    @property
    def window(self) -> int | None:
        """How many positions the layer sees; None where it sees all. Of static kinds alone."""
        return self.mask.window if self.sliding is True else None

    @property
    def static(self) -> bool:
        """Whether it is known while tracing which window the layer has."""
        return isinstance(self.sliding, bool) or self.mask.window is None


class Kernel(NamedTuple):
    """A way to compute attention.

    `lacks` says in words what a kernel cannot do of a call, None where it can all. On a `platform`
    (None: on any) it is what calls of at least `least` queries get by default. A `manual` one is
    run by each device on its own rows and heads, since the compiler cannot split it.
    """

    name: str
    lacks: Callable[[Call], str | None]
    run: Callable[[Call], jax.Array]
    platform: str | None = None
    least: int = 1
    manual: bool = False
