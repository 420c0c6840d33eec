"""Structured pruning: a decoder that is physically smaller, with a Hugging Face config that says
so.

`shrink` takes away layers, key/value groups with their query heads, query heads, feed-forward
units, hidden channels and tokens of the vocabulary, given which ones stay; `prune_structured`
chooses those that matter most. Letters: L layers, H query heads, K key/value heads, d head size, F
feed-forward units, D hidden channels, V tokens.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from peft_jax.core.attachment import module_at
from peft_jax.core.bind import bind
from peft_jax.core.calibrate import calibrate
from peft_jax.core.roles import role_of
from peft_jax.core.select import stack_at
from peft_jax.core.sharding import fetch
from peft_jax.core.tree import is_node, map_places, places
from peft_jax.models.blocks import abstract_params
from peft_jax.models.config import DecoderConfig
from peft_jax.models.decoder import Decoder
from peft_jax.models.families import remade
from peft_jax.models.layers import stacked, unstack_layers
from peft_jax.pruning.importance import importance, parts_of
from peft_jax.pruning.vocabulary import renumbered

# Roles of modules that read the hidden channels, and that write them.
_ATTENTION, _FEED_FORWARD = ("q", "k", "v", "qkv"), ("gate", "up", "gate_up")
_INTO, _OUT_OF = (*_ATTENTION, *_FEED_FORWARD), ("o", "down")


def shrink(
    model: Decoder,
    params: Any,
    *,
    layers: Sequence[int] | None = None,
    heads: Any = None,
    kv_heads: Any = None,
    units: Any = None,
    channels: Sequence[int] | None = None,
    tokens: Sequence[int] | None = None,
) -> tuple[Decoder, Any]:
    """(model, params) with only what is named left.

    `layers` [L'], `channels` [D'] and `tokens` [V'] are numbers of those that stay; `heads` [L,
    H'], `kv_heads` [L, K'] and `units` [L, F'] say it for each layer of the model as it is.
    Key/value heads keep their query heads unless `heads` says which; each must keep as many.
    Left-out parts stay whole. What a token's row or a head computes does not change.

    Raises ValueError naming the argument for numbers that are not there, repeated, or not the same
    number in each layer (no supported family's config can say that), a special token that would go,
    a size that `transformers` refuses for the family, and for trees that do not hold arrays.
    """
    check_decoder(model)
    c, looped = model.config, not model.scan_layers
    for path, w in places(params).items():
        if is_node(w):
            raise ValueError(f"{path} is a {type(w).__name__}; merge or densify before shrink")
    if c.num_experts and (units is not None or channels is not None):
        raise ValueError(
            "units and channels of a mixture of experts are not cut; prune_experts takes whole "
            "experts away"
        )
    L = c.num_layers
    kept = {
        "layers": _numbers("layers", layers, L),
        "channels": _numbers("channels", channels, c.hidden_size),
        "tokens": _numbers("tokens", tokens, c.vocab_size),
        "units": _by_layer("units", units, L, c.intermediate_size, c.model_type),
        "kv_heads": _by_layer("kv_heads", kv_heads, L, c.num_kv_heads, c.model_type),
    }
    kept["heads"] = _query_heads(heads, kept["kv_heads"], c)
    config = _smaller_config(c, kept)
    rules = _rules(c, kept)

    def place(path: str, w: jax.Array) -> jax.Array:
        for axis, index in rules(path):
            w = _pick(w, index, axis)
        return w if stack_at(path) is None else w[kept["layers"]]

    small = map_places(place, stacked(model, params)[1])
    return model.clone(config=config), unstack_layers(small) if looped else small


def check_decoder(model: Any) -> None:
    """Raise ValueError for a model whose parts are not known here."""
    if not isinstance(model, Decoder):
        kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
        raise ValueError(
            f"a {kind} model is not cut down here: structured pruning is for this package's "
            "decoders (Llama's kin)"
        )


def _numbers(name: str, given: Any, n: int) -> np.ndarray:
    """Sorted numbers below `n`, all of them for None."""
    found = np.arange(n) if given is None else np.sort(np.asarray(given, dtype=np.int64).ravel())
    if found.size == 0:
        raise ValueError(f"{name} must leave at least one of {n}")
    if found[0] < 0 or found[-1] >= n:
        raise ValueError(
            f"{name} has {found[0] if found[0] < 0 else found[-1]}, but there are {n}, "
            "numbered from 0"
        )
    if (np.diff(found) == 0).any():
        raise ValueError(f"{name} names {found[:-1][np.diff(found) == 0][0]} twice")
    return found


def _by_layer(name: str, given: Any, L: int, n: int, family: str) -> np.ndarray:
    """Sorted numbers below `n` for each layer, [L, n']."""
    if given is None:
        return np.broadcast_to(np.arange(n), (L, n))
    rows = [_numbers(f"{name} of layer {i}", row, n) for i, row in enumerate(given)]
    if len(rows) != L:
        raise ValueError(f"{name} has {len(rows)} rows, one for each of the {L} layers is expected")
    if len({len(row) for row in rows}) > 1:
        raise ValueError(
            f"{name} differ in number from layer to layer, which a {family} config cannot say: "
            "keep as many in each"
        )
    return np.stack(rows)


def _query_heads(given: Any, kv_heads: np.ndarray, c: DecoderConfig) -> np.ndarray:
    """[L, H'] query heads that stay, those of one key/value head together."""
    group = c.num_heads // c.num_kv_heads
    if given is None:
        return _expanded(kv_heads, group)
    heads = _by_layer("heads", given, c.num_layers, c.num_heads, c.model_type)
    for i, (row, keys) in enumerate(zip(heads, kv_heads, strict=True)):
        counts = {k: int((row // group == k).sum()) for k in range(c.num_kv_heads)}
        if {k for k, n in counts.items() if n} - set(keys.tolist()) or len(
            {counts[k] for k in keys.tolist()}
        ) > 1:
            raise ValueError(
                f"heads of layer {i} must be as many for each key/value head that stays, got "
                f"{counts} for {keys.tolist()}"
            )
    return heads


def _rules(
    c: DecoderConfig, kept: Mapping[str, np.ndarray]
) -> Callable[[str], list[tuple[int, np.ndarray]]]:
    """path of a stacked tree -> [(axis, what stays along it)]; an index [L, n] differs from layer
    to layer.
    """
    q, kv = (_expanded(kept[name], c.head_dim) for name in ("heads", "kv_heads"))
    units, channels = kept["units"], kept["channels"]
    n_q, n_kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    inner = {
        "q": q,
        "k": kv,
        "v": kv,
        "qkv": np.concatenate([q, n_q + kv, n_q + n_kv + kv], 1),
        "o": q,
        "gate": units,
        "up": units,
        "down": units,
        "gate_up": np.concatenate([units, c.intermediate_size + units], 1),
        "q_norm": q,
        "k_norm": kv,
    }

    def of(path: str) -> list[tuple[int, np.ndarray]]:
        module, _, leaf = path.rpartition("/")
        role = role_of(module)
        if c.num_experts and _in_feed_forward(module):
            return []
        if role in _INTO:
            return [(-1, inner[role]), *([(-2, channels)] if leaf == "kernel" else [])]
        if role in _OUT_OF:
            return [(-1, channels), *([(-2, inner[role])] if leaf == "kernel" else [])]
        if role in ("q_norm", "k_norm"):
            return [(-1, inner[role])] if c.qk_norm == "full" else []
        if role == "embedding":
            return [(-2, kept["tokens"]), (-1, channels)]
        if role == "labels":
            return [(-2, channels)] if leaf == "kernel" else []
        return [(-2, channels), (-1, kept["tokens"])] if role == "head" else [(-1, channels)]

    return of


def _in_feed_forward(module: str) -> bool:
    parts = module.split("/")
    return any(role_of("/".join(parts[:i])) == "feed_forward" for i in range(1, len(parts)))


def _expanded(numbers: np.ndarray, size: int) -> np.ndarray:
    """Numbers [L, n] of parts as those of what they consist of, `size` each, [L, n * size]."""
    return (numbers[:, :, None] * size + np.arange(size)).reshape(len(numbers), -1)


def _pick(w: jax.Array, index: np.ndarray, axis: int) -> jax.Array:
    """Entries along an axis, the same ones everywhere or, for an index [L, n], those of each
    layer.
    """
    if index.shape[-1] == w.shape[axis]:
        return w
    if index.ndim == 1:
        return jnp.take(w, index, axis=axis)
    shape = [1] * w.ndim
    shape[0], shape[axis] = index.shape
    return jnp.take_along_axis(w, jnp.asarray(index.reshape(shape)), axis=axis)


def _smaller_config(c: DecoderConfig, kept: Mapping[str, np.ndarray]) -> DecoderConfig:
    """The config of the smaller model, made by way of the Hugging Face one. Raises ValueError where
    that is refused.
    """
    hf = json.loads(c.hf_config)
    layers = kept["layers"].tolist()
    sizes = {
        "num_hidden_layers": len(layers),
        "num_attention_heads": kept["heads"].shape[1],
        "hidden_size": len(kept["channels"]),
        "num_key_value_heads": kept["kv_heads"].shape[1],
        "head_dim": c.head_dim,
        "intermediate_size": kept["units"].shape[1],
        "vocab_size": len(kept["tokens"]),
    }
    hf |= {k: int(v) for k, v in sizes.items()}
    for name in ("layer_types", "no_rope_layers"):
        if isinstance(hf.get(name), list):
            hf[name] = [hf[name][i] for i in layers]
    new = {int(old): i for i, old in enumerate(kept["tokens"])}
    hf = renumbered(hf, new, c.vocab_size)
    if (generation := c.generation_config) is not None:
        generation = json.dumps(
            renumbered(json.loads(generation), new, c.vocab_size), sort_keys=True
        )
    try:
        return dataclasses.replace(remade(c, hf), generation_config=generation)
    except Exception as error:  # validators of transformers raise errors of several kinds
        text = " ".join(str(error.__cause__ or error).split())
        raise ValueError(f"transformers has no {c.model_type} model of {sizes}: {text}") from error


def keep_best(scores: Any, keep: int, name: str = "keep") -> np.ndarray:
    """Numbers of the `keep` highest of scores [..., n], in ascending order, [..., keep]; the first
    of equal ones.

    Raises ValueError for a number outside 1..n.
    """
    scores = fetch(scores)
    if not 1 <= keep <= scores.shape[-1]:
        raise ValueError(f"{name} must leave between 1 and {scores.shape[-1]}, got {keep}")
    return np.sort(np.argsort(-scores, axis=-1, kind="stable")[..., :keep], axis=-1)


def prune_structured(
    model: Decoder,
    params: Any,
    batches: Iterable[Mapping[str, Any]],
    *,
    layers: int | None = None,
    heads: int | None = None,
    kv_heads: int | None = None,
    units: int | None = None,
    channels: int | None = None,
    score: Literal["activation", "fluctuation", "magnitude"] = "activation",
    compensate: bool = False,
) -> tuple[Decoder, Any]:
    """(model, params) with this many layers, query and key/value heads, feed-forward units and
    hidden channels: those that matter most on `batches` by `importance`.

    `heads` counts all of a layer's query heads, as many for each key/value head. `compensate` adds
    what the removed units and heads gave on average to a bias (FLAP, An et al. 2023,
    arXiv:2312.11983), which a llama config can hold; others are refused. Raises ValueError for
    numbers that are not there, and as `shrink` does.
    """
    check_decoder(model)
    c = model.config
    batches = list(batches)
    found = importance(model, params, batches, score=score)
    kept: dict[str, Any] = {}
    for name, keep in (
        ("layers", layers),
        ("kv_heads", kv_heads),
        ("units", units),
        ("channels", channels),
    ):
        if keep is not None:
            kept[name] = keep_best(found[name], keep, name)
    if heads is not None:
        keys = _by_layer(
            "kv_heads", kept.get("kv_heads"), c.num_layers, c.num_kv_heads, c.model_type
        )
        kept["heads"] = _best_heads(fetch(found["heads"]), keys, heads, c)
    if compensate:
        model, params = _compensated(model, params, batches, kept)
    return shrink(model, params, **kept)


def _best_heads(scores: np.ndarray, keys: np.ndarray, heads: int, c: DecoderConfig) -> np.ndarray:
    """[L, heads] the best query heads, as many of each key/value head that stays."""
    group, per_key = c.num_heads // c.num_kv_heads, heads // keys.shape[1]
    if heads % keys.shape[1]:
        raise ValueError(f"heads={heads} is not a multiple of the {keys.shape[1]} key/value heads")
    grouped = np.take_along_axis(scores.reshape(c.num_layers, -1, group), keys[:, :, None], axis=1)
    best = keep_best(grouped, per_key, "heads of a key/value head")
    return (keys[:, :, None] * group + best).reshape(c.num_layers, -1)


def _compensated(
    model: Decoder, params: Any, batches: Any, kept: Mapping[str, Any]
) -> tuple[Decoder, Any]:
    """The model with biases that hold what the removed inputs of the modules that write the hidden
    channels give on average.
    """
    c, looped = model.config, not model.scan_layers
    if c.model_type != "llama":
        raise ValueError(
            f"compensate needs biases after attention and feed-forward, which a {c.model_type} "
            "config cannot say"
        )
    model, tree = stacked(model, params)
    at = parts_of(tree)
    targets = [at[role] for role in _OUT_OF]
    means = calibrate(bind(model), tree, batches, statistic="mean", targets=targets)
    heads = _query_heads(
        kept.get("heads"),
        _by_layer("kv_heads", kept.get("kv_heads"), c.num_layers, c.num_kv_heads, "llama"),
        c,
    )
    units = _by_layer("units", kept.get("units"), c.num_layers, c.intermediate_size, "llama")
    stay = {"o": _expanded(heads, c.head_dim), "down": units}

    def bias_of(path: str, role: str) -> jax.Array:
        module = module_at(tree, path)
        kernel = module["kernel"]
        bias = module.get("bias", jnp.zeros((kernel.shape[0], kernel.shape[-1]), kernel.dtype))
        if role in stay:
            gone = np.ones(kernel.shape[:2], bool)
            np.put_along_axis(gone, stay[role], False, 1)
            lost = jnp.einsum(
                "li,lio->lo",
                jnp.where(gone, means[f"{path}/kernel"], 0.0),
                kernel.astype(jnp.float32),
            )
            bias = (bias + lost).astype(kernel.dtype)
        return bias

    biases = {path: bias_of(path, r) for r, path in at.items() if r in (*_INTO, *_OUT_OF)}
    tree = _with_biases(tree, biases)
    config = remade(c, json.loads(c.hf_config) | {"attention_bias": True, "mlp_bias": True})
    model = model.clone(config=config, scan_layers=not looped)
    return model, unstack_layers(tree) if looped else tree


def _with_biases(tree: Any, biases: Mapping[str, jax.Array], path: str = "") -> Any:
    """The tree with these biases of modules, by their paths."""
    if not isinstance(tree, Mapping):
        return tree
    inside = {n: _with_biases(x, biases, f"{path}/{n}" if path else n) for n, x in tree.items()}
    return {**inside, "bias": biases[path]} if path in biases else inside


def sizes_for(model: Decoder, keep: float, by: Literal["layers", "width"]) -> dict[str, int]:
    """What `prune_structured` is to keep so that at most a share `keep` of the model's parameters
    stays.

    By "layers" whole layers go; by "width" key/value heads and feed-forward units in the same
    proportion, the units then filling the budget up. Raises ValueError where the embeddings alone
    are too much.
    """
    c = model.config
    if not 0.0 < keep <= 1.0:
        raise ValueError(f"keep, a share of the parameters, must lie in (0, 1], got {keep}")
    leaves = {
        p: int(np.prod(w.shape))
        for p, w in places(abstract_params(model.clone(scan_layers=True))).items()
    }
    total = sum(leaves.values())
    layer = sum(n for p, n in leaves.items() if stack_at(p) is not None) // c.num_layers
    rest = total - layer * c.num_layers
    room = (keep * total - rest) / c.num_layers  # for each layer, if all stay
    if by == "layers":
        if (count := int((keep * total - rest) // layer)) < 1:
            raise ValueError(
                f"{keep:.0%} of the parameters leave no layer: embeddings and norms are "
                f"{rest / total:.0%}"
            )
        return {"layers": count}

    def of(*roles):
        found = (n for p, n in leaves.items() if role_of(p.rpartition("/")[0]) in roles)
        return sum(found) // c.num_layers

    attention, mlp = of(*_ATTENTION, "o"), of(*_FEED_FORWARD, "down")
    share = max(0.0, (room - (layer - attention - mlp)) / (attention + mlp))
    group = c.num_heads // c.num_kv_heads
    fits = [k for k in range(1, c.num_kv_heads + 1) if c.hidden_size % (k * group) == 0] or [
        c.num_kv_heads
    ]  # llama asks for it
    kv_heads = min(fits, key=lambda k: abs(k - share * c.num_kv_heads))
    units = int(
        (room - (layer - attention - mlp) - attention * kv_heads / c.num_kv_heads)
        // (mlp / c.intermediate_size)
    )
    if units < 1:
        raise ValueError(
            f"{keep:.0%} of the parameters leave no feed-forward units: embeddings and norms are "
            f"{rest / total:.0%}"
        )
    return {"kv_heads": kv_heads, "units": min(units, c.intermediate_size)}
