"""Hugging Face checkpoints in and out: a folder or repository id <-> (vanilla Flax model, parameter
tree).
"""

from peft_jax.hub.checkpoint.folder import BASE, load_tokenizer, local_folder, read_config
from peft_jax.hub.checkpoint.fresh import fresh_model, load_fresh
from peft_jax.hub.checkpoint.reading import load
from peft_jax.hub.checkpoint.writing import linear_modules, save

__all__ = [
    "BASE",
    "fresh_model",
    "linear_modules",
    "load",
    "load_fresh",
    "load_tokenizer",
    "local_folder",
    "read_config",
    "save",
]
