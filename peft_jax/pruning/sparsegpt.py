"""SparseGPT (Frantar and Alistarh 2023, arXiv:2301.00774): masks chosen input by input, each one's
error made up for by those that follow.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from peft_jax.core.hessian import damped, inverse_factor
from peft_jax.pruning.pattern import NM, Pattern, select_kept


def sparsegpt(
    w: jax.Array,
    *,
    statistics: Any,
    kept: jax.Array,
    sparsity: jax.Array | float,
    pattern: Pattern = None,
    damping: float = 0.01,
    block: int = 128,
) -> tuple[jax.Array, jax.Array]:
    """(the changed matrix, bool of what is kept), both [in, out], for the covariance of the inputs
    [in, in].

    Within each `block` of inputs the share `sparsity` of the smallest w^2 / (H^-1)_ii goes, as its
    Algorithm 1 has it; for an N:M pattern, within each group when its turn comes. Entries outside
    of `kept` are gone already and count among them. `damping` times the mean diagonal is added to
    the Hessian. Raises ValueError for a pattern of blocks, or of groups that do not divide `block`.
    """
    if pattern is not None and not isinstance(pattern, NM):
        raise ValueError(f"sparsegpt prunes entries or N:M groups, not blocks of {pattern}")
    group = pattern.m if isinstance(pattern, NM) else block
    if block < 1 or block % group:
        raise ValueError(f"groups of {group} do not divide sparsegpt's block={block}")
    n_in, n_out = w.shape
    w, hessian = damped(w, statistics["covariance"], damping)
    upper = inverse_factor(hessian)
    missing = -n_in % block  # the last block is filled up with inputs that are not there
    w, kept = (
        jnp.pad(w, ((0, missing), (0, 0))),
        jnp.pad(kept, ((0, missing), (0, 0)), constant_values=True),
    )
    upper = jnp.pad(upper, (0, missing)) + jnp.diag(
        jnp.where(jnp.arange(n_in + missing) < n_in, 0.0, 1.0)
    )
    real = jnp.arange(n_in + missing) < n_in

    def chosen(
        rows: jax.Array, factor: jax.Array, allowed: jax.Array, there: jax.Array
    ) -> jax.Array:
        """bool like `rows`: which of them stay, by the score of the paper's equation 4."""
        score = jnp.square(rows) / jnp.square(jnp.diagonal(factor))[:, None]
        score = jnp.where(allowed, score, -1.0)
        if isinstance(pattern, NM):
            return select_kept(score, 0, pattern, "output")
        score = jnp.where(there[:, None], score, jnp.inf)
        remove = jnp.floor(sparsity * there.sum() * n_out * (1 + 1e-6)).astype(jnp.int32)
        return select_kept(score, remove, None, "matrix")

    def one_block(w: jax.Array, start: jax.Array) -> Any:
        rows, allowed = (jax.lax.dynamic_slice_in_dim(a, start, block) for a in (w, kept))
        there = jax.lax.dynamic_slice_in_dim(real, start, block)
        factor = jax.lax.dynamic_slice(upper, (start, start), (block, block))
        stay = chosen(rows, factor, allowed, there) if pattern is None else jnp.ones_like(allowed)

        def next_group(i: jax.Array, rows: jax.Array, stay: jax.Array) -> jax.Array:
            part, allow = (jax.lax.dynamic_slice_in_dim(a, i, group) for a in (rows, allowed))
            square = jax.lax.dynamic_slice(factor, (i, i), (group, group))
            return jax.lax.dynamic_update_slice_in_dim(
                stay, chosen(part, square, allow, there), i, 0
            )

        def one(i: jax.Array, state: Any) -> Any:
            rows, stay, errors = state
            if isinstance(pattern, NM):
                stay = jax.lax.cond(i % group == 0, lambda: next_group(i, rows, stay), lambda: stay)
            row = rows[i]
            error = jnp.where(stay[i], 0.0, row) / factor[i, i]
            later = jnp.where(jnp.arange(block) > i, factor[i], 0.0)
            return rows - later[:, None] * error, stay, errors.at[i].set(error)

        rows, stay, errors = jax.lax.fori_loop(0, block, one, (rows, stay, jnp.zeros_like(rows)))
        beside = jax.lax.dynamic_slice_in_dim(upper, start, block)
        beside = jnp.where(jnp.arange(w.shape[0]) >= start + block, beside, 0.0)
        return w - jnp.matmul(beside.T, errors), (jnp.where(stay, rows, 0.0), stay)

    _, (rows, stay) = jax.lax.scan(one_block, w, jnp.arange(0, n_in + missing, block))
    return rows.reshape(-1, n_out)[:n_in], stay.reshape(-1, n_out)[:n_in]
