"""Pruning while training: the method `sparse`, whose weights train and lose entries on a schedule
inside the compiled step.

Gradual magnitude pruning (Zhu and Gupta 2017, arXiv:1710.01878), one-shot and iterative pruning
with training in between; SET (Mocanu et al. 2018, arXiv:1707.04780) and RigL (Evci et al. 2020,
arXiv:1911.11134), which let entries grow back; movement pruning (Sanh et al. 2020,
arXiv:2005.07683); and straight-through masks (SR-STE, Zhou et al. 2021, arXiv:2102.04010). The
masks are arrays of the optimizer's state: they move, nothing recompiles.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Unpack, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from peft_jax.core.method import Method
from peft_jax.core.packing import pack_padded, unpack_padded
from peft_jax.core.reparametrised import (
    Product,
    Reparametrised,
    Site,
    find_sites,
    node,
    place_nodes,
)
from peft_jax.core.weight import Weight, from_matrix, materialize, static, to_matrix
from peft_jax.core.where import Selection, Trained
from peft_jax.pruning.distribution import allocate_sparsity, check_pattern
from peft_jax.pruning.masked import Masked, masked
from peft_jax.pruning.pattern import NM, Pattern, make_pattern, removed, select_kept

Score = Literal["magnitude", "random", "snip", "taylor", "movement"]
Schedule = Literal["cubic", "one-shot", "iterative"]
Regrow = Literal["none", "random", "gradient"]


@node
class Sparse(Reparametrised):
    """`base`, an array that trains and whose pruned entries `sparse_optimizer` keeps at zero.

    With `scores` (like `base`; movement pruning) entries act where their score is above zero, and
    the scores train too. With `straight_through` the largest entries act and all train; `decay`
    pulls the others to zero. `sparsity` is the share that is to go, one for each of the leading
    axes' entries.
    """

    trainable: ClassVar[tuple[str, ...]] = ("base", "scores")
    stochastic: ClassVar[bool] = False
    scores: jax.Array | None = None
    share: jax.Array | None = None  # [*lead]: `sparsity` as an array, for straight-through masks
    sparsity: tuple[float, ...] = static()
    pattern: Pattern = static(default=None)
    straight_through: bool = static(default=False)
    decay: float = static(default=0.0)
    name: str = static(default="")

    @property
    def whole(self) -> bool:
        return True

    def array_specs(self, into: Any, out: Any) -> dict[str, tuple[Any, ...]]:
        return {"scores": (into, out), "share": ()}

    def adapt(self, w: jax.Array) -> jax.Array:
        if self.scores is not None:
            passed = self.scores + jax.lax.stop_gradient((self.scores > 0) - self.scores)
            return w * passed
        if self.straight_through:
            return w + jax.lax.stop_gradient(jnp.where(self._largest(w), w, 0.0) - w)
        return w

    def product(self, x: jax.Array, base: Product) -> jax.Array:
        return (
            super().product(x, base)
            if self.scores is not None or self.straight_through
            else base(x)
        )

    def _largest(self, w: jax.Array) -> jax.Array:
        """bool [*lead, in, out]: the entries that act in a straight-through product."""
        assert self.share is not None
        return _select(
            jnp.abs(w),
            removed(self.share, w.shape[-2], w.shape[-1], self.pattern, "matrix"),
            self.pattern,
        )

    def penalty(self) -> jax.Array:
        """decay / 2 times the sum of squares of the entries that do not act, whose gradient is
        SR-STE's equation 6.
        """
        if not self.decay:
            return jnp.zeros(())
        w = self.base_matrix()
        return (
            self.decay
            / 2
            * jnp.sum(jnp.where(jax.lax.stop_gradient(self._largest(w)), 0.0, jnp.square(w)))
        )

    def merge(self) -> Masked:
        array = self.materialize()
        kept = to_matrix(array, self.in_axes, self.out_axes) != 0
        return masked(
            array, kept, in_axes=self.in_axes, out_axes=self.out_axes, pattern=self.pattern
        )


def _select(score: jax.Array, remove: jax.Array, pattern: Pattern) -> jax.Array:
    """`select_kept` of scores [*lead, in, out] with a number to remove for each matrix, ranked over
    whole matrices.
    """
    flat = score.reshape(-1, *score.shape[-2:])
    return jax.vmap(lambda s, n: select_kept(s, n, pattern, "matrix"))(
        flat, remove.reshape(-1)
    ).reshape(score.shape)


def sparse(
    params: Any,
    key: jax.Array,
    *,
    sparsity: Annotated[float | None, "share of the entries that go"] = None,
    score: Annotated[
        Score, "what goes first: magnitude, random, snip, taylor or movement"
    ] = "magnitude",
    distribution: Annotated[
        Literal["uniform", "erk", "global"], "how much of which weight: uniform, erk or global"
    ] = "uniform",
    pattern: Annotated[str | None, "N:M, as 2:4, or blocks, as 16x16"] = None,
    schedule: Annotated[Schedule, "cubic, one-shot or iterative"] = "cubic",
    regrow: Annotated[Regrow, "what grows back: none, random (SET) or gradient (RigL)"] = "none",
    fraction: Annotated[float, "share of the kept entries that change places"] = 0.3,
    begin: Annotated[int, "step of the first change"] = 0,
    final: Annotated[int, "steps at the end without a change"] = 0,
    every: Annotated[int, "steps between changes"] = 10,
    rounds: Annotated[int, "steps of an iterative schedule"] = 4,
    straight_through: Annotated[bool, "mask from the start while all entries train"] = False,
    decay: Annotated[float, "SR-STE's lambda, which pulls masked entries to zero"] = 2e-4,
    **where: Unpack[Trained],
) -> Any:
    """`params` with the weights that `targets` name trained whole and pruned on the way to
    `sparsity`. `key` is not used.

    `score` is magnitude, random, snip or taylor (of the gradients since the last change) or
    movement. The sparsity rises from step `begin` to `final` steps before the end, changed every
    `every` steps: by the `cubic` law, in `rounds` equal steps (iterative), or at once (one-shot).
    `regrow` lets as many entries grow back, from zero, as a `fraction` of those that are kept: at
    random (SET) or where the gradient is largest (RigL, whose fraction falls to zero by a cosine).
    With `straight_through` the final share is masked from the start, by magnitude, while all
    entries train (`decay` is SR-STE's lambda). N:M patterns go with one-shot or straight-through.
    Start from the dense model, or go on from a masked one.

    `score`, `schedule`, `regrow`, `fraction`, `begin`, `final`, `every` and `rounds` are read by
    `sparse_optimizer`. Raises ValueError naming the place or option that does not fit.
    """
    at = Selection.of(sparse, where)
    check_pattern(pattern, sparsity, distribution)
    found = make_pattern(pattern)
    _check(found, score, schedule, regrow, fraction, every, rounds, straight_through)
    sites = find_sites(params, **at.places)
    if isinstance(found, NM):
        shares = {p: np.full(s.sizes[0], found.sparsity) for p, s in sites.items()}
    else:
        assert sparsity is not None
        among: dict[str, Any] = {"targets": at.targets, "exclude": at.exclude, "layout": at.layout}
        shares = allocate_sparsity(params, sparsity, distribution, **among)

    def make(site: Site, key: jax.Array) -> Sparse:
        if isinstance(site.base, Weight) and not (
            isinstance(site.base, Masked) and not isinstance(site.base.base, Weight)
        ):
            raise ValueError(
                f"{site.path} is a {type(site.base).__name__}; `sparse` starts from arrays or "
                "masked arrays"
            )
        site.check_whole("are pruned together")
        if found is not None:
            found.check(site.path, *site.sizes[1:])
        array, share = materialize(site.base), shares[site.path]
        start = jnp.ones_like(to_matrix(array, site.in_axes, site.out_axes), jnp.float32)
        return Sparse(
            **site.common(base=array),
            scores=1e-6 * start if score == "movement" else None,
            share=jnp.asarray(share, jnp.float32) if straight_through else None,
            sparsity=tuple(float(s) for s in np.ravel(share)),
            pattern=found,
            straight_through=straight_through,
            decay=decay if straight_through else 0.0,
        )

    return place_nodes(params, key, make, at)


def prunes_on_the_way(options: Mapping[str, Any]) -> bool:
    """Whether `sparse` with these options has its sparsity only at the end."""
    return not options.get("straight_through")


def _check(
    pattern: Pattern,
    score: str,
    schedule: str,
    regrow: str,
    fraction: float,
    every: int,
    rounds: int,
    straight_through: bool,
) -> None:
    if straight_through and (score != "magnitude" or regrow != "none"):
        raise ValueError(
            "straight_through masks the smallest magnitudes anew in each step: leave score and "
            "regrow as they are"
        )
    if score == "movement" and (regrow != "none" or pattern is not None):
        raise ValueError(
            "movement pruning lets entries return by their score: it has no regrow and no pattern"
        )
    if (
        isinstance(pattern, NM)
        and not straight_through
        and (schedule != "one-shot" or regrow != "none")
    ):
        raise ValueError(
            f"pattern {pattern} goes with schedule=one-shot or straight_through=true, "
            "without regrow"
        )
    if regrow != "none" and pattern is not None:
        raise ValueError("regrow lets single entries grow back: it goes without a pattern")
    if not 0.0 < fraction < 1.0:
        raise ValueError(
            "fraction, the share of the kept entries that change places, must lie in (0, 1), got "
            f"{fraction}"
        )
    if every < 1 or rounds < 1:
        raise ValueError(f"every and rounds must be at least 1, got {every} and {rounds}")


# --------------------------------------------------------------------------------------------------
# the optimizer


class SparseState(NamedTuple):
    """Step number, key, masks (packed as `Masked` packs them) and accumulated scores by place, and
    the optimizer's own.
    """

    step: jax.Array
    key: jax.Array
    masks: dict[str, jax.Array]
    scores: dict[str, jax.Array]
    inner: Any


def sparse_optimizer(
    optimizer: optax.GradientTransformation,
    steps: int,
    *,
    score: Score = "magnitude",
    schedule: Schedule = "cubic",
    regrow: Regrow = "none",
    fraction: float = 0.3,
    begin: int = 0,
    final: int = 0,
    every: int = 10,
    rounds: int = 4,
    straight_through: bool = False,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """`optimizer` with the masks of `sparse` around it, for a training of `steps` steps; see there
    for the options.

    Gradients of pruned entries do not reach the optimizer, and what it does to them is undone.
    Masks change every `every` steps from `begin` to the last but `final`, and then stay.
    """
    optimizer = optax.with_extra_args_support(optimizer)
    end = max(begin, steps - 1 - final)
    accumulates = score in ("snip", "taylor")
    managed = not straight_through

    def init(params: Any) -> SparseState:
        for path, w in _nodes(params).items():
            if math.prod(_matrix(w).shape[:-2]) != len(w.sparsity):
                raise ValueError(
                    f"{path} was unstacked after `sparse`; use it on the tree that trains"
                )
        nodes = _nodes(params) if managed and score != "movement" else {}
        masks = {p: pack_padded(_matrix(w) != 0, 1) for p, w in nodes.items()}
        scores = {p: jnp.zeros_like(_matrix(w)) for p, w in nodes.items()} if accumulates else {}
        key = jax.random.key_data(jax.random.key(seed))
        return SparseState(jnp.zeros((), jnp.int32), key, masks, scores, optimizer.init(params))

    def update(
        updates: Any, state: SparseState, params: Any = None, **extra: Any
    ) -> tuple[Any, SparseState]:
        dense = _nodes(updates)
        kept = {
            p: unpack_padded(m, 1, _matrix(dense[p]).shape[-2]).astype(bool)
            for p, m in state.masks.items()
        }
        masked_updates = _changed(
            updates, lambda p, g: _masked_node(g, kept[p]) if p in kept else g
        )
        new_updates, inner = optimizer.update(masked_updates, state.inner, params, **extra)
        due = (
            (state.step >= begin)
            & (state.step <= end)
            & (((state.step - begin) % every == 0) | (state.step == end))
        )
        share = _share(schedule, state.step, begin, end, rounds)
        now, before = _nodes(new_updates), _nodes(params)
        if score == "movement":
            new_updates = _changed(new_updates, lambda p, u: _shifted(u, before[p], share))
            return new_updates, SparseState(state.step + 1, state.key, {}, {}, inner)
        part = (
            fraction * 0.5 * (1 + jnp.cos(jnp.pi * state.step / max(end, 1)))
            if regrow == "gradient"
            else fraction
        )
        part = jnp.where(state.step < end, part, 0.0)  # what grew at the end would never train
        masks, scores, values = {}, {}, {}
        for i, (path, old) in enumerate(kept.items()):
            w, g = _matrix(before[path]), _matrix(dense[path]).astype(jnp.float32)
            value = w + _matrix(now[path])
            if accumulates:
                scores[path] = state.scores[path] + (
                    w * g if score == "snip" else jnp.square(w * g)
                )
            key = jax.random.fold_in(
                jax.random.wrap_key_data(state.key), state.step * len(kept) + i
            )
            measure = functools.partial(_measure, score, value, scores.get(path), key)
            sparsity = jnp.asarray(before[path].sparsity, jnp.float32) * share
            change = functools.partial(
                _new_mask, measure, old, g, sparsity, part, regrow, before[path].pattern, key
            )
            mask = jax.lax.cond(due, change, lambda old=old: old)
            if accumulates:
                scores[path] = jnp.where(due, 0.0, scores[path])
            masks[path], values[path] = pack_padded(mask, 1), jnp.where(mask & old, value, 0.0) - w
        new_updates = _changed(
            new_updates, lambda p, u: _with_matrix(u, values[p]) if p in values else u
        )
        return new_updates, SparseState(state.step + 1, state.key, masks, scores, inner)

    return optax.GradientTransformationExtraArgs(init, cast("optax.TransformUpdateFn", update))


def _is_sparse(x: Any) -> bool:
    return isinstance(x, Sparse)


def _nodes(tree: Any) -> dict[str, Sparse]:
    leaves = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_sparse)[0]
    return {
        jax.tree_util.keystr(k, simple=True, separator="/"): x for k, x in leaves if _is_sparse(x)
    }


def _changed(tree: Any, change: Any) -> Any:
    """The tree with each Sparse node replaced by `change(path, node)`."""

    def name(k):
        return jax.tree_util.keystr(k, simple=True, separator="/")

    return jax.tree_util.tree_map_with_path(
        lambda k, x: change(name(k), x) if _is_sparse(x) else x, tree, is_leaf=_is_sparse
    )


def _matrix(w: Sparse) -> jax.Array:
    return to_matrix(w.base, w.in_axes, w.out_axes)


def _with_matrix(w: Sparse, matrix: jax.Array) -> Sparse:
    return w.replace(
        base=from_matrix(matrix, w.base.shape, w.in_axes, w.out_axes).astype(w.base.dtype)
    )


def _masked_node(g: Sparse, kept: jax.Array) -> Sparse:
    return _with_matrix(g, jnp.where(kept, _matrix(g), 0.0))


def _share(schedule: str, step: jax.Array, begin: int, end: int, rounds: int) -> jax.Array:
    """The share of the final sparsity that is reached at `step`; for cubic, 1 - (1 - t)^3 (Zhu and
    Gupta's equation 1).
    """
    done = jnp.clip((step - begin) / max(end - begin, 1), 0.0, 1.0)
    done = jnp.where(step < begin, 0.0, jnp.where(step >= end, 1.0, done))
    if schedule == "cubic":
        return 1.0 - (1.0 - done) ** 3
    if schedule == "iterative":
        return jnp.minimum(jnp.floor(done * rounds + 1) / rounds, 1.0) * (step >= begin)
    return (step >= begin).astype(jnp.float32)


def _measure(
    score: str, value: jax.Array, accumulated: jax.Array | None, key: jax.Array
) -> jax.Array:
    if score == "random":
        return jax.random.uniform(key, value.shape)
    return jnp.abs(value if accumulated is None else accumulated)


def _new_mask(
    measure: Any,
    old: jax.Array,
    grad: jax.Array,
    sparsity: jax.Array,
    part: Any,
    regrow: str,
    pattern: Pattern,
    key: jax.Array,
) -> jax.Array:
    """bool [*lead, in, out] of what is kept from now on."""
    n_in, n_out = old.shape[-2:]
    remove = removed(sparsity, n_in, n_out, pattern, "matrix")
    score = jnp.where(
        old, measure(), -jnp.inf if pattern is None else -1.0
    )  # -1: blocks add their scores up
    if regrow == "none":
        return _select(score, remove, pattern) & old
    grown = jnp.floor(part * (n_in * n_out - remove)).astype(jnp.int32)
    kept = _select(score, remove + grown, None) & old
    wish = (
        jnp.abs(grad)
        if regrow == "gradient"
        else jax.random.uniform(jax.random.fold_in(key, 1), old.shape)
    )
    back = _select(jnp.where(kept, -1.0, wish), remove + kept.sum((-2, -1)).ravel(), None)
    return kept | back


def _shifted(u: Sparse, p: Sparse, share: jax.Array) -> Sparse:
    """The update of movement scores, shifted so that the scheduled share of them lies at or below
    zero.

    A shift of all scores changes no order: the mask is that of the top scores (the paper's Top_v).
    """
    assert u.scores is not None
    assert p.scores is not None
    scores = p.scores + u.scores
    flat = jnp.sort(scores.reshape(-1, math.prod(scores.shape[-2:])), axis=-1)
    remove = removed(
        jnp.asarray(p.sparsity, jnp.float32) * share,
        scores.shape[-2],
        scores.shape[-1],
        None,
        "matrix",
    )
    edge = jnp.take_along_axis(flat, jnp.maximum(remove - 1, 0)[:, None], axis=-1)[:, 0]
    edge = jnp.where(remove > 0, edge, flat[:, 0] - 1e-6)
    return u.replace(scores=u.scores - edge.reshape(scores.shape[:-2])[..., None, None])


METHOD = Method(
    name="sparse",
    function=sparse,
    nodes=(Sparse,),
    at="matrices",
    title="gradual, iterative, SET, RigL, movement and straight-through pruning",
    follows=(
        "Zhu and Gupta, arXiv:1710.01878; SET, arXiv:1707.04780; RigL, arXiv:1911.11134; "
        "movement pruning, arXiv:2005.07683; SR-STE, arXiv:2102.04010"
    ),
    differs=(
        "Masks are in the optimizer's state, and pruned entries get no update; movement "
        "pruning shifts scores so that zero is the threshold"
    ),
    reference="tests.references:largest_half",
    identity=False,
    whole=True,
    optimizer=sparse_optimizer,
    ends_otherwise=prunes_on_the_way,
    example={"sparsity": 0.5, "straight_through": True},
    variants=(
        {"straight_through": False},
        {"pattern": "2:4", "sparsity": None},
        {"distribution": "erk", "decay": 1e-3},
    ),
)
