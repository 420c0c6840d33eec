"""What attention proper is called with, by name: an attachment at an attention core changes some of
it and leaves the rest.
"""

from __future__ import annotations

import dataclasses
from typing import Self

import jax
import jax.numpy as jnp

from peft_jax.models.attention import Mask
from peft_jax.models.cache import Record


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ScoreBias:
    """What is added to the scores of attention, `scores` [B or 1, H, T, S], float32."""

    scores: jax.Array

    def with_keys_before(self, length: int) -> Self:
        """The bias with `length` keys in front, whose scores nothing is added to."""
        return dataclasses.replace(self, scores=jnp.pad(self.scores, [(0, 0)] * 3 + [(length, 0)]))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionOperands(Record):
    """Queries [B, T, H, d], keys and values [B, S, K, d], and who sees whom.

    `sliding` chooses the mask's local part, statically or by a traced boolean.
    """

    query: jax.Array
    key: jax.Array
    value: jax.Array
    mask: Mask
    sliding: bool | jax.Array = False
    bias: ScoreBias | None = None
