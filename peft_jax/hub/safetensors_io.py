"""Reading and writing safetensors checkpoints, one file or shards with an index. No pickle,
ever.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import jax
import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from peft_jax.core.files import read_json, replacing_folder, write_json

_FLOAT8 = {"F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
CONFIG = "adapter_config.json"


class NamedTensors(Protocol):
    """Tensors by name: a checkpoint, or one whose tensors go by other names."""

    @property
    def names(self) -> list[str]:
        """The names of all."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one, which is not read."""
        ...

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """One of them, or a part of it."""
        ...


class Checkpoint:
    """Lazily read tensors of a folder. `names` lists them; `shape` and `read` look one up."""

    def __init__(self, files: dict[str, Path], handles: dict[Path, Any]) -> None:
        self._files, self._handles = files, handles

    @property
    def names(self) -> list[str]:
        return list(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape stored in the file's header."""
        return tuple(self._slice(name).get_shape())

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """The tensor, or the part of it that `index` (one slice an axis) cuts out; only that part
        is read.
        """
        part = self._slice(name)
        if part.get_dtype() in _FLOAT8:  # unknown to the library's NumPy side
            whole = mapped(self._files[name], name, _FLOAT8[part.get_dtype()])
            return np.array(whole[index] if index else whole)
        return (
            part[index]
            if index
            else part[:]
            if part.get_shape()
            else self._handles[self._files[name]].get_tensor(name)
        )

    def _slice(self, name: str) -> Any:
        return self._handles[self._files[name]].get_slice(name)


@contextlib.contextmanager
def open_checkpoint(folder: Path, single: str = SINGLE, index: str = INDEX) -> Iterator[Checkpoint]:
    """The safetensors checkpoint in `folder`.

    Raises FileNotFoundError where there is none, and ValueError for a corrupt or truncated file, or
    an index that names a file or a tensor that is not there.
    """
    with contextlib.ExitStack() as stack:
        handles: dict[Path, Any] = {}
        files: dict[str, Path] = {}
        if (folder / index).is_file():
            weight_map = read_json(folder / index).get("weight_map")
            if not isinstance(weight_map, dict):
                raise ValueError(f"{folder / index} has no weight_map")
            for file in sorted(set(weight_map.values())):
                if Path(file).name != file:
                    raise ValueError(
                        f"{folder / index} names {file!r}, which is not a file beside it"
                    )
                handles[folder / file] = stack.enter_context(_open(folder / file))
            for name, file in weight_map.items():
                if name not in handles[folder / file].keys():  # noqa: SIM118 (no mapping)
                    raise ValueError(
                        f"{folder / index} places {name} in {file}, which does not hold it"
                    )
                files[name] = folder / file
        elif (folder / single).is_file():
            handles[folder / single] = stack.enter_context(_open(folder / single))
            files = dict.fromkeys(handles[folder / single].keys(), folder / single)
        else:
            raise FileNotFoundError(_no_weights(folder, single))
        yield Checkpoint(files, handles)


def mapped(path: Path, name: str, dtype: Any) -> np.ndarray:
    """A tensor of a file that has been opened (and so checked), through its header, without reading
    the rest; mapped.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        entry = json.loads(file.read(length))[name]
    start = 8 + length + entry["data_offsets"][0]
    shape = tuple(entry["shape"])
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.memmap(path, np.uint8, "r", start, (size,)).view(dtype).reshape(shape)


def _open(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is named by the index and does not exist")
    try:
        return safe_open(path, framework="numpy")
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(
            f"{path} is not a readable safetensors file (corrupt or truncated): {error}"
        ) from error


def _no_weights(folder: Path, single: str) -> str:
    if any(folder.glob("*.bin")):
        return (
            f"{folder} holds PyTorch .bin files (pickle, which is not read); convert them "
            f"to {single}"
        )
    return f"{folder} holds no {single}"


def write_adapter(
    folder: str | os.PathLike[str], weights: str, tensors: dict[str, np.ndarray], config: Any
) -> None:
    """An adapter's folder of a configuration and one file of weights; of several hosts the first
    one writes it.
    """
    if jax.process_index() != 0:
        return
    with replacing_folder(folder) as temporary:
        write_json(temporary / CONFIG, config)
        save_tensors(temporary / weights, tensors)


def write_shards(
    folder: Path | None,
    tensors: Iterable[tuple[str, tuple[int, ...], Any, Callable[[], np.ndarray]]],
    limit: int,
) -> None:
    """Write (name, shape, dtype, reader) tensors into shards of at most `limit` bytes, with an
    index where several.

    Without a folder all is read and nothing written: so do the hosts that only send their part of
    each tensor.
    """
    shards: list[list[tuple[str, Callable[[], np.ndarray]]]] = [[]]
    sizes, size = [], 0
    for name, shape, dtype, reader in tensors:
        n = int(np.prod(shape)) * np.dtype(dtype).itemsize
        if shards[-1] and size + n > limit:
            shards.append([])
            sizes.append(size)
            size = 0
        shards[-1].append((name, reader))
        size += n
    sizes.append(size)
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards):
        file = SINGLE if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        arrays = {name: reader() for name, reader in shard}
        if folder is not None:
            save_tensors(folder / file, arrays)
        weight_map.update({name: file for name, _ in shard})
    if folder is not None and len(shards) > 1:
        write_json(
            folder / INDEX, {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}
        )


def save_tensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """One safetensors file, marked as PyTorch's layout, which is what other tools look for."""
    save_file(
        {k: np.asarray(v, order="C") for k, v in tensors.items()}, path, metadata={"format": "pt"}
    )
    path.chmod(0o644)  # the library makes files that only their owner can read
