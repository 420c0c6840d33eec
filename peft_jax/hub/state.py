"""A stage's result as a folder: any tree with its nodes, and the model's configuration.

`state.json` describes the tree, nodes with their classes and options, and the model's own
configuration; the arrays are safetensors, as they are. Only classes of this package are made, and
of packages that registered a node, a family or a storage format; nothing else is executed. On
several hosts all of them call both functions.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from peft_jax.core.files import read_json
from peft_jax.core.nodes import node_name
from peft_jax.core.roles import FAMILIES
from peft_jax.core.sharding import fetch
from peft_jax.core.stage import State
from peft_jax.core.weight import Node
from peft_jax.hub.safetensors_io import open_checkpoint, write_shards
from peft_jax.models.families import family_of
from peft_jax.quantization.formats import FORMATS

FILE, VERSION = "state.json", 1
_BYTES = 5 * 10**9  # of a file of arrays
_PLAIN = ("bool", "float16", "float32", "float64", "bfloat16")  # that the files hold as they are
Tensors = dict[str, Any]


def write_state(folder: str | os.PathLike[str], state: State, identity: Mapping[str, Any]) -> None:
    """Write a stage's result, with what identifies the run beside it. The folder, which must not be
    there, appears only when all is written.
    """
    tensors: Tensors = {}
    model, target = state.model, Path(folder)
    described = {
        "version": VERSION,
        "identity": identity,
        "mask_updates": state.mask_updates,
        "trained": state.trained,
        "numbers": dict(state.numbers),
        "task": model.task,
        "scan_layers": model.scan_layers,
        "dtypes": [jnp.dtype(model.dtype).name, jnp.dtype(model.param_dtype).name],
        "config": _described(model.config, "config", tensors),
        "params": _described(state.params, "params", tensors),
    }
    listed = [(n, np.shape(x), _stored(x.dtype), _reader(x)) for n, x in tensors.items()]
    if jax.process_index() != 0:
        return write_shards(None, listed, _BYTES)
    beside = target.with_name(f".{target.name}")
    shutil.rmtree(beside, ignore_errors=True)  # of a run that was killed while it wrote
    beside.mkdir(parents=True)
    (beside / FILE).write_text(json.dumps(described), encoding="utf-8")
    write_shards(beside, listed, _BYTES)
    os.rename(beside, target)


def _reader(x: Any) -> Callable[[], np.ndarray]:
    def read() -> np.ndarray:
        array = np.asarray(fetch(x))
        return np.ascontiguousarray(array).view(_stored(array.dtype)).reshape(array.shape)

    return read


def _stored(dtype: Any) -> np.dtype:
    """The type that a file holds for arrays of `dtype`: of the same size."""
    kind = np.dtype(dtype)
    if kind.name in _PLAIN or kind.kind in "iu":
        return kind
    return np.dtype(f"uint{8 * kind.itemsize}")


def _described(x: Any, path: str, tensors: Tensors) -> Any:
    """A value as JSON; arrays go to `tensors` under `path`."""
    if x is None or isinstance(x, bool | int | float | str):
        return x
    if isinstance(x, jax.Array | np.ndarray | np.generic):
        tensors[path] = x
        return {"tensor": path, "dtype": np.dtype(x.dtype).name}
    if isinstance(x, np.dtype) or (isinstance(x, type) and hasattr(x, "dtype")):
        return {"dtype": jnp.dtype(x).name}
    if isinstance(x, Mapping):
        return {"dict": {k: _described(y, f"{path}.{k}", tensors) for k, y in x.items()}}
    fields = _fields_of(x)
    if fields is not None:
        _check_class(type(x), path)
        kind = f"{type(x).__module__}:{type(x).__qualname__}"
        parts = {n: _described(getattr(x, n), f"{path}.{n}", tensors) for n in fields}
        return {"class": kind, "fields": parts}
    if isinstance(x, tuple | list):
        items = [_described(y, f"{path}.{i}", tensors) for i, y in enumerate(x)]
        return {type(x).__name__: items}
    raise ValueError(f"{path} is a {type(x).__name__}, which a stage's folder cannot hold")


def _fields_of(x: Any) -> list[str] | None:
    """Names of a record's fields; None of what is none."""
    if dataclasses.is_dataclass(x):
        return [f.name for f in dataclasses.fields(x) if f.init]
    return list(getattr(x, "_fields", ())) or None


def read_identity(folder: Path) -> dict[str, Any]:
    """What identifies the run that wrote a stage's folder."""
    return read_json(folder / FILE)["identity"]


def read_state(
    folder: Path, place: Callable[[Any], Any], *, remat: str, attention: str | None
) -> State:
    """The result of a stage. `place` puts a tree on the mesh; `remat` and `attention` are the
    model's, which may be others than those it was made with.

    Raises ValueError naming what cannot be read.
    """
    described = read_json(folder / FILE)
    if described.get("version") != VERSION:
        raise ValueError(
            f"{folder / FILE}: version {described.get('version')!r} is not known; this package "
            f"reads {VERSION}"
        )
    with open_checkpoint(folder) as checkpoint:
        tensors = {n: checkpoint.read(n) for n in checkpoint.names}
    config = _restored(described["config"], tensors, str(folder / FILE))
    dtype, param_dtype = map(jnp.dtype, described["dtypes"])
    module: Any = family_of(config.model_type).module
    model = module(
        config,
        task=described["task"],
        dtype=dtype,
        param_dtype=param_dtype,
        scan_layers=described["scan_layers"],
        remat=remat,
        attention_implementation=attention,
    )
    params = jax.tree.map(jnp.asarray, _restored(described["params"], tensors, str(folder / FILE)))
    kept = {name: described[name] for name in ("mask_updates", "trained", "numbers")}
    return State(model, place(params), **kept)


def _restored(spec: Any, tensors: Tensors, where: str) -> Any:
    """The value that `_described` described."""
    if not isinstance(spec, dict):
        return spec
    if "tensor" in spec:
        return tensors[spec["tensor"]].view(_dtype(spec["dtype"]))
    if "dtype" in spec:
        return _dtype(spec["dtype"])
    if "dict" in spec:
        return {k: _restored(y, tensors, where) for k, y in spec["dict"].items()}
    if "class" in spec:
        fields = {k: _restored(y, tensors, where) for k, y in spec["fields"].items()}
        return _class(spec["class"], where)(**fields)
    ((kind, items),) = spec.items()
    made = [_restored(y, tensors, where) for y in items]
    return tuple(made) if kind == "tuple" else made


def _dtype(name: str) -> np.dtype:
    return np.dtype(getattr(ml_dtypes, name, name))


def _class(name: str, where: str) -> Any:
    module, _, qualified = name.partition(":")
    found = getattr(sys.modules.get(module), qualified, None)
    record = dataclasses.is_dataclass(found) or hasattr(found, "_fields")
    if not (isinstance(found, type) and record):
        raise ValueError(f"{where} has a node of the class {name}, which is not imported")
    _check_class(found, where)
    return found


def _check_class(cls: type, where: str) -> None:
    """Raise ValueError for a class that a folder may not name."""
    if issubclass(cls, Node):
        node_name(cls)  # says what to register
        return
    sources = [f.config for f in FAMILIES.values()] + [f.made for f in FORMATS.values()]
    known = {"peft_jax", *(_root(source) for source in sources)}
    if _root(cls) not in known:
        raise ValueError(
            f"{where} is of the class {cls.__module__}.{cls.__qualname__}, of a package that "
            "registered no family or storage format; a stage's folder cannot hold it"
        )


def _root(source: Any) -> str:
    """The package that something is defined in."""
    return source.__module__.partition(".")[0]
