"""Vanilla Flax models of the families, and what they call their modules."""

from peft_jax.models.families import untie
from peft_jax.models.layers import stack_layers, unstack_layers

__all__ = [
    "stack_layers",
    "unstack_layers",
    "untie",
]
