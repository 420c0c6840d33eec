"""PEFT's LN_TUNING: norms that train."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft_jax.core.reparametrised import Replacement
from peft_jax.core.sharding import fetch
from peft_jax.core.tree import map_places, places
from peft_jax.hub.names import stack_size, tensors_of
from peft_jax.hub.peft.formats import PREFIX, Config, Tensors, WholeFormat
from peft_jax.hub.peft.tied import read_replacement


def _write(params: Any, nodes: Mapping[str, Any], name: str) -> tuple[Tensors, dict[str, Any]]:
    tensors: Tensors = {}
    modules = set()
    for path, w in nodes.items():
        for t in tensors_of(path, stack_size(path, w)):
            module, _, leaf = t.name.rpartition(".")
            modules.add(module)
            tensors[f"{PREFIX}{module}.ln_tuning_layers.{leaf}"] = fetch(
                w.value if t.layer is None else w.value[t.layer]
            )
    return tensors, {"target_modules": sorted(modules), "modules_to_save": None}


def _read(params: Any, tensors: Tensors, config: Config, name: str) -> Any:
    left = {
        k.removeprefix(PREFIX).replace(".ln_tuning_layers.", "."): v for k, v in tensors.items()
    }
    known = places(params)

    def place(path: str, w: Any) -> Any:
        norm = path.rpartition("/")[2] in ("scale", "bias")
        return read_replacement(path, w, left, lambda _: "norm", name, known) if norm else w

    result = map_places(place, params)
    if left:
        raise ValueError(f"the adapter has {sorted(left)[0]}, which the model lacks")
    return result


def _is_norm(node: Any) -> bool:
    """Whether an array of the adapter's own is a norm's."""
    return node.saved_as == "norm"


FORMAT = WholeFormat(
    name="LN_TUNING",
    nodes=(Replacement,),
    write=_write,
    read=_read,
    fits=_is_norm,
    root=PREFIX,
)
