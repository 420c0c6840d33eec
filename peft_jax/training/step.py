"""The one training step: gradient of an objective with respect to the trainable tree alone, then an
optax update.

The frozen tree is an argument: neither differentiated, nor copied, nor baked into the program as a
constant.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from peft_jax.core.bind import bound_of
from peft_jax.core.partition import combine, penalty
from peft_jax.objectives.reading import Apply, Objective


class TrainState(NamedTuple):
    """What training changes: the step number, the trainable tree, optimizer state, rng key and
    skipped-step counts.
    """

    step: jax.Array
    trainable: Any
    opt_state: Any
    rng: jax.Array
    skipped: jax.Array  # steps skipped for a gradient that was not finite
    skipped_in_a_row: jax.Array


def init_state(trainable: Any, optimizer: optax.GradientTransformation, seed: int) -> TrainState:
    """The state before the first step: a copy of the trainable tree (so that it can be donated) in
    float32.
    """
    half = (jnp.bfloat16, jnp.float16)
    trainable = jax.tree.map(
        lambda x: jnp.array(x, jnp.float32 if x.dtype in half else x.dtype, copy=True), trainable
    )

    def zero():
        return jnp.zeros((), jnp.int32)

    return TrainState(
        zero(), trainable, optimizer.init(trainable), jax.random.key(seed), zero(), zero()
    )


def make_step(
    objective: Objective,
    apply: Apply,
    optimizer: optax.GradientTransformation,
    *,
    accumulate: int = 1,
) -> Callable[[TrainState, Any, Any], tuple[TrainState, dict[str, jax.Array]]]:
    """`step(state, frozen, batch) -> (state, metrics)`, pure; jit it with the state donated.

    With `accumulate` > 1 the batch's rows are split into that many micro-batches, whose gradients
    together equal the gradient of the whole batch (but for dropout, and a mixture's load-balancing,
    which is of each micro-batch). A gradient that is not finite changes nothing but the counts.
    Nodes that have a `penalty` add it to what is minimised; the metric `loss` is the objective's
    own. Raises ValueError for a model that computes in float16, whose gradients would vanish below
    6e-8 without a scaled loss.
    """
    if bound_of(apply).dtype == jnp.float16:
        raise ValueError(
            "float16 has too small a range for gradients: train in bfloat16 or float32 (dtype, "
            "model.dtype)"
        )
    optimizer = optax.with_extra_args_support(optimizer)

    def loss_of(trainable: Any, frozen: Any, batch: Any, rng: jax.Array) -> Any:
        params = combine(trainable, frozen)
        loss, metrics = objective(apply, params, batch, rng)
        parts = accumulate if "part" in batch else 1  # losses of such parts are added up
        return loss + penalty(params) / parts, {"loss": loss, **metrics}

    grad_of = jax.value_and_grad(loss_of, has_aux=True)

    def step(state: TrainState, frozen: Any, batch: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        rng = jax.random.fold_in(state.rng, state.step)
        if accumulate == 1:
            (loss, metrics), grads = grad_of(state.trainable, frozen, batch, rng)
            metrics.pop("shared", None)
        else:
            loss, metrics, grads = _accumulated(
                grad_of, state.trainable, frozen, batch, rng, accumulate
            )
        norm = optax.global_norm(grads)
        good = jnp.isfinite(norm) & jnp.isfinite(loss)
        updates, opt_state = optimizer.update(
            grads, state.opt_state, state.trainable, grads=grads, frozen=frozen
        )
        changed = (optax.apply_updates(state.trainable, updates), opt_state)
        trainable, opt_state = jax.tree.map(
            lambda new, old: jnp.where(good, new, old), changed, (state.trainable, state.opt_state)
        )
        bad = 1 - good.astype(jnp.int32)
        new = TrainState(
            state.step + 1,
            trainable,
            opt_state,
            state.rng,
            state.skipped + bad,
            (state.skipped_in_a_row + 1) * bad,
        )
        skips = {"skipped": new.skipped, "skipped_in_a_row": new.skipped_in_a_row}
        return new, {"grad_norm": norm, **metrics, **skips}

    return step


def _accumulated(
    grad_of: Any, trainable: Any, frozen: Any, batch: Any, rng: jax.Array, count: int
) -> Any:
    """(loss, metrics, gradients) over `count` micro-batches: averaged by weight, or added up where
    the objective is told what its parts share (see `objectives.reading`).
    """
    parts = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, count, *x.shape[1:]), 1, 0), batch)

    def key(index):
        return jax.random.fold_in(rng, index)

    first = jax.tree.map(lambda x: x[0], parts)
    shapes = jax.eval_shape(lambda: grad_of(trainable, frozen, first, rng))
    together = "shared" in shapes[0][1]
    shared = {}
    if together:  # what is not shared of this first pass is never computed

        def of(part):
            return grad_of(trainable, frozen, part[1], key(part[0]))[0][1]["shared"]

        shared = {"shared": jax.lax.map(of, (jnp.arange(count), parts))}

    def body(total: Any, part: Any) -> Any:
        index, micro = part
        number = {"part": index} if together else {}
        (loss, metrics), grads = grad_of(
            trainable, frozen, {**micro, **shared, **number}, key(index)
        )
        metrics = {k: v for k, v in metrics.items() if k != "shared"}
        if not together:
            weight = metrics["weight"]
            own = {**metrics, "weight": jnp.ones(())}
            loss, metrics, grads = jax.tree.map(lambda x: x * weight, (loss, own, grads))
        return jax.tree.map(jnp.add, total, (loss, metrics, grads)), None

    (loss, metrics), grads = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    metrics.pop("shared", None)
    (loss, metrics, grads), _ = jax.lax.scan(
        body, (loss, metrics, grads), (jnp.arange(count), parts)
    )
    if together:
        return loss, metrics, grads
    weight = metrics["weight"]

    def mean(x):
        return x / jnp.maximum(weight, 1e-9)

    return (
        mean(loss),
        {k: v if k == "weight" else mean(v) for k, v in metrics.items()},
        jax.tree.map(mean, grads),
    )


def make_evaluation(
    objective: Objective, apply: Apply
) -> Callable[[Any, Any, Any], dict[str, jax.Array]]:
    """`evaluate(trainable, frozen, batch) -> metrics`, without dropout."""

    def evaluate(trainable: Any, frozen: Any, batch: Any) -> dict[str, jax.Array]:
        loss, metrics = objective(apply, combine(trainable, frozen), batch, None)
        return {"loss": loss, **{k: v for k, v in metrics.items() if k != "shared"}}

    return evaluate
