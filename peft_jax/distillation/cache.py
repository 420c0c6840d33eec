"""A teacher's most likely next tokens on disk: written once in shards, resumed, and read back row
by row.

A folder holds `teacher.json`, which says whose they are and of what data, and
`shard-00000.safetensors`, ... with `ids` [rows, T, k] (uint16 or uint32) and `log_probs` [rows, T,
k + 1] (float16 or float32): of these tokens and of all the others together.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import save_file

from peft_jax.core.files import read_json, write_json
from peft_jax.hub.safetensors_io import Checkpoint, mapped, open_checkpoint

MANIFEST = "teacher.json"
FORMAT = 1
Read = Callable[[int, int], tuple[np.ndarray, np.ndarray]]
_NAMES = {
    "tokenizer": "tokenizer",
    "data": "data",
    "rows": "number of rows",
    "length": "sequence length",
    "vocabulary": "vocabulary",
    "temperature": "temperature",
    "teacher": "teacher",
    "k": "number of tokens kept",
    "dtype": "precision",
    "shard_rows": "number of rows in a shard",
}


class CacheHeader(NamedTuple):
    """Whose predictions a cache holds, of what, and how."""

    teacher: str  # hash of the model
    tokenizer: str  # hash of the vocabulary
    data: str  # hash of the rows
    rows: int
    length: int
    vocabulary: int
    k: int
    temperature: float
    dtype: str = "float16"
    shard_rows: int = 256

    @property
    def shards(self) -> int:
        return math.ceil(self.rows / self.shard_rows)

    @property
    def ids_dtype(self) -> Any:
        return np.uint16 if self.vocabulary <= 2**16 else np.uint32

    @property
    def bytes_per_token(self) -> int:
        """Of ids and log-probabilities."""
        return (
            self.k * np.dtype(self.ids_dtype).itemsize
            + (self.k + 1) * np.dtype(self.dtype).itemsize
        )

    def count(self, shard: int) -> int:
        """Rows in a shard."""
        return min(self.shard_rows, self.rows - shard * self.shard_rows)


def _file(shard: int) -> str:
    return f"shard-{shard:05d}.safetensors"


def write_cache(
    folder: Path,
    header: CacheHeader,
    read: Read,
    progress: Callable[[int], Any] = lambda rows: None,
) -> int:
    """Write what is missing of a cache and return how many shards were there already.

    `read(start, stop)` gives (ids [n, T, k], log-probabilities [n, T, k + 1]) of rows start..stop;
    `progress` hears how many rows are done. Each shard appears whole or not at all. Raises
    ValueError where the folder holds another teacher's cache, or one of other data or another form.
    """
    folder.mkdir(parents=True, exist_ok=True)
    done: dict[str, int] = {}
    if (folder / MANIFEST).exists():
        known, done = _manifest(folder)
        _same(folder, known, header._asdict(), "remove it, or give another folder")
    done = {
        name: size
        for name, size in done.items()
        if (folder / name).is_file() and (folder / name).stat().st_size == size
    }
    before = len(done)
    for shard in range(header.shards):
        start, name = shard * header.shard_rows, _file(shard)
        if name not in done:
            ids, log_probs = read(start, start + header.count(shard))
            temporary = folder / f".{name}"
            tensors = {
                "ids": ids.astype(header.ids_dtype),
                "log_probs": log_probs.astype(header.dtype),
            }
            save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, temporary)
            temporary.chmod(0o644)
            done[name] = temporary.stat().st_size
            os.replace(temporary, folder / name)
            manifest = {"format": FORMAT, **header._asdict(), "shards": done}
            write_json(folder / MANIFEST, manifest)
        progress(start + header.count(shard))
    return before


def _manifest(folder: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """(the header's fields, shard -> its size in bytes) of a cache."""
    manifest = read_json(folder / MANIFEST)
    if manifest.get("format") != FORMAT:
        raise ValueError(
            f"{folder / MANIFEST} has format {manifest.get('format')!r}; this version reads "
            f"{FORMAT}"
        )
    shards = manifest.get("shards")
    if not isinstance(shards, dict) or not all(isinstance(n, int) for n in shards.values()):
        raise ValueError(f"{folder / MANIFEST} lists no shards")
    return manifest, shards


def _same(folder: Path, known: Mapping[str, Any], wanted: Mapping[str, Any], advice: str) -> None:
    for name, value in wanted.items():
        if known.get(name) != value:
            raise ValueError(
                f"{folder} was written with another {_NAMES[name]}: {known.get(name)!r}, and here "
                f"it is {value!r}; {advice}"
            )


class CachedRows:
    """An array [N, T, n] in shards, read as its rows are asked for by their numbers."""

    def __init__(self, shards: list[np.ndarray], shard_rows: int) -> None:
        self._shards, self._size = shards, shard_rows
        self.shape = (sum(map(len, shards)), *shards[0].shape[1:])
        self.ndim = len(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any) -> np.ndarray:
        rows = np.arange(len(self))[rows] if isinstance(rows, slice) else np.asarray(rows)
        return np.stack([self._shards[i // self._size][i % self._size] for i in rows.tolist()])


class Cached(NamedTuple):
    """A teacher's predictions: ids [N, T, k] and log-probabilities [N, T, k + 1], read row by row,
    and what the cache is.
    """

    ids: CachedRows
    log_probs: CachedRows
    header: CacheHeader


def open_cache(folder: Path, **wanted: Any) -> Cached:
    """The cache in a folder, which has to agree with what is `wanted` of the fields of
    `CacheHeader`.

    Raises FileNotFoundError where there is none, and ValueError with the reason where it was made
    of something else (another tokenizer, other data), is not finished, or a shard is missing,
    truncated or of another shape.
    """
    if not (folder / MANIFEST).is_file():
        raise FileNotFoundError(f"{folder} holds no {MANIFEST}; `peft-jax teach` writes one")
    known, sizes = _manifest(folder)
    _same(folder, known, wanted, "run `peft-jax teach` with this run's configuration")
    try:
        header = CacheHeader(**{name: known[name] for name in CacheHeader._fields})
    except KeyError as error:
        raise ValueError(f"{folder / MANIFEST} lacks {error.args[0]!r}") from error
    if len(sizes) < header.shards:
        raise ValueError(
            f"{folder} holds {len(sizes)} of {header.shards} shards; run `peft-jax teach` again, "
            "which goes on where it ended"
        )
    made = [
        _shard(folder / _file(i), sizes.get(_file(i), -1), header, header.count(i))
        for i in range(header.shards)
    ]
    ids, log_probs = zip(*made, strict=True)
    of = functools.partial(CachedRows, shard_rows=header.shard_rows)
    return Cached(of(list(ids)), of(list(log_probs)), header)


def _shard(file: Path, size: int, header: CacheHeader, count: int) -> tuple[np.ndarray, np.ndarray]:
    if not file.is_file():
        raise ValueError(f"{file} is missing; run `peft-jax teach` again, which writes it")
    if file.stat().st_size != size:
        raise ValueError(
            f"{file} is truncated or changed: {file.stat().st_size} bytes of {size}; run `peft-jax "
            "teach` again, which mends it"
        )
    with open_checkpoint(file.parent, single=file.name, index="") as opened:
        _expect(opened, "ids", (count, header.length, header.k), file)
        _expect(opened, "log_probs", (count, header.length, header.k + 1), file)
    return mapped(file, "ids", header.ids_dtype), mapped(file, "log_probs", np.dtype(header.dtype))


def _expect(opened: Checkpoint, name: str, shape: tuple[int, ...], file: Path) -> None:
    found = opened.shape(name) if name in opened.names else None
    if found != shape:
        raise ValueError(
            f"{file} holds {name} {found}, expected {shape}; run `peft-jax teach` into "
            "another folder"
        )
