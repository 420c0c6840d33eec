"""Compacter (Karimi Mahabadi et al. 2021, arXiv:2106.04647): bottleneck adapters of parametrised
hypercomplex matrices.

A matrix [in, out] is the sum over i of the Kronecker products of A_i [n, n] and B_i [in/n, out/n],
with B_i of low rank (equation 5). The rules A are shared by all adapters (Compacter) or a module's
own.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Unpack

import jax
import jax.numpy as jnp

from peft_jax.adapters.bottleneck import PLACEMENTS, Bottleneck, check_options, common
from peft_jax.core.attachment import Shared
from peft_jax.core.method import Method
from peft_jax.core.placing import Module, find_modules, place_attachments
from peft_jax.core.reparametrised import node
from peft_jax.core.select import Targets, nearest
from peft_jax.core.weight import static
from peft_jax.core.where import Modules, Selection


@node
class Compacter(Bottleneck):
    """`down` and `up` are {"left" [*lead, n, in/n, rank], "right" [*lead, n, rank, out/n]}, and
    "rule" [*lead, n, n, n] where it is not shared (in `shared`, which `bind` fills).
    """

    trainable: ClassVar[tuple[str, ...]] = ("down", "down_bias", "up", "up_bias")
    zero_padded: ClassVar[bool] = False
    shared: Any = None
    group: str = static(default="")

    @property
    def lead(self) -> tuple[int, ...]:
        return self.down["left"].shape[:-3]

    def matrices(self) -> tuple[jax.Array, jax.Array]:
        return self._matrix(self.down), self._matrix(self.up)

    def _matrix(self, factors: dict[str, jax.Array]) -> jax.Array:
        rule = self.shared["rule"] if self.group else factors["rule"]
        return hypercomplex(rule, jnp.matmul(factors["left"], factors["right"]))


def hypercomplex(rule: jax.Array, w: jax.Array) -> jax.Array:
    """Sum over i of kron(rule_i, w_i): [..., n, n, n] and [..., n, a, b] -> [..., n a, n b]."""
    y = jnp.einsum("...ipq,...iab->...paqb", rule, w)
    return y.reshape(*y.shape[:-4], y.shape[-4] * y.shape[-3], y.shape[-2] * y.shape[-1])


def compacter(
    params: Any,
    key: jax.Array,
    *,
    placement: Annotated[str, "houlsby, pfeiffer, parallel or parallel_mlp"] = "houlsby",
    targets: Annotated[Targets, "modules that get it; by default by placement"] = (),
    reduction_factor: Annotated[float, "the features over the units of the bottleneck"] = 32.0,
    size: Annotated[int | None, "units of the bottleneck; by default by reduction_factor"] = None,
    dimension: Annotated[int, "n of the hypercomplex numbers"] = 4,
    rank: Annotated[int, "rank of the factors B"] = 1,
    shared_rule: Annotated[bool, "one rule for all adapters"] = True,
    activation: Annotated[str, "of the bottleneck, as relu or gelu"] = "gelu",
    init: Annotated[
        Literal["zero", "glorot"], "zero changes nothing at first; glorot draws"
    ] = "zero",
    dropout: Annotated[float, "dropout of the update in training"] = 0.0,
    drop_layers: Annotated[
        int, "AdapterDrop in training: up to how many of the lowest layers lose theirs"
    ] = 0,
    **where: Unpack[Modules],
) -> Any:
    """`params` with a Compacter beside each module that `placement` (see `bottleneck`; pfeiffer
    makes it Compacter++) names.

    `dimension` is n, `rank` that of the B_i. init: zero starts `up` at zero, glorot as the paper.
    Raises ValueError as `bottleneck`, and where `dimension` does not divide the features or the
    bottleneck.
    """
    if placement not in PLACEMENTS:
        raise ValueError(
            f"unknown placement {placement!r}.{nearest(placement, PLACEMENTS)} Placements: "
            f"{', '.join(PLACEMENTS)}"
        )
    if init not in ("zero", "glorot"):
        raise ValueError(f"unknown init {init!r}; there are zero and glorot")
    check_options(activation, "none", "zero", dropout)
    place, n = PLACEMENTS[placement], dimension
    beside = place.parallel and not targets
    at = Selection.of(compacter, where, targets=targets)
    at = at if targets else at.aimed(place.usual(params))
    modules = find_modules(params, **at.places, width=at.width)
    group = f"compacter_{at.adapter}" if shared_rule else ""

    def factors(
        key: jax.Array, lead: tuple[int, ...], n_in: int, n_out: int, start: str
    ) -> dict[str, jax.Array]:
        keys = jax.random.split(key, 3)
        bounds = [(6 / (n_in // n + rank)) ** 0.5, (6 / (rank + n_out // n)) ** 0.5]
        made = {
            "left": jax.random.uniform(
                keys[0], (*lead, n, n_in // n, rank), jnp.float32, -bounds[0], bounds[0]
            ),
            "right": jax.random.uniform(
                keys[1], (*lead, n, rank, n_out // n), jnp.float32, -bounds[1], bounds[1]
            ),
        }
        if start == "zero":
            made["right"] = jnp.zeros_like(made["right"])
        return made if shared_rule else made | {"rule": _rule(keys[2], lead, n)}

    def make(m: Module, key: jax.Array) -> Compacter:
        n_in = m.n_in if beside else m.n_out
        r = size or max(n, int(n_in // reduction_factor) // n * n)
        for what, value in (
            ("features", n_in),
            ("features", m.n_out),
            ("units of the bottleneck", r),
        ):
            if value % n:
                raise ValueError(f"dimension={n} does not divide the {value} {what} of {m.path}")
        down, up = jax.random.split(key)
        return Compacter(
            **common(m, at.adapter, dropout, drop_layers),
            down=factors(down, m.lead, n_in, r, "glorot"),
            up=factors(up, m.lead, r, m.n_out, init),
            down_bias=jnp.zeros((*m.lead, r)),
            up_bias=jnp.zeros((*m.lead, m.n_out)),
            activation=activation,
            parallel=beside,
            group=group,
        )

    placed = place_attachments(params, key, make, "compacter", at.adapter, modules)
    if not shared_rule:
        return placed
    return {
        **placed,
        f"shared_{group}": Shared(
            trained={"rule": _rule(jax.random.fold_in(key, 1), (), n)}, fixed={}
        ),
    }


def _rule(key: jax.Array, lead: tuple[int, ...], n: int) -> jax.Array:
    """A fresh rule. AdapterHub's N(0, 0.01^2) leaves the products next to nothing; the paper's
    rules are of order one.
    """
    return jax.random.normal(key, (*lead, n, n, n)) / n


METHOD = Method(
    name="compacter",
    function=compacter,
    nodes=(Compacter,),
    at="modules",
    title="Compacter",
    follows=(
        "Karimi Mahabadi et al. 2021, arXiv:2106.04647, equation 5; AdapterHub `CompacterConfig`"
    ),
    differs="The up-projection starts at zero, so that nothing changes at first",
    reference="tests.references:bottleneck",
    example={"size": 4, "dimension": 2},
)
