"""The registry of stages. A new one is a file with a `Stage` record at its end, as `STAGE`."""

from __future__ import annotations

from typing import Any

from peft_jax.core.registry import Registry
from peft_jax.core.stage import Stage

STAGES: Registry[Stage[Any]] = Registry(
    "stage",
    [
        f"peft_jax.{package}"
        for package in (
            "core",
            "hub",
            "low_rank",
            "adapters",
            "quantization",
            "pruning",
            "distillation",
            "knowledge",
            "training",
        )
    ],
    "STAGE",
    "peft_jax.stages",
)
# The order of a configuration that lists no stages: those of them that its sections ask for.
ORDER = ("prune", "factorize", "quantize", "adapter", "train")
