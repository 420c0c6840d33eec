"""Hugging Face PEFT adapter folders (`adapter_config.json`, `adapter_model.safetensors`) in and
out.

Tensors decide which modules an adapter touches; the config gives the method, its numbers and what
else was trained. `formats` knows each method's tensors and options; what they have in common is
here.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from peft_jax.core.attachment import Shared
from peft_jax.core.files import read_json
from peft_jax.core.reparametrised import MATRIX, TRANSPOSED, Replacement, replacement, replacements
from peft_jax.core.roles import is_expert
from peft_jax.core.select import OUTPUT_EMBEDDING, nearest
from peft_jax.core.sharding import fetch
from peft_jax.core.tree import is_node, map_places, places, stack_of
from peft_jax.core.weight import Axes, Trainable, Weight, matrix_shape
from peft_jax.hub.names import embedding_name, is_conv1d, modules_of, stack_size
from peft_jax.hub.peft.experts import as_modules, attach_experts, expert_tensors, experts_config
from peft_jax.hub.peft.formats import COMMON, FORMATS, Config, Format, Module, Tensors
from peft_jax.hub.peft.prompts import (
    WHOLE_FORMATS,
    load_whole,
    saved_modules,
    trained_place,
    trained_tensors,
    whole_modules,
)
from peft_jax.hub.peft.tied import (
    check_look_up,
    check_tokens,
    for_head,
    own_heads,
    put_stored,
    split_tie,
    tie_of,
    tied_tensors,
)
from peft_jax.hub.safetensors_io import CONFIG, open_checkpoint, write_adapter
from peft_jax.models.families import FAMILIES

WEIGHTS = "adapter_model.safetensors"
_ROOT, _PREFIX = "base_model.", "base_model.model."
_TOKENS = FORMATS["TRAINABLE_TOKENS"]
_ADAPTED = ("kernel", "embedding", OUTPUT_EMBEDDING)  # leaves whose modules PEFT wraps
_CHANGE_BASE = (
    "init_lora_weights",
    "init_weights",
)  # options under which a method starts from another base
_HARMLESS_STARTS = (
    True,
    False,
    None,
    "gaussian",
    "orthogonal",
    "eva",
    "xavier_uniform",
    "kaiming_uniform",
    "bat",
    "mini",
    "lycoris",
    "mica",
)


# --------------------------------------------------------------------------------------------------
# saving


def save_peft(
    folder: str | os.PathLike[str],
    params: Any,
    *,
    name: str = "default",
    base: str | None = None,
    revision: str | None = None,
    task_type: str | None = "CAUSAL_LM",
) -> None:
    """Write the adapter `name` of one of the methods in `FORMATS` as a PEFT folder; see
    `peft_jax.save_adapter`.
    """
    nodes, tokens, trained = _collect(params, name)
    if not nodes:
        nodes, tokens = tokens, {}
    if not nodes:
        raise ValueError(f"the tree holds no adapter named {name!r}")
    peft_type, kind = _format_of(nodes)
    experts = {path: nodes.pop(path) for path in list(nodes) if is_expert(path)}
    # Of a model without a head, the trunk is all that there is in PEFT.
    bare = f"{trunk_of(params)}." if task_type == "FEATURE_EXTRACTION" else ""

    def own(name):
        return name.removeprefix(bare)

    tie = None if task_type == "FEATURE_EXTRACTION" else tie_of(params)
    check_tokens(
        params, {p: w for p, w in (tokens | nodes).items() if isinstance(w, _TOKENS.nodes)}
    )
    modules = {own(m): n for path, w in nodes.items() for m, n in _by_module(path, w).items()}
    embeddings = {
        own(m)
        for path, w in nodes.items()
        if path.endswith("/embedding")
        for m in _by_module(path, w)
    }
    if tie and tie[0] in nodes and kind is not _TOKENS:
        modules[tie[1]] = for_head(modules[own(embedding_name(tie[0]))], tie[0])
    tensors = {
        f"{_PREFIX}{m}.{t}": v
        for m, n in modules.items()
        for t, v in kind.write(n, m in embeddings).items()
    }
    tensors |= {
        f"{_ROOT}{t}": take(params[f"shared_{_group(nodes)}"]) for t, take in kind.shared.items()
    }
    for path, w in tokens.items():
        for module, node in _by_module(path, w).items():
            tensors |= {
                f"{_PREFIX}{own(module)}.token_adapter.{t}": v
                for t, v in _TOKENS.write(node, True).items()
            }
    whole = own_heads(params, task_type, name) | trained | tied_tensors(params, tie, name)
    check_look_up(
        [*(modules if kind is not _TOKENS else ()), *(t.rpartition(".")[0] for t in whole)]
    )
    for tensor, value in whole.items():  # an adapted module keeps what is its own in `base_layer`
        module, _, leaf = own(tensor).rpartition(".")
        tensors[f"{_PREFIX}{module}.{'base_layer.' if module in modules else ''}{leaf}"] = value
    config = {
        "peft_type": peft_type,
        "target_modules": _target_modules(params, modules),
        "fan_in_fan_out": bool(modules) and all(map(is_conv1d, modules)),
        "inference_mode": True,
        "base_model_name_or_path": base,
        "revision": revision,
        "task_type": task_type,
        **_extras_config(params, peft_type, tie, name),
        **kind.describe(
            modules
            | {n: lora for path, w in experts.items() for n, lora in as_modules(path, w).items()}
        ),
        **_tokens_config(tokens, peft_type),
        **(
            {"ensure_weight_tying": _adapts(params, nodes, tie, name)}
            if peft_type == "LORA"
            else {}
        ),
    }
    if experts:
        tensors |= {_PREFIX + own(t): value for t, value in expert_tensors(experts).items()}
        config |= experts_config(experts)
    if peft_type == "TRAINABLE_TOKENS":
        config = {
            k: v
            for k, v in config.items()
            if k not in ("bias", "modules_to_save", "fan_in_fan_out")
        }
    write_adapter(folder, WEIGHTS, tensors, config)


def trunk_of(params: Any) -> str | None:
    """The module of a tree that holds everything but its head; None where the tree itself does."""
    return next((f.prefix for f in FAMILIES.values() if f.prefix in params), None)


def _collect(params: Any, name: str) -> tuple[dict[str, Any], dict[str, Any], Tensors]:
    """(adapter nodes by path, trainable-token nodes by path, other trained tensors by checkpoint
    name).
    """
    nodes, tokens, trained = {}, {}, {}
    for path, w in places(params).items():
        stack = stack_of(w)
        for i, node in enumerate(stack):
            if isinstance(node, Trainable):
                raise ValueError(
                    f"{path} is fully fine-tuned, which an adapter cannot hold; use merge and save"
                )
            if isinstance(node, Replacement):
                trained.update(trained_tensors(path, node) if node.name == name else {})
            elif getattr(node, "name", None) == name:
                if any(getattr(outer, "pruned", False) for outer in stack[:i]):
                    raise ValueError(
                        f"the update at {path} is masked, which PEFT's format cannot say; use "
                        "merge and save"
                    )
                (tokens if isinstance(node, _TOKENS.nodes) else nodes).setdefault(path, node)
            elif (
                node.trainable
                and not node.frozen
                and not isinstance(node, Shared)
                and not hasattr(node, "name")
            ):
                raise ValueError(
                    f"{path} holds a {type(node).__name__}, which PEFT's format cannot hold"
                )
    return nodes, tokens, trained


def _format_of(nodes: Mapping[str, Any]) -> tuple[str, Format]:
    """The one format of an adapter's nodes."""
    kinds = {
        path: next((k for k, f in FORMATS.items() if isinstance(w, f.nodes)), None)
        for path, w in nodes.items()
    }
    for path, kind in kinds.items():
        if kind is None:
            raise ValueError(
                f"{path} holds a {type(nodes[path]).__name__}, which PEFT has no format for"
            )
    if len(set(kinds.values())) > 1:
        first, other = sorted({str(k) for k in kinds.values()})[:2]
        raise ValueError(
            f"a PEFT folder holds one method, this adapter has {first} and {other}; give them "
            "different names"
        )
    kind = str(next(iter(kinds.values())))
    return kind, FORMATS[kind]


def _group(nodes: Mapping[str, Any]) -> str:
    return next(iter(nodes.values())).group


def _by_module(path: str, node: Any) -> dict[str, Any]:
    """Hugging Face module name -> the node of one layer, with NumPy arrays and its base's shape."""
    layers = stack_size(path, node)
    if len(node.lead) != (layers is not None):
        raise ValueError(f"{path} has leading axes {node.lead} that PEFT's format cannot hold")
    bare = jax.tree.map(fetch, node.replace(base=None))
    shape = jax.ShapeDtypeStruct(node.features, node.dtype)
    result = {}
    for name, layer in modules_of(path, layers):
        one = bare if layer is None else jax.tree.map(lambda x, i=layer: x[i], bare)
        if one.gate is None or one.gate > 0:
            one = one.replace(base=shape, in_axes=(-2,), out_axes=(-1,))
            turned = (
                path.endswith(f"/{OUTPUT_EMBEDDING}")
                and node.in_axes == (-2,)
                and type(node) not in _TOKENS.nodes
            )
            result[name] = for_head(one, path) if turned else one
    return result


def _adapts(params: Any, nodes: Mapping[str, Any], tie: tuple[str, str] | None, name: str) -> bool:
    """Whether a tied embedding is adapted or trained whole, as the head too."""
    return tie is not None and (
        tie[0] in nodes or replacement(places(params)[tie[0]], name) is not None
    )


def _extras_config(
    params: Any, peft_type: str, tie: tuple[str, str] | None, name: str
) -> dict[str, Any]:
    """The options `bias` and `modules_to_save`."""
    marked = replacements(params, name)
    biases = [p for p in places(params) if p.endswith("/bias")]
    trained = [p for p, w in marked.items() if w.saved_as == "bias"]
    if trained and peft_type != "LORA":
        raise ValueError(f"{trained[0]} trains, which PEFT's {peft_type} format cannot hold")
    bias = "none" if not trained else "all" if len(trained) == len(biases) else "lora_only"
    return {
        "modules_to_save": saved_modules(params, name, tie) or None,
        **({"bias": bias} if trained else {}),
    }


def _tokens_config(tokens: Mapping[str, Any], peft_type: str) -> dict[str, Any]:
    if not tokens:
        return {}
    if peft_type != "LORA":
        raise ValueError(
            f"{next(iter(tokens))} has trainable tokens, which PEFT combines with LoRA only, not "
            f"{peft_type}"
        )
    names = {path: modules_of(path, None)[0][0].rpartition(".")[2] for path in tokens}
    return {"trainable_token_indices": {names[p]: fetch(w.ids).tolist() for p, w in tokens.items()}}


def _target_modules(params: Any, modules: Mapping[str, Any]) -> list[str]:
    """Short names where all modules of a name are adapted, full names elsewhere."""
    everywhere: Counter[str] = Counter()
    for path, w in places(params).items():
        if path.rpartition("/")[2] in _ADAPTED:
            names = modules_of(path, stack_size(path, w))
            everywhere.update(name.rpartition(".")[2] for name, _ in names)
    here = Counter(m.rpartition(".")[2] for m in modules)
    complete = {n for n, count in here.items() if count == everywhere[n]}
    return sorted(complete | {m for m in modules if m.rpartition(".")[2] not in complete})


# --------------------------------------------------------------------------------------------------
# loading


def load_peft(params: Any, path: Path, *, name: str) -> Any:
    """`params` with the adapter of a PEFT folder; see `peft_jax.load_adapter`."""
    config = read_json(path / CONFIG)
    kind = None if config.get("peft_type") in WHOLE_FORMATS else _check_config(config, path)
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
        and not any(n.startswith(f"{_PREFIX}{trunk}.") for n in tensors)
    ):
        tensors = {
            n.replace(_PREFIX, f"{_PREFIX}{trunk}.", 1): value for n, value in tensors.items()
        }
    if kind is None:
        return load_whole(params, tensors, config, name, path)
    return attach_peft(params, tensors, config, name, path)


def attach_peft(params: Any, tensors: Tensors, config: Config, name: str, path: Path) -> Any:
    """`params` with an adapter of one of the methods in `FORMATS`; `path` is named in errors."""
    try:
        return _attach_all(params, tensors, config, FORMATS[config["peft_type"]], name, path)
    except KeyError as error:
        raise ValueError(
            f"the adapter in {path} lacks a tensor {error} that its method needs"
        ) from error


def _attach_all(
    params: Any, tensors: Tensors, config: Config, kind: Format, name: str, path: Path
) -> Any:
    modules, tokens, shared, extras = _parse(tensors, config, kind, path)
    check_look_up(
        [*(modules if kind is not _TOKENS else ()), *(t.rpartition(".")[0] for t in extras)]
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
        return _attach_nodes(place, w, tokens, config, _TOKENS, name)

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


def _check_config(config: Config, path: Path) -> Format:
    peft_type = config.get("peft_type")
    if peft_type not in FORMATS:
        raise ValueError(
            f"{path / CONFIG}: peft_type {peft_type!r} is not supported; supported: "
            f"{', '.join((*FORMATS, *WHOLE_FORMATS))}"
        )
    kind = FORMATS[peft_type]
    for key, value in config.items():
        if key not in kind.options | COMMON and value:
            raise ValueError(f"{path / CONFIG}: option {key}={value!r} is not supported")
    for key in _CHANGE_BASE:
        if (start := config.get(key, True)) not in _HARMLESS_STARTS:
            raise ValueError(
                f"{path / CONFIG}: {key}={start!r} changes the base model's weights; "
                "save it with PEFT's path_initial_model_for_weight_conversion first"
            )
    return kind


def _parse(
    tensors: Tensors, config: Config, kind: Format, path: Path
) -> tuple[dict[str, Tensors], dict[str, Tensors], Tensors, Tensors]:
    """(tensors of the adapter by module, of trainable tokens by module, shared ones, others by
    checkpoint name).
    """
    modules: dict[str, Tensors] = {}
    tokens: dict[str, Tensors] = {}
    shared: Tensors = {}
    extras: Tensors = {}
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
        if not key.startswith(_PREFIX):
            raise ValueError(f"{path / WEIGHTS}: tensor {key} does not begin with {_PREFIX}")
        rest = key.removeprefix(_PREFIX)
        for names, found in ((kind.tensors, modules), (_TOKENS.tensors, tokens)):
            if end := next((t for t in names if rest.endswith("." + t)), None):
                value = value if whole else value.astype(np.float32)
                found.setdefault(rest.removesuffix("." + end), {})[end] = value
                break
        else:
            if re.search(
                r"\.(lora|vera|hada|lokr|oft|boft|hra|fourierft|vblora|miss|shira|c3a|road|waveft|hira|gralora|ia3)_",
                rest,
            ):
                raise ValueError(
                    f"{path / WEIGHTS}: tensor {key} belongs to an option that is not supported"
                )
            extras[rest.replace(".base_layer.", ".")] = value
    return modules, tokens, shared, extras


def _attach_nodes(
    path: str, w: Any, modules: dict[str, Tensors], config: Config, kind: Format, name: str
) -> Any:
    """The place with its part of the adapter, which is taken out of `modules`."""
    leaf = path.rpartition("/")[2]
    if leaf not in _ADAPTED:
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


def _axes(leaf: str, kind: Format) -> tuple[Axes, Axes]:
    """The axes of a weight that a method has as (inputs, outputs): those of trainable tokens are a
    row for each token.
    """
    by_token = leaf == "kernel" if kind is _TOKENS else leaf == OUTPUT_EMBEDDING
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
