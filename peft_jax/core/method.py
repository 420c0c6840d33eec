"""A method: a function from tree to tree, and all that is said of it in one record.

A record stands at the end of its method's file as `METHOD` (a tuple of them where a file has
several). The registry `peft_jax.methods.METHODS`, configurations, `--help`, tables, benchmarks and
the method matrix read it, so that a new method is one file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

from peft_jax.core.where import Option, options_of

Options = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Method:
    """`function(params, key, *, options) -> params`, and what it promises.

    `nodes` are the classes that it puts into a tree; `at` says what they change: matrices of any
    model, rows of an embedding, vectors (biases and norms), what modules put out, attention, or
    the model's input. `title` is the name in prose, `follows` what its numbers are held to (paper
    and implementation), `differs` where it knowingly does not.
    """

    name: str
    function: Callable[..., Any]
    nodes: tuple[type, ...]
    at: Literal["matrices", "rows", "vectors", "modules", "attention", "input"]
    title: str
    follows: str
    differs: str = ""
    # promises
    identity: bool = True  # it changes nothing at first
    whole: bool = False  # it trains the weights themselves, and leaves a model and no adapter
    anywhere: bool = True  # it works in any Flax model, not in those of this package alone
    # what it asks of a run
    takes_model: bool = False  # as the option `model`
    needs: Callable[[Options], tuple[str, ...]] | None = None  # see `statistics`
    layout: Callable[[Any], Any] | None = None  # params -> the layout its statistics are taken in
    # (optimizer, steps, **options of the method that it names) -> an optax transformation
    optimizer: Callable[..., Any] | None = None
    # whether, with these options, an evaluation before the last step is one of another model
    ends_otherwise: Callable[[Options], bool] | None = None
    # for the matrix: small options, and what else is to be gone through, beside the example
    example: Options = dataclasses.field(default_factory=dict)
    variants: tuple[Options, ...] = ()

    def __call__(self, params: Any, key: Any = None, **options: Any) -> Any:
        """The tree with the method in it."""
        return self.function(params, key, **options)

    @property
    def options(self) -> dict[str, Option]:
        """Its options by name; see `options_of`."""
        return options_of(self.function)

    def statistics(self, options: Options) -> tuple[str, ...]:
        """The names of the statistics of inputs, or "gradient", that it takes as the option
        `statistics` {name: {path: array}}.
        """
        return () if self.needs is None else self.needs(options)
