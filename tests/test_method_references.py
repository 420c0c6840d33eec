"""Each method against its independent reference, as a number; one without a reference fails."""

from typing import Any, ClassVar, Unpack

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from peft_jax.core.method import Method
from peft_jax.core.reparametrised import Additive, node, place_nodes
from peft_jax.core.where import Selection, Where
from peft_jax.methods import METHODS
from tests.references import check


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.filterwarnings("ignore")
def test_a_method_is_its_reference(name, record_property):
    record_property("error", check(METHODS[name]))


@node
class Scaled(Additive):
    """W + diag(d) W0, a stranger's; the arrays are right and the formula need not be."""

    trainable: ClassVar[tuple[str, ...]] = ("d",)
    d: jax.Array
    wrong: ClassVar[bool] = False

    def delta(self) -> jax.Array:
        d = jnp.sin(self.d) * 3 if self.wrong else self.d
        return d[..., None] * jnp.ones(self.features)


@node
class Wrong(Scaled):
    """The same with sin(d) * 3 in place of d."""

    wrong: ClassVar[bool] = True


def method(kind: Any, **fields: Any) -> Method:
    def scaled(params: Any, key: Any, **where: Unpack[Where]) -> Any:
        at = Selection.of(scaled, where)

        def make(site: Any, key: Any) -> Any:
            return kind(**site.common(name=at.adapter), d=jnp.zeros(site.sizes[1]))

        return place_nodes(params, key, make, at)

    said = {"name": "scaled", "function": scaled, "at": "matrices", "title": "", "follows": ""}
    return Method(**{**said, "nodes": (kind,), **fields})


def formula(node: Any, w: np.ndarray) -> np.ndarray:
    return w + node.d[:, None]


def test_a_right_formula_passes():
    assert check(method(Scaled, reference=formula)) < 1e-6


def test_a_wrong_formula_fails():
    with pytest.raises(
        AssertionError, match=r"method scaled at model/\S+ is off by \d\.\de[-+]0[01]"
    ):
        check(method(Wrong, reference=formula))


def test_a_method_without_a_reference_fails():
    with pytest.raises(AssertionError, match="method scaled names no independent reference"):
        check(method(Scaled))


def test_a_reference_that_meets_no_node_fails():
    def nowhere(params, key):
        return params

    with pytest.raises(AssertionError, match="puts none of its nodes"):
        check(method(Scaled, function=nowhere, reference=formula))
