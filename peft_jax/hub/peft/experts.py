"""LoRA of stacked experts in PEFT's folders (`target_parameters`).

PEFT wraps a module once for each of its parameters, the later ones around the earlier, so that all but the last have
`base_layer` in their names. A of expert e are the rows [e r, (e + 1) r) of `lora_A` [E r, in]; B the columns e, e + E, ... of
`lora_B` [out, r E].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from peft_jax.core.tree import EXPERTS
from peft_jax.hub.names import module_names, stack_size
from peft_jax.hub.peft.formats import Config, Tensors, number
from peft_jax.low_rank.lora import LoRA, scaling

_A, _B = "lora_A.weight", "lora_B.weight"


def one_expert(path: str, node: Any) -> Any:
    """The node of the first layer's first expert. Raises ValueError for anything but plain LoRA in all layers."""
    if type(node) is not LoRA:
        raise ValueError(f"{path} holds a {type(node).__name__}; of stacked experts PEFT's folders hold LoRA alone")
    if node.gate is not None:
        raise ValueError(f"{path} adapts some of the layers, which PEFT's target_parameters cannot say")
    bare = node.replace(base=None)
    for _ in node.lead:
        bare = jax.tree.map(lambda x: np.asarray(x[0]), bare)
    return bare.replace(dropout=0.0)


def expert_tensors(nodes: Mapping[str, Any]) -> Tensors:
    """Tensors by name for the LoRAs at these places."""
    tensors: Tensors = {}
    for path, node in nodes.items():
        module, _, leaf = path.rpartition("/")
        names = [p for p in EXPERTS if f"{module}/{p}" in nodes]
        a, b = (np.asarray(f) for f in node.factors())
        for name, layer in module_names(module, stack_size(path, node)):
            A, B = (x if layer is None else x[layer] for x in (a, b))  # [E, in, r], [E, r, out]
            wrapped = name + ".base_layer" * (len(names) - 1 - names.index(leaf))
            tensors[f"{wrapped}.{_A}"] = A.swapaxes(1, 2).reshape(-1, A.shape[1])
            tensors[f"{wrapped}.{_B}"] = B.transpose(2, 1, 0).reshape(B.shape[2], -1)
    return tensors


def experts_config(nodes: Mapping[str, Any], config: Config) -> dict[str, Any]:
    """What the configuration says of them. Raises ValueError where ranks differ."""
    if patterns := {**config["rank_pattern"], **config["alpha_pattern"]}:
        raise ValueError(
            f"PEFT has one rank and alpha for experts and all else; this adapter has others at {next(iter(patterns))}"
        )
    named = lambda path: ".".join([*module_names(path.rpartition("/")[0], None)[0][0].split(".")[-2:], path.rpartition("/")[2]])
    targets = sorted({named(path) for path in nodes}, key=lambda t: EXPERTS.index(t.rpartition(".")[2]))
    return {"target_parameters": targets, "lora_dropout": 0.0}


def attach_experts(path: str, w: Any, modules: dict[str, Tensors], config: Config, name: str) -> Any:
    """The place of stacked experts [*lead, E, in, out] with its LoRA, which is taken out of `modules`.

    Raises ValueError where a layer has none, or the tensors' shapes do not fit.
    """
    module, _, leaf = path.rpartition("/")
    wanted = {str(t).rpartition(".")[2] for t in config.get("target_parameters") or ()}
    names = [p for p in EXPERTS if p in wanted]
    if leaf not in names:
        return w
    depth, found = len(names) - 1 - names.index(leaf), []
    E, n_in, n_out = w.shape[-3:]
    r = int(number(config, "r"))
    for m, _ in module_names(module, stack_size(path, w)):
        tensors = modules.pop(m + ".base_layer" * depth, {})
        if set(tensors) != {_A, _B}:
            raise ValueError(f"the adapter has no LoRA for {m}.{leaf}, which its target_parameters name")
        a, b = tensors[_A], tensors[_B]
        if a.shape != (E * r, n_in) or b.shape != (n_out, r * E):
            raise ValueError(
                f"{m}.{leaf} has lora_A {a.shape} and lora_B {b.shape}, expected {(E * r, n_in)} and {(n_out, r * E)}"
            )
        found.append((a.reshape(E, r, n_in).swapaxes(1, 2), b.reshape(n_out, r, E).transpose(2, 1, 0)))
    stacked = len(w.shape) > 3
    a, b = (jnp.asarray(np.stack(x) if stacked else x[0], jnp.float32) for x in zip(*found, strict=True))
    rslora = bool(config.get("use_rslora"))
    scale = jnp.full(w.shape[:-2], scaling(number(config, "lora_alpha"), r, rslora), jnp.float32)
    return LoRA(base=w, a=a, b=b, scale=scale, rslora=rslora, name=name)
