"""LoRA (Hu et al. 2021, arXiv:2106.09685): W + s * A B, with A [in, r] and B [r, out] trained and W
frozen.

s = alpha / r, or alpha / sqrt(r) with rank stabilisation (rsLoRA, Kalajdzievski 2023,
arXiv:2312.03732). A starts as Hugging Face PEFT starts it, B at zero, so nothing changes at first.
Dropout acts on the input of A.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self, Unpack

import jax
import jax.numpy as jnp
import numpy as np

from peft_jax.core.coverage import choose, ledger, named, reached, tokens_of
from peft_jax.core.method import Method, Options
from peft_jax.core.reparametrised import Additive, Site, check_dropout, dropped, node, place_nodes
from peft_jax.core.tree import map_places
from peft_jax.core.weight import Axes, from_matrix, matmul, ragged_matmul, static, take
from peft_jax.core.where import Biased, Selection
from peft_jax.low_rank import init as starts


@node
class LoRA(Additive):
    """`base` + scale * a b. a [*lead, in, r], b [*lead, r, out], scale [*lead]; in and out are
    flattened sizes.

    `start` holds the factors that a start such as PiSSA begins with: their product is subtracted.
    """

    trainable: ClassVar[tuple[str, ...]] = ("a", "b")
    zero_padded: ClassVar[bool] = True
    a: jax.Array
    b: jax.Array
    scale: jax.Array
    start: tuple[jax.Array, jax.Array] | None = None
    rslora: bool = static(default=False)  # how `scale` was made from alpha; kept for export

    @property
    def rank(self) -> int:
        return self.a.shape[-1]

    def array_specs(self, into: Any, out: Any) -> dict[str, tuple[Any, ...]]:
        return {"a": (into, None), "b": (None, out), "scale": ()}

    def delta(self) -> jax.Array:
        product = _product32(self.a, self.b)
        if self.start is not None:
            product = product - _product32(*self.start)
        return product * self.scale[..., None, None]

    def update(self, x: jax.Array) -> jax.Array:
        a, b = self.scaled_factors(x.dtype)
        low: Any = _project(getattr(jax.config, "jax_default_matmul_precision"), x, a)  # noqa: B009 - unknown to type checkers
        return jnp.matmul(low, b)

    def factors(self, dtype: Any = jnp.float32) -> tuple[jax.Array, jax.Array]:
        """(A, B) whose product times `scale` is the whole update: of twice the rank where there is
        a `start`.
        """
        if self.start is None:
            return self.a.astype(dtype), self.b.astype(dtype)
        a0, b0 = self.start
        return (
            jnp.concatenate([self.a, a0], -1).astype(dtype),
            jnp.concatenate([self.b, -b0], -2).astype(dtype),
        )

    def scaled_factors(self, dtype: Any) -> tuple[jax.Array, jax.Array]:
        """(A, s B): the scale is in B before it is rounded, since rounded by itself it would be off
        in every product.
        """
        a, b = self.factors()
        return a.astype(dtype), (b * self.scale[..., None, None]).astype(dtype)

    def plain(self) -> Self:
        a, b = self.factors()
        return self.replace(a=a, b=b, start=None)

    def transposed(
        self, x: jax.Array, *, in_axes: Axes, out_axes: Axes, precision: Any = None
    ) -> jax.Array:
        y = matmul(x, self.base, in_axes=in_axes, out_axes=out_axes, precision=precision)
        a, b = self.scaled_factors(x.dtype)
        x = x.reshape(*x.shape[: x.ndim - len(in_axes)], -1)
        change = jnp.matmul(jnp.matmul(x, b.mT), a.mT).reshape(y.shape)
        return y + change if self.gate is None else jnp.where(self.gate > 0, y + change, y)

    def ragged_matmul(self, x: jax.Array, sizes: jax.Array) -> jax.Array:
        if (
            type(self).product is not LoRA.product or type(self).update is not LoRA.update
        ):  # more than a sum (DoRA)
            return super().ragged_matmul(x, sizes)
        a, b = self.scaled_factors(x.dtype)
        b = b if self.gate is None else jnp.where(self.gate[:, None, None] > 0, b, 0)
        key = None if self.key is None else self.key[0]
        low = ragged_matmul(dropped(x, self.dropout, key), a, sizes)
        return ragged_matmul(x, self.base, sizes) + ragged_matmul(low, b, sizes)

    def take(self, ids: jax.Array, dtype: Any = None) -> jax.Array:
        if (self.in_axes, self.out_axes) != ((-2,), (-1,)):
            return super().take(ids, dtype)
        rows = take(self.base, ids, dtype)
        a, b = self.scaled_factors(rows.dtype)
        return rows + jnp.matmul(jnp.take(a, ids, axis=0), b)


def _product32(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, preferred_element_type=jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _project(precision: str | None, x: jax.Array, a: jax.Array) -> jax.Array:
    """x [..., in] times a [in, r], with a's gradient formed as [r, in]: on a CPU four times as fast
    as [in, r].
    """
    return jnp.matmul(x, a, precision=precision)


def _project_forward(precision: str | None, x: jax.Array, a: jax.Array) -> Any:
    return _project(precision, x, a), (x, a)


def _project_backward(precision: str | None, saved: Any, grad: jax.Array) -> Any:
    x, a = saved
    tokens = tuple(range(x.ndim - 1))
    d_a = jax.lax.dot_general(grad, x, ((tokens, tokens), ((), ())), precision=precision)
    d_a = jax.lax.optimization_barrier(d_a).T  # else XLA swaps the operands back
    return jnp.matmul(grad, a.T, precision=precision), d_a


_project.defvjp(_project_forward, _project_backward)


def scaling(alpha: float, rank: int, rslora: bool) -> float:
    """alpha / r, or alpha / sqrt(r) with rank stabilisation."""
    return alpha / (math.sqrt(rank) if rslora else rank)


@ledger()
def lora(
    params: Any,
    key: jax.Array,
    *,
    rank: int = 8,
    alpha: float | None = None,
    dropout: float = 0.0,
    rslora: bool = False,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    init: str = "kaiming",
    statistics: Mapping[str, Any] | None = None,
    **where: Unpack[Biased],
) -> Any:
    """`params` with a LoRA node of rank `rank` at each place that `targets` name.

    `alpha` defaults to the rank (scale 1). `rank_pattern` and `alpha_pattern` override both for the
    places, or single layers of stacked ones, that their keys match; `layers` restricts to these
    layer numbers. `init` is kaiming (PEFT's default), gaussian, orthogonal, pissa, pissa_niter_N,
    olora, or one that needs `statistics` of each place: eva (the inputs' centred_covariance, from
    `calibrate`), corda_kpm and corda_ipm (their covariance) or lora_ga (the weights' `gradients`),
    by itself or under its name.
    `bias` also trains biases, `modules_to_save` whole modules, as in PEFT; `adapter` names the
    adapter. `layout` (see `layout_of`) says which axes of a weight are inputs; without it a weight
    is [*leading, in, out]. Raises ValueError for a rank below 1, dropout outside [0, 1), or a
    target or pattern that matches nothing.
    """
    at = Selection.of(lora, where)
    ranks = Ranks(rank, alpha, rank_pattern or {}, alpha_pattern or {}, rslora)
    check_dropout(dropout)
    known = named(statistics, starts.STATISTICS.get(init, ""))

    def make(site: Site, key: jax.Array) -> LoRA:
        statistic, tokens = known.get(site.path), tokens_of(known, site.path)
        a, b, scale = ranks.factors(site, key, init, statistic, tokens)
        return LoRA(
            **site.common(dropout=dropout, name=at.adapter),
            a=a,
            b=b,
            scale=scale,
            start=(a, b) if starts.changes_base(init) else None,
            rslora=rslora,
        )

    patterns = {"rank_pattern": ranks.rank_pattern, "alpha_pattern": ranks.alpha_pattern}
    return place_nodes(params, key, make, at, patterns=patterns)


def statistics_of(options: Options) -> tuple[str, ...]:
    """The name of the statistic that the start needs, if any."""
    needed = starts.STATISTICS.get(options.get("init", ""))
    return () if needed is None else (needed,)


class Ranks:
    """Rank and alpha of each place and layer: `rank` and `alpha` unless a pattern says
    otherwise.
    """

    def __init__(
        self,
        rank: int,
        alpha: float | None,
        rank_pattern: Mapping[str, int],
        alpha_pattern: Mapping[str, float],
        rslora: bool,
    ) -> None:
        for r in (rank, *rank_pattern.values()):
            if r < 1:
                raise ValueError(f"rank must be at least 1, got {r}")
        self.rank, self.alpha, self.rslora = rank, rank if alpha is None else alpha, rslora
        self.rank_pattern, self.alpha_pattern = rank_pattern, alpha_pattern

    def factors(
        self,
        site: Site,
        key: jax.Array,
        init: str,
        statistic: jax.Array | None = None,
        tokens: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(A, B, scale) of a site; each layer of a stack as if it were alone (see `_by_rank`).

        Matrices whose `statistic` is of no tokens start without one.
        """
        ranks, alphas = (
            site.pattern(self.rank, self.rank_pattern),
            site.pattern(self.alpha, self.alpha_pattern),
        )
        scale = site.by_layer(
            [scaling(a, r, self.rslora) for a, r in zip(alphas, ranks, strict=True)]
        )
        begin = functools.partial(_by_rank, site, ranks, scale, key)
        a, b = begin(init, statistic)
        if init in starts.STATISTICS:
            assert statistic is not None
            least = (
                site.by_layer(ranks) if init == "eva" else 1
            )  # fewer tokens have fewer directions
            how: dict[str, Any] = {"method": f"init {init!r}", "instead": repr(starts.WITHOUT_DATA)}
            there = reached(
                site.path, [statistic], site.sizes[0], tokens=tokens, least=least, **how
            )
            a, b = choose(there, (a, b), begin(starts.WITHOUT_DATA, None))
        return a, b, scale


def _by_rank(
    site: Site,
    ranks: Sequence[int],
    scale: jax.Array,
    key: jax.Array,
    init: str,
    statistic: jax.Array | None,
) -> starts.Factors:
    """A and B of a site. Layers of a stack that have different ranks start each with its own.

    They are padded with zeros to the largest, which stay zero in training.
    """
    begin = (
        starts.embedding
        if site.looks_up and init in starts.RANDOM
        else functools.partial(starts.start, init)
    )
    w = site.matrix()
    if len(set(ranks)) == 1:
        return begin(w, ranks[0], scale, key, statistic)
    (*lead, n_in, n_out), largest = w.shape, max(ranks)
    a, b = jnp.zeros((*lead, n_in, largest)), jnp.zeros((*lead, largest, n_out))
    for rank in sorted(set(ranks)):
        layers = np.flatnonzero(np.equal(ranks, rank))
        given = None if statistic is None else statistic[layers]
        own_a, own_b = begin(w[layers], rank, scale[layers], jax.random.fold_in(key, rank), given)
        a, b = a.at[layers, ..., :rank].set(own_a), b.at[layers, ..., :rank, :].set(own_b)
    return a, b


def rebase(params: Any) -> Any:
    """The bases changed by what PiSSA and its like begin with, which then need not be subtracted
    any more.

    The outputs are the same up to rounding; steps are faster, and the base may now be quantized.
    The way back is the original checkpoint, or an adapter of twice the rank that was saved before.
    """

    def fold(_: str, w: Any) -> Any:
        if not isinstance(w, LoRA) or w.start is None:
            return w
        plain = w.base_matrix()
        base = w.gated(plain - _product32(*w.start) * w.scale[..., None, None], plain)
        return w.replace(
            base=from_matrix(base, w.shape, w.in_axes, w.out_axes).astype(w.dtype), start=None
        )

    return map_places(fold, params)


METHOD = Method(
    name="lora",
    function=lora,
    nodes=(LoRA,),
    at="matrices",
    title="LoRA",
    follows="Hu et al. 2021, arXiv:2106.09685; rsLoRA, arXiv:2312.03732; PEFT `LoraConfig`",
    differs=(
        "An embedding starts with A zero and B normal for every random start, as PEFT's. "
        "`orthogonal` on an embedding is that start too. PiSSA, OLoRA, CorDA and LoRA-GA "
        "leave the base as it was and subtract what they start with (PEFT changes the base): "
        "the base stays shared, and `rebase` folds it in. EVA does not redistribute ranks"
    ),
    needs=statistics_of,
    example={"rank": 2, "alpha": 4.0},
    variants=(
        {"alpha": 5.0},
        {"rslora": True, "alpha": 3.0},
        {"rank_pattern": {"w": 3}},
        {"alpha_pattern": {"w": 7.0}},
        {"init": "gaussian"},
        {"init": "orthogonal"},
        {"init": "pissa"},
        {"init": "pissa_niter_2"},
        {"init": "olora"},
    ),
)
