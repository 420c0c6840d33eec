"""Classes of nodes that adapter folders may name.

A folder says the class of each node, and reading it makes objects of that class: only classes that
are known here are made. Those of this package are known by their names; those of other packages
are registered, and known by their module and name.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from typing import TypeVar

from peft_jax.core.weight import Node

_OWN = "peft_jax."
# packages of this one that define nodes, and are read when a node's class is looked for
_PACKAGES = ("core", "low_rank", "adapters", "quantization", "pruning")
_REGISTERED: dict[str, type[Node]] = {}
N = TypeVar("N", bound=Node)


def register_node(cls: type[N]) -> type[N]:
    """Let adapter folders hold nodes of a class of another package; also a decorator.

    The class is a frozen dataclass that is a pytree: its fields are arrays, nodes or tuples of
    them, and static ones plain values (numbers, strings, tuples). `base`, `key` and `shared` are
    filled by the tree and by `bind`, and are not stored. Raises TypeError for another class.
    """
    if not (isinstance(cls, type) and issubclass(cls, Node) and dataclasses.is_dataclass(cls)):
        raise TypeError(
            f"{cls!r} is no dataclass of nodes: derive it from Weight or Attachment and register "
            "it as a pytree"
        )
    _REGISTERED[_full_name(cls)] = cls
    return cls


def node_name(cls: type[Node]) -> str:
    """What folders call a class. Raises ValueError for one that no folder could be read with."""
    name = _full_name(cls)
    if cls.__module__.startswith(_OWN):
        return cls.__name__
    if _REGISTERED.get(name) is not cls:
        raise ValueError(
            f"the class {name} is not of this package, and a folder with it could not be read: "
            "call peft_jax.core.register_node with it first"
        )
    return name


def node_class(name: str) -> type[Node]:
    """The class that folders call `name`. Raises ValueError for an unknown one."""
    found = _REGISTERED.get(name) or _own_classes().get(name)
    if found is None:
        hint = "; import what registers it (peft_jax.core.register_node)" if "." in name else ""
        raise ValueError(f"a node of the unknown class {name!r}{hint}")
    return found


def _full_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _own_classes() -> dict[str, type[Node]]:
    """Names of this package's node classes, wherever they are defined."""
    for package in _PACKAGES:
        home = importlib.import_module(_OWN + package)
        for found in pkgutil.iter_modules(home.__path__):
            importlib.import_module(f"{home.__name__}.{found.name}")
    found, left = {}, [Node]
    while left:
        cls = left.pop()
        left += cls.__subclasses__()
        if cls.__module__.startswith(_OWN):
            found[cls.__name__] = cls
    return found
