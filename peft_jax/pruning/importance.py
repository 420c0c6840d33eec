"""Importance of a decoder's layers, heads, feed-forward units and hidden channels, from what flows
through them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from peft_jax.core.attachment import Attachment, attach, module_at
from peft_jax.core.bind import bind
from peft_jax.core.calibrate import calibrate, collect, probing, seen_of
from peft_jax.core.coverage import choose, ledger, reached
from peft_jax.core.partition import partition
from peft_jax.core.placing import modules_with_roles
from peft_jax.core.reparametrised import node
from peft_jax.core.tree import places
from peft_jax.core.weight import static
from peft_jax.models.decoder import Decoder
from peft_jax.models.layers import stacked

Score = Literal["activation", "fluctuation", "magnitude"]


@ledger()
def importance(
    model: Decoder,
    params: Any,
    batches: Iterable[Mapping[str, Any]],
    *,
    score: Score = "activation",
) -> dict[str, jax.Array]:
    """{"layers" [L], "heads" [L, H], "kv_heads" [L, K], "units" [L, F], "channels" [D]}, float32;
    higher matters more.

    activation: the root mean square over tokens of what a unit, head or normalised channel puts out
    (Minitron, Muralidharan et al. 2024, arXiv:2407.14679, section 2.2, with the L2 aggregation),
    and layers by their influence (`block_influence`). fluctuation: units and heads by the variance
    of their output times the squared norm of the weights that read it (FLAP, An et al. 2023,
    arXiv:2312.11983, equation 4), the rest as activation. magnitude: by the norms of their weights
    alone; `batches` are not read. Heads and units of layers that no token reached are by magnitude
    too, which is said. Raises ValueError for an unknown score and where there is no batch.
    """
    if score not in ("activation", "fluctuation", "magnitude"):
        raise ValueError(
            f"unknown importance {score!r}; there are activation, fluctuation and magnitude"
        )
    if model.config.num_experts:
        raise ValueError(
            "importance is that of models with one feed-forward; prune_experts makes a "
            "mixture smaller"
        )
    model, params = stacked(model, params)
    at = parts_of(params)

    def kernel(role):
        return _array(params, f"{at[role]}/kernel")

    if score == "magnitude":
        return _magnitudes(model, params, kernel)
    batches, apply = list(batches), bind(model)
    readers = ["qkv", "gate_up"] if model.config.fused_projections else ["q", "gate"]
    targets = [at[role] for role in ("o", "down", *readers)]
    second = calibrate(apply, params, batches, statistic="second_moment", targets=targets)

    def of(role):
        return second[f"{at[role]}/kernel"]

    heads, units = of("o"), of("down")
    known = {
        role: reached(
            f"{at[role]}/kernel",
            [of(role)],
            (model.config.num_layers,),
            method=f"importance {score!r}",
            instead="'magnitude'",
        )
        for role in ("o", "down")
    }
    if score == "fluctuation":
        mean = calibrate(apply, params, batches, statistic="mean", targets=targets[:2])

        def variance(total, role):
            return total - jnp.square(mean[f"{at[role]}/kernel"])

        heads = variance(heads, "o") * jnp.square(kernel("o")).sum(-1)
        units = variance(units, "down") * jnp.square(kernel("down")).sum(-1)
    channels = (jnp.sqrt(of(readers[0])) + jnp.sqrt(of(readers[1]))).sum(0)
    found = {**_of_heads(model, heads), "units": jnp.sqrt(units)}
    plain = _magnitudes(model, params, kernel)
    for name, score_of in found.items():
        there = known["down" if name == "units" else "o"]
        found[name] = choose(there, score_of, plain[name])
    return {"layers": block_influence(model, params, batches), **found, "channels": channels}


def parts_of(params: Any) -> dict[str, str]:
    """role -> path of the module of a decoder's stacked layers that has it, norms left out."""
    return {role: paths[0] for role, paths in modules_with_roles(params).items() if role != "norms"}


def _array(params: Any, path: str) -> jax.Array:
    return places(params)[path].astype(jnp.float32)


def _of_heads(model: Decoder, energy: jax.Array) -> dict[str, jax.Array]:
    """Scores of query and key/value heads from the energy of each of their features [L, H * d]."""
    c = model.config
    heads = energy.reshape(c.num_layers, c.num_heads, c.head_dim).sum(-1)
    keys = heads.reshape(c.num_layers, c.num_kv_heads, -1).sum(-1)
    return {"heads": jnp.sqrt(heads), "kv_heads": jnp.sqrt(keys)}


def _magnitudes(
    model: Decoder, params: Any, kernel: Callable[[str], jax.Array]
) -> dict[str, jax.Array]:
    c, square = model.config, jnp.square
    if c.fused_projections:
        gate_up = square(kernel("gate_up")).sum(-2).reshape(c.num_layers, 2, -1).sum(1)
        query = square(kernel("qkv")[..., : c.num_heads * c.head_dim]).sum(-2)
    else:
        gate_up = square(kernel("gate")).sum(-2) + square(kernel("up")).sum(-2)
        query = square(kernel("q")).sum(-2)
    at = parts_of(params)
    layers = [w for w in jax.tree.leaves(module_at(params, at["stack"])) if w.ndim == 3]
    return {
        "layers": jnp.sqrt(sum(square(w.astype(jnp.float32)).sum((1, 2)) for w in layers)),
        **_of_heads(model, query + square(kernel("o")).sum(-1)),
        "units": jnp.sqrt(gate_up + square(kernel("down")).sum(-1)),
        "channels": jnp.sqrt(square(_array(params, f"{at['embedding']}/embedding")).sum(0)),
    }


@node
class InfluenceProbe(Attachment):
    """Beside a layer: sink [*lead] receives the sum over tokens of 1 - cos(input, output) as a
    gradient. `collect` fills `seen` (see `seen_of`).
    """

    trainable: ClassVar[tuple[str, ...]] = ("sink",)
    sink: jax.Array
    seen: tuple[jax.Array, ...] = ()
    frozen: bool = static(default=False)

    @property
    def lead(self) -> tuple[int, ...]:
        """Sizes of the leading axes."""
        return self.sink.shape

    def around(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        output, seen = call(*args, **kwargs), seen_of(self.seen, args[0].shape[:-1])
        if isinstance(output, tuple):
            return (_tap(args[0], output[0], seen, self.sink), *output[1:])
        return _tap(args[0], output, seen, self.sink)


@jax.custom_vjp
def _tap(x: jax.Array, y: jax.Array, seen: jax.Array, sink: jax.Array) -> jax.Array:
    return y


def _tap_forward(x: jax.Array, y: jax.Array, seen: jax.Array, sink: jax.Array) -> Any:
    return y, (x, y, seen)


def _tap_backward(saved: Any, grad: jax.Array) -> Any:
    x, y, seen = saved
    a, b = x.astype(jnp.float32), y.astype(jnp.float32)
    cosine = (a * b).sum(-1) / jnp.maximum(
        jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1), 1e-12
    )
    return jnp.zeros_like(x), jnp.zeros_like(y), None, ((1.0 - cosine) * seen).sum()


_tap.defvjp(_tap_forward, _tap_backward)


def block_influence(model: Decoder, params: Any, batches: Iterable[Mapping[str, Any]]) -> jax.Array:
    """[L]: how much each layer turns what it is given, the mean over tokens of 1 - cos(input,
    output) (ShortGPT, Men et al. 2024, arXiv:2403.03853, equation 1). Raises ValueError where there
    is no batch.
    """
    model, params = stacked(model, params)
    stack = parts_of(params)["stack"]
    probe = InfluenceProbe(sink=jnp.zeros(model.config.num_layers))
    probed = attach(params, {stack: {"influence": probe}})
    total, count = collect(probing(bind(model)), *partition(probed), batches)
    return module_at(total, stack)["influence"].sink / count
