"""Attachments: what stands beside a module's own parameters and acts on what goes in or comes out of the module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

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
