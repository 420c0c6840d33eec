"""IA3 (Liu et al. 2022, arXiv:2205.05638): keys, values and the feed-forward's inner activations
scaled by learned vectors.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Unpack

import jax
import jax.numpy as jnp

from peft_jax.core.method import Method
from peft_jax.core.options import Beside, Selection
from peft_jax.core.reparametrised import Product, Reparametrised, Site, node, place_nodes, scaled
from peft_jax.core.select import Targets, first_present, is_target
from peft_jax.core.tree import places
from peft_jax.core.weight import static


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


_USUAL = (
    ("k_proj", "v_proj", "down_proj"),
    ("key", "value", "output/dense"),
    ("key_proj", "value_proj", "output/dense"),
    ("k_lin", "v_lin", "lin2"),
    ("c_attn", "mlp/c_proj"),
    ("Wqkv", "mlp/Wo"),
    ("k", "v", "wo"),
    ("qkv_proj", "down_proj"),
)
_FEEDFORWARD = ("down_proj", "output/dense", "lin2", "mlp/c_proj", "mlp/Wo", "wo")


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
    scales start at one. `key` is not used. Raises ValueError for a target that matches nothing.
    """

    usual = first_present(places(params), _USUAL)
    feedforward = feedforward or [t for t in usual if t in _FEEDFORWARD]
    at = Selection.of(ia3, where, targets=targets or usual)

    def make(site: Site, key: jax.Array) -> IA3:
        inputs = is_target(site.path, site.base, feedforward)
        lead, n_in, n_out = site.sizes
        return IA3(
            **site.common(name=at.adapter),
            scale=jnp.ones((*lead, n_in if inputs else n_out)),
            feedforward=inputs,
        )

    return place_nodes(params, key, make, at)


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
