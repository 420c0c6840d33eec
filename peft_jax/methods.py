"""The registry of methods. A new one is a file with a function `(params, key, *, options) -> params` and a line here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from peft_jax.core.tree import full
from peft_jax.low_rank.lora import lora

METHODS: dict[str, Callable[..., Any]] = {
    "lora": lora,
    "full": full,
}
