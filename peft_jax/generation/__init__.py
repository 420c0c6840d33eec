"""Text from a model: sampling, the key/value cache, the decoding programs."""

from peft_jax.generation.generate import generate

__all__ = [
    "generate",
]
