"""Hugging Face checkpoints in and out: a folder or repository id <-> (vanilla Flax model, parameter
tree).
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from peft_jax.core.files import read_json, replacing_folder, write_json
from peft_jax.core.prepare import resolve
from peft_jax.core.select import OUTPUT_EMBEDDING, nearest
from peft_jax.core.sharding import (
    Rules,
    check_rules,
    fetch,
    node_shardings,
    say_whole,
    shard,
    shard_place,
)
from peft_jax.core.tree import map_places, path_str, places
from peft_jax.core.weight import Trainable, Weight, materialize
from peft_jax.hub.generation_config import FILE as GENERATION
from peft_jax.hub.generation_config import read_generation_config
from peft_jax.hub.names import Tensor, expert_tensors, modules_of, stack_size, tensors_of
from peft_jax.hub.quantized import QuantizedReader, quantization_config, writer
from peft_jax.hub.safetensors_io import Checkpoint, open_checkpoint, write_shards
from peft_jax.low_rank.svd import Factorized
from peft_jax.models.blocks import Task, abstract_params, fresh_params
from peft_jax.models.families import (
    FAMILIES,
    family_of,
    hf_config_of,
    introduce,
    task_of,
    untie,
)
from peft_jax.models.family import Family
from peft_jax.quantization.quantized import Quantized

BASE = Path(__file__).parent.parent / "assets" / "base"
logger = logging.getLogger("peft_jax")
_HEAD_TASKS = ("causal_lm", "seq2seq_lm", "masked_lm")  # of models whose head may be the embedding
Parts = Mapping[str, tuple[Any, list[Tensor]]]  # path -> (array, its tensors)
_OLD_NAMES = {"gamma": "weight", "beta": "bias"}  # of norms, in BERT's first checkpoints
_WANTED = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")


def local_folder(folder_or_repo: str | os.PathLike[str], revision: str | None = None) -> Path:
    """The folder itself, the embedded model for "builtin:base", or the local copy of a hub
    repository.

    Raises FileNotFoundError naming what was tried.
    """
    if str(folder_or_repo).startswith("builtin:"):
        if folder_or_repo != "builtin:base":
            raise FileNotFoundError(
                f"there is no built-in model {str(folder_or_repo)!r}; there is builtin:base"
            )
        return BASE
    path = Path(folder_or_repo).expanduser()
    if path.is_dir():
        return path
    name = str(folder_or_repo)
    if path.is_absolute() or name.startswith(".") or name.count("/") > 1:
        raise FileNotFoundError(f"{name} is no folder")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(_WANTED)))
    except Exception as error:
        raise FileNotFoundError(
            f"{name} is neither a folder nor a repository that can be downloaded "
            f"({type(error).__name__})"
        ) from error


def read_config(folder: Path) -> Any:
    """The Hugging Face config of a folder; code in the repository is never run."""
    raw = read_json(folder / "config.json")
    if "model_type" not in raw:
        raise ValueError(f"{folder / 'config.json'} has no model_type")
    from transformers import AutoConfig

    introduce(raw["model_type"])
    return AutoConfig.from_pretrained(folder, trust_remote_code=False)


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
    hf_config = _labelled(read_config(folder), labels)
    dtype = _default_dtype(hf_config) if dtype is None else jnp.dtype(dtype)
    family = family_of(hf_config.model_type)
    with open_checkpoint(folder) as opened:
        checkpoint, architecture = _Renamed(opened, family), family.config(hf_config)
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
            for path, leaf, tensors in _parts(abstract, family, checkpoint.names)
        }
        fresh = _fresh(
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
                node = reader.weight(_modules(path, leaf), leaf.shape, dtype)
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
    checkpoint: _Renamed, reader: QuantizedReader, family: Family, task: Task, tied: bool
) -> bool:
    """Whether a checkpoint whose head is to be its embedding holds another head, which
    `transformers` keeps then.
    """
    if not tied or task not in _HEAD_TASKS:
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


def load_fresh(
    folder_or_repo: str | os.PathLike[str],
    *,
    config: Mapping[str, Any] | None = None,
    task: Task | None = None,
    labels: Sequence[str] | int | None = None,
    dtype: Any = None,
    mesh: Mesh | None = None,
    rules: Rules = (),
    revision: str | None = None,
    seed: int = 0,
    **options: Any,
) -> tuple[Any, Any]:
    """(model, params) of a folder's `config.json`, its values replaced by those of `config`, with
    parameters drawn from `seed`.

    The folder needs no weights. `options` are those of `load`: scan_layers, remat,
    attention_implementation. Raises ValueError for a value that the family's config does not have,
    and as `load` does.
    """
    folder = local_folder(folder_or_repo, revision)
    hf_config = _labelled(read_config(folder), labels)
    known = hf_config.to_dict()
    for name in config or {}:
        if name not in known:
            raise ValueError(
                f"a {hf_config.model_type} config has no {name!r}.{nearest(name, known)}"
            )
    changed = {**known, **(config or {})}
    if isinstance(kinds := changed.get("layer_types"), list) and "layer_types" not in (
        config or {}
    ):
        count = changed.get("num_hidden_layers", len(kinds))
        changed["layer_types"] = None if count > len(kinds) else kinds[:count]
    hf_config = type(hf_config)(**{k: v for k, v in changed.items() if k != "model_type"})
    family = family_of(hf_config.model_type)
    dtype = _default_dtype(hf_config) if dtype is None else jnp.dtype(dtype)
    architecture = dataclasses.replace(
        family.config(hf_config), generation_config=read_generation_config(folder)
    )
    model: Any = family.module(
        architecture, task=task_of(hf_config, task), dtype=dtype, param_dtype=dtype, **options
    )
    params = jax.jit(lambda: fresh_params(model, seed))()
    return model, params if mesh is None else shard(params, mesh, rules)


def _labelled(hf_config: Any, labels: Sequence[str] | int | None) -> Any:
    """The config with these classes. Raises ValueError for a checkpoint's own classes where a text
    may have several.
    """
    if labels is None:
        if hf_config.problem_type == "multi_label_classification":
            raise ValueError(
                "the checkpoint's problem_type is multi_label_classification, of which there is no "
                "loss here: give `labels` "
                "(data.labels) for a new head with one label a text"
            )
        return hf_config
    hf_config.problem_type = None  # that of the old classes
    names = [f"LABEL_{i}" for i in range(labels)] if isinstance(labels, int) else list(labels)
    hf_config.id2label, hf_config.label2id = (
        dict(enumerate(names)),
        {name: i for i, name in enumerate(names)},
    )
    return hf_config


class _Renamed:
    """A checkpoint whose tensors are called as the model's: `read`, `shape` and `names` as of
    `Checkpoint`.

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


def _fresh(
    missing: list[str], parts: Parts, model: Any, folder: Path, seed: int
) -> dict[str, jax.Array]:
    """path -> new values for the places of the head that the checkpoint lacks."""
    wanted = {
        path for path, (_, tensors) in parts.items() if {t.name for t in tensors} & set(missing)
    }
    if not wanted:
        return {}
    logger.warning(
        f"{folder} has no {_listed(missing)}: the {model.task} head starts anew and has to "
        "be trained"
    )
    return jax.jit(
        lambda: {p: w for p, w in places(fresh_params(model, seed)).items() if p in wanted}
    )()


def _modules(path: str, leaf: Any) -> list[tuple[str, int | None]]:
    """(Hugging Face module, layer) for each module behind the leaf at `path`."""
    return modules_of(path, stack_size(path, leaf))


def _quantized_tensors(reader: QuantizedReader, path: str, leaf: Any) -> list[str]:
    """The checkpoint tensors of a quantized kernel, none where it is an array there."""
    if not path.endswith("/kernel"):
        return []
    modules = _modules(path, leaf)
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
        u, v = (
            jax.ShapeDtypeStruct((*lead, *shape), leaf.dtype)
            for shape in ((n_in, k), (k, leaf.shape[-1]))
        )
        return Factorized(u=u, v=v, in_sizes=leaf.shape[-2:-1], out_sizes=leaf.shape[-1:])

    return map_places(place, abstract)


def _parts(
    abstract: Any, family: Family, present: Iterable[str] = ()
) -> Iterable[tuple[str, Any, list[Tensor]]]:
    """(path, array, its tensors) for each array of a tree; the two factors of a weight are
    `<name>_u` and `<name>_v`.

    Experts have tensors of their own, unless they are `present` as one.
    """
    known = set(present)
    for path, leaf in places(abstract).items():
        tensors = tensors_of(path, stack_size(path, leaf))
        if isinstance(leaf, Factorized):
            for factor in ("u", "v"):
                yield (
                    f"{path}/{factor}",
                    getattr(leaf, factor),
                    [t._replace(name=f"{t.name}_{factor}") for t in tensors],
                )
            continue
        if tensors[0].name not in known:
            experts = leaf.shape[-3] if len(leaf.shape) > 2 else 1
            tensors = [one for tensor in tensors for one in expert_tensors(tensor, experts)]
        yield path, leaf, [t._replace(name=_disk_name(family, t.name)) for t in tensors]


def _disk_name(family: Family, name: str) -> str:
    for pattern, replacement in family.disk:
        name = re.sub(pattern, replacement, name)
    return name


def _default_dtype(hf_config: Any) -> Any:
    stored = str(getattr(hf_config, "dtype", None) or "float32").removeprefix("torch.")
    stored = "bfloat16" if stored == "float16" else stored  # in which nothing can be trained
    return jnp.dtype("float32" if jax.default_backend() == "cpu" else stored)


def _check(
    checkpoint: _Renamed, parts: Parts, model: Any, folder: Path, quantized: Mapping[str, list[str]]
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
        raise ValueError(f"{folder} lacks {_listed(lost)}")
    surplus = sorted(present - set(expected) - checkpoint.spare)
    heads_of_all = {head for family in FAMILIES.values() for head in family.heads}
    if surplus := [name for name in surplus if name.partition(".")[0] not in heads_of_all]:
        raise ValueError(
            f"{folder} holds {_listed(surplus)}, which a {model.config.model_type} model has no "
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


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _read_leaf(
    checkpoint: _Renamed, tensors: list[Tensor], leaf: Any, sharding: NamedSharding | None
) -> jax.Array:
    there = [t for t in tensors if not checkpoint.absent.fullmatch(t.name)]
    if there and not there[0].index:
        return _read_tensor(checkpoint, there[0], leaf.shape, leaf.dtype, sharding)
    buffer = jax.jit(lambda: jnp.zeros(leaf.shape, leaf.dtype), out_shardings=sharding)()
    for tensor in there:
        one = (
            None
            if sharding is None
            else NamedSharding(sharding.mesh, P(*sharding.spec[len(tensor.index) :]))
        )
        shape = tensor.shape(leaf.shape)
        start = 0 if tensor.part is None else tensor.part[0] * shape[-1]
        value = _read_tensor(checkpoint, tensor, shape, leaf.dtype, one)
        buffer = _set_part(buffer, value, (*tensor.index, *[0] * (len(shape) - 1), start))
    return buffer


@functools.partial(jax.jit, donate_argnums=0)
def _set_part(buffer: jax.Array, value: jax.Array, start: tuple[Any, ...]) -> jax.Array:
    lead = buffer.ndim - value.ndim
    return jax.lax.dynamic_update_slice(buffer, value.reshape(*[1] * lead, *value.shape), start)


def _read_tensor(
    checkpoint: _Renamed, tensor: Tensor, shape: tuple[int, ...], dtype: Any, sharding: Any
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


def save(
    folder: str | os.PathLike[str],
    model: Any,
    params: Any,
    *,
    tokenizer: Any = None,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Write a Hugging Face folder (configs, safetensors in shards, tokenizer) that `transformers`
    loads.

    `params` must hold arrays: `merge` trees with adapters first. Pruned weights are written with
    their zeros. Factorized weights are written as their factors (`<name>_u`, `<name>_v`), which
    `load` reads and `transformers` does not. Quantized weights are written as bitsandbytes writes
    them (NF4, FP4) or as compressed-tensors (the others). The folder appears only when all is
    written. On several hosts all of them call this, since tensor by tensor is gathered from them,
    and the first one writes. Raises ValueError naming the first node that is neither, or that its
    format cannot hold or `transformers` not read.
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
        method, write = writer(quantized.values())
        config["quantization_config"] = _quantization_config(method, write, model, known)
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
            model.task not in _HEAD_TASKS
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
        found |= {name.removeprefix(trunk): path for name, _ in _modules(path, w)}
    return found


def _quantization_config(
    method: str, write: Any, model: Any, known: Mapping[str, Any]
) -> dict[str, Any]:
    """The folder's `quantization_config`; raises ValueError naming the place that the method cannot
    hold.
    """
    quantized = {path: w for path, w in known.items() if isinstance(w, Quantized)}
    for path, w in quantized.items():
        if not path.endswith("/kernel"):
            raise ValueError(
                f"{path}: {method} folders hold no quantized embeddings and experts; dequantize "
                "it first"
            )
        try:
            write(_layer_of(w, None if stack_size(path, w) is None else 0))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    linear = linear_modules(model, known)
    modules = {
        name: quantized[path]
        for name, path in linear.items()
        if path is not None and path in quantized
    }
    plain = [name for name in linear if name not in modules]
    return quantization_config(method, modules, plain, family_of(model.config.model_type).float32)


def _export(params: Any, model: Any, write: Any) -> Iterable[tuple[str, tuple[int, ...], Any, Any]]:
    family = family_of(model.config.model_type)
    absent, trunk = re.compile(family.absent), _trunk(model)
    for path, leaf, tensors in _parts(params, family):
        if isinstance(leaf, Quantized):
            for module, layer in _modules(path, leaf):
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


def load_tokenizer(folder_or_repo: str | os.PathLike[str], revision: str | None = None) -> Any:
    """The tokenizer of a folder or repository, from `transformers`; code in the repository is never
    run.
    """
    from transformers import AutoTokenizer

    folder = local_folder(folder_or_repo, revision)
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{folder} has no tokenizer that transformers can load: {error}"
        ) from error
