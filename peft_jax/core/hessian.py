"""The Hessian of a layer's squared output error, which is the covariance of its inputs, as GPTQ and
SparseGPT use it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def damped(w: jax.Array, covariance: jax.Array, damping: float) -> tuple[jax.Array, jax.Array]:
    """(w [in, out] with zeros for inputs that never occur, the Hessian [in, in]): the covariance
    with `damping` times its mean diagonal added.
    """
    diagonal = jnp.diagonal(covariance)
    dead = diagonal == 0
    hessian = covariance + jnp.diag(jnp.where(dead, 1.0, 0.0) + damping * diagonal.mean())
    return jnp.where(dead[:, None], 0.0, w), hessian


def inverse_factor(hessian: jax.Array) -> jax.Array:
    """The upper Cholesky factor of the inverse of a Hessian [in, in] (GPTQ's step 3, Frantar et al.
    2022, arXiv:2210.17323).
    """
    return jnp.linalg.cholesky(jnp.linalg.inv(hessian)).T
