"""LoRA of stacked experts in PEFT's folders (`target_parameters`).

PEFT wraps a module once for each of its parameters, the later ones around the earlier, so that all
but the last have `base_layer` in their names. A of expert e are the rows [e r, (e + 1) r) of
`lora_A` [E r, in]; B the columns e, e + E, ... of `lora_B` [out, r E]. Patterns of ranks and alphas
match the module's name with the parameter's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from peft_jax.core.roles import expert_leaves
from peft_jax.core.sharding import fetch
from peft_jax.hub.names import module_names, stack_size
from peft_jax.hub.peft.formats import Config, Tensors, number, pattern
from peft_jax.low_rank.lora import LoRA, scaling

_A, _B = "lora_A.weight", "lora_B.weight"


def as_modules(path: str, node: Any) -> dict[str, LoRA]:
    """PEFT's name of the experts of each layer -> their LoRAs as one, A [E in, r] and B [r, E out],
    for its configuration.

    Raises ValueError for anything but plain LoRA in all layers, of one scale for all experts.
    """
    if type(node) is not LoRA:
        raise ValueError(
            f"{path} holds a {type(node).__name__}; of stacked experts PEFT's folders hold "
            "LoRA alone"
        )
    if node.gate is not None:
        raise ValueError(
            f"{path} adapts some of the layers, which PEFT's target_parameters cannot say"
        )
    module, _, leaf = path.rpartition("/")
    scales, found = fetch(node.scale), {}
    for name, layer, A, B in _by_layer(path, node):
        scale = scales if layer is None else scales[layer]
        if np.ptp(scale):
            raise ValueError(
                f"{path} has experts of different scales, and PEFT has one for all experts "
                "of a layer"
            )
        factors: dict[str, Any] = {
            "a": A.reshape(-1, A.shape[-1]),
            "b": B.swapaxes(0, 1).reshape(B.shape[1], -1),
        }
        found[f"{name}.{leaf}"] = LoRA(
            base=None, **factors, scale=scale.flat[0], rslora=node.rslora, name=node.name
        )
    return found


def _by_layer(path: str, node: Any) -> Iterator[tuple[str, int | None, np.ndarray, np.ndarray]]:
    """(module, number, A [E, in, r], B [E, r, out]) of each layer, without the columns that pad it
    to the largest rank.
    """
    a, b = map(fetch, node.factors())
    for name, layer in module_names(path.rpartition("/")[0], stack_size(path, node)):
        A, B = (x if layer is None else x[layer] for x in (a, b))
        used = A.any(axis=(0, 1)) | B.any(axis=(0, 2))
        used = used if used.any() else np.ones_like(used)
        yield name, layer, A[..., used], B[:, used]


def expert_tensors(nodes: Mapping[str, Any]) -> Tensors:
    """Tensors by name for the LoRAs at these places."""
    tensors: Tensors = {}
    for path, node in nodes.items():
        module, _, leaf = path.rpartition("/")
        names = [p for p in expert_leaves() if f"{module}/{p}" in nodes]
        for name, _, A, B in _by_layer(path, node):
            wrapped = name + ".base_layer" * (len(names) - 1 - names.index(leaf))
            tensors[f"{wrapped}.{_A}"] = A.swapaxes(1, 2).reshape(-1, A.shape[1])
            tensors[f"{wrapped}.{_B}"] = B.transpose(2, 1, 0).reshape(B.shape[2], -1)
    return tensors


def experts_config(nodes: Mapping[str, Any]) -> dict[str, Any]:
    """What the configuration says of them, but for ranks and alphas."""

    def named(path):
        return ".".join(
            [
                *module_names(path.rpartition("/")[0], None)[0][0].split(".")[-2:],
                path.rpartition("/")[2],
            ]
        )

    targets = sorted(
        {named(path) for path in nodes}, key=lambda t: expert_leaves().index(t.rpartition(".")[2])
    )
    return {"target_parameters": targets, "lora_dropout": 0.0}


def attach_experts(
    path: str, w: Any, modules: dict[str, Tensors], config: Config, name: str
) -> Any:
    """The place of stacked experts [*lead, E, in, out] with its LoRA, which is taken out of
    `modules`.

    Raises ValueError where a layer has none, or the tensors' shapes do not fit.
    """
    module, _, leaf = path.rpartition("/")
    wanted = {str(t).rpartition(".")[2] for t in config.get("target_parameters") or ()}
    names = [p for p in expert_leaves() if p in wanted]
    if leaf not in names:
        return w
    depth, found, scales = len(names) - 1 - names.index(leaf), [], []
    E, n_in, n_out = w.shape[-3:]
    rslora = bool(config.get("use_rslora"))
    for m, _ in module_names(module, stack_size(path, w)):
        tensors = modules.pop(m + ".base_layer" * depth, {})
        if set(tensors) != {_A, _B}:
            raise ValueError(
                f"the adapter has no LoRA for {m}.{leaf}, which its target_parameters name"
            )
        a, b = tensors[_A], tensors[_B]
        r = int(pattern(config, "rank_pattern", f"{m}.{leaf}", number(config, "r")))
        scales.append(
            scaling(
                pattern(config, "alpha_pattern", f"{m}.{leaf}", number(config, "lora_alpha")),
                r,
                rslora,
            )
        )
        if a.shape != (E * r, n_in) or b.shape != (n_out, r * E):
            raise ValueError(
                f"{m}.{leaf} has lora_A {a.shape} and lora_B {b.shape}, expected {(E * r, n_in)} "
                f"and {(n_out, r * E)}"
            )
        found.append(
            (a.reshape(E, r, n_in).swapaxes(1, 2), b.reshape(n_out, r, E).transpose(2, 1, 0))
        )
    stacked, most = len(w.shape) > 3, max(a.shape[-1] for a, _ in found)

    def widened(x, axis):
        return np.pad(x, [(0, most - n if i == axis else 0) for i, n in enumerate(x.shape)])

    arrays = zip(*((widened(a, 2), widened(b, 1)) for a, b in found), strict=True)
    a, b = (jnp.asarray(np.stack(x) if stacked else x[0], jnp.float32) for x in arrays)
    scale = np.broadcast_to(np.asarray(scales if stacked else scales[0])[..., None], w.shape[:-2])
    return LoRA(base=w, a=a, b=b, scale=jnp.asarray(scale, jnp.float32), rslora=rslora, name=name)
