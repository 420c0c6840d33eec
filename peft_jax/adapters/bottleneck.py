"""Bottleneck adapters: Houlsby et al. 2019 (arXiv:1902.00751), Pfeiffer et al. 2020
(arXiv:2005.00247), and parallel and scaled parallel ones (He et al. 2021, arXiv:2110.04366), with
the options of AdapterHub's `BnConfig`.

A sequential adapter makes y + s * up(f(down(y))) of what a module puts out, a parallel one y + s *
up(f(down(x))) with what goes in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Unpack

import jax
import jax.numpy as jnp

from peft_jax.adapters.adapter import Adapter, affine, normalized, rows
from peft_jax.core.method import Method
from peft_jax.core.placing import Module, find_modules, module_paths, place_attachments
from peft_jax.core.reparametrised import check_dropout, node
from peft_jax.core.roles import first_fit
from peft_jax.core.select import Targets, check_patterns, nearest
from peft_jax.core.weight import static
from peft_jax.core.where import Modules, Selection

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": jax.nn.relu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": jax.nn.gelu,
    "swish": jax.nn.silu,
    "silu": jax.nn.silu,
    "tanh": jnp.tanh,
    "sigmoid": jax.nn.sigmoid,
    "leakyrelu": jax.nn.leaky_relu,
    "linear": lambda x: x,
}
Gating = Literal["none", "token", "sequence"]


class Placement(NamedTuple):
    """Roles of modules that get an adapter, the first that a model has, and whether it lies beside
    them.
    """

    roles: tuple[tuple[str, ...], ...]
    parallel: bool = False

    def usual(self, params: Any) -> Sequence[str]:
        """The targets for the family that a tree is of. Raises ValueError for a model without
        modules of these roles.
        """
        found = first_fit(module_paths(params), self.roles)
        if found is None:
            raise ValueError(
                f"no modules of this model are known as {' and '.join(self.roles[0])}: give "
                "targets, or say what they are called with register_roles"
            )
        return found.of(*found.names)


PLACEMENTS = {
    "houlsby": Placement((("o", "down"), ("o", "feed_forward"))),  # the latter with experts
    "pfeiffer": Placement((("mlp_residual",),)),
    "parallel": Placement((("mlp_residual",),), parallel=True),
    "parallel_mlp": Placement((("feed_forward",),), parallel=True),
}


@node
class Bottleneck(Adapter):
    """down [*lead, in, r], down_bias [*lead, r], up [*lead, r, out], up_bias [*lead, out].

    `scale` [*lead, 1 or out] is a learned factor, beside the fixed `scaling`. `before` and `after`
    are (scale, bias) of layer norms within the adapter; with `residual_first` the residual is added
    ahead of the latter. `gating` weighs the update by a sigmoid of its input [*lead, in, 1], for
    each token or by its mean over the sequence (UniPELT).
    """

    trainable: ClassVar[tuple[str, ...]] = (
        *("down", "down_bias", "up", "up_bias"),
        *("scale", "before", "after", "gating_weight", "gating_bias"),
    )
    zero_padded: ClassVar[bool] = True
    biases: ClassVar[tuple[str, ...]] = ("(before|after)/.*",)
    down: Any
    up: Any
    down_bias: jax.Array | None = None
    up_bias: jax.Array | None = None
    scale: jax.Array | None = None
    before: tuple[jax.Array, jax.Array] | None = None
    after: tuple[jax.Array, jax.Array] | None = None
    gating_weight: jax.Array | None = None
    gating_bias: jax.Array | None = None
    activation: str = static(default="relu")
    scaling: float = static(default=1.0)
    parallel: bool = static(default=False)
    residual_first: bool = static(default=False)
    stream: bool = static(
        default=False
    )  # beside a residual sum, of which the norm leaves out the stream
    gating: str = static(default="none")

    @property
    def lead(self) -> tuple[int, ...]:
        return self.down.shape[:-2]

    def matrices(self) -> tuple[jax.Array, jax.Array]:
        """(down, up)."""
        return self.down, self.up

    def change(self, x: jax.Array, y: jax.Array) -> jax.Array:
        given = x if self.parallel else y
        down, up = self.matrices()
        if given.shape[-1] != down.shape[-2] or y.shape[-1] != up.shape[-1]:
            raise ValueError(
                f"an adapter {self.name!r} from {down.shape[-2]} to {up.shape[-1]} features stands "
                "beside a module with "
                f"{given.shape[-1]} and {y.shape[-1]}; name other targets, or give width="
            )
        h = given if self.before is None else normalized(given, self.before)
        h = (
            affine(ACTIVATIONS[self.activation](affine(h, down, self.down_bias)), up, self.up_bias)
            * self.scaling
        )
        if self.scale is not None:
            h = h * rows(self.scale.astype(h.dtype))
        h = self.weighed(self.drop(h), given)
        if self.after is None:
            return y + h
        if self.residual_first and not self.parallel:
            return (
                x + normalized(y - x + h, self.after)
                if self.stream
                else normalized(y + h, self.after)
            )
        return y + normalized(h, self.after)

    def weighed(self, h: jax.Array, given: jax.Array) -> jax.Array:
        """The update times its gate, where it has one."""
        if self.gating == "none" or self.gating_weight is None:
            return h
        gate = jax.nn.sigmoid(affine(given, self.gating_weight, self.gating_bias))
        return h * (gate.mean(-2, keepdims=True) if self.gating == "sequence" else gate)


def bottleneck(
    params: Any,
    key: jax.Array,
    *,
    placement: Annotated[str, "houlsby, pfeiffer, parallel or parallel_mlp"] = "houlsby",
    targets: Annotated[Targets, "modules that get it; by default by placement"] = (),
    parallel: Annotated[
        bool | None, "take the module's input, not its output; by default by placement"
    ] = None,
    reduction_factor: Annotated[float, "the features over the units of the bottleneck"] = 16.0,
    size: Annotated[int | None, "units of the bottleneck; by default by reduction_factor"] = None,
    size_pattern: Annotated[
        Mapping[str, int] | None, "sizes of modules that match the keys"
    ] = None,
    activation: Annotated[str | None, "as relu or swish; by default by placement"] = None,
    scaling: Annotated[
        float | Literal["learned", "channel"] | None,
        "a number, or learned or channel; by default by placement",
    ] = None,
    ln_before: Annotated[bool, "a layer norm before it"] = False,
    ln_after: Annotated[bool, "a layer norm after it"] = False,
    residual_before_ln: Annotated[bool, "add the residual ahead of that norm"] = False,
    gating: Annotated[Gating, "weigh the update by a gate: none, token or sequence"] = "none",
    bias: Annotated[bool, "biases of its own"] = True,
    dropout: Annotated[float, "dropout of the update in training"] = 0.0,
    drop_layers: Annotated[
        int, "AdapterDrop in training: up to how many of the lowest layers lose theirs"
    ] = 0,
    init: Annotated[
        Literal["zero", "bert", "houlsby"], "zero changes nothing at first; bert and houlsby draw"
    ] = "zero",
    **where: Unpack[Modules],
) -> Any:
    """`params` with a bottleneck adapter beside each module that `placement` or `targets` name.

    Placements: houlsby (after attention's and the feed-forward's output), pfeiffer (after the
    layer), parallel (beside the feed-forward, from the residual stream) and parallel_mlp (from what
    the feed-forward gets). `targets` and `parallel` place elsewhere. The bottleneck has `size`
    units, or the features over `reduction_factor`; `size_pattern` maps targets to sizes.
    `activation` and `scaling` default to AdapterHub's for the placement (swish, relu; 1, in
    parallel 4). init: zero starts `up` at zero, so that nothing changes at first; bert draws all
    from N(0, 0.02^2), houlsby from N(0, 0.01^2) cut at two deviations. A sequence's gate is a mean
    over all its tokens, later ones too: for encoders, not for generation. Raises ValueError for an
    unknown placement, activation or init, and targets that match nothing.
    """
    if placement not in PLACEMENTS:
        raise ValueError(
            f"unknown placement {placement!r}.{nearest(placement, PLACEMENTS)} Placements: "
            f"{', '.join(PLACEMENTS)}"
        )
    place = PLACEMENTS[placement]
    beside = place.parallel if parallel is None and not targets else bool(parallel)
    activation = activation or ("swish" if placement == "houlsby" and not beside else "relu")
    check_options(activation, gating, init, dropout)
    if scaling is None:
        scaling = 4.0 if beside else 1.0
    at = Selection.of(bottleneck, where, targets=targets)
    at = at if targets else at.aimed(place.usual(params))
    modules = find_modules(params, **at.places, width=at.width)
    check_patterns(
        [f"{n}/" for m in modules for n in (m.path, *m.layers)], size_pattern=size_pattern or {}
    )

    def make(m: Module, key: jax.Array) -> Bottleneck:
        n_in = m.n_in if beside else m.n_out
        wanted = m.one_value(size, size_pattern or {}, "size_pattern")
        r = max(1, wanted or int(n_in // reduction_factor))
        down, up = jax.random.split(key)

        def zeros(n):
            return jnp.zeros((*m.lead, n)) if bias else None

        fixed = scaling if isinstance(scaling, int | float) else 1.0
        learned = {"learned": 1, "channel": m.n_out}.get(str(scaling))
        return Bottleneck(
            **common(m, at.adapter, dropout, drop_layers),
            down=draw(down, (*m.lead, n_in, r), "bert" if init == "zero" else init),
            up=draw(up, (*m.lead, r, m.n_out), init),
            down_bias=zeros(r),
            up_bias=zeros(m.n_out),
            scale=None if learned is None else jnp.ones((*m.lead, learned)),
            before=layer_norm(m.lead, n_in) if ln_before else None,
            after=layer_norm(m.lead, m.n_out) if ln_after else None,
            **gate_arrays(m.lead, n_in, gating, jax.random.fold_in(key, 2)),
            activation=activation,
            scaling=float(fixed),
            parallel=beside,
            residual_first=residual_before_ln,
            stream=m.path.endswith("_residual"),
        )

    if scaling not in ("learned", "channel") and not isinstance(scaling, int | float):
        raise ValueError(f"scaling must be a number, 'learned' or 'channel', not {scaling!r}")
    return place_attachments(params, key, make, "bottleneck", at.adapter, modules)


def check_options(activation: str, gating: str, init: str, dropout: float) -> None:
    """Raise ValueError for an unknown activation, gating or init, or an impossible dropout."""
    check_dropout(dropout)
    for what, value, known in (
        ("activation", activation, ACTIVATIONS),
        ("gating", gating, ("none", "token", "sequence")),
        ("init", init, ("zero", "bert", "houlsby")),
    ):
        if value not in known:
            raise ValueError(
                f"unknown {what} {value!r}.{nearest(value, known)} There are {', '.join(known)}"
            )


def common(m: Module, adapter: str, dropout: float, drop_layers: int) -> dict[str, Any]:
    """The fields that every adapter has."""
    depth = m.by_layer([float(i) for i in m.numbers]) if drop_layers else None
    return {
        "name": adapter,
        "gate": m.gate,
        "depth": depth,
        "dropout": dropout,
        "drop_layers": drop_layers,
    }


def draw(key: jax.Array, shape: tuple[int, ...], init: str) -> jax.Array:
    """A fresh matrix: zero, N(0, 0.02^2) (bert) or a truncated N(0, 0.01^2) (houlsby)."""
    if init == "zero":
        return jnp.zeros(shape)
    if init == "bert":
        return 0.02 * jax.random.normal(key, shape)
    return 0.01 * jax.random.truncated_normal(key, -2.0, 2.0, shape)


def layer_norm(lead: tuple[int, ...], n: int) -> tuple[jax.Array, jax.Array]:
    """(scale, bias) of a fresh layer norm."""
    return jnp.ones((*lead, n)), jnp.zeros((*lead, n))


def gate_arrays(lead: tuple[int, ...], n: int, gating: str, key: jax.Array) -> dict[str, Any]:
    """Fields of a gate over n features."""
    if gating == "none":
        return {}
    return {
        "gating": gating,
        "gating_weight": 0.02 * jax.random.normal(key, (*lead, n, 1)),
        "gating_bias": jnp.zeros((*lead, 1)),
    }


METHOD = Method(
    name="bottleneck",
    function=bottleneck,
    nodes=(Bottleneck,),
    at="modules",
    title="bottleneck (Houlsby, Pfeiffer, parallel, with AdapterHub's options)",
    follows=(
        "Houlsby et al. 2019, arXiv:1902.00751; Pfeiffer et al. 2020, arXiv:2005.00247; "
        "parallel, arXiv:2110.04366; AdapterHub `BnConfig`"
    ),
    differs=(
        "`init=zero` makes the up-projection zero, so that nothing changes at first; "
        "AdapterHub's default start is `init=bert`"
    ),
    reference="tests.references:bottleneck",
    example={"size": 3, "ln_before": True, "scaling": "channel", "gating": "token"},
)
