"""A family in one file: Acorn, a decoder like Llama with biases, whose checkpoints have Llama's
names.

`decoder_family` knows the names, so what is left is the configuration. Put the file into
`peft_jax/models/`, or into a package with the entry point `acorn = "acorn:FAMILY"` in the group
`peft_jax.families`, or call `peft_jax.models.families.register_family(FAMILY)`.
"""

from peft_jax.models.config import llama_config
from peft_jax.models.decoders import decoder_family


def acorn_config(hf):
    """The configuration out of Hugging Face's: Llama's but for what is said here."""
    return llama_config(hf, qkv_bias=True, output_bias=False)


FAMILY = decoder_family("acorn", "Acorn", acorn_config, like="qwen2")
