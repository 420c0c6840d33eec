"""Which of a checkpoint's tensors belong to which array of a model's tree."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from peft_jax.core.tree import places
from peft_jax.hub.names import Tensor, expert_tensors, modules_of, stack_size, tensors_of
from peft_jax.low_rank.svd import Factorized
from peft_jax.models.family import Family

Parts = Mapping[str, tuple[Any, list[Tensor]]]  # path -> (array, its tensors)
HEAD_TASKS = ("causal_lm", "seq2seq_lm", "masked_lm")  # of models whose head may be the embedding


def parts_of(
    abstract: Any, family: Family, present: Iterable[str] = ()
) -> Iterable[tuple[str, Any, list[Tensor]]]:
    """(path, array, its tensors) for each array of a tree; the two factors of a weight are
    `<name>_u` and `<name>_v`.

    Experts have tensors of their own, unless they are `present` as one.
    """
    known = set(present)
    for path, leaf in places(abstract).items():
        tensors = tensors_of(path, stack_size(path, leaf))
        if isinstance(leaf, Factorized):
            for factor in ("u", "v"):
                yield (
                    f"{path}/{factor}",
                    getattr(leaf, factor),
                    [t._replace(name=f"{t.name}_{factor}") for t in tensors],
                )
            continue
        if tensors[0].name not in known:
            experts = leaf.shape[-3] if len(leaf.shape) > 2 else 1
            tensors = [one for tensor in tensors for one in expert_tensors(tensor, experts)]
        yield path, leaf, [t._replace(name=disk_name(family, t.name)) for t in tensors]


def disk_name(family: Family, name: str) -> str:
    for pattern, replacement in family.disk:
        name = re.sub(pattern, replacement, name)
    return name


def layer_modules(path: str, leaf: Any) -> list[tuple[str, int | None]]:
    """(Hugging Face module, layer) for each module behind the leaf at `path`."""
    return modules_of(path, stack_size(path, leaf))


def listed(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
