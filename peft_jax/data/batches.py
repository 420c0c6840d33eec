"""Batches in a deterministic order: which rows batch i holds depends on the seed and i alone, so a
run can resume.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

Batch = dict[str, np.ndarray]


def batch_at(rows: Any, index: int, batch_size: int, *, seed: int) -> Batch:
    """The `index`-th training batch: fields [batch_size, ...], rows in an order that changes with
    each epoch.

    `rows` is a NamedTuple of arrays [N, ...], `tokens` among them. The last, incomplete batch of an
    epoch is filled from the next one's order, so shapes are static and no row is lost.
    """
    chosen = rows_at(len(rows.tokens), index, batch_size, seed=seed)
    return {name: array[chosen] for name, array in rows._asdict().items()}


def rows_at(count: int, index: int, batch_size: int, *, seed: int) -> list[int]:
    """Which of `count` rows the `index`-th training batch holds."""
    first = index * batch_size
    return [
        int(_order(count, (first + i) // count, seed)[(first + i) % count])
        for i in range(batch_size)
    ]


class Part:
    """A field of a batch [B, ...] of which rows are read where they are asked for, so that each
    process reads its own.
    """

    def __init__(self, field: Any, chosen: list[int]) -> None:
        self.field, self.chosen = field, chosen
        self.shape, self.ndim = (len(chosen), *field.shape[1:]), field.ndim

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        rows, *others = index
        return self.field[self.chosen[rows]][(slice(None), *others)]


def parts_at(rows: Any, index: int, batch_size: int, *, seed: int) -> dict[str, Any]:
    """The batch of `batch_at`, its fields as parts that are read on demand."""
    chosen = rows_at(len(rows.tokens), index, batch_size, seed=seed)
    return {name: Part(array, chosen) for name, array in rows._asdict().items()}


@functools.lru_cache(maxsize=4)
def _order(count: int, epoch: int, seed: int) -> np.ndarray:
    """The permutation of an epoch."""
    return np.random.default_rng((seed, epoch)).permutation(count)


def evaluation_batches(rows: Any, batch_size: int) -> list[Batch]:
    """All rows in order, the last batch padded with rows that weigh nothing."""
    count = len(rows.tokens)
    batches = []
    for start in range(0, count, batch_size):
        part = {name: array[start : start + batch_size] for name, array in rows._asdict().items()}
        short = batch_size - len(part["tokens"])
        batches.append(
            {
                name: np.pad(array, [(0, short)] + [(0, 0)] * (array.ndim - 1))
                for name, array in part.items()
            }
        )
    return batches


def unpadded(rows: Any, multiple: int = 8) -> Any:
    """Rows (a NamedTuple of arrays, those of tokens [N, T]) without padding that all of them end
    with, T being a multiple of so many tokens, unless it was less: few lengths, few programs.
    """
    T = rows.tokens.shape[1]
    longest = -(-int((rows.segment_ids > 0).sum(1).max()) // multiple) * multiple
    return type(rows)(*(x[:, :longest] if x.shape[1:] == (T,) else x for x in rows))
