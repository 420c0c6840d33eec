"""How LoRA's factors start: A [*lead, in, r] and B [*lead, r, out].

The starts that are taken from the weight itself (PiSSA, OLoRA) do not begin at zero; `LoRA` then
keeps a frozen copy of what they begin with and subtracts it, so the model is unchanged and the base
stays as it was.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp

Factors = tuple[jax.Array, jax.Array]
WITHOUT_DATA = "kaiming"  # the start where there are no statistics
STATISTICS = {
    "eva": "centred_covariance",
    "corda_kpm": "covariance",
    "corda_ipm": "covariance",
    "lora_ga": "gradient",
}


def kaiming(key: jax.Array, shape: tuple[int, ...], fan_in: int) -> jax.Array:
    """torch's kaiming_uniform_(a=sqrt(5)): uniform within 1/sqrt(fan_in)."""
    bound = 1.0 / math.sqrt(fan_in)
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound)


def _kaiming(w: jax.Array, rank: int, scale: jax.Array, key: jax.Array) -> Factors:
    *lead, n_in, n_out = w.shape
    return kaiming(key, (*lead, n_in, rank), n_in), jnp.zeros((*lead, rank, n_out), jnp.float32)


def embedding(
    w: jax.Array, rank: int, scale: jax.Array, key: jax.Array, statistic: jax.Array | None = None
) -> Factors:
    """A of zeros and B normal, as PEFT starts an `nn.Embedding` whatever the random start: a row of
    A meets one token alone, and B all tokens.
    """
    *lead, n_in, n_out = w.shape
    return jnp.zeros((*lead, n_in, rank), jnp.float32), jax.random.normal(key, (*lead, rank, n_out))


def _gaussian(w: jax.Array, rank: int, scale: jax.Array, key: jax.Array) -> Factors:
    *lead, n_in, n_out = w.shape
    return jax.random.normal(key, (*lead, n_in, rank)) / rank, jnp.zeros(
        (*lead, rank, n_out), jnp.float32
    )


def _orthogonal(w: jax.Array, rank: int, scale: jax.Array, key: jax.Array) -> Factors:
    """Both factors random, but A B = 0: they use the even and the odd rows of one orthogonal
    matrix.
    """
    if rank % 2:
        raise ValueError(f"init 'orthogonal' needs an even rank, got {rank}")
    *lead, n_in, n_out = w.shape
    k1, k2, k3 = jax.random.split(key, 3)
    q = jnp.linalg.qr(jax.random.normal(k1, (*lead, rank, rank)))[0]
    a = jax.random.normal(k2, (*lead, n_in, rank // 2)) @ q[..., 0::2, :] / 10
    b = q[..., 1::2, :].mT @ jax.random.normal(k3, (*lead, rank // 2, n_out)) / 10
    return a, b


def _pissa(w: jax.Array, rank: int, scale: jax.Array, key: jax.Array) -> Factors:
    """The r largest singular directions (Meng et al. 2024, arXiv:2404.02948, equations 2 and 3)."""
    u, s, vt = jnp.linalg.svd(w, full_matrices=False)
    return _split(u[..., :rank], s[..., :rank], vt[..., :rank, :], scale)


def _pissa_fast(
    w: jax.Array, rank: int, scale: jax.Array, key: jax.Array, iterations: int
) -> Factors:
    """PiSSA by randomised subspace iteration (Halko et al. 2011, arXiv:0909.4061, algorithm
    4.4).
    """
    q = jnp.linalg.qr(
        w @ jax.random.normal(key, (*w.shape[:-2], w.shape[-1], min(2 * rank, *w.shape[-2:])))
    )[0]
    for _ in range(iterations):
        q = jnp.linalg.qr(w @ jnp.linalg.qr(w.mT @ q)[0])[0]
    u, s, vt = jnp.linalg.svd(q.mT @ w, full_matrices=False)
    return _split((q @ u)[..., :rank], s[..., :rank], vt[..., :rank, :], scale)


def _split(u: jax.Array, s: jax.Array, vt: jax.Array, scale: jax.Array) -> Factors:
    """Factors whose product times `scale` is u s vt, with the singular values shared evenly."""
    root = jnp.sqrt(s / scale[..., None])
    return u * root[..., None, :], root[..., :, None] * vt


def _olora(w: jax.Array, rank: int, scale: jax.Array, key: jax.Array) -> Factors:
    """The first r columns of the QR decomposition of W^T (Büyükakyüz 2024, arXiv:2406.01775)."""
    q, r = jnp.linalg.qr(w.mT)  # PEFT decomposes [out, in]
    return r[..., :rank, :].mT, q[..., :, :rank].mT


def _eva(w: jax.Array, rank: int, covariance: jax.Array) -> Factors:
    """The directions in which inputs vary most (Paischer et al. 2024, arXiv:2410.07170), with B at
    zero.

    The components of PEFT's incremental PCA, which takes the mean out, are the eigenvectors of the
    covariance about the mean; ranks are not redistributed.
    """
    vectors = jnp.linalg.eigh(covariance)[1][..., ::-1]
    return vectors[..., :rank], jnp.zeros((*w.shape[:-2], rank, w.shape[-1]), jnp.float32)


def _corda(
    w: jax.Array, rank: int, scale: jax.Array, covariance: jax.Array, largest: bool
) -> Factors:
    """The largest (instruction-previewed) or smallest (knowledge-preserved) terms of the SVD of C
    W, undone by C^-1.

    Yang et al. 2024, CorDA, arXiv:2406.05223, equations 2 to 5, where W is [out, in].
    """
    n = w.shape[-2]
    c = covariance + 1e-4 * jnp.trace(covariance, axis1=-2, axis2=-1)[
        ..., None, None
    ] / n * jnp.eye(n)
    u, s, vt = jnp.linalg.svd(c @ w, full_matrices=False)
    u = jnp.linalg.solve(c, u)
    part = slice(None, rank) if largest else slice(s.shape[-1] - rank, None)
    return _split(u[..., part], s[..., part], vt[..., part, :], scale)


def _lora_ga(rank: int, gradient: jax.Array, gamma: float = 16.0) -> Factors:
    """Factors along the gradient's singular vectors (Wang et al. 2024, LoRA-GA, arXiv:2407.05000,
    algorithm 1).

    As in the authors' code (direction ArB2r, scale stable) columns of A and rows of B have the
    length out^(1/4) / sqrt(gamma), whatever alpha is.
    """
    if 2 * rank > min(gradient.shape[-2:]):
        raise ValueError(
            f"init 'lora_ga' needs a rank of at most {min(gradient.shape[-2:]) // 2}, got {rank}"
        )
    u, _, vt = jnp.linalg.svd(gradient, full_matrices=False)
    size = gradient.shape[-1] ** 0.25 / math.sqrt(gamma)
    return size * u[..., :rank], size * vt[..., rank : 2 * rank, :]


_STARTS: dict[str, Callable[[jax.Array, int, jax.Array, jax.Array], Factors]] = {
    "kaiming": _kaiming,
    "gaussian": _gaussian,
    "orthogonal": _orthogonal,
    "pissa": _pissa,
    "olora": _olora,
}
RANDOM = ("kaiming", "gaussian", "orthogonal")  # an embedding has a random start of its own
NAMES = (*_STARTS, "pissa_niter_N", *STATISTICS)


def changes_base(init: str) -> bool:
    """Whether the factors of this start multiply to something other than zero."""
    return init.startswith(("pissa", "olora", "corda", "lora_ga"))


def start(
    init: str,
    w: jax.Array,
    rank: int,
    scale: jax.Array,
    key: jax.Array,
    statistic: jax.Array | None = None,
) -> Factors:
    """(A, B) for the matrix `w` [*lead, in, out] with scale [*lead]; `statistic` is what
    `STATISTICS` says it needs.

    Raises ValueError for an unknown name, a missing statistic, or a rank that is too large.
    """
    if init in STATISTICS:
        if statistic is None:
            raise ValueError(
                f"init {init!r} needs statistics={{path: {STATISTICS[init]}}}; see calibrate and "
                "gradients"
            )
        if init == "lora_ga":
            return _lora_ga(rank, statistic)
        return (
            _eva(w, rank, statistic)
            if init == "eva"
            else _corda(w, rank, scale, statistic, init == "corda_ipm")
        )
    if found := re.fullmatch(r"pissa_niter_(\d+)", init):
        return _pissa_fast(w, rank, scale, key, int(found[1]))
    if init not in _STARTS:
        raise ValueError(f"init must be one of {', '.join(NAMES)}, not {init!r}")
    if rank > min(w.shape[-2:]) and changes_base(init):
        raise ValueError(f"init {init!r} needs a rank of at most {min(w.shape[-2:])}, got {rank}")
    return _STARTS[init](w, rank, scale, key)
