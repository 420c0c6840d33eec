"""Hugging Face PEFT adapter folders (`adapter_config.json`, `adapter_model.safetensors`) in and out.

Tensors decide which modules an adapter touches; the config gives ranks, alphas and what else was trained. PyTorch stores
A as [r, in] and B as [out, r]; here A is [in, r] and B [r, out].
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from peft_jax.core.files import read_json, replacing_folder, write_json
from peft_jax.core.tree import is_node, map_places, nearest, places
from peft_jax.core.weight import Trainable, Weight, materialize, matrix_shape
from peft_jax.hub.names import module_names, tensors_of
from peft_jax.hub.safetensors_io import open_checkpoint, save_tensors
from peft_jax.low_rank.lora import MATRIX, LoRA, scaling

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_UNDERSTOOD = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "exclude_modules", "fan_in_fan_out",
    "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform", "lora_alpha", "lora_dropout",
    "loftq_config", "megatron_core", "modules_to_save", "peft_type", "peft_version", "qalora_group_size", "r",
    "rank_pattern", "revision", "runtime_config", "target_modules", "task_type", "use_rslora", "ensure_weight_tying",
}  # fmt: skip
_HARMLESS_INITS = (True, False, None, "gaussian", "orthogonal", "eva")


class _Factors(NamedTuple):
    """One module's adapter in PyTorch's orientation."""

    a: np.ndarray  # [r, in]
    b: np.ndarray  # [out, r]
    scale: float
    embedding: bool


def _layers(w: Any, path: str) -> int | None:
    """The number of stacked layers behind a place, None where it is not stacked."""
    return w.shape[0] if "layers" in path.split("/") else None


# ---------------------------------------------------------------------------------------------------------- saving


def save_adapter(
    folder: str | os.PathLike[str],
    params: Any,
    *,
    name: str = "default",
    base: str | None = None,
    revision: str | None = None,
    task_type: str | None = "CAUSAL_LM",
) -> None:
    """Write the adapter `name` in `params` as a PEFT folder; `base` names the base model's repository or folder.

    What trains beside it (biases, `modules_to_save`) goes along. Raises ValueError naming the place where the tree holds
    no such adapter, or something that PEFT's LoRA format cannot say.
    """
    factors: dict[str, _Factors] = {}
    trained: dict[str, np.ndarray] = {}
    nodes: dict[str, LoRA] = {}
    for path, w in places(params).items():
        if isinstance(w, Trainable):
            if w.saved_as == "full":
                raise ValueError(f"{path} is fully fine-tuned, which an adapter cannot hold; use merge and save")
            trained.update(_extra_tensors(path, w))
        elif (node := _find(w, name, path)) is not None:
            nodes[path] = node
            factors.update(_factors_of(path, node))
    if not nodes:
        raise ValueError(f"the tree holds no LoRA adapter named {name!r}")
    config = _config(params, nodes, factors) | {
        "base_model_name_or_path": base,
        "revision": revision,
        "task_type": task_type,
    }
    with replacing_folder(folder) as temporary:
        write_json(temporary / CONFIG, config)
        save_tensors(temporary / WEIGHTS, _tensors(factors, trained))


def _find(w: Any, name: str, path: str) -> LoRA | None:
    """The LoRA node called `name` in a stack of nodes."""
    while is_node(w):
        if isinstance(w, LoRA) and w.name == name:
            return w
        if not isinstance(w, LoRA) and w.trainable and not w.frozen:
            raise ValueError(f"{path} holds a {type(w).__name__}, which PEFT's LoRA format cannot hold")
        w = getattr(w, "base", None)
    return None


def _factors_of(path: str, node: LoRA) -> dict[str, _Factors]:
    module, _, leaf = path.rpartition("/")
    a, b, scale = (np.asarray(x) for x in (node.a, node.b, node.scale))
    layers = _layers(node, path)
    if a.ndim != 2 + (layers is not None):
        raise ValueError(f"{path} has leading axes {a.shape[:-2]} that PEFT's format cannot hold")
    result = {}
    for hf_module, layer in module_names(module, layers):
        one = (a, b, scale) if layer is None else (a[layer], b[layer], scale[layer])
        used = one[0].any(axis=0) | one[1].any(axis=1)  # columns padded to a common rank are zero in both
        if used.any():
            result[hf_module] = _Factors(one[0][:, used].T, one[1][used].T, float(one[2]), leaf == "embedding")
    return result


def _extra_tensors(path: str, w: Trainable) -> dict[str, np.ndarray]:
    """Checkpoint name -> array for a place that trains whole."""
    value = np.asarray(w.value)
    tensors = {}
    for tensor in tensors_of(path, _layers(w, path)):
        part = value if tensor.layer is None else value[tensor.layer]
        tensors[tensor.name] = part.T if tensor.transposed else part
    return tensors


def _tensors(factors: Mapping[str, _Factors], trained: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    tensors: dict[str, np.ndarray] = {}
    for module, f in factors.items():
        names = ("lora_embedding_A", "lora_embedding_B") if f.embedding else ("lora_A.weight", "lora_B.weight")
        tensors[f"{_PREFIX}{module}.{names[0]}"], tensors[f"{_PREFIX}{module}.{names[1]}"] = f.a, f.b
    for name, value in trained.items():  # an adapted module keeps what is its own in `base_layer`
        module, _, leaf = name.rpartition(".")
        tensors[f"{_PREFIX}{module}.{'base_layer.' if module in factors else ''}{leaf}"] = value
    return tensors


def _config(params: Any, nodes: Mapping[str, LoRA], factors: Mapping[str, _Factors]) -> dict[str, Any]:
    rslora = {node.rslora for node in nodes.values()}
    use_rslora = rslora == {True}
    ranks = {m: f.a.shape[0] for m, f in factors.items()}
    alphas = {m: f.scale * (ranks[m] ** 0.5 if use_rslora else ranks[m]) for m, f in factors.items()}
    alphas = {m: round(a, 6) for m, a in alphas.items()}
    r, alpha = Counter(ranks.values()).most_common(1)[0][0], Counter(alphas.values()).most_common(1)[0][0]
    dropout = Counter(node.dropout for node in nodes.values()).most_common(1)[0][0]
    marked = {p: w for p, w in places(params).items() if isinstance(w, Trainable)}
    biases = [p for p in places(params) if p.endswith("/bias")]
    trained = [p for p, w in marked.items() if w.saved_as == "bias"]
    whole = [(p, w) for p, w in marked.items() if w.saved_as == "module"]
    # Full names: PEFT compares ends of names, and "norm" would end "input_layernorm" too.
    saved = sorted({n for p, w in whole for n, _ in module_names(p.rpartition("/")[0], _layers(w, p))})
    return {
        "peft_type": "LORA",
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "use_rslora": use_rslora,
        "target_modules": _target_modules(params, factors),
        "rank_pattern": {re.escape(m): n for m, n in ranks.items() if n != r},
        "alpha_pattern": {re.escape(m): a for m, a in alphas.items() if a != alpha},
        "bias": "none" if not trained else "all" if len(trained) == len(biases) else "lora_only",
        "modules_to_save": saved or None,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _target_modules(params: Any, factors: Mapping[str, _Factors]) -> list[str]:
    """Short names where all modules of a name are adapted, full names elsewhere."""
    everywhere: Counter[str] = Counter()
    for path, w in places(params).items():
        if path.endswith(("/kernel", "/embedding")):
            names = module_names(path.rpartition("/")[0], _layers(w, path))
            everywhere.update(name.rpartition(".")[2] for name, _ in names)
    here = Counter(m.rpartition(".")[2] for m in factors)
    complete = {n for n, count in here.items() if count == everywhere[n]}
    return sorted(complete | {m for m in factors if m.rpartition(".")[2] not in complete})


# --------------------------------------------------------------------------------------------------------- loading


def load_adapter(params: Any, folder: str | os.PathLike[str], *, name: str = "default", revision: str | None = None) -> Any:
    """`params` with the PEFT LoRA adapter of a folder or repository in it, ready to run or to train on.

    Layers of a stacked tree may differ in rank, or have no adapter: they are padded with zeros, which stay zero in
    training. Raises FileNotFoundError, or ValueError naming the option, module or tensor that cannot be used.
    """
    from peft_jax.hub.checkpoint import local_folder

    path = local_folder(folder, revision)
    config = read_json(path / CONFIG)
    _check_config(config, path)
    if not (path / WEIGHTS).is_file() and any(path.glob("adapter_model.bin")):
        raise ValueError(f"{path} holds adapter_model.bin (pickle, which is not read); convert it to {WEIGHTS}")
    with open_checkpoint(path, WEIGHTS, WEIGHTS + ".index.json") as checkpoint:
        tensors = {n: checkpoint.read(n) for n in checkpoint.names}
    factors, extras = _parse(tensors, config, path)
    result = map_places(lambda p, w: _attach(p, w, factors, extras, config, name), params)
    if factors or extras:
        left = sorted([*factors, *extras])
        known = [n for p, w in places(params).items() for n, _ in module_names(p.rpartition("/")[0], _layers(w, p))]
        raise ValueError(f"the adapter in {path} has {left[0]}, which the model lacks.{nearest(left[0], known)}")
    return result


def _check_config(config: Mapping[str, Any], path: Path) -> None:
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{path / CONFIG}: peft_type {config.get('peft_type')!r} is not supported; supported: LORA")
    for key, value in config.items():
        if key not in _UNDERSTOOD and value:
            raise ValueError(f"{path / CONFIG}: option {key}={value!r} is not supported")
    init = config.get("init_lora_weights", True)
    if init not in _HARMLESS_INITS:
        raise ValueError(
            f"{path / CONFIG}: init_lora_weights={init!r} changes the base model's weights; "
            "save it with PEFT's path_initial_model_for_weight_conversion first"
        )
    if not isinstance(config.get("r"), int) or not isinstance(config.get("lora_alpha"), int | float):
        raise ValueError(f"{path / CONFIG} needs numbers r and lora_alpha")


def _pattern(pattern: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """PEFT's rule: a key is a regular expression that matches the end of the module's name."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def _parse(
    tensors: dict[str, np.ndarray], config: Mapping[str, Any], path: Path
) -> tuple[dict[str, _Factors], dict[str, np.ndarray]]:
    """(factors by module, other trained tensors by checkpoint name)."""
    halves: dict[str, dict[str, np.ndarray]] = {}
    extras: dict[str, np.ndarray] = {}
    for key, value in tensors.items():
        if not key.startswith(_PREFIX):
            raise ValueError(f"{path / WEIGHTS}: tensor {key} does not begin with {_PREFIX}")
        if value.dtype.kind not in "fV" and value.dtype.name != "bfloat16":
            raise ValueError(f"{path / WEIGHTS}: tensor {key} has dtype {value.dtype}, expected floating point")
        name = key.removeprefix(_PREFIX)
        if found := re.fullmatch(r"(.+)\.lora_(embedding_)?([AB])(\.weight)?", name):
            halves.setdefault(found[1], {})[found[3]] = value
            halves[found[1]]["embedding"] = np.asarray(bool(found[2]))
        elif re.search(r"\.lora_", name):
            raise ValueError(f"{path / WEIGHTS}: tensor {key} belongs to an option that is not supported")
        else:
            extras[name.replace(".base_layer.", ".")] = value
    factors = {}
    for module, half in halves.items():
        if not {"A", "B"} <= set(half):
            raise ValueError(f"{path / WEIGHTS}: {module} has only one of lora_A and lora_B")
        r = _pattern(config.get("rank_pattern"), module, config["r"])
        if half["A"].shape[0] != r or half["B"].shape[1] != r:
            raise ValueError(
                f"{path / WEIGHTS}: {module} has lora_A {half['A'].shape} and lora_B {half['B'].shape}, expected rank {r}"
            )
        alpha = _pattern(config.get("alpha_pattern"), module, config["lora_alpha"])
        scale = scaling(alpha, r, bool(config.get("use_rslora")))
        factors[module] = _Factors(half["A"], half["B"], scale, bool(half["embedding"]))
    return factors, extras


def _attach(path: str, w: Any, factors: dict[str, _Factors], extras: dict[str, np.ndarray], config: Any, name: str) -> Any:
    """The place with its part of the adapter, which is taken out of `factors` and `extras`."""
    if not (is_node(w) and not isinstance(w, Weight)):
        w = _attach_extra(path, w, extras, config)
    module, _, leaf = path.rpartition("/")
    if leaf not in ("kernel", "embedding"):
        return w
    modules = module_names(module, _layers(w, path))
    mine = {layer: factors.pop(m) for m, layer in modules if m in factors}
    if not mine:
        return w
    lead, n_in, n_out = matrix_shape(w.shape, *MATRIX)
    rank = max(f.a.shape[0] for f in mine.values())
    a, b = np.zeros((*lead, n_in, rank), np.float32), np.zeros((*lead, rank, n_out), np.float32)
    scale = np.ones(lead, np.float32)
    for layer, f in mine.items():
        if f.a.shape[1] != n_in or f.b.shape[0] != n_out:
            raise ValueError(f"the adapter's factors for {path} are {f.a.shape} and {f.b.shape}; the weight is {w.shape}")
        at = () if layer is None else (layer,)
        r = f.a.shape[0]
        a[(*at, slice(None), slice(r))], b[(*at, slice(r))], scale[at] = f.a.T, f.b.T, f.scale
    return LoRA(
        base=w,
        a=jnp.asarray(a),
        b=jnp.asarray(b),
        scale=jnp.asarray(scale),
        dropout=float(config.get("lora_dropout") or 0.0),
        rslora=bool(config.get("use_rslora")),
        name=name,
    )


def _attach_extra(path: str, w: Any, extras: dict[str, np.ndarray], config: Any) -> Any:
    """A bias or whole module that was trained beside the adapter, in the place of the base's."""
    tensors = [t for t in tensors_of(path, _layers(w, path)) if t.name in extras]
    if not tensors:
        return w
    value = np.array(materialize(w))
    for tensor in tensors:
        new = extras.pop(tensor.name)
        new = new.T if tensor.transposed else new
        target = value if tensor.layer is None else value[tensor.layer]
        if new.shape != target.shape:
            raise ValueError(f"{tensor.name} in the adapter has shape {new.shape}, the model's is {target.shape}")
        target[...] = new.astype(value.dtype)
    return Trainable(jnp.asarray(value), saved_as="bias" if path.endswith("/bias") else "module")
