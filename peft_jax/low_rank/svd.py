"""Low-rank factorization of the weights themselves: W [in, out] becomes U [in, k] V [k, out].

Plain truncated SVD; ASVD (Yuan et al. 2023, arXiv:2312.05821), which scales inputs by their size
first; and SVD-LLM's whitening (Wang et al. 2024, arXiv:2403.07378), whose truncation is the best
one for the outputs on the calibration data: with X^T X = L L^T, ||X (W - W')|| = ||L^T (W - W')||.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from peft_jax.core.bind import bind
from peft_jax.core.calibrate import calibrate
from peft_jax.core.coverage import ledger, reached, white
from peft_jax.core.options import ConfigError, configuration, option
from peft_jax.core.reparametrised import Matrix, Site, find_sites, node, precision_name
from peft_jax.core.select import Targets
from peft_jax.core.stage import Context, Needs, Stage, State
from peft_jax.core.tree import map_places
from peft_jax.core.values import check_concrete, fetched, is_traced
from peft_jax.core.weight import Axes, Layout, from_matrix, static

logger = logging.getLogger("peft_jax")


@node
class Factorized(Matrix):
    """u [*lead, in, k] times v [*lead, k, out], in the place of a weight of `layout` shape
    `shape`.
    """

    trainable: ClassVar[tuple[str, ...]] = ("u", "v")
    u: jax.Array
    v: jax.Array
    frozen: bool = static(default=True)

    @property
    def lead(self) -> tuple[int, ...]:
        """Sizes of the leading axes."""
        return self.u.shape[:-2]

    @property
    def whole(self) -> bool:
        return not self.frozen

    def train(self) -> Factorized:
        return self.replace(frozen=False)

    def merge(self) -> Factorized:
        """Factors still: there is nothing to fold in, and they are what makes the model small."""
        return self.replace(frozen=True)

    @property
    def rank(self) -> int:
        return self.u.shape[-1]

    @property
    def dtype(self) -> Any:
        return self.u.dtype

    def field_specs(self, spec: P) -> dict[str, P]:
        lead, into, out = (
            tuple(spec)[: len(self.lead)],
            spec[self.in_axes[0]],
            spec[self.out_axes[0]],
        )
        return {"u": P(*lead, into, None), "v": P(*lead, None, out)}

    def materialize(self) -> jax.Array:
        return self.unrounded().astype(self.dtype)

    def unrounded(self) -> jax.Array:
        product: Any = jnp.matmul(self.u, self.v, preferred_element_type=jnp.float32)
        return from_matrix(product, self.shape, self.in_axes, self.out_axes)

    def matmul(
        self, x: jax.Array, *, in_axes: Axes, out_axes: Axes, precision: Any = None
    ) -> jax.Array:
        u, v, sizes = self.u, self.v, self.out_sizes
        if (out_axes, in_axes) == (
            self.in_axes,
            self.out_axes,
        ):  # the transposed product of a tied head
            u, v, sizes = self.v.mT, self.u.mT, self.in_sizes
        elif (in_axes, out_axes) != (self.in_axes, self.out_axes):
            return super().matmul(x, in_axes=in_axes, out_axes=out_axes, precision=precision)
        tokens = x.shape[: x.ndim - len(in_axes)]
        with jax.default_matmul_precision(precision_name(precision)):
            y = jnp.matmul(jnp.matmul(x.reshape(*tokens, -1), u.astype(x.dtype)), v.astype(x.dtype))
        return y.reshape(*tokens, *sizes)

    def take(self, ids: jax.Array, dtype: Any = None) -> jax.Array:
        rows = jnp.matmul(self.u[ids], self.v)
        return rows if dtype is None else rows.astype(dtype)


@ledger()
def factorize(
    params: Any,
    *,
    keep: float | None = None,
    error: float | None = None,
    statistics: Mapping[str, jax.Array] | None = None,
    whitening: Literal["root", "scale"] = "root",
    allocation: Literal["uniform", "energy"] = "uniform",
    targets: Targets = "all-linear",
    exclude: Targets = (),
    layout: Layout | None = None,
    train: bool = False,
) -> tuple[Any, dict[str, dict[str, float]]]:
    """`params` with a Factorized weight at each place that `targets` name, and a report of each.

    Either `keep`, the share of the targets' parameters that may stay, or `error`, the largest
    relative error of a weight (of its outputs, with statistics), sets the ranks. `statistics` are
    covariances of the inputs by path (`calibrate`): they make the truncation activation-aware, by
    SVD-LLM's whitening or ASVD's scales; what no token reached is truncated plainly, which is said.
    A budget is shared out evenly or by the energy that a rank holds. Stacked layers share a rank;
    looped ones have each their own. A weight that would not become smaller stays as it is. With
    `train` the factors train.

    Returns (tree, {path: {"rank", "kept" (share of parameters), "error"}}). Warns (logger
    `peft_jax`) where weights are cut without statistics. Raises ValueError unless exactly one of
    `keep` in (0, 1] and `error` in [0, 1) is given, and for a place without statistics.
    """
    if (keep is None) == (error is None):
        raise ValueError(
            "give either keep, a share of the parameters, or error, the largest relative error"
        )
    if not (0 < (1.0 if keep is None else keep) <= 1) or not (0 <= (error or 0.0) < 1):
        raise ValueError(f"keep must lie in (0, 1] and error in [0, 1), got {keep} and {error}")
    sites = find_sites(params, targets=targets, exclude=exclude, layout=layout)
    if statistics is not None and (missing := sorted(set(sites) - set(statistics))):
        raise ValueError(
            f"there are no statistics of {missing[0]}; calibrate with the same targets"
        )
    parts = {
        p: _decompose(s, None if statistics is None else statistics[p], whitening)
        for p, s in sites.items()
    }
    energies = {
        p: (fetched(s) ** 2).reshape(-1, s.shape[-1]).sum(0) for p, (_, s, _) in parts.items()
    }
    if error is not None or allocation != "uniform":
        check_concrete(
            "ranks by an error or by energy depend on the weights: factorize runs with keep alone",
            energies,
        )
    ranks = _ranks(sites, energies, keep, error, allocation)
    report: dict[str, dict[str, float]] = {}

    def place(path: str, w: Any) -> Any:
        if path not in sites:
            return w
        lead, n_in, n_out = sites[path].sizes
        k = ranks[path]
        lost = energies[path][k:].sum() / (energies[path].sum() + 1e-30)
        dense = k * (n_in + n_out) >= n_in * n_out
        report[path] = {
            "rank": float(min(n_in, n_out) if dense else k),
            "kept": 1.0 if dense else k * (n_in + n_out) / (n_in * n_out),
            "error": 0.0 if dense else lost**0.5 if is_traced(lost) else float(lost**0.5),
        }
        if dense:
            return w
        u, s, v = parts[path]
        in_axes, out_axes = sites[path].in_axes, sites[path].out_axes
        return Factorized(
            u=u[..., :k].astype(w.dtype),
            v=(s[..., :k, None] * v[..., :k, :]).astype(w.dtype),
            in_sizes=tuple(w.shape[a] for a in in_axes),
            out_sizes=tuple(w.shape[a] for a in out_axes),
            in_axes=in_axes,
            out_axes=out_axes,
            frozen=not train,
        )

    tree = map_places(place, params)
    if statistics is None and any(
        not is_traced(row) and row["error"] > 1e-3 for row in report.values()
    ):
        logger.warning(
            "plain SVD of whole weights is known to ruin language models even where little is cut "
            "off; SVD-LLM, which heeds "
            "their inputs, is factorize(..., statistics=calibrate(...)), or "
            "factorize.activations=true in a configuration"
        )
    return tree, report


def _decompose(
    site: Site, covariance: jax.Array | None, whitening: str
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(u [*lead, in, m], s [*lead, m], v [*lead, m, out]) whose first k terms are the best
    approximation of rank k.
    """
    w = site.matrix()
    if covariance is None:
        u, s, v = jnp.linalg.svd(w, full_matrices=False)
        return u, s, v
    n = w.shape[-2]
    if covariance.shape[-2:] != (n, n):
        raise ValueError(
            f"statistics of {site.path} have shape {covariance.shape}, expected covariances [..., "
            f"{n}, {n}]"
        )
    name = "ASVD" if whitening == "scale" else "SVD-LLM"
    there = reached(site.path, [covariance], site.sizes[0], method=name, instead="plain SVD")
    covariance = white(covariance, there)
    diagonal = jnp.diagonal(covariance, axis1=-2, axis2=-1)
    floor = (
        1e-5 * diagonal.mean(-1, keepdims=True) + 1e-30
    )  # inputs that never occur must not count for nothing
    if whitening == "scale":
        size = jnp.sqrt(jnp.sqrt(diagonal + floor))  # ASVD's alpha = 0.5
        u, s, v = jnp.linalg.svd(size[..., None] * w, full_matrices=False)
        return u / size[..., None], s, v
    # A root of X^T X from its eigenvectors, which unlike Cholesky's exists where calibration tokens
    # are few.
    values, vectors = jnp.linalg.eigh(covariance)
    root = jnp.sqrt(jnp.maximum(values, 0.0) + floor)
    u, s, v = jnp.linalg.svd(root[..., None] * jnp.matmul(vectors.mT, w), full_matrices=False)
    return jnp.matmul(vectors, u / root[..., None]), s, v


def _ranks(
    sites: Mapping[str, Site],
    energies: Mapping[str, np.ndarray],
    keep: float | None,
    error: float | None,
    allocation: str,
) -> dict[str, int]:
    sizes = {p: s.sizes for p, s in sites.items()}
    if error is not None:
        return {p: _rank_of_error(e, error) for p, e in energies.items()}
    assert keep is not None
    if allocation == "uniform":
        return {
            p: max(1, int(keep * i * o / (i + o))) if keep < 1 else min(i, o)
            for p, (_, i, o) in sizes.items()
        }
    # Greedy: the terms that hold the largest share of their weight's energy a parameter, until the
    # budget is spent.
    gains, costs, owners = [], [], []
    for p, e in energies.items():
        lead, i, o = sizes[p]
        cost = (i + o) * max(1, int(np.prod(lead)))
        gains.append(e / max(e.sum(), 1e-30) / (i + o))
        costs.append(np.full(len(e), cost))
        owners.extend([p] * len(e))
    gain, cost = np.concatenate(gains), np.concatenate(costs)
    order = np.argsort(-gain, kind="stable")
    budget = keep * sum(i * o * max(1, int(np.prod(lead))) for lead, i, o in sizes.values())
    chosen = order[np.cumsum(cost[order]) <= budget]
    ranks = dict.fromkeys(sizes, 0)
    for index in chosen:
        ranks[owners[index]] += 1
    return {p: max(1, k) for p, k in ranks.items()}


def _rank_of_error(energy: np.ndarray, error: float) -> int:
    """The smallest rank whose truncation loses at most error^2 of the energy."""
    lost = np.concatenate([np.cumsum(energy[::-1])[::-1], [0.0]]) / max(energy.sum(), 1e-30)
    return max(1, int(np.argmax(lost <= error**2)))


@configuration
class FactorizeConfig:
    keep: float | None = option(
        None, "make weights products of low rank: the share of the targets' parameters that stays"
    )
    error: float | None = option(None, "or the largest relative error of a weight")
    activations: bool = option(
        True, "best for outputs on the training data (SVD-LLM), not for the weights themselves"
    )
    targets: str | list[str] = option("all-linear", "what to factorize")
    exclude: list[str] = option([], "what to leave whole")
    calibration_batches: int = option(
        8, "batches of the training data that activations are taken from"
    )


def check_factorize(section: FactorizeConfig) -> None:
    """Raise ConfigError where both set the ranks."""
    if section.keep is not None and section.error is not None:
        raise ConfigError("factorize.keep and factorize.error both set the ranks: give one of them")


def _run(section: FactorizeConfig, state: State, context: Context) -> State:
    where: dict[str, Any] = {"targets": section.targets, "exclude": section.exclude}
    found = None
    if section.activations:
        found = calibrate(bind(state.model), state.params, context.batches, **where)
    options: dict[str, Any] = {"keep": section.keep, "error": section.error, **where}
    params, _ = factorize(state.params, statistics=found, **options)
    return state.replace(params=context.placed(params), numbers={})


def _needs(section: FactorizeConfig) -> Needs:
    looks = section.activations
    return Needs(section.calibration_batches, ("covariance",)) if looks else Needs()


STAGE = Stage(
    "factorize",
    "low-rank factorization of the base, after pruning",
    FactorizeConfig,
    _run,
    needs=_needs,
    check=check_factorize,
    asked=lambda section: section.keep is not None or section.error is not None,
    wants="factorize.keep or factorize.error, as in factorize.keep=0.5",
)
