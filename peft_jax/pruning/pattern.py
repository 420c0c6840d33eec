"""Which entries of a matrix may go together: any, N of every M along the inputs, or whole
blocks.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

Compare = Literal["output", "matrix"]


@dataclasses.dataclass(frozen=True)
class NM:
    """`n` of every `m` inputs in a row are kept, for each output: 2:4 and its like (Mishra et al.
    2021, arXiv:2104.08378).
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        if not 1 <= self.n <= self.m:
            raise ValueError(
                f"pattern {self} keeps more of a group than it has: n must lie in 1..m"
            )

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def sparsity(self) -> float:
        """The share of entries that go."""
        return 1.0 - self.n / self.m

    def check(self, path: str, n_in: int, n_out: int) -> None:
        """Raise ValueError where the groups do not divide a matrix."""
        if n_in % self.m:
            raise ValueError(
                f"pattern {self} does not divide the {n_in} inputs of {path}; exclude the place"
            )


@dataclasses.dataclass(frozen=True)
class Block:
    """Blocks of `rows` inputs by `columns` outputs are kept or go as one."""

    rows: int
    columns: int

    def __post_init__(self) -> None:
        if min(self.rows, self.columns) < 1:
            raise ValueError(f"blocks must have at least one row and column, got {self}")

    def __str__(self) -> str:
        return f"{self.rows}x{self.columns}"

    def check(self, path: str, n_in: int, n_out: int) -> None:
        """Raise ValueError where the blocks do not divide a matrix."""
        if n_in % self.rows or n_out % self.columns:
            raise ValueError(
                f"blocks of {self} do not divide the {n_in} inputs or {n_out} outputs of {path}; "
                "exclude it"
            )


Pattern = NM | Block | None


def make_pattern(pattern: Pattern | str) -> Pattern:
    """A pattern from "2:4" (two of four kept) or "16x16" (blocks); None and patterns as they are.

    Raises ValueError for anything else.
    """
    if not isinstance(pattern, str):
        return pattern
    if found := re.fullmatch(r"(\d+):(\d+)", pattern):
        return NM(int(found[1]), int(found[2]))
    if found := re.fullmatch(r"(\d+)x(\d+)", pattern):
        return Block(int(found[1]), int(found[2]))
    raise ValueError(f"pattern {pattern!r} is neither N:M, as 2:4, nor a block, as 16x16")


def select_kept(
    score: jax.Array, remove: jax.Array | int, pattern: Pattern, compare: Compare
) -> jax.Array:
    """bool [in, out]: False for the `remove` entries (see `removed`) of the lowest `score` [in,
    out].

    Entries are ranked within each output or over the whole matrix, blocks by the sum of their
    scores (within the blocks of the same outputs, or over the matrix). Exactly `remove` go, ties in
    the order of the inputs. N:M patterns do not read it.
    """
    n_in, n_out = score.shape
    if isinstance(pattern, NM):
        groups = score.reshape(-1, pattern.m, n_out)
        return _without_lowest(groups, pattern.m - pattern.n, 1).reshape(n_in, n_out)
    if isinstance(pattern, Block):
        blocks = score.reshape(
            n_in // pattern.rows, pattern.rows, n_out // pattern.columns, pattern.columns
        ).sum((1, 3))
        kept = select_kept(blocks, remove, None, compare)
        return jnp.repeat(jnp.repeat(kept, pattern.rows, 0), pattern.columns, 1)
    if compare == "output":
        return _without_lowest(score, remove, 0)
    return _without_lowest(score.T.ravel(), remove, 0).reshape(n_out, n_in).T


def removed(sparsity: Any, n_in: int, n_out: int, pattern: Pattern, compare: Compare) -> Any:
    """How many of the entries (or blocks) that are ranked together go: floor(sparsity * n), int32
    like `sparsity`.
    """
    rows, columns = (pattern.rows, pattern.columns) if isinstance(pattern, Block) else (1, 1)
    count = n_in // rows * (1 if compare == "output" else n_out // columns)
    if isinstance(sparsity, jax.Array):  # a schedule, while training
        return jnp.floor(sparsity * count * (1 + 1e-6)).astype(jnp.int32)
    return np.floor(np.asarray(sparsity, np.float64) * count + 1e-6).astype(
        np.int32
    )  # 0.29 * 100 < 29


def _without_lowest(score: jax.Array, remove: Any, axis: int) -> jax.Array:
    """bool like `score`: False for the `remove` lowest along an axis, the first of equal ones
    first.
    """
    order = jnp.argsort(score, axis=axis, stable=True)
    stays = jnp.arange(score.shape[axis]) >= remove
    stays = jnp.broadcast_to(jnp.expand_dims(stays, range(1, score.ndim - axis)), score.shape)
    return jnp.put_along_axis(jnp.zeros(score.shape, bool), order, stays, axis=axis, inplace=False)
