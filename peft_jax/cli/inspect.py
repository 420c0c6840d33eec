"""The table of `peft-jax inspect`."""

from __future__ import annotations

from typing import Any

import jax
from rich.table import Table

from peft_jax.core.partition import count, partition
from peft_jax.core.tree import is_node, places


def tree_table(params: Any) -> Table:
    """Each place with its kind, shape, dtype, bytes and trained parameters; totals at the end."""
    table = Table("path", "kind", "shape", "dtype", "bytes", "trained")
    for column in table.columns[2:]:
        column.justify = "right"
    for path, x in places(params).items():
        arrays = jax.tree.leaves(x)
        trained = sum(a.size for a in jax.tree.leaves(partition(x)[0]))
        shape, dtype = getattr(x, "shape", ""), getattr(x, "dtype", "")
        table.add_row(
            path,
            kind_of(x),
            str(shape),
            str(dtype),
            f"{nbytes(arrays):,}",
            f"{trained:,}" if trained else "",
        )
    trained, total = count(params)
    table.add_section()
    table.add_row(
        "total",
        f"{total:,} parameters",
        "",
        "",
        f"{nbytes(jax.tree.leaves(params)):,}",
        f"{trained:,} ({trained / total:.2%})",
    )
    return table


def kind_of(x: Any) -> str:
    """The nodes of a place, outermost first, as in "LoRA(r=8) > array"."""
    if not is_node(x):
        return "array"
    rank, format = getattr(x, "rank", None), getattr(x, "format", None)
    name = type(x).__name__ + (f"(r={rank})" if rank else f"({format.name})" if format else "")
    return f"{name} > {kind_of(x.base)}" if hasattr(x, "base") else name


def nbytes(arrays: Any) -> int:
    """Bytes that the arrays hold."""
    return sum(a.size * a.dtype.itemsize for a in arrays)
