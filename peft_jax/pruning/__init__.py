"""Pruning: masks, patterns, scores, smaller models."""

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

__all__ = [
    "NM",
    "Block",
    "Masked",
    "allocate_sparsity",
    "compress",
    "densify",
    "expert_importance",
    "mask_from_zeros",
    "mask_updates",
    "prune",
    "prune_experts",
    "prune_in_turn",
    "prune_structured",
    "prune_vocabulary",
    "shrink",
    "sizes_for",
    "sparse",
    "sparsity_of",
    "take_layers",
]
