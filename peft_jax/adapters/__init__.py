"""Adapter modules: bottlenecks, prefixes, prompts, IA3, ReFT, and what is made of several."""

from peft_jax.adapters.adapter_drop import keep_layers
from peft_jax.adapters.bitfit import bitfit
from peft_jax.adapters.bottleneck import bottleneck
from peft_jax.adapters.compacter import compacter
from peft_jax.adapters.compose import (
    average_adapters,
    fuse_adapters,
    route_adapters,
    stack_adapters,
)
from peft_jax.adapters.ia3 import ia3
from peft_jax.adapters.invertible import invertible
from peft_jax.adapters.llama_adapter import adaption_prompt
from peft_jax.adapters.ln_tuning import ln_tuning
from peft_jax.adapters.prefix import prefix_tuning
from peft_jax.adapters.prompt import cpt, multitask_prompt_tuning, p_tuning, prompt_tuning
from peft_jax.adapters.reft import reft
from peft_jax.adapters.unipelt import mix_and_match, unipelt

__all__ = [
    "adaption_prompt",
    "average_adapters",
    "bitfit",
    "bottleneck",
    "compacter",
    "cpt",
    "fuse_adapters",
    "ia3",
    "invertible",
    "keep_layers",
    "ln_tuning",
    "mix_and_match",
    "multitask_prompt_tuning",
    "p_tuning",
    "prefix_tuning",
    "prompt_tuning",
    "reft",
    "route_adapters",
    "stack_adapters",
    "unipelt",
]
