"""peft_jax: parameter-efficient fine-tuning of language models in JAX and Flax."""

from peft_jax.core.attachment import Attachment
from peft_jax.core.bind import MissingRuleError, bind, layout_of, nnx_params, register_rule
from peft_jax.core.sharding import make_mesh, shard, shardings
from peft_jax.core.tree import combine, count, freeze, full, merge, partition, places, select, unmerge
from peft_jax.core.weight import Trainable, Weight, einsum, materialize, matmul, take
from peft_jax.hub import load, load_adapter, load_tokenizer, save, save_adapter
from peft_jax.low_rank.lora import LoRA, lora
from peft_jax.training.generate import generate

__version__ = "0.1.0"

__all__ = [
    "Attachment",
    "LoRA",
    "MissingRuleError",
    "Trainable",
    "Weight",
    "bind",
    "combine",
    "count",
    "einsum",
    "freeze",
    "full",
    "generate",
    "layout_of",
    "load",
    "load_adapter",
    "load_tokenizer",
    "lora",
    "make_mesh",
    "materialize",
    "matmul",
    "merge",
    "nnx_params",
    "partition",
    "places",
    "register_rule",
    "save",
    "save_adapter",
    "select",
    "shard",
    "shardings",
    "take",
    "unmerge",
]
