"""Calibrated quantization block by block, as in GPTQ's and AWQ's own procedures: each block is
calibrated on what the quantized blocks before it pass on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from peft_jax.core.calibrate import Statistic
from peft_jax.core.coverage import Calibrated, ledger
from peft_jax.core.in_turn import in_turn
from peft_jax.core.reparametrised import find_sites
from peft_jax.core.select import Targets, check_patterns, matches
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
    token_cap: float | None = 4.0,
    targets: Targets = "all-linear",
    exclude: Targets = (),
    layout: Layout | None = None,
    seed: int = 0,
    **options: Any,
) -> Any:
    """As `quantize`, with the statistics that the rounding needs taken from `batches`, one block
    after the other.

    A block is a layer: weights whose paths have the same number (`layers_3`). Stacked layers are
    one block; a tree of our decoder is taken apart by `unstack_layers`, and then runs once, one
    layer after the other; of other models the part up to each block runs anew. Weights outside of
    layers come last. For `token_cap` see `calibrate`; without it the few tokens that a model writes
    large are all that GPTQ serves. Raises ValueError as `quantize` and `calibrate` do.
    """
    layout = {**embedding_layout(params), **(layout or {})}
    sites = find_sites(params, targets=targets, exclude=exclude, layout=layout)
    if isinstance(format, Mapping):
        check_patterns(sites, format=format)
    formats = [
        make_format(f) for f in (format.values() if isinstance(format, Mapping) else [format])
    ]
    wanted: list[Statistic] = sorted(
        {name for f in formats for name in needed_statistics(rounding, f)}
    )

    def change(params: Any, paths: list[str], found: dict[str, Calibrated]) -> Any:
        here = (
            {k: f for k, f in format.items() if _matches_any(k, paths)}
            if isinstance(format, Mapping)
            else format
        )
        if not here:
            return params
        return quantize(
            params,
            here,
            rounding=rounding,
            statistics=found,
            targets=paths,
            layout=layout,
            seed=seed,
            **options,
        )

    return in_turn(
        apply, params, batches, sites, wanted, change, layout=layout, token_cap=token_cap
    )


def _matches_any(pattern: str, paths: list[str]) -> bool:
    return any(matches(p, pattern) for p in paths)
