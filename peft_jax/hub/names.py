"""Paths in a parameter tree and names of modules and tensors in Hugging Face's models.

`model/layers/self_attn/q_proj/kernel` [L, in, out] is `model.layers.{i}.self_attn.q_proj.weight`
[out, in] for each layer i; looped trees have `model/layers_{i}/...` instead. Stacks are called as
they are there (`layers`, `layer`, `h`, `block`), so the names follow from the tree alone.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import numpy as np

from peft_jax.core.roles import FAMILIES, is_expert
from peft_jax.core.select import OUTPUT_EMBEDDING, number_layers, stack_at

_WEIGHT_LEAVES = ("kernel", "embedding", "scale", OUTPUT_EMBEDDING)


class Tensor(NamedTuple):
    """A tensor and where it goes: its name, the layer it fills (None: all of the leaf), transposed
    or not.

    Of stacked experts it may be one (`expert`), and of its outputs the `part[0]`-th of `part[1]`
    equal runs.
    """

    name: str
    layer: int | None
    transposed: bool
    expert: int | None = None
    part: tuple[int, int] | None = None

    @property
    def place(self) -> tuple[int, ...]:
        """Its place on the leaf's leading axes."""
        return tuple(i for i in (self.layer, self.expert) if i is not None)

    def shape(self, leaf: tuple[int, ...]) -> tuple[int, ...]:
        """Its shape as part of a leaf of this shape, not transposed."""
        *rest, last = leaf[len(self.place) :]
        return (*rest, last // (1 if self.part is None else self.part[1]))

    def stored(self, leaf: tuple[int, ...]) -> tuple[int, ...]:
        """Its shape in the checkpoint."""
        shape = self.shape(leaf)
        return (*shape[:-2], *shape[-2:][::-1]) if self.transposed else shape

    def take(self, value: Any) -> Any:
        """Its part of a leaf, as the checkpoint has it."""
        value = value[self.place] if self.place else value
        if self.part is not None:
            i, n = self.part
            size = value.shape[-1] // n
            value = value[..., i * size : (i + 1) * size]
        return value.swapaxes(-1, -2) if self.transposed else value

    def put(self, leaf: Any, value: Any, where: str) -> None:
        """Fill its part of a leaf, a NumPy array, from the checkpoint's `value`. Raises ValueError
        for another shape.
        """
        if np.shape(value) != self.stored(leaf.shape):
            raise ValueError(
                f"{self.name} in {where} has shape {np.shape(value)}, the model's is "
                f"{self.stored(leaf.shape)}"
            )
        leaf[self.place] = (value.swapaxes(-1, -2) if self.transposed else value).astype(leaf.dtype)


def stack_size(path: str, w: Any) -> int | None:
    """The number of stacked layers behind a place that holds `w`, None where it is not stacked."""
    return None if stack_at(path) is None else w.shape[0]


def tensors_of(path: str, layers: int | None) -> list[Tensor]:
    """The tensors behind the leaf at `path`; `layers` is the number of stacked layers."""
    module, _, leaf = path.rpartition("/")
    transposed = is_expert(path) or (leaf == "kernel" and not is_conv1d(module))
    suffix = "weight" if leaf in _WEIGHT_LEAVES else leaf
    return [
        Tensor(f"{name}.{suffix}" if name else suffix, layer, transposed)
        for name, layer in modules_of(path, layers)
    ]


def modules_of(path: str, layers: int | None) -> list[tuple[str, int | None]]:
    """(Hugging Face module name, layer) for each module behind the place at `path`; see
    `tensors_of`.
    """
    module, _, leaf = path.rpartition("/")
    if leaf != OUTPUT_EMBEDDING:
        return module_names(module, layers)
    heads = {f.embedding: f.head for f in FAMILIES.values()}
    return [(heads.get(module, f"{module}/{leaf}".replace("/", ".")), None)]


def embedding_name(path: str) -> str:
    """The Hugging Face module name of the embedding at `path`."""
    return module_names(path.rpartition("/")[0], None)[0][0]


def expert_tensors(tensor: Tensor, experts: int) -> list[Tensor]:
    """The tensors of single experts, as checkpoints have them, for one of stacked experts; itself
    for any other.
    """
    if not is_expert(tensor.name.replace(".", "/")):
        return [tensor]
    module, _, leaf = tensor.name.rpartition(".")
    parts = next(f.expert_parts[leaf] for f in FAMILIES.values() if leaf in f.expert_parts)
    return [
        tensor._replace(name=f"{module}.{e}.{name}.weight", expert=e, part=(i, len(parts)))
        for e in range(experts)
        for i, name in enumerate(parts)
    ]


def is_conv1d(module: str) -> bool:
    """Whether the module at this path, or of this name, is one of Hugging Face's `Conv1D`."""
    name = re.split(r"[/.]", module)[-1]
    return any(name in family.conv1d for family in FAMILIES.values())


def module_names(module: str, layers: int | None) -> list[tuple[str, int | None]]:
    """(Hugging Face module name, layer) for each module behind a tree's module path."""
    parts, at = module.split("/"), stack_at(module)
    if layers is None or at is None:
        paths: list[tuple[str, int | None]] = [(module, None)]
    else:
        paths = [("/".join([*parts[:at], str(i), *parts[at:]]), i) for i in range(layers)]

    return [(_theirs(number_layers(path).replace("/", ".")), i) for path, i in paths]


def _theirs(name: str) -> str:
    """Hugging Face's name of the module that is called so here."""
    for family in FAMILIES.values():
        for pattern, replacement in family.renamed:
            name = re.sub(pattern, replacement, name)
    return name
