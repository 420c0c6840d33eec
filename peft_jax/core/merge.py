"""Updates folded into what they lie over, and taken out again."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from peft_jax.core.attachment import Attachment, Shared
from peft_jax.core.prepare import distribute
from peft_jax.core.stage import Context, Stage, State
from peft_jax.core.tree import data_fields, is_node, map_nodes, map_places, places
from peft_jax.core.weight import Weight, materialize

logger = logging.getLogger("peft_jax")


def merge(params: Any) -> Any:
    """Every Weight replaced by what it amounts to: updates folded into their base (and bias).
    Attachments stay.

    An update over a pruned weight fills its zeros, which is said in a warning: `mask_updates` keeps
    them.
    """
    if filled := [p for p, x in places(params).items() if _fills_zeros(x)]:
        logger.warning(
            f"merging fills the zeros of {len(filled)} pruned weights, {filled[0]} the first; "
            "peft_jax.pruning.mask_updates(params) "
            "before training keeps them"
        )
    whole = distribute(params)
    beside = biased(whole)

    def fold(path: str, x: Any) -> Any:
        if isinstance(x, Attachment):
            return _return_shared(x)
        x = x.merge() if isinstance(x, Weight) else x
        return beside[path].bias(materialize(x)).astype(x.dtype) if path in beside else x

    merged = map_places(fold, whole)
    if not isinstance(merged, Mapping):
        return merged
    needed = {
        f"shared_{getattr(x, 'group', '')}"
        for x in places(params).values()
        if isinstance(x, Attachment)
    }
    return {k: x for k, x in merged.items() if not isinstance(x, Shared) or k in needed}


def biased(params: Any) -> dict[str, Weight]:
    """path of a bias -> the Weight in the place of `kernel` beside it."""
    known = places(params)
    kernels = {
        p.rpartition("/")[0]: x
        for p, x in known.items()
        if p.endswith("/kernel") and isinstance(x, Weight)
    }
    return {f"{module}/bias": x for module, x in kernels.items() if f"{module}/bias" in known}


def _fills_zeros(x: Any) -> bool:
    """Whether a node that is not pruned lies over one that is."""
    if not is_node(x) or getattr(x, "pruned", False):
        return False
    inner = [getattr(x, f) for f in data_fields(x)]
    return any(getattr(y, "pruned", False) or _fills_zeros(y) for y in inner)


def unmerge(merged: Any, params: Any) -> Any:
    """The tree of `params` (with its adapters) over bases recovered from `merged`; equal up to
    rounding.
    """
    known, whole = places(merged), distribute(params)
    beside = biased(whole)

    def back(path: str, x: Any) -> Any:
        value = known.get(path, x)
        if path in beside:
            value = beside[path].recover_bias(materialize(value))
        if isinstance(x, Attachment):
            return _return_shared(x)
        return _return_shared(x.unmerge(value)) if isinstance(x, Weight) else value

    return map_places(back, whole)


def _return_shared(x: Any) -> Any:
    if not is_node(x):
        return map_nodes(_return_shared, x)
    changes = {f: _return_shared(getattr(x, f)) for f in data_fields(x)}
    return x.replace(**{**changes, **({"shared": None} if getattr(x, "group", "") else {})})


def _run(section: None, state: State, context: Context) -> State:
    params = context.placed(merge(state.params))
    return state.replace(params=params, trained=False, numbers={})


STAGE = Stage("merge", "adapters folded into the weights that they lie over", None, _run)
