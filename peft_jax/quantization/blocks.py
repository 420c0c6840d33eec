"""Calibrated quantization block by block: each block is calibrated on what the quantized blocks before it pass on.

So later blocks make up for the errors of earlier ones, as in GPTQ's and AWQ's own procedures, and the statistics of one block
are held at a time, whatever the model's depth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax

from peft_jax.core.calibrate import calibrate_all, layer_blocks
from peft_jax.core.coverage import ledger
from peft_jax.core.reparametrised import find_sites
from peft_jax.core.tree import Targets, check_patterns, matches
from peft_jax.core.weight import Layout
from peft_jax.quantization.formats import Format, make_format
from peft_jax.quantization.quantize import embedding_layout, quantize
from peft_jax.quantization.rounding import needed_statistics


@ledger()
def quantize_in_turn(
    apply: Callable[..., Any],
    params: Any,
    batches: Iterable[Mapping[str, Any]],
    format: Format | str | Mapping[str, Format | str] = "int4",
    *,
    rounding: str = "gptq",
    targets: Targets = "all-linear",
    exclude: Targets = (),
    layout: Layout | None = None,
    seed: int = 0,
    **options: Any,
) -> Any:
    """As `quantize`, with the statistics that the rounding needs taken from `batches`, one block after the other.

    A block is a layer: weights whose paths have the same number (`layers_3`). Stacked layers are one block; a tree of our
    decoder is taken apart by `unstack_layers`. Weights outside of layers come last. The model runs once for each block, up
    to that block. Raises ValueError as `quantize` and `calibrate` do.
    """
    layout = {**embedding_layout(params), **(layout or {})}
    sites = find_sites(params, targets=targets, exclude=exclude, layout=layout)
    if isinstance(format, Mapping):
        check_patterns(sites, format=format)
    formats = [make_format(f) for f in (format.values() if isinstance(format, Mapping) else [format])]
    batches = list(batches)
    for paths in layer_blocks(sites):
        wanted = {name for f in formats for name in needed_statistics(rounding, f)}
        found = calibrate_all(apply, params, batches, sorted(wanted), targets=paths, layout=layout)
        here = {k: f for k, f in format.items() if _matches_any(k, paths)} if isinstance(format, Mapping) else format
        if here:
            params = quantize(
                params, here, rounding=rounding, statistics=found, targets=paths, layout=layout, seed=seed, **options
            )
        jax.block_until_ready(params)
    return params


def _matches_any(pattern: str, paths: list[str]) -> bool:
    return any(matches(p, pattern) for p in paths)
