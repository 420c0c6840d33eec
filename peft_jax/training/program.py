"""What the program of a training step takes, told before the first step: memory, operations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax

from peft_jax.core.files import write_json
from peft_jax.training.flops import flops_of

STEP = "step.json"


def describe_step(step: Any, arguments: tuple[Any, ...], tokens: int, folder: Path) -> None:
    """Write what a jitted step takes on these arguments into `folder`/step.json, where that is not
    there yet: `memory_bytes` as the compiled program tells it (arguments, results and temporaries
    on one device), `flops` of the matrix products, and the `tokens` of a batch.

    What is compiled for this is what the first step runs.
    """
    path = folder / STEP
    if path.is_file():
        return
    traced = step.trace(*arguments)
    found = {"tokens": tokens, "flops": flops_of(traced.jaxpr)}
    compiled = traced.lower().compile()
    found["memory_bytes"] = _peak(compiled.memory_analysis())
    if jax.process_index() == 0:
        write_json(path, found)


def _peak(stats: Any) -> int | None:
    """Bytes of arguments, results (but for those that lie where arguments did) and temporaries."""
    if stats is None:
        return None
    held = stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
    return int(held + stats.temp_size_in_bytes)
