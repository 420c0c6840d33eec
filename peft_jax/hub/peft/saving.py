"""Adapters out, as Hugging Face PEFT folders."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from typing import Any

import jax

from peft_jax.core.attachment import Shared
from peft_jax.core.reparametrised import Replacement, replacement, replacements
from peft_jax.core.roles import is_expert
from peft_jax.core.select import OUTPUT_EMBEDDING
from peft_jax.core.sharding import fetch
from peft_jax.core.tree import places, stack_of
from peft_jax.core.weight import Trainable
from peft_jax.hub.names import embedding_name, is_conv1d, modules_of, stack_size
from peft_jax.hub.peft.experts import as_modules, expert_tensors, experts_config
from peft_jax.hub.peft.formats import (
    PREFIX,
    ROOT,
    WEIGHTS,
    PeftFormat,
    Tensors,
    format_of,
    module_formats,
)
from peft_jax.hub.peft.tied import (
    check_look_up,
    check_tokens,
    for_head,
    own_heads,
    tie_of,
    tied_tensors,
)
from peft_jax.hub.peft.trainable_tokens import FORMAT as TOKENS
from peft_jax.hub.peft.whole import saved_modules, trained_tensors
from peft_jax.hub.safetensors_io import write_adapter
from peft_jax.models.families import FAMILIES

ADAPTED = ("kernel", "embedding", OUTPUT_EMBEDDING)  # leaves whose modules PEFT wraps


def save_peft(
    folder: str | os.PathLike[str],
    params: Any,
    *,
    name: str = "default",
    base: str | None = None,
    revision: str | None = None,
    task_type: str | None = "CAUSAL_LM",
) -> None:
    """Write the adapter `name` of one of the methods that are stored by module as a PEFT folder;
    see `peft_jax.save_adapter`.
    """
    nodes, tokens, trained = _collect(params, name)
    if not nodes:
        nodes, tokens = tokens, {}
    if not nodes:
        raise ValueError(f"the tree holds no adapter named {name!r}")
    kind = _format_of(nodes)
    experts = {path: nodes.pop(path) for path in list(nodes) if is_expert(path)}
    # Of a model without a head, the trunk is all that there is in PEFT.
    bare = f"{trunk_of(params)}." if task_type == "FEATURE_EXTRACTION" else ""

    def own(name):
        return name.removeprefix(bare)

    tie = None if task_type == "FEATURE_EXTRACTION" else tie_of(params)
    check_tokens(params, {p: w for p, w in (tokens | nodes).items() if isinstance(w, TOKENS.nodes)})
    modules = {own(m): n for path, w in nodes.items() for m, n in _by_module(path, w).items()}
    embeddings = {
        own(m)
        for path, w in nodes.items()
        if path.endswith("/embedding")
        for m in _by_module(path, w)
    }
    if tie and tie[0] in nodes and kind is not TOKENS:
        modules[tie[1]] = for_head(modules[own(embedding_name(tie[0]))], tie[0])
    tensors = {
        f"{PREFIX}{m}.{t}": v
        for m, n in modules.items()
        for t, v in kind.write(n, m in embeddings).items()
    }
    tensors |= {
        f"{ROOT}{t}": take(params[f"shared_{_group(nodes)}"]) for t, take in kind.shared.items()
    }
    for path, w in tokens.items():
        for module, node in _by_module(path, w).items():
            tensors |= {
                f"{PREFIX}{own(module)}.token_adapter.{t}": v
                for t, v in TOKENS.write(node, True).items()
            }
    whole = own_heads(params, task_type, name) | trained | tied_tensors(params, tie, name)
    check_look_up(
        [*(modules if kind is not TOKENS else ()), *(t.rpartition(".")[0] for t in whole)]
    )
    for tensor, value in whole.items():  # an adapted module keeps what is its own in `base_layer`
        module, _, leaf = own(tensor).rpartition(".")
        tensors[f"{PREFIX}{module}.{'base_layer.' if module in modules else ''}{leaf}"] = value
    config = {
        "peft_type": kind.name,
        "target_modules": _target_modules(params, modules),
        "fan_in_fan_out": bool(modules) and all(map(is_conv1d, modules)),
        "inference_mode": True,
        "base_model_name_or_path": base,
        "revision": revision,
        "task_type": task_type,
        **_extras_config(params, kind, tie, name),
        **kind.describe(
            modules
            | {n: lora for path, w in experts.items() for n, lora in as_modules(path, w).items()}
        ),
        **_tokens_config(tokens, kind),
        **(
            {"ensure_weight_tying": _adapts(params, nodes, tie, name)}
            if "ensure_weight_tying" in kind.beside
            else {}
        ),
    }
    if experts:
        tensors |= {PREFIX + own(t): value for t, value in expert_tensors(experts).items()}
        config |= experts_config(experts)
    config = {k: v for k, v in config.items() if k not in kind.without}
    write_adapter(folder, WEIGHTS, tensors, config)


def trunk_of(params: Any) -> str | None:
    """The module of a tree that holds everything but its head; None where the tree itself does."""
    return next((f.prefix for f in FAMILIES.values() if f.prefix in params), None)


def _collect(params: Any, name: str) -> tuple[dict[str, Any], dict[str, Any], Tensors]:
    """(adapter nodes by path, trainable-token nodes by path, other trained tensors by checkpoint
    name).
    """
    nodes, tokens, trained = {}, {}, {}
    for path, w in places(params).items():
        stack = stack_of(w)
        for i, node in enumerate(stack):
            if isinstance(node, Trainable):
                raise ValueError(
                    f"{path} is fully fine-tuned, which an adapter cannot hold; use merge and save"
                )
            if isinstance(node, Replacement):
                trained.update(trained_tensors(path, node) if node.name == name else {})
            elif getattr(node, "name", None) == name:
                if any(getattr(outer, "pruned", False) for outer in stack[:i]):
                    raise ValueError(
                        f"the update at {path} is masked, which PEFT's format cannot say; use "
                        "merge and save"
                    )
                (tokens if isinstance(node, TOKENS.nodes) else nodes).setdefault(path, node)
            elif (
                node.trainable
                and not node.frozen
                and not isinstance(node, Shared)
                and not hasattr(node, "name")
            ):
                raise ValueError(
                    f"{path} holds a {type(node).__name__}, which PEFT's format cannot hold"
                )
    return nodes, tokens, trained


def _format_of(nodes: Mapping[str, Any]) -> PeftFormat:
    """The one format of an adapter's nodes."""
    kinds = {path: format_of(w) for path, w in nodes.items()}
    for path, kind in kinds.items():
        if kind is None:
            raise ValueError(
                f"{path} holds a {type(nodes[path]).__name__}, which PEFT has no format for"
            )
    names = sorted({k.name for k in kinds.values() if k is not None})
    if len(names) > 1:
        first, other = names[:2]
        raise ValueError(
            f"a PEFT folder holds one method, this adapter has {first} and {other}; give them "
            "different names"
        )
    kind = next(iter(kinds.values()))
    assert kind is not None
    return kind


def _group(nodes: Mapping[str, Any]) -> str:
    return next(iter(nodes.values())).group


def _by_module(path: str, node: Any) -> dict[str, Any]:
    """Hugging Face module name -> the node of one layer, with NumPy arrays and its base's shape."""
    layers = stack_size(path, node)
    if len(node.lead) != (layers is not None):
        raise ValueError(f"{path} has leading axes {node.lead} that PEFT's format cannot hold")
    bare = jax.tree.map(fetch, node.replace(base=None))
    shape = jax.ShapeDtypeStruct(node.features, node.dtype)
    result = {}
    for name, layer in modules_of(path, layers):
        one = bare if layer is None else jax.tree.map(lambda x, i=layer: x[i], bare)
        if one.gate is None or one.gate > 0:
            one = one.replace(base=shape, in_axes=(-2,), out_axes=(-1,))
            turned = (
                path.endswith(f"/{OUTPUT_EMBEDDING}")
                and node.in_axes == (-2,)
                and type(node) not in TOKENS.nodes
            )
            result[name] = for_head(one, path) if turned else one
    return result


def _adapts(params: Any, nodes: Mapping[str, Any], tie: tuple[str, str] | None, name: str) -> bool:
    """Whether a tied embedding is adapted or trained whole, as the head too."""
    return tie is not None and (
        tie[0] in nodes or replacement(places(params)[tie[0]], name) is not None
    )


def _extras_config(
    params: Any, kind: PeftFormat, tie: tuple[str, str] | None, name: str
) -> dict[str, Any]:
    """The options `bias` and `modules_to_save`."""
    marked = replacements(params, name)
    biases = [p for p in places(params) if p.endswith("/bias")]
    trained = [p for p, w in marked.items() if w.saved_as == "bias"]
    if trained and "bias" not in kind.beside:
        raise ValueError(f"{trained[0]} trains, which PEFT's {kind.name} format cannot hold")
    bias = "none" if not trained else "all" if len(trained) == len(biases) else "lora_only"
    return {
        "modules_to_save": saved_modules(params, name, tie) or None,
        **({"bias": bias} if trained else {}),
    }


def _tokens_config(tokens: Mapping[str, Any], kind: PeftFormat) -> dict[str, Any]:
    if not tokens:
        return {}
    if "trainable_token_indices" not in kind.beside:
        able = [f.name for f in module_formats() if "trainable_token_indices" in f.beside]
        raise ValueError(
            f"{next(iter(tokens))} has trainable tokens, which PEFT combines with "
            f"{' and '.join(able)} only, not {kind.name}"
        )
    names = {path: modules_of(path, None)[0][0].rpartition(".")[2] for path in tokens}
    return {"trainable_token_indices": {names[p]: fetch(w.ids).tolist() for p, w in tokens.items()}}


def _target_modules(params: Any, modules: Mapping[str, Any]) -> list[str]:
    """Short names where all modules of a name are adapted, full names elsewhere."""
    everywhere: Counter[str] = Counter()
    for path, w in places(params).items():
        if path.rpartition("/")[2] in ADAPTED:
            names = modules_of(path, stack_size(path, w))
            everywhere.update(name.rpartition(".")[2] for name, _ in names)
    here = Counter(m.rpartition(".")[2] for m in modules)
    complete = {n for n, count in here.items() if count == everywhere[n]}
    return sorted(complete | {m for m in modules if m.rpartition(".")[2] not in complete})
