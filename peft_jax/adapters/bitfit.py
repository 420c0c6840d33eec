"""BitFit (Ben Zaken et al. 2022, arXiv:2106.10199): only the biases train."""

from __future__ import annotations

from typing import Any

from peft_jax.core.tree import Targets, map_places, places, select
from peft_jax.core.weight import Trainable, Weight


def bitfit(params: Any, key: Any = None, *, targets: Targets = "*", exclude: Targets = ()) -> Any:
    """`params` with the biases that `targets` name training. `key` is not used.

    Raises ValueError where there is none, as in LLaMA-like models.
    """
    if not (biases := [p for p in places(params) if p.rpartition("/")[2] == "bias"]):
        raise ValueError("bitfit trains biases, and this model has none; ln_tuning trains its norms, ia3 scales its outputs")
    chosen = set(select(params, targets, exclude, min_ndim=0)) & set(biases)
    if not chosen:
        raise ValueError(f"targets {targets!r} name no bias; biases here: {', '.join(biases[:6])}, ...")
    return map_places(lambda p, w: Trainable(w, saved_as="bias") if p in chosen and not isinstance(w, Weight) else w, params)
