"""Adapters by name: which ones a tree holds, and the tree without some of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from peft_jax.core.attachment import Attachment, Shared
from peft_jax.core.reparametrised import Reparametrised
from peft_jax.core.select import nearest
from peft_jax.core.tree import data_fields, is_node, places, stack_of
from peft_jax.core.weight import Weight


def adapter_names(params: Any) -> list[str]:
    """Names of the adapters in a tree, in the order in which they are met."""
    nodes = [
        n
        for w in places(params).values()
        for n in stack_of(w)
        if isinstance(n, Reparametrised | Attachment)
    ]
    return list(dict.fromkeys(name for n in nodes if (name := getattr(n, "name", ""))))


def check_names(params: Any, names: Sequence[str]) -> None:
    """Raise ValueError for a name that no adapter in the tree has."""
    known = adapter_names(params)
    for name in names:
        if name not in known:
            raise ValueError(
                f"there is no adapter {name!r}.{nearest(name, known)} Adapters here: "
                f"{', '.join(known) or 'none'}"
            )


def without(w: Any, names: Sequence[str]) -> Any:
    """A place's array or Weight without the adapters of these names over it."""
    if not isinstance(w, Weight):
        return w
    if isinstance(w, Reparametrised) and w.name in names:
        return without(w.base, names)
    return w.replace(base=without(getattr(w, "base"), names)) if "base" in data_fields(w) else w  # noqa: B009 - not every Weight has one


def replaced(w: Any, names: Sequence[str], make: Callable[[Any], Any]) -> Any:
    """A place's Weight with `make(what is under it)` where the outermost adapter of these names
    was, and without the others.
    """
    if isinstance(w, Reparametrised) and w.name in names:
        return make(without(w.base, names))
    return w.replace(base=replaced(w.base, names, make))


def renamed(w: Any, name: str, new: str) -> Any:
    """A place's array or Weight with the nodes of the adapter `name` called `new`."""
    if not isinstance(w, Reparametrised):
        return w
    return w.replace(base=renamed(w.base, name, new), **({"name": new} if w.name == name else {}))


def drop_adapters(params: Any, names: Sequence[str]) -> Any:
    """The tree without these adapters, what was under and beside them as it was. Raises ValueError
    for an unknown name.
    """
    check_names(params, names)

    def walk(tree: Any) -> Any:
        if not isinstance(tree, Mapping):
            return jax.tree.map(lambda w: without(w, names), tree, is_leaf=is_node)
        kept = {
            k: x
            for k, x in tree.items()
            if not (isinstance(x, Attachment) and getattr(x, "name", None) in names)
        }
        walked = {k: walk(x) for k, x in kept.items()}

        def empty(x):
            return isinstance(x, Mapping) and not x

        return {
            k: x for k, x in walked.items() if not empty(x) or empty(kept[k])
        }  # no part was there for an attachment alone

    left = walk(params)
    used = {
        f"shared_{n.group}"
        for w in places(left).values()
        for n in stack_of(w)
        if getattr(n, "group", "")
    }
    return {k: x for k, x in left.items() if not isinstance(x, Shared) or k in used}
