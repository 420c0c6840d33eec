"""Distillation as an objective: a teacher's tree beside the student's, in one tree that one step
trains.

The tree is {"student": ..., "teachers": {"0": ...}, "projections": {...}}; what trains in it is the
student's, and matrices that make hidden states of different widths comparable. A teacher that is
the student's own base has no tree of its own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from peft_jax.core.adapters import adapter_names, drop_adapters
from peft_jax.core.bind import Bound, bound_of
from peft_jax.core.capture import capture
from peft_jax.core.partition import freeze, partition
from peft_jax.core.tree import path_str
from peft_jax.core.weight import Trainable
from peft_jax.distillation.divergence import (
    Divergence,
    forward_kl,
    log_probabilities,
    reverse_kl,
    top_k,
    with_tail,
)
from peft_jax.distillation.hidden import (
    FEATURES,
    feature_loss,
    layer_map,
    places_of,
    visible_tokens,
)
from peft_jax.distillation.match import uld
from peft_jax.generation.cache import outdated
from peft_jax.generation.programs import continuations
from peft_jax.objectives.reading import (
    Apply,
    Objective,
    Reading,
    logits_width,
    mean_over,
    nll_and_hits,
    over_positions,
    scores_of,
    with_head,
)
from peft_jax.objectives.tokens import balanced

Batch = dict[str, jax.Array]


class Teacher(NamedTuple):
    """One to learn from: its `apply`, its weight among several, and, where its tokenizer is another
    one, the ids of the tokens that both have (the student's, the teacher's). `apply` is None for
    the student's own base.
    """

    apply: Apply | None
    weight: float = 1.0
    shared: tuple[Any, Any] | None = None


class FeatureTerm(NamedTuple):
    """An objective over hidden states: its name, weight, pairs of layers (None: the usual ones) and
    options.
    """

    name: str
    weight: float = 1.0
    layers: tuple[tuple[int, int], ...] | None = None
    options: Mapping[str, Any] = {}


class OnPolicy(NamedTuple):
    """Learning from texts that the student writes: `share` of the batches (the rest is the data's),
    their length, and how they are sampled; `minillm` adds the gradient through what is written (Gu
    et al. 2023), `teacher_share` of the draws are the teacher's, and `prompt_tokens` is the least
    that stays of a row.
    """

    share: float = 1.0
    max_tokens: int = 64
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    prompt_tokens: int = 1
    eos: tuple[int, ...] = ()
    minillm: bool = False
    teacher_share: float = 0.0


def distillation(
    reading: Reading,
    teachers: Sequence[Teacher],
    *,
    divergence: Divergence = forward_kl,
    temperature: float = 1.0,
    weight: float = 1.0,
    data_weight: float = 0.0,
    features: Sequence[FeatureTerm] = (),
    keep: int = 0,
    vocabulary: int | None = None,
    on_policy: OnPolicy | None = None,
    chunk: int | None = None,
    router_loss: float | None = None,
) -> Objective:
    """An objective of a tree as `beside_teachers` makes it.

    The loss is `data_weight` times the cross-entropy, plus `weight` times temperature^2 (Hinton et
    al. 2015) times the mean divergence of student and teachers at that temperature, plus the
    features. `keep` > 0 compares the teacher's most likely tokens and the others' mass together; a
    batch with `teacher_ids` [B, T, k] and `teacher_log_probs` [B, T, k + 1] brings the teacher's
    predictions itself. Logits are computed for `chunk` tokens at a time (see `over_positions`),
    both models'. `vocabulary` is how many of the logits are tokens. A student that is a mixture of
    experts adds `router_loss` times its load-balancing loss (see `balanced`). Metrics:
    `divergence`, `data_loss`, one for each feature.
    """

    def objective(apply: Apply, params: Any, batch: Batch, rng: Any) -> Any:
        data = batch
        if on_policy is not None and rng is not None:
            batch = _own_texts(on_policy, apply, params, teachers, batch, rng)
        batch = reading.view(batch, rng)
        student, mean = params["student"], mean_over(batch)
        states, found = _read(reading, apply, student, batch, rng, _wanted(features, student))
        head = reading.head(apply, student, batch)
        taught = [
            _teach(reading, apply, params, i, t, batch, features) for i, t in enumerate(teachers)
        ]
        spec = _Comparison(
            divergence, temperature, keep, vocabulary, on_policy is not None and on_policy.minillm
        )
        parts = _compare(spec, head, states, teachers, taught, batch, chunk, rng)
        weights = batch["weights"].astype(jnp.float32)
        metrics = {
            "weight": weights.sum(),
            "accuracy": mean(parts["hits"], weights),
            "data_loss": mean(parts["nll"], weights),
        }
        shared = {"weight": metrics["weight"]}
        loss = jnp.zeros(())
        if weight:
            compared = (
                (batch["compared"].astype(jnp.float32), "compared")
                if "compared" in batch
                else (weights, "weight")
            )
            shared[compared[1]] = compared[0].sum()
            if spec.policy and rng is not None:
                loss = weight * mean(_policy_loss(on_policy, parts, weights), weights)
            else:
                loss = weight * temperature**2 * mean(parts["divergence"], *compared)
            metrics["divergence"] = mean(parts["divergence"], *compared)
        if (
            data_weight and on_policy is not None and rng is not None
        ):  # of the data, not of what the student wrote
            seen = reading.view(data, rng)
            data_weights = seen["weights"].astype(jnp.float32)
            nll, _ = scores_of(
                head, reading.states(apply, student, seen, rng), seen["targets"], chunk, rng
            )
            metrics["data_loss"] = mean(nll, data_weights, "data")
            shared["data"] = data_weights.sum()
        loss = loss + data_weight * metrics["data_loss"] if data_weight else loss
        for term in features:
            value, shared[term.name] = _feature(
                term, params, apply, batch, found, [t.found for t in taught], teachers
            )
            loss, metrics = loss + term.weight * value, {**metrics, term.name: value}
        return loss, metrics if len(shared) == 1 else {**metrics, "shared": shared}

    return balanced(objective, router_loss)


def of_student(objective: Objective) -> Objective:
    """An objective of the student alone, for a tree with its teachers."""
    return lambda apply, params, batch, rng: objective(apply, params["student"], batch, rng)


def beside_teachers(
    student: Any,
    teachers: Sequence[Any],
    features: Sequence[FeatureTerm] = (),
    widths: tuple[int, Sequence[int]] | None = None,
    *,
    seed: int = 0,
) -> dict[str, Any]:
    """The tree that `distillation` works on. `teachers` are trees, or None for the student's own
    base (which must be left as it is by the method; ValueError names a place that trains in
    itself). `widths` are hidden sizes (student, teachers): where they differ, features that can
    gain a projection.
    """
    for tree in teachers:
        if tree is None:
            base_of(student)
    tree: dict[str, Any] = {
        "student": student,
        "teachers": {str(i): freeze(t) for i, t in enumerate(teachers) if t is not None},
        "projections": {},
    }
    if widths is not None:
        ours, theirs = widths
        for n, term in enumerate(features):
            for i, other in enumerate(theirs):
                if FEATURES[term.name].projects and other != ours:
                    key = jax.random.fold_in(jax.random.key(seed), n * len(theirs) + i)
                    start = jax.random.normal(key, (ours, other)) * ours**-0.5
                    tree["projections"][f"{term.name}_{i}"] = Trainable(start)
    return tree


def base_of(params: Any) -> Any:
    """A tree without its adapters, its arrays the same ones. Raises ValueError where the base
    itself trains.
    """
    names = adapter_names(params)
    base = drop_adapters(params, names) if names else params
    if left := jax.tree_util.tree_flatten_with_path(partition(base)[0])[0]:
        raise ValueError(
            f"the base cannot be the teacher while {path_str(left[0][0])} of it trains: use a "
            "method that leaves it alone, as "
            "lora, or name a teacher"
        )
    return base


# --------------------------------------------------------------------------------------------------
# what the models say


class _Taught(NamedTuple):
    """A teacher's states [B, T, D] with its head, and what was captured; the predictions themselves
    where they are stored.
    """

    states: jax.Array | None
    head: Callable[[jax.Array], jax.Array] | None
    found: dict[str, jax.Array]


def _wanted(features: Sequence[FeatureTerm], tree: Any, side: int = 0) -> dict[str, Any]:
    needs = {n for term in features for n in FEATURES[term.name].needs}
    embedded = any(pair[side] == 0 for term in features for pair in term.layers or ())
    return places_of(tree, needs, embedded=embedded) if needs else {}


def _read(
    reading: Reading, apply: Apply, tree: Any, batch: Batch, rng: Any, wanted: dict[str, Any]
) -> Any:
    """(states, what was captured)."""
    if not wanted:
        return reading.states(apply, tree, batch, rng), {}
    found: dict[str, jax.Array] = {}

    def around(call: Apply, *args: Any, **kwargs: Any) -> Any:
        out, seen = capture(call, wanted)(*args, **kwargs)
        found.update(seen)
        return out

    return reading.states(bound_of(apply).wrap(around), tree, batch, rng), found


def _teach(
    reading: Reading,
    apply: Apply,
    params: Any,
    index: int,
    teacher: Teacher,
    batch: Batch,
    features: Sequence[FeatureTerm],
) -> _Taught:
    tree = base_of(params["student"]) if teacher.apply is None else params["teachers"][str(index)]
    theirs = teacher.apply or apply
    if "teacher_tokens" in batch:
        own = {"tokens": batch["teacher_tokens"], "segment_ids": batch["teacher_segment_ids"]}
        batch = {**{k: v for k, v in batch.items() if k not in ("positions", "at")}, **own}
    states, found = _read(reading, theirs, tree, batch, None, _wanted(features, tree, 1))
    stop = functools.partial(jax.tree.map, jax.lax.stop_gradient)
    return _Taught(stop(states), reading.head(theirs, stop(tree), batch), stop(found))


class _Comparison(NamedTuple):
    divergence: Divergence
    temperature: float
    keep: int
    vocabulary: int | None
    policy: bool


def _compare(
    spec: _Comparison,
    head: Any,
    states: jax.Array,
    teachers: Sequence[Teacher],
    taught: Sequence[_Taught],
    batch: Batch,
    chunk: Any,
    rng: Any,
) -> dict[str, jax.Array]:
    """nll and hits [B, T] of the targets, divergence [B, T] (or where it is compared, [B, P]), and
    for MiniLLM the student's and the teacher's log-probabilities of the targets.
    """
    stored = {n: batch[n] for n in ("teacher_ids", "teacher_log_probs") if n in batch}
    both = [t.states for t in taught]
    width = logits_width(head, states) * (1 + len(taught))

    heads = [head, *(t.head for t in taught if t.head is not None)]
    compared = with_head(functools.partial(_compared, spec, tuple(teachers)), *heads)
    if "teacher_at" not in batch:
        arrays = (states, batch["targets"], both, stored)
        return over_positions(compared, arrays, width, chunk, rng)

    def pick(x, at):
        return jnp.take_along_axis(x, at[..., None], axis=1)

    ours, theirs = pick(states, batch["compared_at"]), [pick(x, batch["teacher_at"]) for x in both]

    found = over_positions(with_head(_scored, head), (states, batch["targets"]), width, chunk, rng)
    return found | over_positions(compared, (ours, None, theirs, {}), width, chunk, rng)


def _scored(head: Any, states: jax.Array, targets: jax.Array, rng: Any = None) -> dict[str, Any]:
    return dict(zip(("nll", "hits"), nll_and_hits(head(states, rng=rng), targets), strict=True))


def _compared(spec: _Comparison, teachers: Sequence[Teacher], head: Any, *given: Any, rng=None):
    """What `_compare` gives of a chunk; without targets what is compared alone. `given` are the
    teachers' heads, states, targets, the teachers' states and what is stored of them.
    """
    *heads, states, targets, theirs, stored = given
    logits, scored = head(states, rng=rng), {}
    if targets is not None:
        scored = dict(zip(("nll", "hits"), nll_and_hits(logits, targets), strict=True))
    stop = jax.lax.stop_gradient
    others = [stop(own(s)) for own, s in zip(heads, theirs, strict=True)]
    return scored | _divergences(spec, logits, targets, teachers, others, stored)


def _divergences(
    spec: _Comparison,
    logits: jax.Array,
    targets: Any,
    teachers: Sequence[Teacher],
    others: list[jax.Array],
    stored: Any,
) -> dict[str, jax.Array]:
    options: dict[str, Any] = {"temperature": spec.temperature, "vocabulary": spec.vocabulary}
    if stored:
        ours = with_tail(logits, stored["teacher_ids"].astype(jnp.int32), **options)
        return {
            "divergence": spec.divergence(ours, stored["teacher_log_probs"].astype(jnp.float32))
        }
    total = sum(t.weight for t in teachers)
    value, made = jnp.zeros(logits.shape[:-1], jnp.float32), {}
    for teacher, theirs in zip(teachers, others, strict=True):
        value = value + teacher.weight / total * _divergence(spec, options, logits, theirs, teacher)
    if spec.policy:
        p, q = (log_probabilities(x, **options) for x in (others[0], logits))

        def of(x):
            return jnp.take_along_axis(x, targets[..., None], axis=-1)[..., 0]

        made = {"log_q": of(q), "log_p": of(p), "reverse_kl": reverse_kl(q, p)}
    return {"divergence": value, **made}


def _divergence(
    spec: _Comparison, options: Any, logits: jax.Array, others: jax.Array, teacher: Teacher
) -> jax.Array:
    """Of a student's logits [..., V] and a teacher's [..., U]."""
    mine: dict[str, Any] = {"temperature": spec.temperature}
    if spec.divergence is uld:
        return uld(log_probabilities(logits, **mine), log_probabilities(others, **mine))
    if teacher.shared is not None:
        ours, theirs = (jnp.broadcast_to(i, (*logits.shape[:-1], len(i))) for i in teacher.shared)
        return spec.divergence(with_tail(logits, ours, **mine), with_tail(others, theirs, **mine))
    if spec.keep:
        ids, kept = top_k(others, spec.keep, **options)
        return spec.divergence(with_tail(logits, ids, **options), kept)
    return spec.divergence(
        log_probabilities(logits, **options), log_probabilities(others, **options)
    )


def _feature(
    term: FeatureTerm,
    params: Any,
    apply: Apply,
    batch: Batch,
    found: Any,
    taught: Sequence[Any],
    teachers: Sequence[Teacher],
) -> tuple[jax.Array, jax.Array]:
    """(the term, how much counts in it): of a part of a batch its share of the whole batch's."""
    segments = batch.get("segment_ids")
    segments = jnp.ones(batch["tokens"].shape, jnp.int32) if segments is None else segments
    weights = (segments > 0).astype(jnp.float32)
    visible = visible_tokens(segments, causal=bound_of(apply).cache)
    counted = FEATURES[term.name].counted(weights, visible)
    share = (
        counted / jnp.maximum(batch["shared"][term.name].sum(), 1e-9) if "shared" in batch else 1.0
    )
    total, sum_of_weights = jnp.zeros(()), sum(t.weight for t in teachers)
    for i, (teacher, theirs) in enumerate(zip(teachers, taught, strict=True)):

        def depth(x):
            return next(v.shape[0] for n, v in x.items() if n != "embedded")

        pairs = term.layers or layer_map(term.name, depth(found), depth(theirs))
        projection = params["projections"].get(f"{term.name}_{i}")
        value = feature_loss(
            term.name,
            found,
            theirs,
            pairs,
            weights=weights,
            visible=visible,
            projection=projection.value if isinstance(projection, Trainable) else projection,
            **term.options,
        )
        total = total + teacher.weight / sum_of_weights * value
    return total * share, counted


# ------------------------------------------------------------------------------------------------
# the student's own texts


def _own_texts(
    spec: OnPolicy, apply: Apply, params: Any, teachers: Sequence[Teacher], batch: Batch, rng: Any
) -> Batch:
    """The batch, or in a `share` of the calls the prompts of its rows with what the student (mixed
    with the teacher) writes.
    """
    draw, key = jax.random.split(jax.random.fold_in(rng, 2))
    frozen = jax.tree.map(jax.lax.stop_gradient, params)
    first = teachers[0]
    theirs = base_of(frozen["student"]) if first.apply is None else frozen["teachers"].get("0")
    writer, tree = apply, frozen["student"]
    if spec.teacher_share:
        writer, tree = (
            _mixed(apply, first.apply or apply, spec.teacher_share),
            (frozen["student"], theirs),
        )

    def write():
        return _written(spec, writer, tree, batch, key)

    if spec.share >= 1.0:
        return write()
    return jax.lax.cond(jax.random.uniform(draw) < spec.share, write, lambda: dict(batch))


def _written(spec: OnPolicy, apply: Apply, params: Any, batch: Batch, key: Any) -> Batch:
    """Rows of prompts, each with the tokens before the first that is to be learnt, and of
    continuations, which count.
    """
    tokens, segments = batch["tokens"], batch["segment_ids"]
    B, T = tokens.shape
    size = (segments == 1).sum(1)
    first = jnp.argmax(batch["weights"] > 0, axis=1) + 1
    n = jnp.clip(jnp.maximum(first, spec.prompt_tokens), 1, jnp.maximum(size, 1))[
        :, None
    ]  # the prompt's tokens
    place = jnp.arange(T)[None]
    back = place - (T - n)  # prompts padded on the left
    prompts = jnp.take_along_axis(tokens, jnp.maximum(back, 0), axis=1)
    new = continuations(
        apply,
        params,
        jnp.where(back >= 0, prompts, 0),
        (back >= 0).astype(jnp.int32),
        key,
        max_tokens=spec.max_tokens,
        eos=spec.eos,
        temperature=spec.temperature,
        top_k=spec.top_k,
        top_p=spec.top_p,
    )
    end = jnp.isin(new, jnp.asarray(spec.eos, jnp.int32))
    ended = jnp.cumsum(end, axis=1) - end > 0  # after the end token
    count = (~ended).sum(1)[:, None]
    at = jnp.arange(T + 1)[None] - n
    whole = jnp.where(
        at >= 0,
        jnp.take_along_axis(new, jnp.clip(at, 0, spec.max_tokens - 1), 1),
        jnp.pad(tokens, ((0, 0), (0, 1))),
    )
    there = at < count
    counts = ((at[:, 1:] >= 0) & there[:, 1:]).astype(jnp.float32)
    seen = there[:, :-1].astype(segments.dtype)
    return {
        **batch,
        "tokens": jnp.where(seen > 0, whole[:, :-1], 0).astype(tokens.dtype),
        "targets": jnp.where(there[:, 1:], whole[:, 1:], 0).astype(batch["targets"].dtype),
        "weights": counts.astype(batch["weights"].dtype),
        "positions": jnp.broadcast_to(place, (B, T)).astype(batch["positions"].dtype),
        "segment_ids": seen,
    }


def _mixed(student: Apply, teacher: Apply, share: float) -> Bound:
    """An `apply` of (student's tree, teacher's tree) that gives log-probabilities of a mixture,
    each with its own cache.
    """
    both = (bound_of(student), bound_of(teacher))

    def mixture(params: Any, *args: Any, cache: Any, **kwargs: Any) -> Any:
        ours, theirs = (
            f(p, *args, cache=cache[str(i)], **kwargs)
            for i, (f, p) in enumerate(zip(both, params, strict=True))
        )
        size = min(ours[0].shape[-1], theirs[0].shape[-1])
        log = [jax.nn.log_softmax(x[0][..., :size].astype(jnp.float32)) for x in (ours, theirs)]
        mixed = jnp.logaddexp(log[0] + np.log1p(-share), log[1] + np.log(share))
        return mixed, {"0": ours[1], "1": theirs[1]}

    def empty(params: Any, *sizes: Any) -> Any:
        made = [f(p, *sizes, method="empty_cache") for f, p in zip(both, params, strict=True)]
        return {str(i): cache for i, cache in enumerate(made)}

    def either(params: Any, cache: Any) -> Any:
        found = [outdated(f, params[i], cache[str(i)]) for i, f in enumerate(both)]
        found = [rows for rows in found if rows is not None]
        return functools.reduce(jnp.logical_or, found) if found else None

    methods = {"__call__": mixture, "empty_cache": empty, "outdated": either}

    def apply(params: Any, *args: Any, method: str = "__call__", **kwargs: Any) -> Any:
        return methods[method](params, *args, **kwargs)

    return Bound.of(apply, cache=True, outdates=True)


def _policy_loss(
    spec: OnPolicy | None, parts: dict[str, jax.Array], weights: jax.Array
) -> jax.Array:
    """[B, T] whose gradient is MiniLLM's (Gu et al. 2023, arXiv:2306.08543, equations 3 to 7): at
    each place the reverse KL, and the log-probability of what was written times the mean log-ratio
    of what follows it, both weighted by how much likelier the student was to write it than the
    mixture that wrote it.
    """
    assert spec is not None
    log_q, log_p = parts["log_q"], jax.lax.stop_gradient(parts["log_p"])
    ratio = jax.lax.stop_gradient(log_p - log_q) * weights

    def after(x):
        return jnp.cumsum(x[:, ::-1], axis=1)[:, ::-1] - x  # the sum of what follows

    reward = after(ratio) / jnp.maximum(after(weights), 1.0)
    importance = jnp.ones_like(reward)
    if spec.teacher_share:
        mixture = jnp.logaddexp(
            log_q + np.log1p(-spec.teacher_share), log_p + np.log(spec.teacher_share)
        )
        importance = jnp.exp(jax.lax.stop_gradient(log_q - mixture))
    return importance * (parts["reverse_kl"] - reward * log_q)
