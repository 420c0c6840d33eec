"""BitFit (Ben Zaken et al. 2022, arXiv:2106.10199): only the biases train."""

from __future__ import annotations

from typing import Any, Unpack

from peft_jax.core.method import Method
from peft_jax.core.reparametrised import Replacement, replace_arrays
from peft_jax.core.select import Targets, select
from peft_jax.core.tree import places
from peft_jax.core.weight import Trainable
from peft_jax.core.where import Excluding, Selection


def bitfit(
    params: Any,
    key: Any = None,
    *,
    targets: Targets = "*",
    **where: Unpack[Excluding],
) -> Any:
    """`params` with biases of the adapter's own, which train, where `targets` name some. `key` is
    not used.

    Raises ValueError where there is none, as in LLaMA-like models.
    """
    at = Selection.of(bitfit, where, targets=targets)
    if not (biases := [p for p in places(params) if p.rpartition("/")[2] == "bias"]):
        raise ValueError(
            "bitfit trains biases, and this model has none; ln_tuning trains its norms, ia3 scales "
            "its outputs"
        )
    chosen = set(select(params, at.targets, at.exclude, min_ndim=0)) & set(biases)
    if not chosen:
        raise ValueError(
            f"targets {targets!r} name no bias; biases here: {', '.join(biases[:6])}, ..."
        )
    chosen = {p for p in chosen if not isinstance(places(params)[p], Trainable)}
    return replace_arrays(params, dict.fromkeys(chosen, "bias"), name=at.adapter)


METHOD = Method(
    name="bitfit",
    function=bitfit,
    nodes=(Replacement,),
    at="vectors",
    title="BitFit",
    follows="Ben Zaken et al. 2022, arXiv:2106.10199",
    differs="A model without biases is refused",
)
