"""Layer-norm tuning (Zhao et al. 2023, arXiv:2312.11420): only the norms train."""

from __future__ import annotations

from typing import Any, Unpack

from peft_jax.core.method import Method
from peft_jax.core.reparametrised import Replacement, replace_arrays
from peft_jax.core.select import Targets, matches, select
from peft_jax.core.tree import places
from peft_jax.core.weight import Weight
from peft_jax.core.where import Excluding, Selection

_NORMS = ("*norm*", "*Norm*", "*/ln_*")


def ln_tuning(
    params: Any,
    key: Any = None,
    *,
    targets: Targets = _NORMS,
    **where: Unpack[Excluding],
) -> Any:
    """`params` with the scales and biases of the norms that `targets` name training. `key` is not
    used.

    Raises ValueError where they name no norm.
    """
    known = places(params)
    if targets == _NORMS:
        targets = [t for t in _NORMS if any(matches(p, t) for p in known)] or _NORMS
    at = Selection.of(ln_tuning, where, targets=targets)
    norms = {p.rpartition("/")[0] for p in known if p.rpartition("/")[2] == "scale"}

    def is_norm(path: str) -> bool:
        module, _, leaf = path.rpartition("/")
        w = known[path]
        plain = not isinstance(w, Weight) or isinstance(w, Replacement)
        return plain and module in norms and leaf in ("scale", "bias")

    chosen = [p for p in select(params, at.targets, at.exclude, min_ndim=0) if is_norm(p)]
    if not chosen:
        raise ValueError(
            f"targets {targets!r} name no norm; norms here: {', '.join(sorted(norms))}"
        )
    return replace_arrays(params, dict.fromkeys(chosen, "norm"), name=at.adapter)


METHOD = Method(
    name="ln_tuning",
    function=ln_tuning,
    nodes=(Replacement,),
    at="vectors",
    title="layer-norm tuning",
    follows="Zhao et al. 2023, arXiv:2312.11420; PEFT `LNTuningConfig`",
    differs="Norms are found by their names in all families",
)
