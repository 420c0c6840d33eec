"""PEFT's methods that are stored for a model as a whole: prompts, prefixes, adaption prompts and
layer-norm tuning.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from peft_jax.adapters.llama_adapter import AdaptionPrompt, FusedAdaptionPrompt, prompted
from peft_jax.adapters.prefix import Offset, Prefix, attention_cores, offset_stack
from peft_jax.adapters.prompt import (
    ContextTokens,
    EncodedTokens,
    Prompt,
    TaskTokens,
    VirtualTokens,
    place_prompt,
)
from peft_jax.core.attachment import Attachment, attach
from peft_jax.core.placing import hidden_size, layers_of, token_stack
from peft_jax.core.prepare import distribute
from peft_jax.core.reparametrised import Replacement, replacements
from peft_jax.core.roles import role_of
from peft_jax.core.sharding import fetch
from peft_jax.core.tree import map_places, places
from peft_jax.hub.layers import join_layers, put_nodes, split_layers
from peft_jax.hub.names import modules_of, stack_size, tensors_of
from peft_jax.hub.peft.formats import FORMATS
from peft_jax.hub.peft.tied import (
    own_heads,
    put_stored,
    read_replacement,
    split_tie,
    tie_of,
    tied_tensors,
)
from peft_jax.hub.safetensors_io import write_adapter

WEIGHTS = "adapter_model.safetensors"
ROOT, PREFIX = "base_model.", "base_model.model."
_BY_MODULE = ("ADAPTION_PROMPT", "LN_TUNING")  # methods whose other tensors have the longer prefix
Tensors = dict[str, np.ndarray]
Config = Mapping[str, Any]


class WholeFormat(NamedTuple):
    """How a method is stored: `write` makes (tensors, configuration) of the tree and the adapter's
    nodes, `read` puts the adapter of (tree, tensors, configuration, name) into the tree. `fits`
    says which of the nodes are this method's.
    """

    nodes: tuple[type, ...]
    write: Callable[[Any, Mapping[str, Any], str], tuple[Tensors, dict[str, Any]]]
    read: Callable[[Any, Tensors, Config, str], Any]
    fits: Callable[[Any], bool] | None = None


def save_whole(
    folder: str | os.PathLike[str],
    params: Any,
    nodes: Mapping[str, Any],
    kind: str,
    *,
    name: str,
    base: Any,
    revision: Any,
    task_type: Any,
) -> None:
    """Write the adapter `name`, whose nodes are these, as a PEFT folder of the method `kind`."""
    modules = {
        p: n
        for p, n in nodes.items()
        if isinstance(n, Replacement) and n.saved_as in ("module", "base")
    }
    own = {p: n for p, n in nodes.items() if p not in modules}
    tensors, config = WHOLE_FORMATS[kind].write(params, own, name)
    tie = None if task_type == "FEATURE_EXTRACTION" else tie_of(params)
    whole = {
        t: value for path, n in modules.items() for t, value in trained_tensors(path, n).items()
    }
    whole = own_heads(params, task_type, name) | whole | tied_tensors(params, tie, name)
    tensors |= {(PREFIX if kind in _BY_MODULE else ROOT) + t: value for t, value in whole.items()}
    common = {
        "modules_to_save": saved_modules(params, name, tie) or None,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "peft_type": kind,
        "revision": revision,
        "task_type": task_type,
    }
    write_adapter(folder, WEIGHTS, tensors, config | common)


def load_whole(params: Any, tensors: Tensors, config: Config, name: str, path: Path) -> Any:
    """`params` with the adapter of a PEFT folder. Raises ValueError naming the tensor that is
    missing or does not fit.
    """
    kind = str(config["peft_type"])
    root = PREFIX if kind in _BY_MODULE else ROOT
    named = set(config.get("modules_to_save") or ())
    held = {
        root + t.name
        for p, w in places(params).items()
        if hasattr(w, "shape")
        for t in tensors_of(p, stack_size(p, w))
    }
    saved = {
        t: tensors.pop(t)
        for t in list(tensors)
        if (t.startswith(root) and named & set(t.removeprefix(root).split(".")))
        or t.removeprefix(root).rpartition(".")[0] in named
        or t in held
    }
    params = put_trained(
        params, {t.removeprefix(root): value for t, value in saved.items()}, config, name, path
    )
    try:
        return WHOLE_FORMATS[kind].read(params, tensors, config, name)
    except KeyError as error:
        raise ValueError(
            f"{path / WEIGHTS} lacks a tensor {error} that its method needs"
        ) from error


def trained_tensors(path: str, w: Replacement) -> Tensors:
    """Hugging Face's tensors for an array of the adapter's own, by name."""
    value = fetch(w.value)
    return {
        t.name: t.take(value)
        for t in tensors_of(path, stack_size(path, w))
        if t.layer is None or _replaces(w, t.layer)
    }


def _replaces(w: Replacement, layer: int) -> bool:
    return w.gate is None or bool(w.gate[layer].max() > 0)


def put_trained(params: Any, tensors: Tensors, config: Config, name: str, path: Path) -> Any:
    """`params` with whole modules (PEFT's `modules_to_save`) from these tensors. Raises ValueError
    where they do not fit.
    """
    left = dict(tensors)
    params = put_stored(params, left, config, name)
    params = split_tie(params, {}, {}, left, config, FORMATS["LORA"])
    modules, known = whole_modules(left), places(params)
    result = (
        map_places(lambda place, w: trained_place(place, w, left, modules, name, known), params)
        if left
        else params
    )
    if left:
        raise ValueError(
            f"the adapter in {path} has {sorted(left)[0]}, which the model lacks; load it with the "
            "adapter's task"
        )
    return result


def saved_modules(params: Any, name: str, tie: tuple[str, str] | None = None) -> list[str]:
    """PEFT's `modules_to_save`: the modules that train whole, heads by the name of the whole head,
    others by their full names (PEFT compares ends of names, and "norm" would end "input_layernorm"
    too). `tie` is the place of an embedding and the name of the head that trains with it.
    """
    known = places(params)
    marked = {p: n for p, n in replacements(params, name).items() if n.saved_as == "module"}

    def top(path):
        return path.partition("/")[0]

    heads = {top(p) for p in marked} - {
        top(p) for p, w in known.items() if p not in marked and not isinstance(w, Attachment)
    }
    modules = (
        (n, i, w)
        for p, w in marked.items()
        if top(p) not in heads
        for n, i in modules_of(p, stack_size(p, w))
    )
    names = {n for n, i, w in modules if i is None or _replaces(w, i)}
    if tie and tie[0] in marked:
        names.add(tie[1])
    return sorted(names | heads)


def whole_modules(tensors: Iterable[str]) -> set[str]:
    """The modules of these tensors that are there with their weights: else a bias alone was
    trained.
    """
    return {t.rpartition(".")[0] for t in tensors if t.endswith(".weight")}


def trained_place(
    path: str, w: Any, tensors: Tensors, whole: set[str], name: str, known: Mapping[str, Any]
) -> Any:
    """What was trained whole at a place of `known`, over the base's; it is taken out of
    `tensors`.
    """

    def alone(t):
        return path.endswith("/bias") and t.rpartition(".")[0] not in whole

    return read_replacement(
        path, w, tensors, lambda t: "bias" if alone(t) else "module", name, known
    )


# --------------------------------------------------------------------------------------------------
# prompts


def _tokens(nodes: Mapping[str, Any]) -> Any:
    return next(n for n in nodes.values() if not isinstance(n, Prompt))


def _write_prompt(
    params: Any, nodes: Mapping[str, Any], name: str
) -> tuple[Tensors, dict[str, Any]]:
    prompt = fetch(_tokens(nodes).prompt())
    return {"prompt_embeddings": prompt}, _prompt_config(prompt)


def _prompt_config(prompt: np.ndarray) -> dict[str, Any]:
    return {
        "num_virtual_tokens": prompt.shape[0],
        "token_dim": prompt.shape[1],
        "num_transformer_submodules": 1,
    }


def _embeddings(params: Any, tensors: Tensors) -> jnp.ndarray:
    prompt, width = tensors["prompt_embeddings"], hidden_size(params)
    if prompt.ndim != 2 or prompt.shape[1] != width:
        raise ValueError(
            f"prompt_embeddings has shape {prompt.shape}, expected (tokens, {width}) for this model"
        )
    return jnp.asarray(prompt, jnp.float32)


def _read_prompt(params: Any, tensors: Tensors, config: Config, name: str) -> Any:
    prompt = _embeddings(params, tensors)[
        : config.get("num_virtual_tokens")
    ]  # a decoder's, which PEFT keeps too, is not used
    return place_prompt(params, VirtualTokens(embeddings=prompt, name=name), len(prompt), None)


def _write_context(
    params: Any, nodes: Mapping[str, Any], name: str
) -> tuple[Tensors, dict[str, Any]]:
    tensors, config = _write_prompt(params, nodes, name)
    tokens = _tokens(nodes)
    return tensors, config | {
        "cpt_token_ids": list(tokens.token_ids),
        "cpt_mask": [1] * len(tokens.token_ids),
        "cpt_tokens_type_mask": list(tokens.token_types),
        "opt_projection_epsilon": tokens.epsilon,
        "opt_projection_format_epsilon": tokens.format_epsilon,
    }


def _read_context(params: Any, tensors: Tensors, config: Config, name: str) -> Any:
    from peft_jax.adapters.prompt import context_tokens

    rows = _embeddings(params, tensors)
    ids, types = config.get("cpt_token_ids") or [], config.get("cpt_tokens_type_mask") or []
    if not len(ids) == len(types) == len(rows):
        raise ValueError(
            f"prompt_embeddings has {len(rows)} tokens, cpt_token_ids {len(ids)} and "
            f"cpt_tokens_type_mask {len(types)}"
        )
    epsilon, format_epsilon = (
        float(config.get(f"opt_projection_{k}") or 0.0) for k in ("epsilon", "format_epsilon")
    )
    return place_prompt(
        params, context_tokens(rows, ids, types, epsilon, format_epsilon, name), len(rows), None
    )


def _write_tasks(
    params: Any, nodes: Mapping[str, Any], name: str
) -> tuple[Tensors, dict[str, Any]]:
    t = _tokens(nodes)
    arrays = {
        "prompt_embeddings": t.embeddings,
        "prefix_task_cols": t.columns,
        "prefix_task_rows": t.rows,
    }
    arrays = {k: fetch(v) for k, v in arrays.items()}
    config = {"num_tasks": t.columns.shape[0], "num_ranks": t.columns.shape[-1]}
    return arrays, _prompt_config(arrays["prompt_embeddings"]) | config


def _read_tasks(params: Any, tensors: Tensors, config: Config, name: str) -> Any:
    prompt = _embeddings(params, tensors)
    columns, rows = (
        jnp.asarray(tensors[k], jnp.float32) for k in ("prefix_task_cols", "prefix_task_rows")
    )
    n, P, r = columns.shape
    if len(prompt) != P or rows.shape != (n, r, prompt.shape[1]):
        raise ValueError(
            f"prefix_task_cols {columns.shape} and prefix_task_rows {rows.shape} do not fit "
            f"{prompt.shape}"
        )
    return place_prompt(
        params, TaskTokens(embeddings=prompt, columns=columns, rows=rows, name=name), P, None
    )


# --------------------------------------------------------------------------------------------------
# prefixes


def prefix_places(params: Any) -> list[tuple[str, int]]:
    """(canonical path of an attention core, number of the pair of keys and values there) for PEFT's
    prefixes.

    A decoder's layers have a pair each. In an encoder-decoder of L decoder layers, layer i attends
    to itself with the pair 2 i, counted round L, and to the encoder with none: PEFT cuts its list
    of pairs, twice over, in fours, and uses the first two.
    """
    cores = [n for core in attention_cores(params) for n, _ in layers_of(params, core)[1]]
    if token_stack(params)[0] != "encoder-decoder":
        return [(core, i) for i, core in enumerate(cores)]
    own = [
        core
        for core in cores
        if core.startswith("decoder/") and role_of(core.rpartition("/")[0]) == "attention"
    ]
    return [(core, 2 * i % len(own)) for i, core in enumerate(own)]


def _write_prefix(
    params: Any, nodes: Mapping[str, Any], name: str
) -> tuple[Tensors, dict[str, Any]]:
    split, order = _split_prefixes(params, nodes, name), prefix_places(params)
    if missing := [p for p, _ in order if f"{p}/prefix" not in split]:
        raise ValueError(
            f"PEFT's prefix tuning has a prefix in every layer, and {missing[0]} has none"
        )
    pairs = {i: split[f"{core}/prefix"] for core, i in order}
    pairs = {
        i: pairs.get(i, pairs[0]) for i in range(len(order))
    }  # what an encoder-decoder's list has and does not use
    both = [x for i in sorted(pairs) for x in (pairs[i].keys, pairs[i].values)]  # [P, K d] each
    if any(x is None for x in both):
        raise ValueError("a prefix in Flax's attention layers has no PEFT format")
    tensors = {"prompt_embeddings": np.concatenate(both, axis=-1)}
    own = {
        "num_virtual_tokens": both[0].shape[0],
        "num_layers": len(pairs),
        "prefix_projection": False,
    }
    return tensors, own | _sizes_of(params, both[0].shape[-1])


def _split_prefixes(params: Any, nodes: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The prefixes by layer."""
    whole = places(distribute(params))
    return split_layers(
        params, {p: _made(whole[p]) for p, n in nodes.items() if isinstance(n, Prefix)}, name
    )


def _sizes_of(params: Any, features: int) -> dict[str, int]:
    """What PEFT asks of an encoder-decoder's attention with keys of so many features."""
    if token_stack(params)[0] != "encoder-decoder":
        return {}
    table = next(
        w
        for p, w in places(params).items()
        if p.endswith("/embedding") and role_of(p.rpartition("/")[0]) == "relative"
    )
    return {
        "num_transformer_submodules": 2,
        "num_attention_heads": table.shape[-1],
        "token_dim": features,
    }


def prefixes_fit(params: Any, nodes: Mapping[str, Any], name: str) -> bool:
    """Whether PEFT's format can hold these prefixes: in an encoder-decoder those of its decoder's
    attention to itself, equal where PEFT has one pair for two layers.
    """
    if token_stack(params)[0] != "encoder-decoder":
        return True
    split, order = _split_prefixes(params, nodes, name), prefix_places(params)
    if set(split) != {f"{core}/prefix" for core, _ in order}:
        return False
    first = {i: split[f"{core}/prefix"] for core, i in order}
    return all(
        np.array_equal(getattr(split[f"{core}/prefix"], field), getattr(first[i], field))
        for core, i in order
        for field in ("keys", "values")
    )


def _made(node: Prefix) -> Prefix:
    """The prefix itself in the place of what makes it."""
    keys, values = node.arrays_by_layer()
    plain = {
        "weight": None,
        "bias": None,
        "shared": None,
        "group": "",
        "gating_weight": None,
        "gating_bias": None,
    }
    return node.replace(keys=keys, values=values, **plain)


def _read_prefix(params: Any, tensors: Tensors, config: Config, name: str) -> Any:
    if config.get("prefix_projection") and "prompt_embeddings" not in tensors:
        raise ValueError(
            "the adapter has its prefix as an encoder; save it with PEFT's inference mode"
        )
    return place_prefix(
        params, tensors["prompt_embeddings"].astype(np.float32), prefix_places(params), name
    )


def place_prefix(
    params: Any, flat: np.ndarray, order: list[tuple[str, int]], name: str, *, offset: bool = True
) -> Any:
    """`params` with a prefix from `flat` [P, 2 * pairs * K d], keys and values of each pair in
    turn; `order` says where.
    """
    from peft_jax.adapters.prefix import kv_features

    if not order:
        raise ValueError(
            "prefix tuning needs attention of this package's models, and this model has none"
        )
    count = len(order)
    wanted = 2 * count * kv_features(params)
    if flat.ndim != 2 or flat.shape[1] != wanted:
        raise ValueError(
            f"prompt_embeddings has shape {flat.shape}, expected (tokens, {wanted}) for this model"
        )
    parts = np.split(flat, 2 * count, axis=1)
    nodes = {
        f"{core}/prefix": Prefix(
            keys=parts[2 * i],
            values=parts[2 * i + 1],
            length=flat.shape[0],
            offset=offset,
            name=name,
        )
        for core, i in order
    }
    placed, stack = put_nodes(params, join_layers(params, nodes, name)), offset_stack(params)
    if not offset or stack is None:
        return placed
    return attach(placed, {stack: {f"offset_{name}": Offset(length=flat.shape[0], name=name)}})


# --------------------------------------------------------------------------------------------------
# adaption prompts


def _write_adaption(
    params: Any, nodes: Mapping[str, Any], name: str
) -> tuple[Tensors, dict[str, Any]]:
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


def _read_adaption(params: Any, tensors: Tensors, config: Config, name: str) -> Any:
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
        module = key.removeprefix(PREFIX).removesuffix(".adaption_prompt").replace(".", "/")
        nodes[f"{module}/{place}/adaption"] = cls(
            prompt=prompt[0].astype(np.float32), strength=strength, name=name
        )
    if not nodes:
        raise KeyError("adaption_prompt")
    return put_nodes(params, join_layers(params, nodes, name))


# --------------------------------------------------------------------------------------------------
# norms


def _write_norms(
    params: Any, nodes: Mapping[str, Any], name: str
) -> tuple[Tensors, dict[str, Any]]:
    tensors: Tensors = {}
    modules = set()
    for path, w in nodes.items():
        for t in tensors_of(path, stack_size(path, w)):
            module, _, leaf = t.name.rpartition(".")
            modules.add(module)
            tensors[f"{PREFIX}{module}.ln_tuning_layers.{leaf}"] = fetch(
                w.value if t.layer is None else w.value[t.layer]
            )
    return tensors, {"target_modules": sorted(modules), "modules_to_save": None}


def _read_norms(params: Any, tensors: Tensors, config: Config, name: str) -> Any:
    left = {
        k.removeprefix(PREFIX).replace(".ln_tuning_layers.", "."): v for k, v in tensors.items()
    }
    known = places(params)

    def place(path: str, w: Any) -> Any:
        norm = path.rpartition("/")[2] in ("scale", "bias")
        return read_replacement(path, w, left, lambda _: "norm", name, known) if norm else w

    result = map_places(place, params)
    if left:
        raise ValueError(f"the adapter has {sorted(left)[0]}, which the model lacks")
    return result


WHOLE_FORMATS: dict[str, WholeFormat] = {
    "PROMPT_TUNING": WholeFormat((VirtualTokens, Prompt), _write_prompt, _read_prompt),
    "P_TUNING": WholeFormat((EncodedTokens, Prompt), _write_prompt, _read_prompt),
    "CPT": WholeFormat((ContextTokens, Prompt), _write_context, _read_context),
    "MULTITASK_PROMPT_TUNING": WholeFormat((TaskTokens, Prompt), _write_tasks, _read_tasks),
    "PREFIX_TUNING": WholeFormat(
        (Prefix, Offset),
        _write_prefix,
        _read_prefix,
        lambda n: (
            isinstance(n, Offset) or (n.part == "both" and n.gating_weight is None and n.offset)
        ),
    ),
    "ADAPTION_PROMPT": WholeFormat(
        (AdaptionPrompt, FusedAdaptionPrompt), _write_adaption, _read_adaption
    ),
    "LN_TUNING": WholeFormat(
        (Replacement,), _write_norms, _read_norms, lambda n: n.saved_as == "norm"
    ),
}
