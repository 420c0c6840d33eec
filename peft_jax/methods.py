"""The registry of methods: records that stand at the end of the methods' files.

An installed package adds its own by an entry point of the group `peft_jax.methods`, a program by
`METHODS.register(record)`.
"""

from __future__ import annotations

from peft_jax.core.method import Method
from peft_jax.core.registry import Registry

FOLDERS = ("low_rank", "adapters", "quantization", "pruning", "core")

METHODS: Registry[Method] = Registry(
    "method", [f"peft_jax.{folder}" for folder in FOLDERS], "METHOD", "peft_jax.methods"
)
