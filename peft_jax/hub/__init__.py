"""Checkpoints, adapters and tokenizers in the formats that other tools read."""

from peft_jax.hub.checkpoint import abstract_params, load, load_tokenizer, local_folder, save
from peft_jax.hub.peft import load_adapter, save_adapter

__all__ = ["abstract_params", "load", "load_adapter", "load_tokenizer", "local_folder", "save", "save_adapter"]
