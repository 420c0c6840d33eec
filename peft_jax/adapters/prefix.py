"""Prefix tuning (Li and Liang 2021, arXiv:2101.00190): keys and values that stand before those of
the tokens in every layer.

In a decoder of this package they are attached to the attention core, and tokens count their
positions from the prefix's end, as with a key/value cache that holds it; in attention layers of
Flax, to the projections of keys and values. A packed row's sequences all see the prefix; local
layers see what their window reaches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal, Unpack

import jax
import jax.numpy as jnp

from peft_jax.adapters.adapter import affine
from peft_jax.adapters.bottleneck import ACTIVATIONS
from peft_jax.core.attachment import Attachment, Shared, attach, module_at
from peft_jax.core.method import Method
from peft_jax.core.placing import Module, attention_cores, find_modules, module_paths, token_stack
from peft_jax.core.placing import hidden_size as _hidden
from peft_jax.core.reparametrised import node
from peft_jax.core.roles import modules_by_role
from peft_jax.core.select import Targets, nearest
from peft_jax.core.weight import Layout, matrix_shape, static
from peft_jax.core.where import Among, Selection
from peft_jax.models.cache import Inputs
from peft_jax.models.operands import AttentionOperands

_FLAX = {"query", "key", "value", "out"}


@node
class Prefix(Attachment):
    """keys and values [*lead, P, K d], or what makes them: `weight` [*lead, h, 2 K d] and `bias`
    [*lead, 2 K d] after the MLP's first layer, which all layers share ({"embedding" [P, D],
    "weight" [D, h], "bias" [h]} in `shared`).

    `part` says what the module is: "both" an attention core, "key" or "value" a projection [B, T,
    H, d], "mask" the attention around such projections. `gating_weight` [*lead, H d, 1] and
    `gating_bias` [*lead, 1] weigh the prefix for each token by a sigmoid of its query. Rows of a
    bank have [B, ...] each.
    """

    trainable: ClassVar[tuple[str, ...]] = (
        "keys",
        "values",
        "weight",
        "bias",
        "gating_weight",
        "gating_bias",
    )
    keys: jax.Array | None = None
    values: jax.Array | None = None
    weight: jax.Array | None = None
    bias: jax.Array | None = None
    gating_weight: jax.Array | None = None
    gating_bias: jax.Array | None = None
    gate: jax.Array | None = None
    shared: Any = None
    length: int = static()
    offset: bool = static(
        default=True
    )  # whether tokens count their positions from its end (then there is an `Offset`)
    activation: str = static(default="tanh")
    part: str = static(default="both")
    group: str = static(default="")
    name: str = static(default="default")
    frozen: bool = static(default=False)

    @property
    def lead(self) -> tuple[int, ...]:
        """Sizes of the leading axes."""
        for array, own in ((self.keys, 2), (self.values, 2), (self.bias, 1)):
            if array is not None:
                return array.shape[:-own]
        return ()

    def arrays(self) -> tuple[Any, Any]:
        """(keys, values) [P, K d] each; None for a part that has none."""
        if self.weight is None or self.bias is None:
            return self.keys, self.values
        hidden = ACTIVATIONS[self.activation](
            affine(self.shared["embedding"], self.shared["weight"], self.shared["bias"])
        )
        both = affine(hidden, self.weight, self.bias)
        if self.part != "both":
            return both, both
        n = both.shape[-1] // 2
        return both[..., :n], both[..., n:]

    def arrays_by_layer(self) -> tuple[Any, Any]:
        """(keys, values) [*lead, P, K d] each, outside a call; the tree's `distribute` has filled
        `shared`.
        """
        run: Callable[[Any], Any] = Prefix.arrays
        for _ in self.lead:
            run = jax.vmap(run)
        return run(self)

    def around(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.part == "both":
            return self._around_core(call, *args)
        if self.part == "mask":
            mask = kwargs.get("mask")
            if mask is not None:
                kwargs["mask"] = jnp.concatenate(
                    [jnp.ones((*mask.shape[:-1], self.length), mask.dtype), mask], axis=-1
                )
            return call(*args, **kwargs)
        keys, values = self.arrays()
        return _before(keys if self.part == "key" else values, call(*args, **kwargs))

    def _around_core(self, call: Callable[..., Any], o: AttentionOperands) -> Any:
        keys, values = self.arrays()
        visible = True if self.gate is None else (self.gate > 0).reshape(-1, 1, 1, 1)
        first = 0 if self.offset else -self.length
        return call(
            o.replace(
                key=_before(keys, o.key),
                value=_before(values, o.value),
                mask=o.mask.with_prefix(self.length, visible, self._bias(o.query), first),
                bias=None if o.bias is None else o.bias.with_keys_before(self.length),
            )
        )

    def _bias(self, q: jax.Array) -> jax.Array | None:
        """What the gate adds to the prefix's scores, [B, 1, T, P]: its logarithm, so that an open
        gate adds nothing.
        """
        if self.gating_weight is None:
            return None
        logits = affine(q.reshape(*q.shape[:2], -1), self.gating_weight, self.gating_bias).astype(
            jnp.float32
        )
        return jnp.broadcast_to(
            jax.nn.log_sigmoid(logits)[:, None], (q.shape[0], 1, q.shape[1], self.length)
        )


def _before(prefix: jax.Array, x: jax.Array) -> jax.Array:
    """x [B, T, K, d] with a prefix [P, K d], or one for each row [B, P, K d], before each row."""
    B, _, K, d = x.shape
    prefix = prefix.astype(x.dtype).reshape(*prefix.shape[:-1], K, d)
    return jnp.concatenate([jnp.broadcast_to(prefix, (B, *prefix.shape[-3:])), x], axis=1)


@node
class Offset(Attachment):
    """Around a decoder's stack: positions count from `length`, the end of a prefix."""

    length: int = static()
    name: str = static(default="default")
    frozen: bool = static(default=False)

    def moves(self, path: str) -> int:
        return self.length

    def around(self, call: Callable[..., Any], inputs: Inputs) -> Any:  # type: ignore[override]
        tokens, positions, cache = inputs.tokens, inputs.positions, inputs.cache
        if positions is None:
            start = 0 if cache is None else cache.index
            rows = 1 if cache is None else tokens.shape[0]
            positions = jnp.broadcast_to(
                start + jnp.arange(tokens.shape[1], dtype=jnp.int32), (rows, tokens.shape[1])
            )
        return call(inputs.replace(positions=positions + self.length))


def prefix_tuning(
    params: Any,
    key: jax.Array,
    *,
    num_virtual_tokens: int = 20,
    projection: bool = False,
    hidden_size: int | None = None,
    activation: str = "tanh",
    gating: Literal["none", "token"] = "none",
    targets: Targets = "*",
    init_std: float = 0.02,
    offset: bool = True,
    **where: Unpack[Among],
) -> Any:
    """`params` with a prefix in each attention that `targets` name (a decoder's, or Flax's own
    attention layers).

    With `projection` an MLP of `hidden_size` units makes the prefix while it trains (section 4.3);
    it is exported without it. `gating` weighs the prefix for each token (UniPELT). Keys and values
    start as N(0, init_std^2). With `offset` the tokens of a decoder count their positions from the
    prefix's end, as in PEFT; without, from 0, as in AdapterHub. Raises ValueError for a model
    without such attention and targets that match none.
    """
    if num_virtual_tokens < 1:
        raise ValueError(f"num_virtual_tokens must be at least 1, got {num_virtual_tokens}")
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"unknown activation {activation!r}.{nearest(activation, ACTIVATIONS)} There are "
            f"{', '.join(ACTIVATIONS)}"
        )
    if gating not in ("none", "token"):
        raise ValueError(f"unknown gating {gating!r}; a prefix has none or token")
    at = Selection.of(prefix_tuning, where, targets=targets)
    P, adapter = num_virtual_tokens, at.adapter
    group = f"prefix_{adapter}" if projection else ""
    found = _attentions(params, at)
    nodes: dict[str, dict[str, Any]] = {}
    keys = iter(jax.random.split(key, 4 * len(found) + 3))
    h = 0
    if projection:
        D = _hidden(params)
        h = hidden_size or D

    def make(m: Module, n: int, part: str) -> Prefix:
        halves = 2 if part == "both" else 1
        common = {
            "length": P,
            "part": part,
            "gate": m.gate,
            "name": adapter,
            "activation": activation,
            "group": group,
            "offset": offset,
        }
        if projection:
            weight = jax.random.normal(next(keys), (*m.lead, h, halves * n)) * h**-0.5
            return Prefix(**common, weight=weight, bias=jnp.zeros((*m.lead, halves * n)))
        made = [init_std * jax.random.normal(next(keys), (*m.lead, P, n)) for _ in range(halves)]
        return Prefix(
            **common,
            keys=made[0] if part != "value" else None,
            values=made[-1] if part != "key" else None,
        )

    for m, kind, n_q, n_kv in found:
        if kind == "core":
            prefix = make(m, n_kv, "both")
            if gating == "token":
                prefix = prefix.replace(
                    gating_weight=0.02 * jax.random.normal(next(keys), (*m.lead, n_q, 1)),
                    gating_bias=jnp.zeros((*m.lead, 1)),
                )
            nodes[m.path] = {f"prefix_{adapter}": prefix}
            continue
        if gating != "none" or m.gate is not None:
            raise ValueError(
                f"{m.path} is an attention layer of Flax, where a prefix has no gate and stands in "
                "all stacked layers"
            )
        nodes[m.path] = {f"prefix_{adapter}": Prefix(length=P, part="mask", name=adapter)}
        nodes |= {
            f"{m.path}/{part}": {f"prefix_{adapter}": make(m, n_kv, part)}
            for part in ("key", "value")
        }
    if (
        any(kind == "core" for _, kind, _, _ in found)
        and (stack := offset_stack(params))
        and offset
    ):
        nodes[stack] = {f"offset_{adapter}": Offset(length=P, name=adapter)}
    params = attach(params, nodes)
    if not projection:
        return params
    D = _hidden(params)
    trained = {
        "embedding": jax.random.normal(next(keys), (P, D)),
        "weight": jax.random.normal(next(keys), (D, h)) * D**-0.5,
        "bias": jnp.zeros(h),
    }
    return {**params, f"shared_{group}": Shared(trained=trained, fixed={})}


def offset_stack(params: Any) -> str | None:
    """The path of the decoder's stack, whose tokens count their positions from a prefix's end; None
    in other models.
    """
    kind, path = token_stack(params)
    return path if kind == "decoder" else None


def kv_features(params: Any) -> int:
    """Features of a model's keys, all heads together."""
    return _sizes(params, _around(attention_cores(params)[0]), None)[1]


def _around(core: str) -> str:
    """The attention that a core is in."""
    return core.rpartition("/")[0]


def _attentions(params: Any, at: Selection) -> list[tuple[Module, str, int, int]]:
    """(where, what, features of queries, features of keys) for each attention that is selected."""
    cores = {_around(core): core for core in attention_cores(params)}
    flax = [p for p in module_paths(params) if set(module_at(params, p)) >= _FLAX]
    if not cores and not flax:
        raise ValueError(
            "no attention was found that a prefix can stand in (this package's, or Flax's with "
            "query, key, value, out)"
        )
    named = {m.path: m for m in find_modules(params, **at.places)}
    found = []
    for path in [*cores, *flax]:
        core = cores.get(path, path)
        m = named.get(core) or named.get(path)
        if m is not None:
            found.append(
                (
                    m._replace(path=core),
                    "core" if path in cores else "flax",
                    *_sizes(params, path, at.layout),
                )
            )
    if not found:
        here = ", ".join([*cores, *flax])
        raise ValueError(f"targets {at.targets!r} name no attention; attention here: {here}")
    return found


def _sizes(params: Any, path: str, layout: Layout | None) -> tuple[int, int]:
    """Features of queries and of keys, all heads together."""
    module = module_at(params, path)

    def out(name):
        return matrix_shape(
            module[name]["kernel"].shape,
            *(layout or {}).get(f"{path}/{name}/kernel", ((-2,), (-1,))),
        )[1:]

    if set(module) >= _FLAX:
        return out("query")[1], out("key")[1]
    names = modules_by_role(path, module)
    if "qkv" not in names:
        return out(names["q"])[1], out(names["k"])[1]
    n_q, total = out(names["o"])[0], out(names["qkv"])[1]
    return n_q, (total - n_q) // 2


METHOD = Method(
    name="prefix_tuning",
    function=prefix_tuning,
    nodes=(Prefix, Offset),
    at="attention",
    title="prefix tuning",
    follows="Li and Liang 2021, arXiv:2101.00190; PEFT `PrefixTuningConfig`",
    differs=(
        "Keys and values start as N(0, 0.02^2), where PEFT's are N(0, 1): a prefix that large "
        "ruins a model at first. `offset=False` counts positions as AdapterHub does"
    ),
    identity=False,
    example={"num_virtual_tokens": 3},
)
