"""Coverage: how many tokens stand behind the statistics of each matrix, and what is said where
there are none.

A calibrated method asks `reached` which matrices of a stack it knows anything about. For the others
it does what needs no data. All that happens within a `ledger` is said in one line for each method
when the outermost one closes.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from peft_jax.core.sharding import fetch
from peft_jax.core.values import is_traced

logger = logging.getLogger("peft_jax")


@jax.tree_util.register_pytree_node_class
class Calibrated(dict[str, jax.Array]):
    """path -> statistic, and in `tokens` path -> how many tokens each of its matrices saw,
    [*lead].
    """

    def __init__(self, values: Mapping[str, jax.Array], tokens: Mapping[str, jax.Array]) -> None:
        super().__init__(values)
        self.tokens = dict(tokens)

    def tree_flatten(self) -> tuple[Any, None]:
        return (dict(self), self.tokens), None

    @classmethod
    def tree_unflatten(cls, _: None, children: Any) -> Calibrated:
        return cls(*children)


def tokens_of(statistics: Any, path: str) -> jax.Array | None:
    """How many tokens stand behind the statistics of a place, [*lead]; None where they do not say
    so.
    """
    return getattr(statistics, "tokens", {}).get(path)


def named(statistics: Any, name: str) -> Mapping[str, Any]:
    """path -> the statistic `name`, of {name: {path: array}} or of that one alone."""
    values = statistics or {}
    return values.get(name, values)


class _Count(NamedTuple):
    """Of a place's `total` matrices a method knows nothing of `missing`, the first of which is
    `first`.
    """

    missing: int
    total: int
    first: str


@dataclasses.dataclass
class Ledger:
    """tokens: path -> how many tokens each of its matrices saw, [*lead], in the last pass. known:
    (method, what is done instead) -> path -> count of what the method knows.
    """

    tokens: dict[str, jax.Array] = dataclasses.field(default_factory=dict)
    known: dict[tuple[str, str], dict[str, _Count]] = dataclasses.field(default_factory=dict)

    def note(self, method: str, instead: str, path: str, there: jax.Array) -> None:
        """Enter which matrices of one place, `there` [*lead], `method` knows something of."""
        number = np.unravel_index(int(jnp.argmin(there.reshape(-1))), there.shape)
        first = path + (str([int(n) for n in number]) if there.shape else "")
        count = _Count(there.size - int(there.sum()), there.size, first)
        self.known.setdefault((method, instead), {})[path] = count

    def say(self) -> None:
        """Warn of what was missing, a line for each method."""
        for (method, instead), counts in self.known.items():
            missing = [count for count in counts.values() if count.missing]
            if missing:
                logger.warning(
                    "%s has no usable statistics of %d of %d matrices (of experts each is one), "
                    "which take %s instead; the "
                    "first is %s. Calibrate on more, or more varied, rows.",
                    method,
                    sum(c.missing for c in missing),
                    sum(c.total for c in counts.values()),
                    instead,
                    missing[0].first,
                )


_LEDGER: contextvars.ContextVar[Ledger | None] = contextvars.ContextVar("ledger", default=None)


@contextlib.contextmanager
def ledger() -> Iterator[Ledger]:
    """What calibration saw, and what it did not, while the block (or decorated function) runs; said
    at its end.

    Within another ledger it is that one.
    """
    if (outer := _LEDGER.get()) is not None:
        yield outer
        return
    book = Ledger()
    token = _LEDGER.set(book)
    try:
        yield book
    finally:
        _LEDGER.reset(token)
    book.say()


def tokens_in_words(tokens: jax.Array) -> str:
    """The tokens that one matrix or each of several [*lead] saw, for a table."""
    seen = fetch(tokens).astype(int)
    if not seen.ndim or seen.min() == seen.max():
        return f"{seen.min():,}"
    none = f", {(seen == 0).sum()} of {seen.size} none" if (seen == 0).any() else ""
    return f"{seen.min():,} to {seen.max():,}{none}"


def record_tokens(tokens: Mapping[str, jax.Array]) -> None:
    """Enter how many tokens each matrix of each path saw."""
    if (book := _LEDGER.get()) is not None:
        book.tokens.update(tokens)


def reached(
    path: str,
    statistics: Iterable[jax.Array],
    lead: tuple[int, ...],
    *,
    method: str,
    instead: str,
    tokens: jax.Array | None = None,
    least: int | jax.Array = 1,
) -> jax.Array | None:
    """bool [*lead]: of which matrices the statistics [*lead, ...] say anything; None where of all
    of them.

    They do where they are finite, not all zero and, if it is known, of at least `least` `tokens` (a
    number, or one each). Notes in the ledger, which warns, that the others take `instead` of
    `method`; not of traced arrays, for which there is always an array.
    """
    there = jnp.ones(lead, bool)
    for array in statistics:
        own = tuple(range(len(lead), array.ndim))
        there &= jnp.isfinite(array).all(own) & (array != 0).any(own)
    if tokens is not None:
        there &= tokens >= least
    if is_traced(there):
        return there
    with ledger() as book:
        book.note(method, instead, path, there)
    return None if bool(there.all()) else there


def choose(there: jax.Array | None, calibrated: Any, plain: Any) -> Any:
    """Arrays [*lead, ...] of `calibrated` where there are statistics (`reached`), of `plain`
    elsewhere.
    """
    if there is None:
        return calibrated

    def ours(a):
        return there.reshape(there.shape + (1,) * (a.ndim - there.ndim))

    return jax.tree.map(lambda a, b: jnp.where(ours(a), a, b), calibrated, plain)


def white(covariance: jax.Array, there: jax.Array | None) -> jax.Array:
    """Covariances [*lead, in, in], those of independent inputs of the others' mean size where there
    are none (`reached`).
    """
    if there is None:
        return covariance
    size = jnp.diagonal(covariance, axis1=-2, axis2=-1).mean(-1)
    size = jnp.where(there, size, 0.0).sum() / jnp.maximum(there.sum(), 1)
    size = jnp.where(size > 0, size, 1.0)
    return choose(
        there, covariance, jnp.broadcast_to(size * jnp.eye(covariance.shape[-1]), covariance.shape)
    )
