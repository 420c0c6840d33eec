"""Hugging Face checkpoints out: (model, tree) -> a folder that `transformers` loads."""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from peft_jax.core.files import replacing_folder, write_json
from peft_jax.core.prepare import resolve
from peft_jax.core.select import OUTPUT_EMBEDDING
from peft_jax.core.sharding import fetch
from peft_jax.core.tree import map_places, path_str, places
from peft_jax.core.weight import Trainable, Weight, materialize
from peft_jax.hub.checkpoint.parts import HEAD_TASKS, layer_modules, parts_of
from peft_jax.hub.names import stack_size
from peft_jax.hub.quantized import Tool, ways, writer
from peft_jax.hub.safetensors_io import write_shards
from peft_jax.low_rank.svd import Factorized
from peft_jax.models.blocks import abstract_params
from peft_jax.models.families import family_of, hf_config_of
from peft_jax.models.generation_config import FILE as GENERATION
from peft_jax.quantization.quantized import Quantized


def save(
    folder: str | os.PathLike[str],
    model: Any,
    params: Any,
    *,
    tokenizer: Any = None,
    max_shard_bytes: int = 5 * 10**9,
    tool: str | None = None,
) -> None:
    """Write a Hugging Face folder (configs, safetensors in shards, tokenizer) that `transformers`
    loads.

    `params` must hold arrays: `merge` trees with adapters first. Pruned weights are written with
    their zeros. Factorized weights are written as their factors (`<name>_u`, `<name>_v`), which
    `load` reads and `transformers` does not. Quantized weights are written as `tool` does, or as
    the one that holds their formats (`peft_jax.hub.quantized.TOOLS`): bitsandbytes,
    compressed-tensors; "peft_jax" holds all of them, for `load` alone. The folder appears only when
    all is written. On several hosts all of them call this, since tensor by tensor is gathered from
    them, and the first one writes. Raises ValueError naming the first node that is neither, or that
    the tool cannot hold or `transformers` not read.
    """
    params = _joined(map_places(_saved_as, resolve(params)), model)
    for path, leaf in places(params).items():
        if (
            isinstance(leaf, Weight) and not isinstance(leaf, (Factorized, Quantized))
        ) or not hasattr(leaf, "dtype"):
            raise ValueError(
                f"{path} is a {type(leaf).__name__}; call peft_jax.merge(params) before save"
            )
    expected = jax.tree_util.tree_flatten_with_path(abstract_params(model))[0]
    known = places(params)
    for key, leaf in expected:
        if known.get(path_str(key)) is None or known[path_str(key)].shape != leaf.shape:
            raise ValueError(
                f"params do not fit the model at {path_str(key)}: expected shape {leaf.shape}"
            )
    config = hf_config_of(model)
    config.pop("quantization_config", None)
    if "causal_lm" in family_of(model.config.model_type).tasks and model.task == "causal_lm":
        apart = any(path.endswith(f"/{OUTPUT_EMBEDDING}") for path in known)
        config["tie_word_embeddings"] = model.config.tie_embeddings and not apart
    config["dtype"] = str(jnp.dtype(next(iter(known.values())).dtype))
    quantized = {path: w for path, w in known.items() if isinstance(w, Quantized)}
    write = None
    if quantized:
        chosen = writer(quantized.values(), tool)
        config["quantization_config"] = _quantization_config(chosen, model, known)
        write = chosen.write
    tensors = _export(params, model, write)
    if jax.process_index() != 0:
        return write_shards(None, tensors, max_shard_bytes)
    with replacing_folder(folder) as temporary:
        write_json(temporary / "config.json", config)
        if (generation := model.config.generation_config) is not None:
            write_json(temporary / GENERATION, json.loads(generation))
        write_shards(temporary, tensors, max_shard_bytes)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)


def _joined(params: Any, model: Any) -> Any:
    """The tree without an embedding of the head's own where it is the embedding after all, or the
    model has no such head.
    """

    def needless(tree: Mapping[str, Any]) -> bool:
        one, other = tree["embedding"], tree[OUTPUT_EMBEDDING]
        return (
            model.task not in HEAD_TASKS
            or one is other
            or bool((materialize(one) == materialize(other)).all())
        )

    def walk(tree: Any) -> Any:
        if not isinstance(tree, Mapping):
            return tree
        drop = OUTPUT_EMBEDDING in tree and needless(tree)
        return {k: walk(x) for k, x in tree.items() if not (drop and k == OUTPUT_EMBEDDING)}

    return walk(params)


def _saved_as(path: str, w: Any) -> Any:
    """A pruned weight as the array that it stands for, or as the quantized weight whose zeros are
    its own.
    """
    if not getattr(w, "pruned", False):
        return w
    base = getattr(w, "base", None)
    if isinstance(base, Quantized):
        if not bool((base.materialize() == w.materialize()).all()):
            raise ValueError(
                f"{path} is masked, and its quantized weights are not zero there; quantize it "
                "after pruning"
            )
        return base
    if isinstance(base, Weight) and not isinstance(base, Trainable):
        raise ValueError(
            f"{path} is masked over a {type(base).__name__}; call peft_jax.merge(params) "
            "before save"
        )
    return w.materialize()


def _trunk(model: Any) -> str:
    """The prefix that names in the model's folder are without: a bare model's is the model
    itself.
    """
    return (
        family_of(model.config.model_type).prefix + "."
        if model.task == "feature_extraction"
        else ""
    )


def linear_modules(model: Any, params: Any) -> dict[str, str | None]:
    """The linear modules of Hugging Face's class of this model -> path of the kernel, None where
    the tree has none.
    """
    family, trunk = family_of(model.config.model_type), _trunk(model)
    kernels = {path: w for path, w in places(params).items() if path.endswith("/kernel")}
    found: dict[str, str | None] = {}
    if model.task in family.without_kernel:
        found[family.without_kernel[model.task]] = None
    for path, w in kernels.items():
        found |= {name.removeprefix(trunk): path for name, _ in layer_modules(path, w)}
    return found


def _quantization_config(tool: Tool, model: Any, known: Mapping[str, Any]) -> dict[str, Any]:
    """The folder's `quantization_config`; raises ValueError naming the place that the tool cannot
    hold.
    """
    assert tool.write is not None
    assert tool.config is not None
    quantized = {path: w for path, w in known.items() if isinstance(w, Quantized)}
    for path, w in quantized.items():
        if not path.endswith("/kernel"):
            raise ValueError(
                f"{path}: {tool.name} folders hold no quantized embeddings and experts; dequantize "
                "it first"
            )
        try:
            tool.write(_layer_of(w, None if stack_size(path, w) is None else 0))
        except ValueError as error:
            raise ValueError(f"{path}: {error}; {ways()}") from error
    linear = linear_modules(model, known)
    modules = {
        name: quantized[path]
        for name, path in linear.items()
        if path is not None and path in quantized
    }
    plain = [name for name in linear if name not in modules]
    return tool.config(modules, plain, family_of(model.config.model_type).float32)


def _export(params: Any, model: Any, write: Any) -> Iterable[tuple[str, tuple[int, ...], Any, Any]]:
    family = family_of(model.config.model_type)
    absent, trunk = re.compile(family.absent), _trunk(model)
    for path, leaf, tensors in parts_of(params, family):
        if isinstance(leaf, Quantized):
            for module, layer in layer_modules(path, leaf):
                yield from _export_quantized(module.removeprefix(trunk), leaf, layer, write)
            continue
        for tensor in tensors:
            if absent.fullmatch(tensor.name):
                continue
            reader = functools.partial(lambda leaf, tensor: fetch(tensor.take(leaf)), leaf, tensor)
            yield tensor.name.removeprefix(trunk), tensor.stored(leaf.shape), leaf.dtype, reader


def _layer_of(w: Quantized, layer: int | None) -> Quantized:
    """One layer of a weight, or the weight where it is not stacked, with NumPy arrays."""
    return jax.tree.map(lambda a: fetch(a if layer is None else a[layer]), w)


def _export_quantized(module: str, w: Quantized, layer: int | None, write: Any) -> Iterable[Any]:
    @functools.lru_cache(maxsize=1)
    def tensors() -> dict[str, np.ndarray]:
        return write(_layer_of(w, layer))

    for suffix, value in tensors().items():
        yield (
            f"{module}.{suffix}",
            value.shape,
            value.dtype,
            lambda suffix=suffix: tensors()[suffix],
        )
    tensors.cache_clear()  # read again when its shard is written
