"""One layer after the other: statistics of a layer's inputs, a change of its weights, and on with
what it puts out now.

So later layers make up for what earlier ones lost, and the statistics of one layer are held at a
time. A model that can be taken apart (a `Chain`) runs once from its first layer to its last,
whatever its depth; of any other the part up to a layer runs anew for each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from peft_jax.core.attachment import Attachment, Shared, module_at
from peft_jax.core.bind.bound import Bound
from peft_jax.core.calibrate import Pass, Statistic, calibrate_all, probing
from peft_jax.core.coverage import Calibrated, ledger
from peft_jax.core.reparametrised import find_sites
from peft_jax.core.select import Targets, layer_paths
from peft_jax.core.tree import places
from peft_jax.core.weight import Layout

Layer = Callable[..., jax.Array]
Run = Callable[[Any, dict[str, jax.Array]], dict[str, jax.Array]]
Change = Callable[[Any, list[str], dict[str, Calibrated]], Any]


class Chain(NamedTuple):
    """A model as what it does with tokens first, and its layers in order.

    `enter(params, tokens, **inputs)` gives the first layer's hidden states [B, T, D]. `layers` maps
    the path of each layer to `layer(its part of params, hidden states, **inputs)`, which gives the
    next one's; like layers are the same function, so that they share what is compiled. The inputs
    are `positions` and `segment_ids` [B, T], where there are any.
    """

    enter: Callable[..., jax.Array]
    layers: Mapping[str, Layer]


def chain_of(apply: Callable[..., Any], params: Any) -> Chain | None:
    """How the bound model is taken apart; None where it cannot be, or the tree has what acts across
    layers.
    """
    if not isinstance(apply, Bound) or not apply.chain:
        return None
    if any(isinstance(x, (Attachment, Shared)) for x in places(params).values()):
        return None
    return apply.model.chain()


def layer_blocks(paths: Iterable[str]) -> list[list[str]]:
    """Paths grouped by the number of their layer (`layers_3`), in order; stacked layers and those
    without a number last.
    """
    numbers = {path: layer_paths(path, None)[0][1] for path in paths}
    ordered = sorted({n for n in numbers.values() if n is not None})
    blocks = [[p for p, n in numbers.items() if n == number] for number in [*ordered, None]]
    return [block for block in blocks if block]


def in_turn(
    apply: Callable[..., Any],
    params: Any,
    batches: Iterable[Mapping[str, Any]],
    paths: Iterable[str],
    statistics: Sequence[Statistic],
    change: Change,
    **options: Any,
) -> Any:
    """`params` after `change(params, paths of one block, statistic -> what calibrate gives of these
    paths)` of each block.

    A block is a layer (`layer_blocks`); what lies outside of layers comes last. `options` are
    `calibrate`'s. Raises ValueError as `calibrate` does.
    """
    batches, paths = list(batches), list(paths)
    chain = chain_of(apply, params) if statistics else None
    if chain is not None:
        params = _along(chain, params, batches, paths, statistics, change, options)
        paths = [p for p in paths if not any(p.startswith(f"{layer}/") for layer in chain.layers)]
    for block in layer_blocks(paths):
        params = change(
            params,
            block,
            calibrate_all(apply, params, batches, statistics, targets=block, **options),
        )
        jax.block_until_ready(params)
    return params


def _along(
    chain: Chain,
    params: Any,
    batches: list[Any],
    paths: list[str],
    statistics: Sequence[Statistic],
    change: Change,
    options: Any,
) -> Any:
    """`in_turn` for the layers of a chain."""
    enter = jax.jit(chain.enter)
    states: list[dict[str, jax.Array]] = []
    for batch in batches:
        inputs = {
            name: jnp.asarray(batch[name]) for name in ("positions", "segment_ids") if name in batch
        }
        states.append({"tokens": enter(params, jnp.asarray(batch["tokens"]), **inputs), **inputs})
    passes: dict[Layer, tuple[Pass, Run]] = {}
    left = {p for p in paths if any(p.startswith(f"{prefix}/") for prefix in chain.layers)}
    for prefix, layer in chain.layers.items():
        probes, run = passes.setdefault(layer, (probing(layer), jax.jit(_renewed(layer))))
        if block := [p for p in paths if p.startswith(f"{prefix}/")]:
            own = dict(
                options,
                within=prefix,
                compiled=probes,
                targets=[p.removeprefix(f"{prefix}/") for p in block],
            )
            params = change(
                params,
                block,
                calibrate_all(layer, module_at(params, prefix), states, statistics, **own),
            )
            left -= set(block)
        if not left:  # nothing looks at what the layers from here on put out
            return params
        states = [run(module_at(params, prefix), state) for state in states]
    return params


def _renewed(layer: Layer) -> Run:
    def run(params: Any, state: dict[str, jax.Array]) -> dict[str, jax.Array]:
        inputs = {name: x for name, x in state.items() if name != "tokens"}
        return {**inputs, "tokens": layer(params, state["tokens"], **inputs)}

    return run


@ledger()
def output_errors(
    apply: Callable[..., Any],
    before: Any,
    after: Any,
    batches: Iterable[Mapping[str, Any]],
    *,
    targets: Targets = "all-linear",
    exclude: Targets = (),
    layout: Layout | None = None,
) -> dict[str, jax.Array]:
    """path -> ||X (W' - W)|| / ||X W|| [*lead] of each weight W of `before` that is W' in `after`,
    on after's own inputs X; not a number where there are none.

    The covariances of one block of layers are held at a time. Raises ValueError as `calibrate`
    does.
    """
    sites = find_sites(before, targets=targets, exclude=exclude, layout=layout)
    known, found = places(after), {}

    def measure(params: Any, paths: list[str], statistics: dict[str, Calibrated]) -> Any:
        covariances = statistics["covariance"]
        for path in paths:
            old, new = sites[path].matrix(), sites[path]._replace(base=known[path]).matrix()

            def energy(w, of=covariances[path]):
                return jnp.maximum(jnp.sum((of @ w) * w, (-2, -1)), 0.0)

            error = jnp.sqrt(energy(new - old) / jnp.maximum(energy(old), 1e-30))
            found[path] = jnp.where(covariances.tokens[path] > 0, error, jnp.nan)
        return params

    in_turn(apply, after, batches, sites, ("covariance",), measure, layout=layout)
    return found
