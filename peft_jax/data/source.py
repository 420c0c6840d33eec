"""Where records come from, as the configuration says it."""

from __future__ import annotations

from typing import Literal

from peft_jax.core.options import configuration, option
from peft_jax.data.formats import Kind


@configuration
class SourceConfig:
    path: str = option(
        "builtin:python-docs",
        "builtin:NAME, a .jsonl/.json/.csv/.parquet/.arrow/.txt file, or a hub dataset id",
    )
    split: str = option("train", "split of a built-in or hub dataset")
    limit: int | None = option(None, "use at most this many records")
    phrasing: Literal["train", "held_out"] | None = option(
        None,
        "of facts: the templates to train with, or those held out; by default train for "
        "data.train, held_out elsewhere",
    )
    part: Literal["known", "unseen"] | None = option(
        None, "of facts: those of the known or the unseen subjects; by default all"
    )


@configuration
class MixedSource(SourceConfig):
    """One of several sources, with its share of the records."""

    weight: float | None = option(
        None, "share of the records among the sources that have one, as parts of their sum"
    )
    epochs: float = option(1.0, "how often its records are among them, where it has no weight")
    kind: Kind | None = option(None, "what its records are; by default data.kind, or told")
    columns: dict[str, str] = option({}, "names of its fields; by default data.columns")
