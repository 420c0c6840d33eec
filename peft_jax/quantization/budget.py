"""Mixed bit widths: which format each weight gets under a budget of bits for all of them
together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from peft_jax.core.coverage import ledger, reached, white
from peft_jax.core.reparametrised import Site, find_sites
from peft_jax.core.select import Targets
from peft_jax.core.weight import Layout
from peft_jax.quantization.formats import Format, make_format
from peft_jax.quantization.quantize import (
    bits_per_weight,
    check_fits,
    embedding_layout,
    quantize_weight,
)


@ledger()
def allocate_bits(
    params: Any,
    formats: Sequence[Format | str],
    *,
    bits: float,
    statistics: Mapping[str, jax.Array] | None = None,
    targets: Targets = "all-linear",
    exclude: Targets = (),
    layout: Layout | None = None,
) -> dict[str, Format]:
    """path -> format, for `quantize`: the least total error with at most `bits` a weight on
    average, scales included.

    The error of a format is that of the weight's outputs on calibration data, from `statistics`
    (covariances of the inputs by path, from `calibrate`), relative to their size; without them, and
    for what no token reached, that of the weight itself. Each place starts with the smallest
    format, and the best bargain (error saved for a bit) is taken until the budget is spent. Raises
    ValueError where even the smallest formats exceed the budget.
    """
    layout = {**embedding_layout(params), **(layout or {})}
    sites = find_sites(params, targets=targets, exclude=exclude, layout=layout)
    choices = [make_format(f) for f in formats]
    tried = {
        p: [_try(s, f, None if statistics is None else statistics[p]) for f in choices]
        for p, s in sites.items()
    }
    counts = {p: math.prod(s.base.shape) for p, s in sites.items()}
    chosen = {p: min(range(len(choices)), key=lambda i, p=p: tried[p][i][0]) for p in sites}
    left = bits * sum(counts.values()) - sum(tried[p][i][0] * counts[p] for p, i in chosen.items())
    if left < 0:
        least = bits - left / sum(counts.values())
        raise ValueError(
            f"a budget of {bits} bits a weight is too small: the smallest formats take {least:.3f}"
        )
    while True:
        options = [
            ((tried[p][now][1] - tried[p][i][1]) / cost, cost, p, i)
            for p, now in chosen.items()
            for i in range(len(choices))
            if 0 < (cost := (tried[p][i][0] - tried[p][now][0]) * counts[p]) <= left
            and tried[p][i][1] < tried[p][now][1]
        ]
        if not options:
            return {p: choices[i] for p, i in chosen.items()}
        _, cost, path, i = max(options)
        chosen[path], left = i, left - cost


def _try(site: Site, format: Format, covariance: jax.Array | None) -> tuple[float, float]:
    """(bits a weight, relative squared error) of one place in a format."""
    check_fits(site.path, format, site.sizes[1])
    w = np.asarray(site.matrix(), np.float64)
    q = quantize_weight(site.path, site.base, format, in_axes=site.in_axes, out_axes=site.out_axes)
    error = w - np.asarray(q.matrix(), np.float64)
    if covariance is None:
        return bits_per_weight(q), float(np.square(error).sum() / np.square(w).sum())
    there = reached(
        site.path,
        [covariance],
        site.sizes[0],
        method="the budget of bits",
        instead="the error of the weight",
    )
    c = np.asarray(white(covariance, there), np.float64)

    def energy(m):
        return float(np.einsum("...io,...ij,...jo->", m, c, m, optimize=True))

    return bits_per_weight(q), energy(error) / energy(w)
