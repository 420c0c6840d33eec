"""Losses between a student's and a teacher's hidden states, attentions and their relations.

Letters: B batch, T tokens, D features, H heads, d head size. `weights` [B, T] are 1 for tokens and
0 for padding; `visible` [B, T, T] says which tokens each token sees. All return a scalar, float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from peft_jax.core.capture import Place, input_of, output_of, plain_path
from peft_jax.core.select import stack_at
from peft_jax.core.tree import places

_MASKED = -1e9


class States(NamedTuple):
    """What one layer's attention takes: queries [B, T, H, d], keys and values [B, T, K, d]."""

    query: Any
    key: Any
    value: Any = None


def cosine(student: jax.Array, teacher: jax.Array, weights: jax.Array) -> jax.Array:
    """Mean of 1 - cos between hidden states [B, T, D] (DistilBERT, Sanh et al. 2019,
    arXiv:1910.01108, section 3).
    """
    s, t = student.astype(jnp.float32), teacher.astype(jnp.float32)
    norms = jnp.sqrt(jnp.maximum((s * s).sum(-1) * (t * t).sum(-1), 1e-24))
    return _weighted(1.0 - (s * t).sum(-1) / norms, weights)


def squared(student: jax.Array, teacher: jax.Array, weights: jax.Array) -> jax.Array:
    """Mean squared difference of hidden states [B, T, D] (FitNets, Romero et al. 2014,
    arXiv:1412.6550; TinyBERT, Jiao et al. 2019, arXiv:1909.10351, equation 8).
    """
    return _weighted(
        jnp.square(student.astype(jnp.float32) - teacher.astype(jnp.float32)).mean(-1), weights
    )


def attention_scores(query: jax.Array, key: jax.Array) -> jax.Array:
    """Scaled scores [B, H, T, T] of queries [B, T, H, d] and keys [B, T, K, d]; a key head serves H
    / K query heads.
    """
    key = jnp.repeat(key, query.shape[2] // key.shape[2], axis=2)
    scores = jnp.einsum("bthd,bshd->bhts", query, key, preferred_element_type=jnp.float32)
    return scores * query.shape[-1] ** -0.5


def attention(student: States, teacher: States, visible: jax.Array) -> jax.Array:
    """Mean squared difference of attention scores before the softmax, over what is visible
    (TinyBERT, equation 7).
    """
    difference = jnp.square(_scores(student) - _scores(teacher)).mean(1)
    return _weighted(difference, visible.astype(jnp.float32))


def _scores(states: States) -> jax.Array:
    return attention_scores(states.query, states.key)


def relation(student: jax.Array, teacher: jax.Array, visible: jax.Array) -> jax.Array:
    """Mean KL of the teacher's distributions over tokens from the student's, given scores [B, H, T,
    T] before the softmax.
    """

    def log(x):
        return jax.nn.log_softmax(jnp.where(visible[:, None], x, _MASKED), axis=-1)

    p, q = log(teacher), log(student)
    divergence = jnp.where(visible[:, None], jnp.exp(p) * (p - q), 0.0).sum(-1).mean(1)  # [B, T]
    return _weighted(divergence, visible.any(-1).astype(jnp.float32))


def minilm(student: States, teacher: States, visible: jax.Array) -> jax.Array:
    """Attention distributions and relations of values (MiniLM, Wang et al. 2020, arXiv:2002.10957,
    equations 4 to 8).
    """
    values = relation(
        attention_scores(student.value, student.value),
        attention_scores(teacher.value, teacher.value),
        visible,
    )
    return relation(_scores(student), _scores(teacher), visible) + values


def minilmv2(
    student: States, teacher: States, visible: jax.Array, *, relation_heads: int
) -> jax.Array:
    """Relations among queries, keys and values in `relation_heads` heads each, so that widths and
    numbers of heads may differ (MiniLMv2, Wang et al. 2020, arXiv:2012.15828, equations 3 to 5).
    """
    total = jnp.zeros(())
    for s, t in zip(student, teacher, strict=True):
        a, b = (x.reshape(*x.shape[:2], relation_heads, -1) for x in (s, t))
        total = total + relation(attention_scores(a, a), attention_scores(b, b), visible)
    return total


def visible_tokens(segment_ids: jax.Array, *, causal: bool) -> jax.Array:
    """[B, T, T] whether a token (the second axis) sees another (the third): those of its own
    segment, padding none.
    """
    seen = (segment_ids[:, :, None] == segment_ids[:, None, :]) & (segment_ids[:, :, None] > 0)
    return jnp.tril(seen) if causal else seen


def _weighted(values: jax.Array, weights: jax.Array) -> jax.Array:
    return (values * weights).sum() / jnp.maximum(weights.sum(), 1e-9)


def _of_tokens(weights: jax.Array, visible: jax.Array) -> jax.Array:
    return weights.sum()


def _of_sights(weights: jax.Array, visible: jax.Array) -> jax.Array:
    return visible.sum().astype(jnp.float32)


def _of_seeing(weights: jax.Array, visible: jax.Array) -> jax.Array:
    return visible.any(-1).sum().astype(jnp.float32)


class Feature(NamedTuple):
    """An objective over layers: what it needs of each (fields of `States`), how much counts in its
    mean, the layers that it pairs by default, and whether a projection makes up for different
    widths.
    """

    needs: tuple[str, ...]
    counted: Callable[[jax.Array, jax.Array], jax.Array]  # of weights [B, T] and visible [B, T, T]
    every: bool  # layer by layer, or the last one alone
    projects: bool = False
    options: tuple[str, ...] = ()


FEATURES: dict[str, Feature] = {
    "cosine": Feature(("hidden",), _of_tokens, every=True, projects=True),
    "squared": Feature(("hidden",), _of_tokens, every=True, projects=True),
    "attention": Feature(("query", "key"), _of_sights, every=True),
    "minilm": Feature(("query", "key", "value"), _of_seeing, every=False),
    "minilmv2": Feature(
        ("query", "key", "value"), _of_seeing, every=False, options=("relation_heads",)
    ),
}
_LOSSES: dict[str, Callable[..., jax.Array]] = {
    "cosine": cosine,
    "squared": squared,
    "attention": attention,
    "minilm": minilm,
    "minilmv2": minilmv2,
}


def layer_map(name: str, student: int, teacher: int) -> list[tuple[int, int]]:
    """(student's layer, teacher's layer), numbered from 1 (0 is what goes into the first): every
    k-th of the teacher's, or the last ones, as the objective has it.
    """
    if not FEATURES[name].every:
        return [(student, teacher)]
    return [(i, max(1, round(i * teacher / student))) for i in range(1, student + 1)]


def feature_loss(
    name: str,
    student: dict[str, jax.Array],
    teacher: dict[str, jax.Array],
    pairs: Sequence[tuple[int, int]],
    *,
    weights: jax.Array,
    visible: jax.Array,
    projection: jax.Array | None = None,
    **options: Any,
) -> jax.Array:
    """The mean over pairs of layers of an objective, given what was captured: name -> [L, ...]."""
    loss = _LOSSES[name]
    total = jnp.zeros(())
    for s, t in pairs:
        if "hidden" in FEATURES[name].needs:
            a, b = (
                x["hidden"][n - 1] if n else x["embedded"][0]
                for x, n in ((student, s), (teacher, t))
            )
            a = a if projection is None else jnp.matmul(a.astype(jnp.float32), projection)
            total = total + loss(a, b, weights)
        else:

            def of(found, layer):
                return States(**{n: found[n][layer - 1] for n in FEATURES[name].needs})

            total = total + loss(of(student, s), of(teacher, t), visible, **options)
    return total / len(pairs)


def places_of(params: Any, needs: set[str], *, embedded: bool = False) -> dict[str, Place]:
    """What to capture for `needs` of a tree's one stack of layers. Raises ValueError where it has
    none, or several.
    """
    stacks = {
        "/".join(p.split("/")[:at])
        for p in map(plain_path, places(params))
        if (at := stack_at(p)) is not None
    }
    if len(stacks) != 1:
        raise ValueError(
            "hidden states are those of one stack of layers; the model has "
            f"{', '.join(sorted(stacks)) or 'none'}"
        )
    (stack,) = stacks
    found = {"hidden": output_of(stack)} if "hidden" in needs else {}
    if embedded:
        found["embedded"] = input_of(stack)
    return found | {
        n: input_of(f"{stack}/*core", field=n) for n in ("query", "key", "value") if n in needs
    }
