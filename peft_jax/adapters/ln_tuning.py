"""Layer-norm tuning (Zhao et al. 2023, arXiv:2312.11420): only the norms train."""

from __future__ import annotations

from typing import Any

from peft_jax.core.method import Method
from peft_jax.core.reparametrised import Replacement, replace_arrays
from peft_jax.core.select import Targets, matches
from peft_jax.core.tree import places
from peft_jax.core.weight import Weight

_NORMS = ("*norm*", "*Norm*", "*/ln_*")


def ln_tuning(
    params: Any,
    key: Any = None,
    *,
    targets: Targets = _NORMS,
    exclude: Targets = (),
    adapter: str = "default",
) -> Any:
    """`params` with the scales and biases of the norms that `targets` name training. `key` is not
    used.

    Raises ValueError where they name no norm.
    """
    wanted, unwanted = ([t] if isinstance(t, str) else list(t) for t in (targets, exclude))
    known = places(params)
    norms = {p.rpartition("/")[0] for p in known if p.rpartition("/")[2] == "scale"}

    def named(p, patterns):
        return any(matches(p, t) for t in patterns)

    def plain(w):
        return not isinstance(w, Weight) or isinstance(w, Replacement)

    beside = {
        p: w
        for p, w in known.items()
        if p.rpartition("/")[0] in norms and p.rpartition("/")[2] in ("scale", "bias")
    }
    chosen = {p for p, w in beside.items() if plain(w)}
    chosen = {p for p in chosen if named(p, wanted) and not named(p, unwanted)}
    if not chosen:
        raise ValueError(
            f"targets {targets!r} name no norm; norms here: {', '.join(sorted(norms))}"
        )
    return replace_arrays(params, dict.fromkeys(chosen, "norm"), name=adapter)


METHOD = Method(
    name="ln_tuning",
    function=ln_tuning,
    nodes=(Replacement,),
    at="vectors",
    title="layer-norm tuning",
    follows="Zhao et al. 2023, arXiv:2312.11420; PEFT `LNTuningConfig`",
    differs="Norms are found by their names in all families",
)
