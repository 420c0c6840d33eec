"""PEFT's ADAPTION_PROMPT: LLaMA-Adapter's prompts in the last layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from peft_jax.adapters.llama_adapter import AdaptionPrompt, FusedAdaptionPrompt, prompted
from peft_jax.core.placing import hidden_size
from peft_jax.hub.layers import join_layers, put_nodes, split_layers
from peft_jax.hub.peft.formats import PREFIX, Config, Tensors, WholeFormat
from peft_jax.hub.peft.prefix_tuning import prefix_places


def _write(params: Any, nodes: Mapping[str, Any], name: str) -> tuple[Tensors, dict[str, Any]]:
    split = split_layers(params, nodes, name)
    place = prompted(params)[1]
    attention = [core.rpartition("/")[0] for core, _ in prefix_places(params)]
    cores = [f"{module}/{place}" for module in attention]
    has = [f"{core}/adaption" in split for core in cores]
    count = sum(has)
    if has != [i >= len(has) - count for i in range(len(has))]:
        raise ValueError(
            "PEFT's adaption prompts stand in the last layers, and this adapter leaves some of "
            "them out"
        )
    tensors: Tensors = {}
    for core in cores[len(cores) - count :]:
        node, module = split[f"{core}/adaption"], core.rpartition("/")[0].replace("/", ".")
        tensors[f"{PREFIX}{module}.adaption_prompt"] = node.prompt[None]
        tensors[f"{PREFIX}{module}.adaption_gate"] = np.reshape(node.strength, 1)
    length = next(iter(split.values())).prompt.shape[0]
    return tensors, {
        "adapter_layers": count,
        "adapter_len": length,
        "target_modules": attention[0].rpartition("/")[2],
    }


def _read(params: Any, tensors: Tensors, config: Config, name: str) -> Any:
    nodes, width = {}, hidden_size(params)
    cls, place = prompted(params)
    for key, prompt in tensors.items():
        if not key.endswith(".adaption_prompt"):
            continue
        if prompt.ndim != 3 or prompt.shape[0] != 1 or prompt.shape[2] != width:
            raise ValueError(
                f"tensor {key} has shape {prompt.shape}, expected (1, tokens, {width}) for "
                "this model"
            )
        strength = tensors[key.removesuffix("prompt") + "gate"].astype(np.float32).reshape(())
        arrays: dict[str, Any] = {"prompt": prompt[0].astype(np.float32), "strength": strength}
        module = key.removeprefix(PREFIX).removesuffix(".adaption_prompt").replace(".", "/")
        nodes[f"{module}/{place}/adaption"] = cls(**arrays, name=name)
    if not nodes:
        raise KeyError("adaption_prompt")
    return put_nodes(params, join_layers(params, nodes, name))


FORMAT = WholeFormat(
    name="ADAPTION_PROMPT",
    nodes=(AdaptionPrompt, FusedAdaptionPrompt),
    write=_write,
    read=_read,
    root=PREFIX,
)
