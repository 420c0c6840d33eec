"""Attachments: what stands beside a module's own parameters and acts on what goes in or comes out of the module."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax

from peft_jax.core.weight import Node


class Attachment(Node):
    """A node under a key of its own in a module's part of the tree.

    `bind` calls `around` in place of each call of the module's method `method`. Several attachments of one module nest
    in the order of their keys, the first one outermost.
    """

    method: ClassVar[str] = "__call__"

    def around(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run `call(*args, **kwargs)` (the module) and return its output, changing either on the way."""
        raise NotImplementedError


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Shared(Attachment):
    """Arrays that several Weights of a tree share, at the tree's top under `shared_<group>`; it acts on no module.

    `trained` and `fixed` map names to arrays without leading axes. `bind` and `merge` hand them to the weights whose
    `group` names this one.
    """

    trainable: ClassVar[tuple[str, ...]] = ("trained",)
    method: ClassVar[str] = ""
    trained: dict[str, jax.Array]
    fixed: dict[str, jax.Array]
    frozen: bool = dataclasses.field(default=False, metadata={"static": True})
