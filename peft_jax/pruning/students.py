"""Students made of their teacher: some of its layers, as they are."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from peft_jax.core.roles import stack_names
from peft_jax.models.families import family_of, remade
from peft_jax.models.family import NOTHING

_COUNTS = (
    "num_hidden_layers",
    "n_layers",
    "n_layer",
    "num_layers",
    "num_decoder_layers",
)  # as the families call it


def spaced(total: int, keep: int) -> list[int]:
    """`keep` of `total` layers at even distances, the first and the last among them (DistilBERT,
    Sanh et al. 2019).
    """
    if not 1 <= keep <= total:
        raise ValueError(f"a student of {total} layers keeps between 1 and {total}, got {keep}")
    return np.round(np.linspace(0, total - 1, keep)).astype(int).tolist()


def take_layers(model: Any, params: Any, layers: int | Sequence[int]) -> tuple[Any, Any]:
    """(model, params) with these layers only, numbered from 0, or with a number of them evenly
    `spaced`; the rest as it is.

    For all families; of an encoder-decoder both stacks, which must have as many layers. Trees may
    hold nodes. Raises ValueError for numbers that are not there or not ascending, and for a family
    whose layers cannot change places.
    """
    c = model.config
    hf = json.loads(c.hf_config)
    total = c.num_layers
    kept = spaced(total, layers) if isinstance(layers, int) else list(layers)
    if not kept or kept != sorted(set(kept)) or kept[0] < 0 or kept[-1] >= total:
        raise ValueError(f"layers must be ascending numbers from 0 to {total - 1}, got {kept}")
    family = family_of(c.model_type)
    if hf.get("scale_attn_by_inverse_layer_idx") or (kept[0] != 0 and family.absent != NOTHING):
        raise ValueError(
            f"the layers of this {c.model_type} model depend on their place: keep the first, and "
            "all of them in order"
        )
    if hf.get("num_decoder_layers", hf.get("num_layers")) != hf.get("num_layers"):
        raise ValueError(f"encoder and decoder of this {c.model_type} model differ in depth")
    config = remade(c, _fewer(hf, kept, total))
    config = dataclasses.replace(config, tie_embeddings=c.tie_embeddings, num_labels=c.num_labels)
    return model.clone(config=config), _taken(params, kept)


def _fewer(hf: dict[str, Any], kept: list[int], total: int) -> dict[str, Any]:
    """A Hugging Face config with fewer layers: their number, what is listed layer by layer, and
    numbers of layers.
    """
    new = {old: i for i, old in enumerate(kept)}
    for name, value in hf.items():
        if name in _COUNTS and value == total:
            hf[name] = len(kept)
        elif (
            name in ("layer_types", "no_rope_layers")
            and isinstance(value, list)
            and len(value) == total
        ):
            hf[name] = [value[i] for i in kept]
        elif name == "mlp_only_layers" and isinstance(value, list):
            hf[name] = [new[i] for i in value if i in new]
    return hf


def _taken(tree: Any, kept: list[int]) -> Any:
    """A tree's stacks, stacked or looped, with the layers of these numbers."""
    if not isinstance(tree, Mapping):
        return tree
    stacks = stack_names()
    numbered = {name: re.fullmatch(rf"({'|'.join(stacks)})_(\d+)", name) for name in tree}
    result = {}
    for name, part in tree.items():
        if (match := numbered[name]) is None:
            index = np.asarray(kept)
            result[name] = (
                jax.tree.map(lambda a, i=index: a[i], part)
                if name in stacks
                else _taken(part, kept)
            )
        elif int(match[2]) in kept:
            result[f"{match[1]}_{kept.index(int(match[2]))}"] = part
    return result
