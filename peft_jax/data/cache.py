"""Packed rows on disk: made once, in memory that does not grow with the data, and read from a
memory map as batches ask for them.

A cache is a folder of three flat files: `tokens.bin`, all examples one after another, the tokens as
uint32 with the highest bit set where one is learnt; `starts.bin`, where each example begins; and
`rows.bin`, the first example of each row. What a batch needs beside (targets, positions, segments,
weights) follows from them. Examples are packed in blocks, by best fit within each.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from peft_jax.core.files import read_json, replacing_folder, write_json
from peft_jax.data.encode import Example, Rows, bins_of

VERSION = 1  # of what is written, and of how records become tokens
BLOCK = 1 << 17  # examples that are packed together
LEARNT = np.uint32(1 << 31)


def cache_key(**parts: Any) -> str:
    """A short hash of everything that rows depend on."""
    said = json.dumps({"version": VERSION, **parts}, sort_keys=True, default=str)
    return hashlib.sha256(said.encode()).hexdigest()[:20]


def identity_of_file(path: str) -> Any:
    """What tells one state of a file from another: its size and when it was written; None for what
    is no file.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        return None
    stat = file.stat()
    return [str(file.resolve()), stat.st_size, stat.st_mtime_ns]


def write_rows(
    folder: Path,
    examples: Iterable[Example],
    length: int,
    *,
    packing: bool = True,
    about: Mapping[str, Any] | None = None,
    tell: Callable[[int, int], None] | None = None,
) -> None:
    """Write the rows of examples into a folder, whole or not at all; `tell` is called with the
    examples and rows so far. Raises ValueError where there are none.
    """
    with replacing_folder(folder) as made:
        writer = _Writer(made, length, packing)
        with writer:
            for block in _blocks(examples):
                writer.add(block)
                if tell is not None:
                    tell(writer.examples, writer.rows)
        if not writer.rows:
            raise ValueError("there is no example to keep")
        said = {
            "version": VERSION,
            "length": length,
            "examples": writer.examples,
            "rows": writer.rows,
            "tokens": writer.tokens,
            "learnt": writer.learnt,
            "filled": (writer.tokens - writer.examples) / (writer.rows * length),
            "largest": writer.largest,
            "longest": writer.longest,
        }
        write_json(made / "rows.json", {**(about or {}), **said})


def open_rows(folder: Path) -> Rows | None:
    """The rows of a cache, fields that are read as batches ask for them; None where there is no
    whole one.
    """
    if not (folder / "rows.json").is_file():
        return None
    store = _Store(folder)
    fields: list[Any] = [Field(store, name) for name in Rows._fields]
    return Rows(*fields)


def _blocks(examples: Iterable[Example]) -> Iterator[list[Example]]:
    block: list[Example] = []
    for example in examples:
        if example.rule:
            raise ValueError("a cache holds no rules of facts: leave data.cache out")
        block.append(example)
        if len(block) == BLOCK:
            yield block
            block = []
    if block:
        yield block


class _Writer:
    """The files of a cache while they are written."""

    def __init__(self, folder: Path, length: int, packing: bool) -> None:
        self.length, self.packing = length, packing
        self.files = {n: (folder / f"{n}.bin").open("wb") for n in ("tokens", "starts", "rows")}
        self.examples = self.rows = self.tokens = self.learnt = self.largest = self.longest = 0

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *_: object) -> None:
        for name, end in (("starts", self.tokens), ("rows", self.examples)):
            self.files[name].write(np.asarray([end], np.int64).tobytes())
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())
            file.close()

    def add(self, block: list[Example]) -> None:
        """The rows of these examples."""
        bins = bins_of(block, self.length, packing=self.packing)
        ordered = [block[i] for members in bins for i in members]
        sizes = np.asarray([len(e.ids) for e in ordered], np.int64)
        ids = np.concatenate([e.ids for e in ordered]).astype(np.uint32)
        learn = np.concatenate([e.learn for e in ordered])
        first = np.cumsum([0, *map(len, bins)])[:-1] + self.examples
        begins = np.cumsum(np.r_[0, sizes])
        self.files["tokens"].write(np.where(learn, ids | LEARNT, ids).tobytes())
        self.files["starts"].write((begins[:-1] + self.tokens).tobytes())
        self.files["rows"].write(first.astype(np.int64).tobytes())
        self.examples += len(ordered)
        self.rows += len(bins)
        self.tokens += len(ids)
        learn[begins[:-1]] = False  # nothing predicts an example's first token
        self.learnt += int(learn.sum())
        self.largest = max(self.largest, int(ids.max()))
        self.longest = max(self.longest, int(sizes.max()))


class _Store:
    """A cache that is open."""

    def __init__(self, folder: Path) -> None:
        self.about = read_json(folder / "rows.json")
        self.key = folder.name
        self.shape = (int(self.about["rows"]), int(self.about["length"]))
        kinds = {"tokens": np.uint32, "starts": np.int64, "rows": np.int64}
        self.maps = {n: np.memmap(folder / f"{n}.bin", t, "r") for n, t in kinds.items()}
        self.fields = functools.lru_cache(maxsize=16)(self._fields)

    def _fields(self, chosen: tuple[int, ...]) -> dict[str, np.ndarray]:
        """All fields of these rows, as `pack` makes them."""
        shape = (len(chosen), self.shape[1])
        kinds = (np.int32, np.int32, np.float32, np.int32, np.int32)
        rows = Rows(*(np.zeros(shape, kind) for kind in kinds))
        for at, row in enumerate(chosen):
            self._fill(Rows(*(field[at] for field in rows)), row)
        return rows._asdict()

    def _fill(self, out: Rows, row: int) -> None:
        first, last = self.maps["rows"][row : row + 2]
        starts = self.maps["starts"][first : last + 1]
        kept = np.asarray(self.maps["tokens"][starts[0] : starts[-1]])
        ids, learnt = (kept & ~LEARNT).astype(np.int32), kept >= LEARNT
        place = 0
        for segment, (a, b) in enumerate(itertools.pairwise(starts), 1):
            n, a = int(b - a) - 1, int(a - starts[0])
            cut = np.s_[place : place + n]
            out.tokens[cut], out.targets[cut] = ids[a : a + n], ids[a + 1 : a + n + 1]
            out.weights[cut] = learnt[a + 1 : a + n + 1]
            out.positions[cut], out.segment_ids[cut] = np.arange(n), segment
            place += n


class Field:
    """One field of the rows of a cache: an array [N, T] that is read row by row."""

    def __init__(self, store: _Store, name: str) -> None:
        self.store, self.name = store, name
        self.shape, self.ndim = store.shape, 2
        self.size = store.shape[0] * store.shape[1]
        self.dtype = np.dtype(np.float32 if name == "weights" else np.int32)

    @property
    def digest(self) -> str:
        """What the rows are known by."""
        return f"{self.store.key}/{self.name}"

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any) -> np.ndarray:
        if isinstance(rows, slice):
            chosen = tuple(range(*rows.indices(len(self))))
        elif isinstance(rows, int | np.integer):
            return self[[rows]][0]
        else:
            chosen = tuple(int(r) % len(self) for r in rows)
        return self.store.fields(chosen)[self.name]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        whole = self[:]
        return whole if dtype is None else whole.astype(dtype)

    def max(self, axis: Any = None, out: Any = None, **_: Any) -> int:
        """The largest value, or, for segments and weights, a bound of it."""
        longest = int(self.store.about["longest"]) - 1
        bounds = {"tokens": self.store.about["largest"], "targets": self.store.about["largest"]}
        return int(bounds.get(self.name, max(longest - 1, 1)))

    def min(self, axis: Any = None, out: Any = None, **_: Any) -> int:
        """The smallest value: that of padding."""
        return 0
