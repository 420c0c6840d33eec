"""RoAd (Liao and Monz 2024, arXiv:2409.00119): pairs of outputs rotated and scaled.

Within a group of g outputs, feature i is paired with feature i + g/2 (equation 4). road_1 shares
angle and scale in a pair, road_2 gives each output its own, road_4 its own for both terms.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Unpack

import jax
import jax.numpy as jnp

from peft_jax.core.method import Method
from peft_jax.core.reparametrised import Product, Reparametrised, Site, node, place_nodes
from peft_jax.core.weight import static
from peft_jax.core.where import Selection, Where

_SHARE = {"road_1": 0.5, "road_2": 1, "road_4": 2}  # parameters of a kind an output


@node
class RoAd(Reparametrised):
    """theta and alpha [*lead, out/2, out or 2 out] by variant."""

    trainable: ClassVar[tuple[str, ...]] = ("theta", "alpha")
    theta: jax.Array
    alpha: jax.Array
    variant: str = static(default="road_1")
    group_size: int = static(default=64)

    @property
    def changes_output(self) -> bool:
        return True

    def _columns(self) -> tuple[jax.Array, jax.Array]:
        """Factors of an output itself and of its turned partner, each [*lead, out]."""
        theta, alpha, g = self.theta, self.alpha, self.group_size
        if self.variant == "road_1":
            theta, alpha = (
                jnp.repeat(p.reshape(*self.lead, -1, g // 2), 2, axis=-2).reshape(*self.lead, -1)
                for p in (theta, alpha)
            )
        if self.variant == "road_4":
            halves = [p.reshape(*self.lead, -1, 2, g) for p in (theta, alpha)]
            (t1, t2), (a1, a2) = (
                [h[..., i, :].reshape(*self.lead, -1) for i in (0, 1)] for h in halves
            )
            return a1 * jnp.cos(t1), a2 * jnp.sin(t2)
        return alpha * jnp.cos(theta), alpha * jnp.sin(theta)

    def _turn(self, y: jax.Array, first: jax.Array, second: jax.Array) -> jax.Array:
        pairs = y.reshape(*y.shape[:-1], -1, 2, self.group_size // 2)
        turned = jnp.stack([-pairs[..., 1, :], pairs[..., 0, :]], axis=-2).reshape(y.shape)
        return (y * first + turned * second).astype(y.dtype)

    def adapt(self, w: jax.Array) -> jax.Array:
        first, second = (c[..., None, :] for c in self._columns())
        return self._turn(w, first, second)

    def recover(self, w: jax.Array) -> jax.Array:
        """Solves each pair's two equations."""
        first, second = (
            c[..., None, :].reshape(*self.lead, 1, -1, 2, self.group_size // 2)
            for c in self._columns()
        )
        p = w.reshape(*w.shape[:-1], -1, 2, self.group_size // 2)
        a, b, c, d = first[..., 0, :], -second[..., 0, :], second[..., 1, :], first[..., 1, :]
        determinant = a * d - b * c
        x = (d * p[..., 0, :] - b * p[..., 1, :]) / determinant
        y = (a * p[..., 1, :] - c * p[..., 0, :]) / determinant
        return jnp.stack([x, y], axis=-2).reshape(w.shape)

    def product(self, x: jax.Array, base: Product) -> jax.Array:
        return self._turn(base(x), *self._columns())


def road(
    params: Any,
    key: jax.Array,
    *,
    variant: Literal["road_1", "road_2", "road_4"] = "road_1",
    group_size: int = 64,
    **where: Unpack[Where],
) -> Any:
    """`params` with a RoAd node at each place that `targets` name.

    A layer's bias is turned with its output. Raises ValueError where `group_size` (an even number)
    does not divide a weight's outputs.
    """
    at = Selection.of(road, where)
    if group_size < 2 or group_size % 2:
        raise ValueError(f"group_size must be even, got {group_size}")

    def make(site: Site, key: jax.Array) -> RoAd:
        lead, _, n_out = site.sizes
        site.check_divides(group_size, "group_size", inputs=False)
        shape = (*lead, int(n_out * _SHARE[variant]))
        common = site.common(name=at.adapter)
        return RoAd(
            **common,
            theta=jnp.zeros(shape),
            alpha=jnp.ones(shape),
            variant=variant,
            group_size=group_size,
        )

    return place_nodes(params, key, make, at)


METHOD = Method(
    name="road",
    function=road,
    nodes=(RoAd,),
    at="matrices",
    title="RoAd",
    follows="Liao and Monz 2024, arXiv:2409.00119, equation 4; PEFT `RoadConfig`",
    differs="The bias is turned with the output, as in PEFT, in a merge too",
    example={"group_size": 4},
    variants=(
        {"variant": "road_2"},
        {"variant": "road_4"},
    ),
)
