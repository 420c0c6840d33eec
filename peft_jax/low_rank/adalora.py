"""AdaLoRA (Zhang et al. 2023, arXiv:2303.10512): W + s P diag(E) Q, whose ranks share one budget.

`adalora_budget` is an optax transformation that keeps the paper's importance scores (equations 8 to
11) and sets the E of the least important triplets to zero on the paper's cubic schedule (equation
12); arrays change, shapes do not. The orthogonality penalty (equation 4, averaged over the factors
as Hugging Face PEFT does) is the node's `penalty`, which the training step adds to the loss.
"""

from __future__ import annotations

import functools
from typing import Annotated, Any, ClassVar, NamedTuple, Unpack, cast

import jax
import jax.numpy as jnp
import optax

from peft_jax.core.method import Method
from peft_jax.core.partition import combine
from peft_jax.core.reparametrised import Additive, Site, check_dropout, node, place_nodes
from peft_jax.core.weight import static
from peft_jax.core.where import Selection, Where


@node
class AdaLoRA(Additive):
    """`base` + scale * a diag(e) b. a [*lead, in, r], e [*lead, r], b [*lead, r, out], scale
    [*lead].
    """

    trainable: ClassVar[tuple[str, ...]] = ("a", "e", "b")
    a: jax.Array
    e: jax.Array
    b: jax.Array
    scale: jax.Array
    orthogonal: float = static(default=0.0)  # the weight of the penalty

    def array_specs(self, into: Any, out: Any) -> dict[str, tuple[Any, ...]]:
        return {"a": (into, None), "e": (None,), "b": (None, out), "scale": ()}

    def delta(self) -> jax.Array:
        return jnp.matmul(self.a * (self.e * self.scale[..., None])[..., None, :], self.b)

    def update(self, x: jax.Array) -> jax.Array:
        a = self.a * (self.e * self.scale)
        return jnp.matmul(jnp.matmul(x, a.astype(x.dtype)), self.b.astype(x.dtype))

    def penalty(self) -> jax.Array:
        """orthogonal * (||A^T A - I|| + ||B B^T - I||), summed over the layers that are adapted."""
        eye = jnp.eye(self.a.shape[-1])

        def distance(gram):
            return jnp.sqrt(jnp.square(gram - eye).sum((-2, -1)) + 1e-12)

        each = distance(self.a.mT @ self.a) + distance(self.b @ self.b.mT)
        return self.orthogonal * (each if self.gate is None else each * self.gate).sum()

    def penalty_terms(self) -> Any:
        """The number of those norms, since as in PEFT it is their mean over the model that
        counts.
        """
        return 2 * (self.e[..., 0].size if self.gate is None else self.gate.sum())


def adalora(
    params: Any,
    key: jax.Array,
    *,
    init_rank: Annotated[int, "rank of each weight at first"] = 12,
    target_rank: Annotated[int, "mean rank at the end"] = 8,
    alpha: Annotated[
        float | None, "the scale is alpha over init_rank; by default init_rank"
    ] = None,
    dropout: Annotated[float, "dropout of the update's input in training"] = 0.0,
    orthogonal: Annotated[float, "weight of the penalty that keeps the factors orthogonal"] = 0.5,
    warmup: Annotated[int, "steps before ranks begin to fall"] = 0,
    final: Annotated[int, "steps at the end with fixed ranks"] = 0,
    every: Annotated[int, "steps between changes of the ranks"] = 1,
    beta1: Annotated[float, "decay of the smoothed sensitivity"] = 0.85,
    beta2: Annotated[float, "decay of its uncertainty"] = 0.85,
    **where: Unpack[Where],
) -> Any:
    """`params` with an AdaLoRA node of rank `init_rank` at each place that `targets` name.

    The scale is alpha / init_rank; alpha defaults to the initial rank. `orthogonal` weighs the
    penalty. `target_rank`, `warmup`, `final`, `every`, `beta1` and `beta2` are read by
    `adalora_budget`. Raises ValueError for ranks that do not fall from `init_rank` to
    `target_rank`.
    """
    at = Selection.of(adalora, where)
    if not 1 <= target_rank <= init_rank:
        raise ValueError(
            f"target_rank must lie between 1 and init_rank={init_rank}, got {target_rank}"
        )
    check_dropout(dropout)

    def make(site: Site, key: jax.Array) -> AdaLoRA:
        lead, n_in, n_out = site.sizes
        k1, k2 = jax.random.split(key)
        return AdaLoRA(
            **site.common(dropout=dropout, name=at.adapter),
            a=0.02 * jax.random.normal(k1, (*lead, n_in, init_rank)),
            e=jnp.zeros((*lead, init_rank)),
            b=0.02 * jax.random.normal(k2, (*lead, init_rank, n_out)),
            scale=jnp.full(
                lead, (alpha or init_rank) / (init_rank + 1e-5)
            ),  # PEFT's guard against rank 0
            orthogonal=orthogonal,
        )

    return place_nodes(params, key, make, at)


class BudgetState(NamedTuple):
    """Step number, and smoothed sensitivity and uncertainty like the trained tree."""

    step: jax.Array
    importance: Any
    uncertainty: Any


def adalora_budget(
    steps: int,
    *,
    init_rank: int = 12,
    target_rank: int = 8,
    warmup: int = 0,
    final: int = 0,
    every: int = 1,
    beta1: float = 0.85,
    beta2: float = 0.85,
) -> optax.GradientTransformationExtraArgs:
    """Put last in the optimizer's chain: after each update, the triplets outside the budget get E =
    0.

    The budget falls from `init_rank` to `target_rank` a weight on average, from step `warmup` to
    step `steps - final`, and is applied every `every` steps; afterwards the last choice stays.
    Needs the gradients as `grads`, and the frozen tree as `frozen` where some of the layers of a
    stack are left out, which then have no part in the budget.
    """

    def init(params: Any) -> BudgetState:
        def zeros():
            return jax.tree.map(jnp.zeros_like, params)  # two trees, since states are donated

        return BudgetState(jnp.zeros((), jnp.int32), zeros(), zeros())

    def update(
        updates: Any,
        state: BudgetState,
        params: Any = None,
        *,
        grads: Any,
        frozen: Any = None,
        **_: Any,
    ) -> Any:
        sensitivity = jax.tree.map(lambda p, g: jnp.abs(p * g), params, grads)
        importance = jax.tree.map(
            lambda i, s: beta1 * i + (1 - beta1) * s, state.importance, sensitivity
        )
        uncertainty = jax.tree.map(
            lambda u, s, i: beta2 * u + (1 - beta2) * jnp.abs(s - i),
            state.uncertainty,
            sensitivity,
            importance,
        )
        whole = params if frozen is None else combine(params, frozen)

        def leaf(x):
            return x is None or _is_adalora(x)

        scores = jax.tree.map(_triplet_scores, importance, uncertainty, whole, is_leaf=leaf)
        budget = _budget_fraction(state.step, steps, init_rank, target_rank, warmup, final)
        active = (state.step > warmup) & ((state.step % every == 0) | (state.step >= steps - final))
        updates = _zero_outside(updates, params, scores, budget, active)
        return updates, BudgetState(state.step + 1, importance, uncertainty)

    return optax.GradientTransformationExtraArgs(init, cast("optax.TransformUpdateFn", update))


@functools.wraps(adalora_budget)  # the same options
def adalora_optimizer(optimizer: optax.GradientTransformation, steps: int, **options: Any) -> Any:
    """`optimizer` with `adalora_budget` after it."""
    return optax.chain(optimizer, adalora_budget(steps, **options))


def _is_adalora(x: Any) -> bool:
    return isinstance(x, AdaLoRA)


def _triplet_scores(importance: Any, uncertainty: Any, node: Any) -> Any:
    """S = s(E) + mean s(P) + mean s(Q) a triplet, [*lead, r] (equation 8), where s is importance
    times uncertainty; minus infinity in layers that are left out.
    """
    if not _is_adalora(importance):
        return None
    s = jax.tree.map(jnp.multiply, importance, uncertainty)
    scores = s.e + s.a.mean(-2) + s.b.mean(-1)
    return scores if node.gate is None else jnp.where(node.gate[..., None] > 0, scores, -jnp.inf)


def _budget_fraction(
    step: jax.Array, steps: int, init_rank: int, target_rank: int, warmup: int, final: int
) -> jax.Array:
    """The share of triplets kept at `step` (equation 12)."""
    done = jnp.clip((step - warmup) / max(steps - warmup - final, 1), 0.0, 1.0)
    return (target_rank + (init_rank - target_rank) * (1 - done) ** 3) / init_rank


def _zero_outside(
    updates: Any, params: Any, scores: Any, budget: jax.Array, active: jax.Array
) -> Any:
    flat = jnp.concatenate([s.ravel() for s in jax.tree.leaves(scores)])
    kept = jnp.round(budget * jnp.isfinite(flat).sum()).astype(jnp.int32)
    threshold = jnp.sort(flat)[::-1][jnp.clip(kept - 1, 0, flat.size - 1)]

    def zero(u: Any, p: Any, s: Any) -> Any:
        if not _is_adalora(u):
            return u
        return u.replace(e=jnp.where(active & (s < threshold), -p.e, u.e))

    return jax.tree.map(zero, updates, params, scores, is_leaf=_is_adalora)


METHOD = Method(
    name="adalora",
    function=adalora,
    nodes=(AdaLoRA,),
    at="matrices",
    title="AdaLoRA",
    follows="Zhang et al. 2023, arXiv:2303.10512, equations 4 and 8 to 12; PEFT `AdaLoraConfig`",
    differs=(
        "The budget is an optax transformation, so that arrays keep their shapes; the scale "
        "is alpha / (r + 1e-5), as in PEFT"
    ),
    reference="PEFT",
    optimizer=adalora_optimizer,
    example={"init_rank": 2, "target_rank": 1},
    variants=(
        {"alpha": 5.0},
        {"orthogonal": 0.1},
    ),
)
