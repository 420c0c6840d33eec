"""Folders of methods that PEFT stores for a model as a whole, and whole modules that train beside
an adapter (PEFT's `modules_to_save`).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from peft_jax.core.attachment import Attachment
from peft_jax.core.reparametrised import Replacement, replacements
from peft_jax.core.sharding import fetch
from peft_jax.core.tree import map_places, places
from peft_jax.hub.names import modules_of, stack_size, tensors_of
from peft_jax.hub.peft.formats import WEIGHTS, Config, Tensors, WholeFormat
from peft_jax.hub.peft.tied import (
    own_heads,
    put_stored,
    read_replacement,
    split_tie,
    tie_of,
    tied_tensors,
)
from peft_jax.hub.safetensors_io import write_adapter


def save_whole(
    folder: str | os.PathLike[str],
    params: Any,
    nodes: Mapping[str, Any],
    kind: WholeFormat,
    *,
    name: str,
    base: Any,
    revision: Any,
    task_type: Any,
) -> None:
    """Write the adapter `name`, whose nodes are these, as a PEFT folder of the method `kind`."""
    modules = {
        p: n
        for p, n in nodes.items()
        if isinstance(n, Replacement) and n.saved_as in ("module", "base")
    }
    own = {p: n for p, n in nodes.items() if p not in modules}
    tensors, config = kind.write(params, own, name)
    tie = None if task_type == "FEATURE_EXTRACTION" else tie_of(params)
    whole = {
        t: value for path, n in modules.items() for t, value in trained_tensors(path, n).items()
    }
    whole = own_heads(params, task_type, name) | whole | tied_tensors(params, tie, name)
    tensors |= {kind.root + t: value for t, value in whole.items()}
    common = {
        "modules_to_save": saved_modules(params, name, tie) or None,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "peft_type": kind.name,
        "revision": revision,
        "task_type": task_type,
    }
    write_adapter(folder, WEIGHTS, tensors, config | common)


def load_whole(
    params: Any, tensors: Tensors, config: Config, kind: WholeFormat, name: str, path: Path
) -> Any:
    """`params` with the adapter of a PEFT folder of the method `kind`. Raises ValueError naming the
    tensor that is missing or does not fit.
    """
    root = kind.root
    named = set(config.get("modules_to_save") or ())
    held = {
        root + t.name
        for p, w in places(params).items()
        if hasattr(w, "shape")
        for t in tensors_of(p, stack_size(p, w))
    }
    saved = {
        t: tensors.pop(t)
        for t in list(tensors)
        if (t.startswith(root) and named & set(t.removeprefix(root).split(".")))
        or t.removeprefix(root).rpartition(".")[0] in named
        or t in held
    }
    params = put_trained(
        params, {t.removeprefix(root): value for t, value in saved.items()}, config, name, path
    )
    try:
        return kind.read(params, tensors, config, name)
    except KeyError as error:
        raise ValueError(
            f"{path / WEIGHTS} lacks a tensor {error} that its method needs"
        ) from error


def trained_tensors(path: str, w: Replacement) -> Tensors:
    """Hugging Face's tensors for an array of the adapter's own, by name."""
    value = fetch(w.value)
    return {
        t.name: t.take(value)
        for t in tensors_of(path, stack_size(path, w))
        if t.layer is None or replaces(w, t.layer)
    }


def replaces(w: Replacement, layer: int) -> bool:
    return w.gate is None or bool(w.gate[layer].max() > 0)


def put_trained(params: Any, tensors: Tensors, config: Config, name: str, path: Path) -> Any:
    """`params` with whole modules (PEFT's `modules_to_save`) from these tensors. Raises ValueError
    where they do not fit.
    """
    left = dict(tensors)
    params = put_stored(params, left, config, name)
    params = split_tie(params, {}, {}, left, config, None)
    modules, known = whole_modules(left), places(params)
    result = (
        map_places(lambda place, w: trained_place(place, w, left, modules, name, known), params)
        if left
        else params
    )
    if left:
        raise ValueError(
            f"the adapter in {path} has {sorted(left)[0]}, which the model lacks; load it with the "
            "adapter's task"
        )
    return result


def saved_modules(params: Any, name: str, tie: tuple[str, str] | None = None) -> list[str]:
    """PEFT's `modules_to_save`: the modules that train whole, heads by the name of the whole head,
    others by their full names (PEFT compares ends of names, and "norm" would end "input_layernorm"
    too). `tie` is the place of an embedding and the name of the head that trains with it.
    """
    known = places(params)
    marked = {p: n for p, n in replacements(params, name).items() if n.saved_as == "module"}

    def top(path):
        return path.partition("/")[0]

    heads = {top(p) for p in marked} - {
        top(p) for p, w in known.items() if p not in marked and not isinstance(w, Attachment)
    }
    modules = (
        (n, i, w)
        for p, w in marked.items()
        if top(p) not in heads
        for n, i in modules_of(p, stack_size(p, w))
    )
    names = {n for n, i, w in modules if i is None or replaces(w, i)}
    if tie and tie[0] in marked:
        names.add(tie[1])
    return sorted(names | heads)


def whole_modules(tensors: Iterable[str]) -> set[str]:
    """The modules of these tensors that are there with their weights: else a bias alone was
    trained.
    """
    return {t.rpartition(".")[0] for t in tensors if t.endswith(".weight")}


def trained_place(
    path: str, w: Any, tensors: Tensors, whole: set[str], name: str, known: Mapping[str, Any]
) -> Any:
    """What was trained whole at a place of `known`, over the base's; it is taken out of
    `tensors`.
    """

    def alone(t):
        return path.endswith("/bias") and t.rpartition(".")[0] not in whole

    return read_replacement(
        path, w, tensors, lambda t: "bias" if alone(t) else "module", name, known
    )
