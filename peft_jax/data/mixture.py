"""Several sources as one: each as often as its epochs or its weight say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from peft_jax.core.options import ConfigError
from peft_jax.data.source import MixedSource

T = TypeVar("T")


def check_sources(sources: Sequence[MixedSource]) -> None:
    """Raise ConfigError for shares that cannot be."""
    for i, source in enumerate(sources):
        if source.weight is not None and source.weight <= 0:
            raise ConfigError(f"data.sources.{i}.weight must be above 0, got {source.weight}")
        if source.epochs <= 0:
            raise ConfigError(f"data.sources.{i}.epochs must be above 0, got {source.epochs}")
        if source.weight is not None and source.epochs != 1.0:
            raise ConfigError(f"data.sources.{i} has a weight and epochs: give one of them")


def mixed(parts: Sequence[Sequence[T]], sources: Sequence[MixedSource], seed: int) -> list[T]:
    """The records of several sources, one after the other, each as often as its source says.

    Those with weights share as many records as they have together; what goes beyond whole passes
    over a source is drawn without replacement, from the seed and the source's place.
    """
    weighed = [i for i, s in enumerate(sources) if s.weight is not None]
    there = sum(len(parts[i]) for i in weighed)
    total = sum(sources[i].weight or 0.0 for i in weighed)
    found: list[T] = []
    for i, (part, source) in enumerate(zip(parts, sources, strict=True)):
        wanted = source.epochs * len(part)
        if source.weight is not None:
            wanted = there * source.weight / total
        found += _times(part, round(wanted), np.random.default_rng((seed, i)))
    return found


def _times(part: Sequence[T], wanted: int, rng: np.random.Generator) -> list[T]:
    whole, rest = divmod(max(wanted, 1), len(part))
    chosen = sorted(rng.choice(len(part), rest, replace=False).tolist())
    return [*part] * whole + [part[i] for i in chosen]
