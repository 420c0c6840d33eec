"""Adapters as vectors: combined with weights, converted to LoRA, resized, subtracted, removed. Pure
functions on trees.

Combinations follow Hugging Face PEFT's `add_weighted_adapter`: task arithmetic (Ilharco et al.
2023, arXiv:2212.04089), TIES (Yadav et al. 2023, arXiv:2306.01708), DARE (Yu et al. 2024,
arXiv:2311.03099) and magnitude pruning, on the factors or, with the suffix `_svd`, on the updates
themselves followed by a truncated SVD.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from peft_jax.core.adapters import check_names, renamed, replaced
from peft_jax.core.merge import biased
from peft_jax.core.prepare import distribute
from peft_jax.core.reparametrised import Additive, Reparametrised, Replacement
from peft_jax.core.select import nearest
from peft_jax.core.tree import map_places, places, stack_of
from peft_jax.core.weight import Weight, materialize
from peft_jax.low_rank.lora import LoRA

Merge = Callable[
    [jax.Array, jax.Array, jax.Array], jax.Array
]  # (tensors [n, ...], weights [n], key) -> [...]


def combine_adapters(
    params: Any,
    weights: Mapping[str, float],
    *,
    method: str = "linear",
    into: str = "combined",
    rank: int | None = None,
    density: float = 1.0,
    majority: Literal["total", "frequency"] = "total",
    key: jax.Array | None = None,
) -> Any:
    """The LoRA adapters that `weights` names replaced by one called `into`.

    `method` is linear, cat (exact, the ranks add up), ties, dare_linear, dare_ties or
    magnitude_prune, on the factors, or svd, ties_svd, dare_linear_svd, dare_ties_svd or
    magnitude_prune_svd, on the updates, cut to `rank` (the largest one by default). `density` is
    the share of entries that pruning keeps; DARE draws them with `key`. Negative weights subtract.
    Raises ValueError for unknown names or methods, ranks that differ where they must not, and a
    density outside (0, 1].
    """
    check_names(params, list(weights))
    names = list(weights)
    if not 0.0 < density <= 1.0:
        raise ValueError(f"density must lie in (0, 1], got {density}")
    base_method = method.removesuffix("_svd") if method != "svd" else "linear"
    if method != "cat" and base_method not in _MERGES:
        known = ["cat", "svd", *_MERGES, *(f"{m}_svd" for m in _MERGES if m != "linear")]
        raise ValueError(
            f"unknown method {method!r}.{nearest(method, known)} Methods: {', '.join(known)}"
        )
    if base_method.startswith("dare") and key is None:
        raise ValueError(f"method {method!r} draws at random; pass key=jax.random.key(...)")
    merge = (
        functools.partial(_MERGES[base_method], density=density, majority=majority)
        if method != "cat"
        else None
    )

    def place(path: str, w: Any) -> Any:
        found = plain_loras(path, w, names)
        if not found:
            return w
        own = [weights[n.name] for n in found]
        local = (
            jax.random.fold_in(key, zlib.crc32(path.encode()))
            if key is not None
            else jax.random.key(0)
        )
        if merge is None:
            a, b = _concatenate(found, own)
        elif method == "svd" or method.endswith("_svd"):
            deltas = jnp.stack([n.change() for n in found])
            a, b = _truncate(
                _by_layer(merge, deltas, own, local), rank or max(n.rank for n in found)
            )
        else:
            a, b = _merge_factors(path, merge, found, own, local)
        return replaced(w, names, lambda base: _as_lora(base, found[0], a, b, into))

    return map_places(place, params)


def to_lora(
    params: Any, *, rank: int, adapter: str = "default", into: str | None = None
) -> tuple[Any, dict[str, float]]:
    """The adapter, of whatever method, as the LoRA of this rank that is nearest to it (truncated
    SVD of its update).

    Returns the tree and, for each place, the relative error ||update - LoRA|| / ||update||
    (Frobenius norm). What is not a sum, like OFT, is converted too, since the update is the changed
    weight less the base, both float32. Raises ValueError where there is no adapter of that name,
    and for one that changes a bias too, which no LoRA does.
    """
    check_names(params, [adapter])
    errors: dict[str, float] = {}
    spread = distribute(params)
    whole = places(spread)
    biases = {id(w): whole[path] for path, w in biased(spread).items()}

    def place(path: str, w: Any) -> Any:
        found = next(
            (
                n
                for n in stack_of(whole[path])
                if isinstance(n, Reparametrised) and n.name == adapter
            ),
            None,
        )
        if found is None:
            return w
        if isinstance(found, Replacement):  # no update: it goes along as it is
            return renamed(w, adapter, into or adapter)
        _check_bias(path, found, biases.get(id(whole[path])))
        update = found.change()
        a, b = _truncate(update, rank)
        errors[path] = float(
            jnp.linalg.norm(update - a @ b) / jnp.maximum(jnp.linalg.norm(update), 1e-30)
        )
        return replaced(w, [adapter], lambda base: _as_lora(base, found, a, b, into or adapter))

    result = map_places(place, params)
    unused = [
        f"shared_{n.group}"
        for w in whole.values()
        for n in stack_of(w)
        if getattr(n, "group", "") and n.name == adapter
    ]
    return ({k: v for k, v in result.items() if k not in unused} if unused else result), errors


def resize(params: Any, *, rank: int, adapter: str = "default") -> tuple[Any, dict[str, float]]:
    """A LoRA adapter at another rank, the best approximation of its update; with the relative
    errors of `to_lora`.
    """
    return to_lora(params, rank=rank, adapter=adapter)


def subtract_adapters(params: Any, plus: str, minus: str, *, into: str = "difference") -> Any:
    """The LoRA adapter `plus` less `minus`, exactly, with a rank that is the sum of theirs."""
    return combine_adapters(params, {plus: 1.0, minus: -1.0}, method="cat", into=into)


def plain_loras(path: str, w: Any, names: Sequence[str]) -> list[LoRA]:
    """The LoRAs of these names at one place, outermost first.

    Raises ValueError for an adapter of another method, and where between two of them lies a weight
    that is no sum, so that what is under it cannot move out.
    """
    nodes = stack_of(w)
    mine = [i for i, n in enumerate(nodes) if isinstance(n, Reparametrised) and n.name in names]
    for n in (nodes[i] for i in mine):
        if isinstance(n, Replacement):
            raise ValueError(
                f"{path} is trained whole by {n.name!r}, and whole modules cannot be combined"
            )
        if type(n) is not LoRA:
            raise ValueError(
                f"{path} has a {type(n).__name__} named {n.name!r}; convert it with to_lora first"
            )
    for n in nodes[mine[0] : mine[-1]] if mine else ():
        if not (isinstance(n, Additive) and n.sum):
            raise ValueError(
                f"{path} has a {type(n).__name__} between the adapters {', '.join(names)}, which "
                "changes what is under it; "
                "convert it with to_lora, or drop it, first"
            )
    return [nodes[i] for i in mine]


def _check_bias(path: str, node: Reparametrised, bias: Any) -> None:
    """Raise ValueError where the method changes the bias beside the weight."""
    if bias is None or not node.changes_output:
        return
    under = (
        node.base.bias(materialize(bias)) if isinstance(node.base, Weight) else materialize(bias)
    )
    if bool(jnp.any(node.bias(materialize(bias)) != under)):
        raise ValueError(
            f"the {type(node).__name__} at {path} changes the bias beside it too, which a LoRA "
            "cannot; merge it, or leave "
            "places with a bias out of its targets"
        )


def _as_lora(base: Any, like: Reparametrised, a: jax.Array, b: jax.Array, name: str) -> LoRA:
    scale = jnp.ones(a.shape[:-2], jnp.float32)
    return LoRA(
        base=base, a=a, b=b, scale=scale, in_axes=like.in_axes, out_axes=like.out_axes, name=name
    )


def _truncate(update: jax.Array, rank: int) -> tuple[jax.Array, jax.Array]:
    """(u s, v) of the `rank` largest singular values: a [*lead, in, r], b [*lead, r, out]."""
    u, s, vt = jnp.linalg.svd(update, full_matrices=False)
    return u[..., :rank] * s[..., None, :rank], vt[..., :rank, :]


def _weighted(node: LoRA, weight: float) -> jax.Array:
    """weight * scale, [*lead], zero in layers that are gated off."""
    scale = node.scale * weight
    return scale if node.gate is None else scale * node.gate


def _concatenate(nodes: Sequence[LoRA], weights: Sequence[float]) -> tuple[jax.Array, jax.Array]:
    factors = [n.factors() for n in nodes]
    a = jnp.concatenate(
        [
            a * _weighted(n, w)[..., None, None]
            for n, w, (a, _) in zip(nodes, weights, factors, strict=True)
        ],
        axis=-1,
    )
    return a, jnp.concatenate([b for _, b in factors], axis=-2)


def _merge_factors(
    path: str, merge: Merge, nodes: Sequence[LoRA], weights: Sequence[float], key: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Each factor merged by itself, with the square root of the weights (their sign on A), as PEFT
    does.
    """
    factors = [n.factors() for n in nodes]
    if len({a.shape for a, _ in factors}) > 1:
        raise ValueError(
            f"the adapters at {path} differ in rank; use method 'cat' or one that ends in svd"
        )
    scales = jnp.stack([_weighted(n, w) for n, w in zip(nodes, weights, strict=True)])
    root = jnp.sqrt(jnp.abs(scales))
    ka, kb = jax.random.split(key)
    a = _by_layer(merge, jnp.stack([a for a, _ in factors]), root * jnp.sign(scales), ka)
    return a, _by_layer(merge, jnp.stack([b for _, b in factors]), root, kb)


def _by_layer(merge: Merge, tensors: jax.Array, weights: Any, key: jax.Array) -> jax.Array:
    """`merge` for each matrix of [n, *lead, p, q] with weights [n] or [n, *lead]."""
    lead = tensors.shape[1:-2]
    weights = jnp.asarray(weights, jnp.float32)
    weights = jnp.broadcast_to(
        weights.reshape(*weights.shape, *[1] * (1 + len(lead) - weights.ndim)),
        (len(tensors), *lead),
    )
    keys = jax.random.split(key, lead) if lead else key
    for _ in lead:
        merge = jax.vmap(merge, in_axes=(1, 1, 0))
    return merge(tensors, weights, keys)


def _linear(tensors: jax.Array, weights: jax.Array, key: jax.Array, **_: Any) -> jax.Array:
    return jnp.tensordot(weights, tensors, 1)


def _largest(tensor: jax.Array, density: float) -> jax.Array:
    """The tensor with all but its `density` largest entries zero."""
    flat = jnp.abs(tensor).ravel()
    kept = jax.lax.top_k(flat, max(1, int(density * flat.size)))[1]
    return tensor * jnp.zeros(flat.size).at[kept].set(1.0).reshape(tensor.shape)


def _random(tensor: jax.Array, density: float, key: jax.Array) -> jax.Array:
    """Entries dropped at random, the rest rescaled."""
    return jnp.where(jax.random.bernoulli(key, density, tensor.shape), tensor / density, 0)


def _agree(tensors: jax.Array, weights: jax.Array, majority: str) -> jax.Array:
    """TIES' election of signs and disjoint mean, of tensors that are pruned already."""
    votes = tensors.sum(0) if majority == "total" else jnp.sign(tensors).sum(0)
    agrees = jnp.sign(tensors) == jnp.where(votes >= 0, 1.0, -1.0)
    weighted = tensors * weights.reshape(-1, *[1] * (tensors.ndim - 1)) * agrees
    return weighted.sum(0) / jnp.maximum(agrees.sum(0), 1)


def _magnitude_prune(
    tensors: jax.Array, weights: jax.Array, key: jax.Array, *, density: float, **_: Any
) -> jax.Array:
    return jnp.tensordot(weights, jnp.stack([_largest(t, density) for t in tensors]), 1)


def _ties(
    tensors: jax.Array, weights: jax.Array, key: jax.Array, *, density: float, majority: str
) -> jax.Array:
    return _agree(jnp.stack([_largest(t, density) for t in tensors]), weights, majority)


def _dare_linear(
    tensors: jax.Array, weights: jax.Array, key: jax.Array, *, density: float, **_: Any
) -> jax.Array:
    return jnp.tensordot(weights, _random(tensors, density, key), 1)


def _dare_ties(
    tensors: jax.Array, weights: jax.Array, key: jax.Array, *, density: float, majority: str
) -> jax.Array:
    return _agree(_random(tensors, density, key), weights, majority)


_MERGES: dict[str, Callable[..., jax.Array]] = {
    "linear": _linear,
    "ties": _ties,
    "dare_linear": _dare_linear,
    "dare_ties": _dare_ties,
    "magnitude_prune": _magnitude_prune,
}
