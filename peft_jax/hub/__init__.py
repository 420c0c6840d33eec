"""Checkpoints, adapters and tokenizers in the formats that other tools read."""

from peft_jax.hub.adapters import load_adapter, save_adapter
from peft_jax.hub.checkpoint import load, load_tokenizer, local_folder, save

__all__ = [
    "load",
    "load_adapter",
    "load_tokenizer",
    "local_folder",
    "save",
    "save_adapter",
]
