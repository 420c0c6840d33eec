"""Divergences between a student's and a teacher's next-token distributions.

All take log-probabilities over the last axis, [..., V], and return nats [...] (total variation: a
share). The student's is the first argument. Q is the student's distribution, P the teacher's.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from peft_jax.core.select import nearest

Divergence = Callable[[jax.Array, jax.Array], jax.Array]
FLOOR = -1e4  # stands for log 0: exp of it is 0, and products with it are finite


def log_probabilities(
    logits: jax.Array, *, temperature: float = 1.0, vocabulary: int | None = None
) -> jax.Array:
    """Log-probabilities [..., V] in float32 of logits over `temperature`; only the first
    `vocabulary` of them exist, where given (families pad their embeddings to different sizes).
    """
    logits = logits.astype(jnp.float32)
    logits = logits if vocabulary is None else logits[..., :vocabulary]
    return jnp.maximum(jax.nn.log_softmax(logits / temperature, axis=-1), FLOOR)


def forward_kl(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """KL(P || Q): the student covers all that the teacher does (Hinton et al. 2015,
    arXiv:1503.02531).
    """
    return _mean(teacher, teacher - student)


def reverse_kl(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """KL(Q || P): the student keeps to what the teacher would say (Gu et al. 2023,
    arXiv:2306.08543).
    """
    return _mean(student, student - teacher)


def jensen_shannon(student: jax.Array, teacher: jax.Array, *, beta: float = 0.5) -> jax.Array:
    """beta KL(P || M) + (1 - beta) KL(Q || M) with M = beta P + (1 - beta) Q (Agarwal et al. 2023,
    arXiv:2306.13649, equation 1). At the ends, where that is 0, its limits over beta and 1 - beta:
    KL(P || Q) for 0 and KL(Q || P) for 1.
    """
    if beta in (0.0, 1.0):
        return (reverse_kl if beta else forward_kl)(student, teacher)
    mixture = _mixture(teacher, student, beta)
    return beta * _mean(teacher, teacher - mixture) + (1.0 - beta) * _mean(
        student, student - mixture
    )


def skewed_forward_kl(student: jax.Array, teacher: jax.Array, *, alpha: float = 0.1) -> jax.Array:
    """KL(P || alpha P + (1 - alpha) Q) (DistiLLM, Ko et al. 2024, arXiv:2402.03898, section
    3.1).
    """
    return _mean(teacher, teacher - _mixture(teacher, student, alpha))


def skewed_reverse_kl(student: jax.Array, teacher: jax.Array, *, alpha: float = 0.1) -> jax.Array:
    """KL(Q || alpha Q + (1 - alpha) P) (Ko et al. 2024, section 3.1)."""
    return _mean(student, student - _mixture(student, teacher, alpha))


def total_variation(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """Half the sum of |P - Q|, in [0, 1] (Wen et al. 2023, arXiv:2307.15190)."""
    return 0.5 * jnp.abs(jnp.exp(teacher) - jnp.exp(student)).sum(-1)


def _mean(of: jax.Array, values: jax.Array) -> jax.Array:
    """The mean of `values` under the distribution whose log-probabilities are `of`."""
    return (jnp.exp(of) * values).sum(-1)


def _mixture(first: jax.Array, second: jax.Array, share: float) -> jax.Array:
    """Log-probabilities of `share` of the first distribution and the rest of the second."""
    if share in (0.0, 1.0):
        return first if share else second
    return jnp.logaddexp(first + math.log(share), second + math.log1p(-share))


DIVERGENCES: dict[
    str, tuple[Callable[..., jax.Array], str | None]
] = {  # name -> (function, its option in [0, 1])
    "forward_kl": (forward_kl, None),
    "reverse_kl": (reverse_kl, None),
    "jensen_shannon": (jensen_shannon, "beta"),
    "skewed_forward_kl": (skewed_forward_kl, "alpha"),
    "skewed_reverse_kl": (skewed_reverse_kl, "alpha"),
    "total_variation": (total_variation, None),
}


def make_divergence(name: str, **options: float) -> Divergence:
    """The divergence of a name with its option. Raises ValueError for an unknown name or option, or
    a share not in [0, 1].
    """
    if name not in DIVERGENCES:
        raise ValueError(
            f"unknown divergence {name!r}.{nearest(name, DIVERGENCES)} There are: "
            f"{', '.join(DIVERGENCES)}"
        )
    function, option = DIVERGENCES[name]
    for key, value in options.items():
        if key != option:
            raise ValueError(
                f"{name} has no option {key!r}{f'; it has {option}' if option else ''}"
            )
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"{key} of {name} must lie in [0, 1], got {value}")
    return functools.partial(function, **options)


def with_tail(
    logits: jax.Array, ids: jax.Array, *, temperature: float = 1.0, vocabulary: int | None = None
) -> jax.Array:
    """Log-probabilities [..., k + 1] of k tokens, `ids` [..., k], and of all the others together,
    given logits [..., V].

    With the others' mass as one outcome more, a divergence between two such distributions is a
    lower bound of the whole one (data processing inequality) and equals it where k = V; leaving the
    others out would make it neither.
    """
    every = log_probabilities(logits, temperature=temperature, vocabulary=vocabulary)
    chosen = jnp.take_along_axis(every, ids, axis=-1)
    inside = jnp.zeros(every.shape, bool)
    inside = jnp.put_along_axis(inside, ids, True, axis=-1, inplace=False)
    rest = jax.nn.logsumexp(jnp.where(inside, FLOOR, every), axis=-1, keepdims=True)
    return jnp.concatenate([chosen, jnp.maximum(rest, FLOOR)], axis=-1)


def top_k(
    logits: jax.Array, k: int, *, temperature: float = 1.0, vocabulary: int | None = None
) -> tuple[jax.Array, jax.Array]:
    """(ids [..., k] of the k most likely tokens, log-probabilities [..., k + 1] of these and of the
    others together).
    """
    size = logits.shape[-1] if vocabulary is None else vocabulary
    ids = jax.lax.top_k(logits[..., :size], min(k, size))[1]
    return ids, with_tail(logits, ids, temperature=temperature, vocabulary=vocabulary)
