"""Attachments that change what flows through chosen layers at chosen tokens: for finding and
writing facts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from peft_jax.core.attachment import Attachment, module_at
from peft_jax.core.prepare import cache_slots
from peft_jax.core.reparametrised import node
from peft_jax.core.roles import described, hooks_of, modules_by_role, role_of
from peft_jax.core.tree import places


class FeedForward(NamedTuple):
    """Where a decoder's feed-forward stands: the stack of its layers, the attention and the
    feed-forward in it, the path of the weight that writes, and the sum that adds what is made of
    its output to the hidden states.
    """

    stack: str
    attention: str
    module: str
    weight: str
    residual: str
    layers: int


def feed_forward(params: Any) -> FeedForward:
    """Of a decoder's tree with stacked layers. Raises ValueError for others."""
    known = places(params)
    if cache_slots(params):
        raise ValueError(
            "the tree has virtual tokens, which edits would count as a prompt's own; edit the "
            "model without them"
        )
    for path, w in known.items():
        if path.endswith("/kernel") and w.ndim == 3 and _writes(path.removesuffix("/kernel")):
            module = path.rsplit("/", 2)[0]
            stack = module.rpartition("/")[0]
            inside = module_at(params, stack)
            names = modules_by_role(stack, [*inside, *hooks_of(stack, inside)])
            return FeedForward(
                stack,
                f"{stack}/{names['attention']}",
                module,
                path,
                f"{stack}/{names['mlp_residual']}",
                w.shape[0],
            )
    raise ValueError(
        "knowledge is edited in decoders with stacked layers and one feed-forward each (Llama's "
        "kin, GPT-2)"
    )


def _writes(module: str) -> bool:
    """Whether the module is the last of a decoder's feed-forward."""
    found = described(module)
    if found is None or (found.role, found.record.kind) != ("down", "decoder"):
        return False
    return role_of(module.rpartition("/")[0]) == "feed_forward"


@node
class AddAt(Attachment):
    """Adds delta [L, B, D] to a module's output at tokens `at` [L, B] of the rows."""

    delta: jax.Array
    at: jax.Array

    def around(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return _first(call(*args, **kwargs), self._added)

    def _added(self, out: jax.Array) -> jax.Array:
        here = jnp.arange(out.shape[1])[None] == self.at[:, None]
        return out + (here[..., None] * self.delta[:, None]).astype(out.dtype)


@node
class Noise(Attachment):
    """Adds noise [B, T, D] to a module's output (an embedding's look-up)."""

    noise: jax.Array

    def around(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return call(*args, **kwargs) + self.noise


@node
class Restore(Attachment):
    """Gives all rows the first row's output at the tokens where `mask` [L, T] is true."""

    mask: jax.Array

    def around(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return _first(
            call(*args, **kwargs), lambda out: jnp.where(self.mask[None, :, None], out[:1], out)
        )


def _first(out: Any, change: Callable[[jax.Array], jax.Array]) -> Any:
    """A module's output with the first of its parts changed."""
    return (change(out[0]), *out[1:]) if isinstance(out, tuple) else change(out)


KEY = "knowledge"  # under which an attachment stands beside a module
