"""Trainable tokens: some rows of an embedding train, the others stay (Hugging Face PEFT's
`TrainableTokens`).

A head that is tied to the embedding sees the same new rows. Of a head with a kernel of its own,
columns train.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Unpack

import jax
import jax.numpy as jnp

from peft_jax.core.method import Method
from peft_jax.core.placing import token_embedding
from peft_jax.core.reparametrised import MATRIX, TRANSPOSED, Reparametrised, Site, node, place_nodes
from peft_jax.core.roles import role_of
from peft_jax.core.select import OUTPUT_EMBEDDING, Targets
from peft_jax.core.tree import places
from peft_jax.core.weight import Axes, matmul, take
from peft_jax.core.where import Saved, Selection


@node
class TrainableTokens(Reparametrised):
    """`base` [V, D] with the rows `ids` [n] replaced by `rows` [n, D]."""

    trainable: ClassVar[tuple[str, ...]] = ("rows",)
    rows: jax.Array
    ids: jax.Array

    def array_specs(self, into: Any, out: Any) -> dict[str, tuple[Any, ...]]:
        return {"rows": (None, out)}

    def adapt(self, w: jax.Array) -> jax.Array:
        return w.at[self.ids].set(self.rows)

    def recover(self, w: jax.Array) -> jax.Array:
        return w.at[self.ids].set(
            self.base_matrix()[self.ids]
        )  # a merge has lost them; the node's own base has them

    def take(self, ids: jax.Array, dtype: Any = None) -> jax.Array:
        found = ids[..., None] == self.ids
        rows = take(self.base, ids, dtype)
        return jnp.where(
            found.any(-1)[..., None], self.rows.astype(rows.dtype)[found.argmax(-1)], rows
        )

    def transposed(
        self, x: jax.Array, *, in_axes: Axes, out_axes: Axes, precision: Any = None
    ) -> jax.Array:
        y = matmul(x, self.base, in_axes=in_axes, out_axes=out_axes, precision=precision)
        return y.at[..., self.ids].set(
            jnp.matmul(x, self.rows.astype(x.dtype).T, precision=precision)
        )


def trainable_tokens(
    params: Any,
    key: jax.Array,
    *,
    ids: Annotated[Sequence[int], "tokens whose rows train"],
    targets: Annotated[
        Targets, "the embeddings, and heads, that have them; by default the tokens'"
    ] = (),
    **where: Unpack[Saved],
) -> Any:
    """`params` with the rows `ids` of the embeddings that `targets` name (by default the tokens')
    training, from the values they have.

    Raises ValueError for repeated ids or ids outside the vocabulary, and for a target that is no
    embedding [V, D].
    """
    layout = {p: axes for p in places(params) if (axes := _by_token(p)) is not None}
    at = Selection.of(trainable_tokens, where, targets=targets, layout=layout)
    at = at if targets else at.aimed(token_embedding(params)[0])
    if not ids or len(set(ids)) != len(ids):
        raise ValueError(f"ids must be different token ids, at least one, got {list(ids)}")

    def make(site: Site, key: jax.Array) -> TrainableTokens:
        lead, size, _ = site.sizes
        if lead or site.path not in layout:
            raise ValueError(f"{site.path} is no embedding of shape [V, D] and no output head")
        if not all(0 <= i < size for i in ids):
            raise ValueError(f"ids must lie between 0 and {size - 1}, got {list(ids)}")
        chosen = jnp.asarray(ids, jnp.int32)
        by_row = site.in_axes == MATRIX[0]
        rows = take(site.base, chosen).astype(jnp.float32) if by_row else site.matrix()[chosen]
        return TrainableTokens(**site.common(name=at.adapter), rows=rows, ids=chosen)

    return place_nodes(params, key, make, at)


def _by_token(path: str) -> tuple[Axes, Axes] | None:
    """The axes of the weight at `path` as (tokens, features); None where it has no rows for
    tokens.
    """
    module, _, leaf = path.rpartition("/")
    if leaf in ("embedding", OUTPUT_EMBEDDING):
        return MATRIX
    head = leaf == "kernel" and role_of(module) in ("head", "labels")
    return TRANSPOSED if head else None


METHOD = Method(
    name="trainable_tokens",
    function=trainable_tokens,
    nodes=(TrainableTokens,),
    at="rows",
    title="trainable tokens",
    follows="PEFT `TrainableTokensConfig` (no paper)",
    differs="Columns of an untied head train too",
    reference="PEFT",
    example={"ids": [1, 3]},
)
