"""peft_jax: parameter-efficient fine-tuning of language models in JAX and Flax."""

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
from peft_jax.core.adapters import adapter_names, drop_adapters
from peft_jax.core.attachment import Attachment
from peft_jax.core.bank import bank, bank_adapter, clear_adapter, run_parallel, set_adapter
from peft_jax.core.bind import MissingRuleError, bind, layout_of, nnx_params, register_rule
from peft_jax.core.calibrate import calibrate, gradients
from peft_jax.core.capture import capture, input_of, output_of
from peft_jax.core.in_turn import output_errors
from peft_jax.core.merge import merge, unmerge
from peft_jax.core.partition import combine, count, freeze, full, partition
from peft_jax.core.select import select
from peft_jax.core.sharding import make_mesh, shard, shardings
from peft_jax.core.tree import places
from peft_jax.core.weight import Trainable, Weight, einsum, materialize, matmul, take
from peft_jax.generation.generate import generate
from peft_jax.hub import load, load_adapter, load_tokenizer, save, save_adapter
from peft_jax.low_rank.adalora import adalora
from peft_jax.low_rank.algebra import combine_adapters, resize, subtract_adapters, to_lora
from peft_jax.low_rank.boft import boft
from peft_jax.low_rank.c3a import c3a
from peft_jax.low_rank.delora import delora
from peft_jax.low_rank.dora import dora
from peft_jax.low_rank.fourierft import fourierft
from peft_jax.low_rank.gralora import gralora
from peft_jax.low_rank.hira import hira
from peft_jax.low_rank.hra import hra
from peft_jax.low_rank.loftq import loftq
from peft_jax.low_rank.loha import loha
from peft_jax.low_rank.lokr import lokr
from peft_jax.low_rank.lora import LoRA, lora, rebase
from peft_jax.low_rank.miss import miss
from peft_jax.low_rank.oft import oft
from peft_jax.low_rank.randlora import randlora
from peft_jax.low_rank.road import road
from peft_jax.low_rank.shira import shira
from peft_jax.low_rank.svd import Factorized, factorize
from peft_jax.low_rank.trainable_tokens import trainable_tokens
from peft_jax.low_rank.vblora import vblora
from peft_jax.low_rank.vera import vera
from peft_jax.low_rank.waveft import waveft
from peft_jax.models.families import untie
from peft_jax.models.layers import stack_layers, unstack_layers
from peft_jax.pruning.blocks import prune_in_turn
from peft_jax.pruning.distribution import allocate_sparsity
from peft_jax.pruning.experts import expert_importance, prune_experts
from peft_jax.pruning.masked import Masked, mask_from_zeros, mask_updates
from peft_jax.pruning.pattern import NM, Block
from peft_jax.pruning.prune import compress, densify, prune, sparsity_of
from peft_jax.pruning.sparse_training import sparse
from peft_jax.pruning.structured import prune_structured, shrink, sizes_for
from peft_jax.pruning.students import take_layers
from peft_jax.pruning.vocabulary import prune_vocabulary
from peft_jax.quantization.adam8bit import adamw8bit, scale_by_adam8bit
from peft_jax.quantization.blocks import quantize_in_turn
from peft_jax.quantization.budget import allocate_bits
from peft_jax.quantization.formats import FP4, FP8, MXFP4, NF4, Int
from peft_jax.quantization.qalora import qalora
from peft_jax.quantization.qat import qat
from peft_jax.quantization.quantize import bits_per_weight, dequantize, quantize, quantize_weight
from peft_jax.quantization.quantized import Quantized

__version__ = "0.1.0"

__all__ = [
    "FP4",
    "FP8",
    "MXFP4",
    "NF4",
    "NM",
    "Attachment",
    "Block",
    "Factorized",
    "Int",
    "LoRA",
    "Masked",
    "MissingRuleError",
    "Quantized",
    "Trainable",
    "Weight",
    "adalora",
    "adamw8bit",
    "adapter_names",
    "adaption_prompt",
    "allocate_bits",
    "allocate_sparsity",
    "average_adapters",
    "bank",
    "bank_adapter",
    "bind",
    "bitfit",
    "bits_per_weight",
    "boft",
    "bottleneck",
    "c3a",
    "calibrate",
    "capture",
    "clear_adapter",
    "combine",
    "combine_adapters",
    "compacter",
    "compress",
    "count",
    "cpt",
    "delora",
    "densify",
    "dequantize",
    "dora",
    "drop_adapters",
    "einsum",
    "expert_importance",
    "factorize",
    "fourierft",
    "freeze",
    "full",
    "fuse_adapters",
    "generate",
    "gradients",
    "gralora",
    "hira",
    "hra",
    "ia3",
    "input_of",
    "invertible",
    "keep_layers",
    "layout_of",
    "ln_tuning",
    "load",
    "load_adapter",
    "load_tokenizer",
    "loftq",
    "loha",
    "lokr",
    "lora",
    "make_mesh",
    "mask_from_zeros",
    "mask_updates",
    "materialize",
    "matmul",
    "merge",
    "miss",
    "mix_and_match",
    "multitask_prompt_tuning",
    "nnx_params",
    "oft",
    "output_errors",
    "output_of",
    "p_tuning",
    "partition",
    "places",
    "prefix_tuning",
    "prompt_tuning",
    "prune",
    "prune_experts",
    "prune_in_turn",
    "prune_structured",
    "prune_vocabulary",
    "qalora",
    "qat",
    "quantize",
    "quantize_in_turn",
    "quantize_weight",
    "randlora",
    "rebase",
    "reft",
    "register_rule",
    "resize",
    "road",
    "route_adapters",
    "run_parallel",
    "save",
    "save_adapter",
    "scale_by_adam8bit",
    "select",
    "set_adapter",
    "shard",
    "shardings",
    "shira",
    "shrink",
    "sizes_for",
    "sparse",
    "sparsity_of",
    "stack_adapters",
    "stack_layers",
    "subtract_adapters",
    "take",
    "take_layers",
    "to_lora",
    "trainable_tokens",
    "unipelt",
    "unmerge",
    "unstack_layers",
    "untie",
    "vblora",
    "vera",
    "waveft",
]
