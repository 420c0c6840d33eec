"""IA3 (Liu et al. 2022, arXiv:2205.05638): keys, values and the feed-forward's inner activations
scaled by learned vectors.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Unpack

import jax
import jax.numpy as jnp

from peft_jax.core.method import Method
from peft_jax.core.reparametrised import Product, Reparametrised, Site, node, place_nodes, scaled
from peft_jax.core.roles import first_fit, module_of, names_of
from peft_jax.core.select import Targets, is_target
from peft_jax.core.tree import places
from peft_jax.core.weight import static
from peft_jax.core.where import Beside, Selection


@node
class IA3(Reparametrised):
    """`base` with its inputs (`feedforward`) or its outputs, the bias included, scaled by `scale`
    [*lead, in or out].
    """

    trainable: ClassVar[tuple[str, ...]] = ("scale",)
    scale: jax.Array
    feedforward: bool = static(default=False)

    @property
    def changes_output(self) -> bool:
        return not self.feedforward

    def array_specs(self, into: Any, out: Any) -> dict[str, tuple[Any, ...]]:
        return {"scale": (into if self.feedforward else out,)}

    def _factor(self) -> jax.Array:
        return self.scale[..., :, None] if self.feedforward else self.scale[..., None, :]

    def adapt(self, w: jax.Array) -> jax.Array:
        return w * self._factor()

    def recover(self, w: jax.Array) -> jax.Array:
        return w / self._factor()

    def product(self, x: jax.Array, base: Product) -> jax.Array:
        return base(scaled(x, self.scale)) if self.feedforward else scaled(base(x), self.scale)


_USUAL = (("k", "v", "down"), ("qkv", "down"))  # roles, as PEFT has them


def ia3(
    params: Any,
    key: jax.Array,
    *,
    targets: Annotated[
        Targets, "what is scaled; by default keys, values and the feed-forward's output"
    ] = (),
    feedforward: Annotated[Targets, "those of them whose inputs are scaled"] = (),
    **where: Unpack[Beside],
) -> Any:
    """`params` with an IA3 node at each place that `targets` name; of those that `feedforward`
    names too, the inputs are scaled.

    By default keys, values and the feed-forward's output, as PEFT has it for each family. All
    scales start at one. `key` is not used. Raises ValueError for a target that matches nothing, and
    where there are none and no module is known to make keys and values.
    """

    feedforward = feedforward or names_of("down")
    at = Selection.of(ia3, where, targets=targets)
    at = at if targets else at.aimed(_usual_targets(params))

    def make(site: Site, key: jax.Array) -> IA3:
        inputs = is_target(site.path, site.base, feedforward)
        lead, n_in, n_out = site.sizes
        return IA3(
            **site.common(name=at.adapter),
            scale=jnp.ones((*lead, n_in if inputs else n_out)),
            feedforward=inputs,
        )

    return place_nodes(params, key, make, at)


def _usual_targets(params: Any) -> tuple[str, ...]:
    found = first_fit(map(module_of, places(params)), _USUAL)
    if found is None:
        raise ValueError(
            "no modules of this model are known to make keys, values and a feed-forward's output: "
            "give targets, or say what they are called with register_roles"
        )
    return found.of(*found.names)


METHOD = Method(
    name="ia3",
    function=ia3,
    nodes=(IA3,),
    at="matrices",
    title="IA3",
    follows="Liu et al. 2022, arXiv:2205.05638; PEFT `IA3Config`",
    differs="Targets are PEFT's for each family; the bias is scaled with the output, as in PEFT",
    reference="PEFT",
    variants=({"feedforward": "kernel"},),
)
