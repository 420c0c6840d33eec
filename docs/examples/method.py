"""A method of your own, in one file: W' = W + s diag(c) W, a weight's inputs scaled from one.

Run `python docs/examples/method.py` to see its node, and

    pytest -p docs.examples.method tests/test_method_matrix.py tests/test_method_references.py \\
        tests/test_method_nodes.py -k input_scaling

to hold it to what every method promises. An installed package offers `METHOD` as an entry point
of the group `peft_jax.methods` instead of registering it.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Unpack

import jax
import jax.numpy as jnp
import numpy as np

from peft_jax.core.method import Method
from peft_jax.core.reparametrised import (
    Product,
    Reparametrised,
    Site,
    node,
    place_nodes,
    scaled,
)
from peft_jax.core.weight import static
from peft_jax.core.where import Selection, Where
from peft_jax.methods import METHODS


@node
class InputScaling(Reparametrised):
    """c [*lead, in], zero at first, so that nothing changes."""

    trainable: ClassVar[tuple[str, ...]] = ("c",)
    c: jax.Array
    scale: float = static(default=1.0)

    def array_specs(self, into: Any, out: Any) -> dict[str, tuple[Any, ...]]:
        return {"c": (into,)}

    def adapt(self, w: jax.Array) -> jax.Array:
        return w * self.factor()[..., None]

    def recover(self, w: jax.Array) -> jax.Array:
        return w / self.factor()[..., None]

    def product(self, x: jax.Array, base: Product) -> jax.Array:
        return base(scaled(x, self.factor()))

    def factor(self) -> jax.Array:
        return 1 + self.scale * self.c


def input_scaling(
    params: Any,
    key: jax.Array,
    *,
    scale: Annotated[float, "s, by which what is learned counts"] = 1.0,
    **where: Unpack[Where],
) -> Any:
    """`params` with an InputScaling node at each place that `targets` name."""
    at = Selection.of(input_scaling, where)

    def make(site: Site, key: jax.Array) -> InputScaling:
        lead, n_in, _ = site.sizes
        return InputScaling(**site.common(name=at.adapter), c=jnp.zeros((*lead, n_in)), scale=scale)

    return place_nodes(params, key, make, at)


def reference(node: Any, w: np.ndarray) -> np.ndarray:
    """The formula by itself, in NumPy, that the method is compared with."""
    return w + node.scale * np.diag(node.c) @ w


METHOD = METHODS.register(
    Method(
        name="input_scaling",
        function=input_scaling,
        nodes=(InputScaling,),
        at="matrices",
        title="input scaling",
        follows="this file",
        reference=reference,
        variants=({"scale": 2.0},),
    )
)

if __name__ == "__main__":
    tree = {"dense": {"kernel": jnp.ones((4, 3))}}
    adapted = METHOD(tree, jax.random.key(0), targets="dense")
    print(adapted["dense"]["kernel"])
