"""Layer-norm tuning (Zhao et al. 2023, arXiv:2312.11420): only the norms train."""

from __future__ import annotations

from typing import Any

from peft_jax.core.tree import Targets, map_places, matches, places
from peft_jax.core.weight import Trainable, Weight

_NORMS = ("*norm*", "*Norm*", "*/ln_*")


def ln_tuning(
    params: Any, key: Any = None, *, targets: Targets = _NORMS, exclude: Targets = (), adapter: str = "default"
) -> Any:
    """`params` with the scales and biases of the norms that `targets` name training. `key` is not used.

    Raises ValueError where they name no norm.
    """
    wanted, unwanted = ([t] if isinstance(t, str) else list(t) for t in (targets, exclude))
    known = places(params)
    norms = {p.rpartition("/")[0] for p in known if p.rpartition("/")[2] == "scale"}
    named = lambda p, patterns: any(matches(p, t) for t in patterns)
    chosen = {
        p
        for p, w in known.items()
        if p.rpartition("/")[0] in norms and p.rpartition("/")[2] in ("scale", "bias") and not isinstance(w, Weight)
    }
    chosen = {p for p in chosen if named(p, wanted) and not named(p, unwanted)}
    if not chosen:
        raise ValueError(f"targets {targets!r} name no norm; norms here: {', '.join(sorted(norms))}")
    return map_places(lambda p, w: Trainable(w, saved_as="norm", name=adapter) if p in chosen else w, params)
