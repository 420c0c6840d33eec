"""What the weights that are stored without their zeros have in common."""

from __future__ import annotations

from typing import Any, ClassVar, Self

import jax

from peft_jax.core.reparametrised import Matrix
from peft_jax.core.weight import from_matrix


class Stored(Matrix):
    """A matrix of which only `values` are stored, and which of them belong where. They train unless
    `frozen`.
    """

    trainable: ClassVar[tuple[str, ...]] = ("values",)
    pruned: ClassVar[bool] = True
    values: jax.Array

    def matrix(self) -> jax.Array:
        """The dense matrix [*lead, in, out]."""
        raise NotImplementedError

    @property
    def dtype(self) -> Any:
        return self.values.dtype

    @property
    def whole(self) -> bool:
        return not self.frozen

    def materialize(self) -> jax.Array:
        return from_matrix(self.matrix(), self.shape, self.in_axes, self.out_axes)

    def merge(self) -> Self:
        """Itself: there is nothing to fold in."""
        return self

    def unmerge(self, merged: Any) -> Self:
        return merged

    def train(self) -> Self:
        return self.replace(frozen=False)
