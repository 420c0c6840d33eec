"""AdapterDrop at inference (Rücklé et al. 2021, arXiv:2010.11918): adapters left out of some
layers, for speed.

In training, an adapter's option `drop_layers` leaves them out at random, so that this costs little.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from peft_jax.adapters.adapter import Adapter
from peft_jax.core.select import layer_paths


def keep_layers(params: Any, layers: Sequence[int], *, adapter: str = "default") -> Any:
    """The adapter left out of all but these layers: by its gate where layers are stacked, taken out
    of the tree elsewhere.

    Only the latter saves time (`unstack_layers`, and a model with scan_layers=False). Raises
    ValueError where the tree holds no such adapter.
    """
    wanted, found = set(layers), []

    def walk(tree: Any, path: str) -> Any:
        if isinstance(tree, Adapter) and tree.name == adapter:
            found.append(path)
            numbers = [i for _, i in layer_paths(path, tree.lead[0] if tree.lead else None)]
            kept = jnp.asarray([float(i in wanted) for i in numbers])
            if not tree.lead:
                return tree if numbers[0] in wanted else None
            kept = jnp.broadcast_to(kept.reshape(-1, *[1] * (len(tree.lead) - 1)), tree.lead)
            return tree.replace(gate=kept if tree.gate is None else kept * tree.gate)
        if not isinstance(tree, Mapping):
            return tree
        parts = {name: walk(x, f"{path}/{name}" if path else name) for name, x in tree.items()}
        return {name: x for name, x in parts.items() if x is not None}

    result = walk(params, "")
    if not found:
        raise ValueError(f"the tree holds no adapter beside modules named {adapter!r}")
    return result
