"""Attachments: what stands beside a module's own parameters and acts on what goes in or comes out
of the module.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self

import jax

from peft_jax.core.weight import Node


class Attachment(Node):
    """A node under a key of its own in a module's part of the tree.

    `bind` calls `around` in place of each call of the module's method `method`. Several attachments
    of one module nest in the order of their keys, the first one outermost.
    """

    method: ClassVar[str] = "__call__"
    slots: int = 0  # slots of a key/value cache that it takes before the first token

    @property
    def lead(self) -> tuple[int, ...]:
        """Sizes of the leading axes of its arrays."""
        return ()

    def linked(self, params: Any, path: str) -> Self:
        """This node at `path` with what it needs of the rest of the tree, for one call; itself
        where that is nothing.
        """
        return self

    def moves(self, path: str) -> int:
        """How many positions it puts before the first token, as the module at `path` counts
        them.
        """
        return 0

    def check(self, module: Any) -> None:
        """Raise ValueError where this node does not fit the bound module that it stands beside."""

    def around(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run `call(*args, **kwargs)` (the module) and return its output, changing either on the
        way.
        """
        raise NotImplementedError


def key_of(tree: Mapping[Any, Any], part: str) -> Any:
    """The key of a mapping that a part of a path stands for: a list of NNX modules has integers for
    keys.
    """
    return int(part) if part not in tree and part.isdigit() and int(part) in tree else part


def is_list(tree: Any) -> bool:
    """Whether this part of a tree is a list of modules, which has numbers for keys, and no module
    itself.
    """
    return isinstance(tree, Mapping) and bool(tree) and all(str(k).isdigit() for k in tree)


def module_at(params: Any, path: str) -> Any:
    """The part of a tree that belongs to the module at `path`; an empty one where there is none."""
    for part in filter(None, path.split("/")):
        params = params.get(key_of(params, part), {}) if isinstance(params, Mapping) else {}
    return params


def attach(params: Any, nodes: Mapping[str, Mapping[str, Any]]) -> Any:
    """`params` with `nodes[module path][key]` beside the parameters of the module at each path.

    Raises ValueError where a module has an attachment of that key already, and for a list of
    modules.
    """

    def put(tree: Any, parts: list[str], path: str, new: Mapping[str, Any]) -> Any:
        if parts:
            key = key_of(tree, parts[0])
            return {**tree, key: put(tree.get(key, {}), parts[1:], path, new)}
        if is_list(tree):
            raise ValueError(
                f"{path} is a list of modules, which is never called; name the modules in it, "
                f"{path}/0 the first"
            )
        if clash := set(tree) & set(new):
            kind, _, name = sorted(clash)[0].partition("_")
            raise ValueError(
                f"{path or 'the top'} has {kind} {name!r} already; give this one another name with "
                "adapter="
            )
        return {**tree, **new}

    for path, new in nodes.items():
        params = put(params, [p for p in path.split("/") if p], path, new)
    return params


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Shared(Attachment):
    """Arrays that several nodes of a tree share, at the tree's top under `shared_<group>`; it acts
    on no module.

    `trained` and `fixed` map names to arrays without leading axes. `bind` and `merge` hand them to
    the nodes whose `group` names this one, in their field `shared`.
    """

    trainable: ClassVar[tuple[str, ...]] = ("trained",)
    method: ClassVar[str] = ""
    trained: dict[str, jax.Array]
    fixed: dict[str, jax.Array]
    frozen: bool = dataclasses.field(default=False, metadata={"static": True})
