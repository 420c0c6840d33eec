"""Adapters in, from Hugging Face PEFT folders."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from peft_jax.core.attachment import Shared
from peft_jax.core.files import read_json
from peft_jax.core.reparametrised import MATRIX, TRANSPOSED
from peft_jax.core.roles import is_expert
from peft_jax.core.select import OUTPUT_EMBEDDING, nearest
from peft_jax.core.tree import is_node, map_places, places
from peft_jax.core.weight import Axes, Weight, matrix_shape
from peft_jax.hub.names import modules_of, stack_size
from peft_jax.hub.peft.experts import attach_experts
from peft_jax.hub.peft.formats import (
    COMMON,
    PEFT_FORMATS,
    PREFIX,
    WEIGHTS,
    Config,
    Module,
    PeftFormat,
    Tensors,
    WholeFormat,
    module_formats,
)
from peft_jax.hub.peft.saving import ADAPTED, trunk_of
from peft_jax.hub.peft.tied import check_look_up, put_stored, split_tie
from peft_jax.hub.peft.trainable_tokens import FORMAT as TOKENS
from peft_jax.hub.peft.whole import load_whole, trained_place, whole_modules
from peft_jax.hub.safetensors_io import CONFIG, open_checkpoint

_CHANGE_BASE = (
    "init_lora_weights",
    "init_weights",
)  # options under which a method starts from another base


def load_peft(params: Any, path: Path, *, name: str) -> Any:
    """`params` with the adapter of a PEFT folder; see `peft_jax.load_adapter`."""
    config = read_json(path / CONFIG)
    kind = _find_format(config, path)
    if not (path / WEIGHTS).is_file() and any(path.glob("adapter_model.bin")):
        raise ValueError(
            f"{path} holds adapter_model.bin (pickle, which is not read); convert it to {WEIGHTS}"
        )
    with open_checkpoint(path, WEIGHTS, WEIGHTS + ".index.json") as checkpoint:
        tensors = {n: checkpoint.read(n) for n in checkpoint.names}
    trunk = trunk_of(params)
    if (
        config.get("task_type") == "FEATURE_EXTRACTION"
        and trunk
        and not any(n.startswith(f"{PREFIX}{trunk}.") for n in tensors)
    ):
        tensors = {n.replace(PREFIX, f"{PREFIX}{trunk}.", 1): value for n, value in tensors.items()}
    if isinstance(kind, WholeFormat):
        return load_whole(params, tensors, config, kind, name, path)
    return attach_peft(params, tensors, config, name, path)


def attach_peft(params: Any, tensors: Tensors, config: Config, name: str, path: Path) -> Any:
    """`params` with an adapter of a method that is stored by module; `path` is named in errors."""
    kind = PEFT_FORMATS[config["peft_type"]]
    assert isinstance(kind, PeftFormat)
    try:
        return _attach_all(params, tensors, config, kind, name, path)
    except KeyError as error:
        raise ValueError(
            f"the adapter in {path} lacks a tensor {error} that its method needs"
        ) from error


def _attach_all(
    params: Any, tensors: Tensors, config: Config, kind: PeftFormat, name: str, path: Path
) -> Any:
    modules, tokens, shared, extras = _parse(tensors, config, kind, path)
    check_look_up(
        [*(modules if kind is not TOKENS else ()), *(t.rpartition(".")[0] for t in extras)]
    )
    params = put_stored(params, extras, config, name)
    params = split_tie(params, modules, tokens, extras, config, kind)
    known_places = places(params)
    known = [n for p, w in known_places.items() for n, _ in modules_of(p, stack_size(p, w))]
    whole = whole_modules(extras)

    def attach(place: str, w: Any) -> Any:
        if not isinstance(w, Weight) and is_node(w):
            return w
        w = trained_place(place, w, extras, whole, name, known_places)
        if is_expert(place):
            return attach_experts(place, w, modules, config, name)
        w = _attach_nodes(place, w, modules, config, kind, name)
        return _attach_nodes(place, w, tokens, config, TOKENS, name)

    result = map_places(attach, params)
    if left := sorted([*modules, *tokens, *extras]):
        raise ValueError(
            f"the adapter in {path} has {left[0]}, which the model lacks.{nearest(left[0], known)}"
        )
    if kind.read_shared is None:
        return result
    group = f"{config['peft_type'].lower()}_{name}"
    sizes = [w.features for w in places(result).values() if getattr(w, "group", "") == group]
    trained, fixed = kind.read_shared(
        shared, config, (max(n for n, _ in sizes), max(n for _, n in sizes))
    )
    arrays = [
        {k: jnp.asarray(v, jnp.float32) for k, v in part.items()} for part in (trained, fixed)
    ]
    return {**result, f"shared_{group}": Shared(trained=arrays[0], fixed=arrays[1])}


def _find_format(config: Config, path: Path) -> PeftFormat | WholeFormat:
    """The format of a folder. Raises ValueError for an unknown one, and for options that are not
    understood.
    """
    peft_type = config.get("peft_type")
    if peft_type not in PEFT_FORMATS:
        raise ValueError(
            f"{path / CONFIG}: peft_type {peft_type!r} is not supported; supported: "
            f"{', '.join(PEFT_FORMATS)}"
        )
    kind = PEFT_FORMATS[config["peft_type"]]
    if isinstance(kind, PeftFormat):
        _check_options(config, kind, path)
    return kind


def _check_options(config: Config, kind: PeftFormat, path: Path) -> None:
    for key, value in config.items():
        if key not in kind.options | COMMON and value:
            raise ValueError(f"{path / CONFIG}: option {key}={value!r} is not supported")
    for key in _CHANGE_BASE:
        if (start := config.get(key, True)) not in (True, False, None, *kind.starts):
            raise ValueError(
                f"{path / CONFIG}: {key}={start!r} changes the base model's weights; "
                "save it with PEFT's path_initial_model_for_weight_conversion first"
            )


def _parse(
    tensors: Tensors, config: Config, kind: PeftFormat, path: Path
) -> tuple[dict[str, Tensors], dict[str, Tensors], Tensors, Tensors]:
    """(tensors of the adapter by module, of trainable tokens by module, shared ones, others by
    checkpoint name).
    """
    modules: dict[str, Tensors] = {}
    tokens: dict[str, Tensors] = {}
    shared: Tensors = {}
    extras: Tensors = {}
    stems = "|".join(_stems())
    for key, value in tensors.items():
        whole = key.endswith("_indices")
        if (
            (value.dtype.kind != "i")
            if whole
            else (value.dtype.kind not in "fV" and value.dtype.name != "bfloat16")
        ):
            raise ValueError(
                f"{path / WEIGHTS}: tensor {key} has dtype {value.dtype}, expected "
                f"{'integers' if whole else 'floating point'}"
            )
        if (
            last := key.rpartition(".")[2]
        ) in kind.shared:  # some of PEFT's methods repeat them beside each module
            shared[last] = value.astype(np.float32)
            continue
        if not key.startswith(PREFIX):
            raise ValueError(f"{path / WEIGHTS}: tensor {key} does not begin with {PREFIX}")
        rest = key.removeprefix(PREFIX)
        for names, found in ((kind.tensors, modules), (TOKENS.tensors, tokens)):
            if end := next((t for t in names if rest.endswith("." + t)), None):
                value = value if whole else value.astype(np.float32)
                found.setdefault(rest.removesuffix("." + end), {})[end] = value
                break
        else:
            if re.search(rf"\.({stems})_", rest):
                raise ValueError(
                    f"{path / WEIGHTS}: tensor {key} belongs to an option that is not supported"
                )
            extras[rest.replace(".base_layer.", ".")] = value
    return modules, tokens, shared, extras


def _stems() -> list[str]:
    """What the names of the methods' tensors begin with: "lora" of "lora_A.weight"."""
    formats = [f for f in module_formats() if f is not TOKENS]  # whose own are read with any method
    return sorted({t.partition("_")[0] for f in formats for t in f.tensors})


def _attach_nodes(
    path: str, w: Any, modules: dict[str, Tensors], config: Config, kind: PeftFormat, name: str
) -> Any:
    """The place with its part of the adapter, which is taken out of `modules`."""
    leaf = path.rpartition("/")[2]
    if leaf not in ADAPTED:
        return w
    names = modules_of(path, stack_size(path, w))
    mine = {layer: (m, modules.pop(m)) for m, layer in names if m in modules}
    if not mine:
        return w
    axes = _axes(leaf, kind)
    lead, n_in, n_out = matrix_shape(w.shape, *axes)
    group = f"{config['peft_type'].lower()}_{name}" if kind.read_shared else ""
    read = {
        i: kind.read(t, config, Module(m, n_in, n_out, leaf == "embedding"))
        for i, (m, t) in mine.items()
    }
    for i, (cls, fields) in read.items():
        make: Any = cls
        _check_shapes(
            make(base=jax.ShapeDtypeStruct((n_in, n_out), w.dtype), group=group, **fields),
            mine[i][0],
        )
    node: Any = {cls for cls, _ in read.values()}.pop()
    static, arrays = _split_fields(node, next(iter(read.values()))[1])
    fields = (
        _stack_layers([read[i][1] if i in read else None for _, i in names], arrays, path)
        if lead
        else arrays
    )
    gate = (
        None
        if len(mine) == len(names)
        else jnp.asarray([float(i in mine) for _, i in names], jnp.float32)
    )
    where = {"in_axes": axes[0], "out_axes": axes[1]}
    return node(
        base=w,
        gate=gate,
        name=name,
        group=group,
        **where,
        **static,
        **jax.tree.map(_to_jax, fields),
    )


def _axes(leaf: str, kind: PeftFormat) -> tuple[Axes, Axes]:
    """The axes of a weight that a method has as (inputs, outputs): those of trainable tokens are a
    row for each token.
    """
    by_token = leaf == "kernel" if kind is TOKENS else leaf == OUTPUT_EMBEDDING
    return TRANSPOSED if by_token else MATRIX


def _to_jax(x: Any) -> jax.Array:
    return jnp.asarray(x) if np.asarray(x).dtype.kind == "i" else jnp.asarray(x, jnp.float32)


def _split_fields(
    node: type[Weight], fields: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(static fields, arrays) of what a format read."""
    fixed = {f.name for f in dataclasses.fields(node) if f.metadata.get("static")}  # type: ignore[arg-type]
    return {k: v for k, v in fields.items() if k in fixed}, {
        k: v for k, v in fields.items() if k not in fixed
    }


def _stack_layers(
    layers: list[dict[str, Any] | None], arrays: dict[str, Any], path: str
) -> dict[str, Any]:
    """Arrays of all layers with a leading axis: those of smaller rank padded, missing ones (gated
    off) a copy of another.
    """
    present = [{k: one[k] for k in arrays} if one is not None else arrays for one in layers]

    def stack(*values: Any) -> np.ndarray:
        shapes = {np.shape(v) for v in values}
        largest = tuple(max(sizes) for sizes in zip(*shapes, strict=True))
        pads = [[(0, n - m) for n, m in zip(largest, np.shape(v), strict=True)] for v in values]
        return np.stack(
            [np.pad(v, pad) if pad else np.asarray(v) for v, pad in zip(values, pads, strict=True)]
        )

    try:
        return jax.tree.map(stack, *present)
    except ValueError as error:
        raise ValueError(
            f"layers of {path} differ in more than rank; load the model with scan_layers=False"
        ) from error


def _check_shapes(node: Any, module: str) -> None:
    """Raise ValueError where the arrays read for a module do not fit its weight."""
    if node.group:
        return  # what it shares is not there yet; `distribute` fits by slicing
    arrays = {k: np.shape(v) for k, v in vars(node).items() if isinstance(v, np.ndarray)}
    try:
        shape = jax.eval_shape(lambda n: n.materialize(), node).shape
    except (TypeError, ValueError, IndexError, ZeroDivisionError) as error:
        raise ValueError(
            f"the adapter's arrays for {module} are {arrays}; the weight is {node.shape}"
        ) from error
    if shape != node.shape:
        raise ValueError(
            f"the adapter's arrays for {module} are {arrays}; the weight is {node.shape}"
        )
