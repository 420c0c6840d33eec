"""Mixtures of methods: UniPELT (Mao et al. 2022, arXiv:2110.07577) and Mix-and-Match adapters (He
et al. 2021, arXiv:2110.04366).
"""

from __future__ import annotations

from typing import Any, Literal, Unpack

import jax

from peft_jax.adapters.bottleneck import Bottleneck, bottleneck
from peft_jax.adapters.prefix import Offset, Prefix, prefix_tuning
from peft_jax.core.method import Method
from peft_jax.core.select import Targets
from peft_jax.core.where import Among, Named, Selection


def unipelt(
    params: Any,
    key: jax.Array,
    *,
    rank: int = 8,
    num_virtual_tokens: int = 10,
    reduction_factor: float = 16.0,
    gating: Literal["token", "sequence"] = "token",
    targets: Targets = ("q_proj", "v_proj"),
    **where: Unpack[Named],
) -> Any:
    """`params` with a gated LoRA on `targets`, a gated prefix in every layer and a gated adapter
    after every layer's feed- forward.

    Each gate is a sigmoid of the module's input (the prefix's, of the query), for each token; with
    `sequence` LoRA and adapter have the paper's mean over the sequence instead, which sees later
    tokens: for encoders, not for generation. Raises ValueError as the methods do that it is made
    of.
    """
    adapter = Selection.of(unipelt, where).adapter
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    if gating not in ("token", "sequence"):
        raise ValueError(f"unknown gating {gating!r}; there are token and sequence")
    keys = jax.random.split(key, 3)
    # LoRA beside the module, so that its gate sees the sequence: a linear bottleneck without
    # biases.
    params = bottleneck(
        params,
        keys[0],
        targets=targets,
        parallel=True,
        size=rank,
        activation="linear",
        scaling=1.0,
        bias=False,
        gating=gating,
        adapter=adapter,
    )
    params = prefix_tuning(
        params, keys[1], num_virtual_tokens=num_virtual_tokens, gating="token", adapter=adapter
    )
    return bottleneck(
        params,
        keys[2],
        placement="pfeiffer",
        reduction_factor=reduction_factor,
        gating=gating,
        adapter=adapter,
    )


def mix_and_match(
    params: Any,
    key: jax.Array,
    *,
    num_virtual_tokens: int = 30,
    size: int | None = None,
    reduction_factor: float = 2.0,
    targets: Targets = (),
    **where: Unpack[Among],
) -> Any:
    """`params` with a prefix in every layer and a scaled parallel adapter beside every
    feed-forward, or the modules `targets`.

    Raises ValueError as the methods do that it is made of.
    """
    Selection.of(mix_and_match, where)
    keys = jax.random.split(key)
    params = prefix_tuning(params, keys[0], num_virtual_tokens=num_virtual_tokens, **where)
    return bottleneck(
        params,
        keys[1],
        placement="parallel",
        targets=targets,
        parallel=True,
        size=size,
        reduction_factor=reduction_factor,
        **where,
    )


METHOD = (
    Method(
        name="unipelt",
        function=unipelt,
        nodes=(Bottleneck, Prefix, Offset),
        at="attention",
        title="UniPELT",
        follows="Mao et al. 2022, arXiv:2110.07577; AdapterHub `UniPELTConfig`",
        differs=(
            "Gates are by token, since a gate of the whole sequence sees later tokens of a causal "
            "model; the logarithm of a prefix's gate is added to its scores"
        ),
        identity=False,
        anywhere=False,
        example={"rank": 2, "num_virtual_tokens": 3, "reduction_factor": 4},
    ),
    Method(
        name="mix_and_match",
        function=mix_and_match,
        nodes=(Bottleneck, Prefix, Offset),
        at="modules",
        title="Mix-and-Match",
        follows="He et al. 2021, arXiv:2110.04366; AdapterHub `MAMConfig`",
        differs="A prefix and a scaled parallel adapter with the options of those two",
        identity=False,
        example={"num_virtual_tokens": 3, "size": 3},
    ),
)
