"""Hugging Face checkpoints in: a folder or repository id -> (Flax model, parameter tree)."""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from peft_jax.core.select import OUTPUT_EMBEDDING
from peft_jax.core.sharding import Rules, check_rules, node_shardings, say_whole, shard_place
from peft_jax.core.tree import map_places, places
from peft_jax.hub.checkpoint.folder import default_dtype, local_folder, read_config
from peft_jax.hub.checkpoint.fresh import fresh_head, labelled
from peft_jax.hub.checkpoint.parts import HEAD_TASKS, Parts, layer_modules, listed, parts_of
from peft_jax.hub.generation_config import read_generation_config
from peft_jax.hub.names import Tensor, stack_size, tensors_of
from peft_jax.hub.quantized import QuantizedReader
from peft_jax.hub.safetensors_io import Checkpoint, open_checkpoint
from peft_jax.low_rank.svd import Factorized
from peft_jax.models.blocks import Task, abstract_params
from peft_jax.models.families import FAMILIES, family_of, task_of, untie
from peft_jax.models.family import Family

logger = logging.getLogger("peft_jax")


_OLD_NAMES = {"gamma": "weight", "beta": "bias"}  # of norms, in BERT's first checkpoints


def load(
    folder_or_repo: str | os.PathLike[str],
    *,
    task: Task | None = None,
    labels: Sequence[str] | int | None = None,
    dtype: Any = None,
    mesh: Mesh | None = None,
    rules: Rules = (),
    revision: str | None = None,
    scan_layers: bool = True,
    remat: str = "none",
    attention_implementation: str | None = None,
    each: Callable[[str, jax.Array], Any] | None = None,
    seed: int = 0,
) -> tuple[Any, Any]:
    """(model, params) of a Hugging Face checkpoint: a vanilla Flax module and a plain tree.

    Quantized checkpoints (bitsandbytes, GPTQ, AWQ, compressed-tensors) give Quantized weights with
    the codes as they are. `each(path, array)` may replace an array as soon as it is read, by a
    quantized one for example, so that the whole model is never held in full precision.

    `task` is what the model is for, by default what the checkpoint was saved for. A head that the
    checkpoint lacks starts anew from `seed`, which is said in a log line; `labels` are the names of
    its classes, or their number. `dtype` is that of parameters and computation; by default float32
    on the CPU and the checkpoint's elsewhere, bfloat16 for float16, in which nothing can be
    trained. Tensors go one by one straight into their dtype and, with a `mesh`, their sharding,
    each device reading its own part, so host memory stays near the largest tensor. Raises
    FileNotFoundError, or ValueError naming the tensor, for an unsupported family or task, and for
    tensors that are missing, surplus or misshapen.
    """
    folder = local_folder(folder_or_repo, revision)
    hf_config = labelled(read_config(folder), labels)
    dtype = default_dtype(hf_config, mesh) if dtype is None else jnp.dtype(dtype)
    family = family_of(hf_config.model_type)
    with open_checkpoint(folder) as opened:
        checkpoint, architecture = Renamed(opened, family), family.config(hf_config)
        architecture = dataclasses.replace(
            architecture, generation_config=read_generation_config(folder)
        )
        reader = QuantizedReader(checkpoint, getattr(hf_config, "quantization_config", None))
        task = task_of(hf_config, task)
        apart = _head_apart(checkpoint, reader, family, task, architecture.tie_embeddings)
        if apart and task != "masked_lm":
            architecture = dataclasses.replace(architecture, tie_embeddings=False)
        options = {
            "scan_layers": scan_layers,
            "remat": remat,
            "attention_implementation": attention_implementation,
        }
        model: Any = family.module(
            architecture, task=task, dtype=dtype, param_dtype=dtype, **options
        )
        abstract = _with_factors(abstract_params(model), checkpoint)
        quantized = {
            p: names
            for p, w in places(abstract).items()
            if (names := _quantized_tensors(reader, p, w))
        }
        parts = {
            path: (leaf, tensors)
            for path, leaf, tensors in parts_of(abstract, family, checkpoint.names)
        }
        fresh = fresh_head(
            _check(checkpoint, parts, model, folder, quantized), parts, model, folder, seed
        )

        def read(path: str, leaf: Any, sharding: Any) -> Any:
            found = _read_leaf(checkpoint, parts[path][1], leaf, sharding)
            if each is None or (made := each(path, found)) is found:
                return found
            return made if mesh is None else shard_place(path, made, mesh, rules)

        def place(path: str, leaf: Any) -> Any:
            if path in fresh:
                return fresh[path] if mesh is None else shard_place(path, fresh[path], mesh, rules)
            if path in quantized:
                node = reader.weight(layer_modules(path, leaf), leaf.shape, dtype)
                return node if mesh is None else shard_place(path, node, mesh, rules)
            placed = None if mesh is None else node_shardings(path, leaf, mesh, rules)
            if isinstance(leaf, Factorized):
                factors = {
                    f: read(f"{path}/{f}", getattr(leaf, f), placed and getattr(placed, f))
                    for f in ("u", "v")
                }
                return leaf.replace(**factors)
            return read(path, leaf, placed)

        check_rules(rules)
        params = map_places(place, abstract)
        if apart and task == "masked_lm":  # the module has no head of its own, the tree has
            params = untie(params)
            parts = {
                p: (w, tensors_of(p, None))
                for p, w in places(params).items()
                if p.endswith(OUTPUT_EMBEDDING)
            }
            params = map_places(lambda p, w: place(p, w) if p in parts else w, params)
        if mesh is not None:
            say_whole(params, jax.tree.map(lambda x: x.sharding, params), mesh, rules)
        return model, params


def _head_apart(
    checkpoint: Renamed, reader: QuantizedReader, family: Family, task: Task, tied: bool
) -> bool:
    """Whether a checkpoint whose head is to be its embedding holds another head, which
    `transformers` keeps then.
    """
    if not tied or task not in HEAD_TASKS:
        return False
    head, embedding = f"{family.head}.weight", f"{family.embedding.replace('/', '.')}.weight"
    names = set(checkpoint.names)
    if reader.tensors(family.head) or (family.own_head and head in names):
        return True
    if not {head, embedding} <= names:
        return False
    shape = checkpoint.shape(head)
    if shape != checkpoint.shape(embedding):
        return True
    rows = max(1, 2**24 // shape[1])  # a part at a time, so that neither is held whole
    parts = [
        (slice(i, min(i + rows, shape[0])), slice(0, shape[1])) for i in range(0, shape[0], rows)
    ]
    return not all(
        np.array_equal(checkpoint.read(head, p), checkpoint.read(embedding, p)) for p in parts
    )


class Renamed:
    """A checkpoint whose tensors are called as the model's (`NamedTensors`).

    What belongs to the model's trunk may stand there without the trunk's name (a checkpoint of the
    trunk alone), and norms by their old names. Tensors that some checkpoints have beyond what the
    model needs are left out.
    """

    def __init__(self, checkpoint: Checkpoint, family: Family) -> None:
        prefix, names = family.prefix + ".", checkpoint.names
        bare = bool(family.prefix) and not any(n.startswith(prefix) for n in names)
        self.absent = re.compile(family.absent)
        self._checkpoint, self._own = checkpoint, {}
        for name in names:
            module, _, leaf = name.rpartition(".")
            ours = f"{module}.{_OLD_NAMES[leaf]}" if leaf in _OLD_NAMES else name
            self._own[prefix + ours if bare else ours] = name
        self.spare = {n for n in self._own if re.fullmatch(family.spare, n)}

    @property
    def names(self) -> list[str]:
        return list(self._own)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._checkpoint.shape(self._own[name])

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        return self._checkpoint.read(self._own[name], index)


def _quantized_tensors(reader: QuantizedReader, path: str, leaf: Any) -> list[str]:
    """The checkpoint tensors of a quantized kernel, none where it is an array there."""
    if not path.endswith("/kernel"):
        return []
    modules = layer_modules(path, leaf)
    names = [reader.tensors(module) for module, _ in modules]
    if any(names) and not all(names):
        raise ValueError(
            f"some layers of {modules[0][0]} are quantized and others not; load with "
            "scan_layers=False"
        )
    return [name for of in names for name in of]


def _with_factors(abstract: Any, checkpoint: Any) -> Any:
    """The tree with a Factorized weight where the checkpoint holds factors (see `save`)."""
    present = set(checkpoint.names)

    def place(path: str, leaf: Any) -> Any:
        first = tensors_of(path, stack_size(path, leaf))[0].name
        if first in present or f"{first}_u" not in present:
            return leaf
        (k, n_in), lead = checkpoint.shape(f"{first}_u"), leaf.shape[:-2]
        factors: dict[str, Any] = {
            name: jax.ShapeDtypeStruct((*lead, *shape), leaf.dtype)
            for name, shape in (("u", (n_in, k)), ("v", (k, leaf.shape[-1])))
        }
        return Factorized(**factors, in_sizes=leaf.shape[-2:-1], out_sizes=leaf.shape[-1:])

    return map_places(place, abstract)


def _check(
    checkpoint: Renamed, parts: Parts, model: Any, folder: Path, quantized: Mapping[str, list[str]]
) -> list[str]:
    """Names and shapes before a single tensor is read; those of quantized weights are checked when
    they are.

    Returns what is missing of a head that may start anew.
    """
    whole = {path: part for path, part in parts.items() if path not in quantized}
    expected = {
        tensor.name: tensor.stored(leaf.shape)
        for leaf, tensors in whole.values()
        for tensor in tensors
    }
    expected = {
        name: shape for name, shape in expected.items() if not checkpoint.absent.fullmatch(name)
    }
    present = set(checkpoint.names) - {name for names in quantized.values() for name in names}
    if model.config.tie_embeddings or model.task not in ("causal_lm", "seq2seq_lm"):
        present.discard(f"{family_of(model.config.model_type).head}.weight")
    missing = sorted(set(expected) - present)
    heads = [name for name in missing if set(name.split(".")) & set(model.heads)]
    if lost := [name for name in missing if name not in heads]:
        raise ValueError(f"{folder} lacks {listed(lost)}")
    surplus = sorted(present - set(expected) - checkpoint.spare)
    heads_of_all = {head for family in FAMILIES.values() for head in family.heads}
    if surplus := [name for name in surplus if name.partition(".")[0] not in heads_of_all]:
        raise ValueError(
            f"{folder} holds {listed(surplus)}, which a {model.config.model_type} model has no "
            "place for"
        )
    for name in sorted(set(expected) & present):
        if checkpoint.shape(name) != expected[name]:
            if set(name.split(".")) & set(model.heads):  # a head for other labels
                heads.append(name)
                continue
            raise ValueError(
                f"{name} in {folder} has shape {checkpoint.shape(name)}, expected {expected[name]}"
            )
    return heads


def _read_leaf(
    checkpoint: Renamed, tensors: list[Tensor], leaf: Any, sharding: NamedSharding | None
) -> jax.Array:
    there = [t for t in tensors if not checkpoint.absent.fullmatch(t.name)]
    if there and not there[0].place:
        return _read_tensor(checkpoint, there[0], leaf.shape, leaf.dtype, sharding)
    buffer = jax.jit(lambda: jnp.zeros(leaf.shape, leaf.dtype), out_shardings=sharding)()
    for tensor in there:
        one = (
            None
            if sharding is None
            else NamedSharding(sharding.mesh, P(*sharding.spec[len(tensor.place) :]))
        )
        shape = tensor.shape(leaf.shape)
        start = 0 if tensor.part is None else tensor.part[0] * shape[-1]
        value = _read_tensor(checkpoint, tensor, shape, leaf.dtype, one)
        buffer = _set_part(buffer, value, (*tensor.place, *[0] * (len(shape) - 1), start))
    return buffer


@functools.partial(jax.jit, donate_argnums=0)
def _set_part(buffer: jax.Array, value: jax.Array, start: tuple[Any, ...]) -> jax.Array:
    lead = buffer.ndim - value.ndim
    return jax.lax.dynamic_update_slice(buffer, value.reshape(*[1] * lead, *value.shape), start)


def _read_tensor(
    checkpoint: Renamed, tensor: Tensor, shape: tuple[int, ...], dtype: Any, sharding: Any
) -> jax.Array:
    def part(index: tuple[slice, ...] | None) -> np.ndarray:
        if index is not None and tensor.transposed:
            index = (*index[:-2], *index[-2:][::-1])
        value = checkpoint.read(tensor.name, index)
        if not np.issubdtype(value.dtype, np.floating) and value.dtype.name not in (
            "bfloat16",
            "float16",
        ):
            raise ValueError(
                f"{tensor.name} has dtype {value.dtype}: no quantization_config says how to read it"
            )
        return np.ascontiguousarray(
            (value.swapaxes(-1, -2) if tensor.transposed else value).astype(dtype)
        )

    if sharding is None:
        return jnp.asarray(part(None))
    return jax.make_array_from_callback(shape, sharding, part)
