"""Low-rank factorization: LoRA and its family, and whole weights as products."""

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

__all__ = [
    "Factorized",
    "LoRA",
    "adalora",
    "boft",
    "c3a",
    "combine_adapters",
    "delora",
    "dora",
    "factorize",
    "fourierft",
    "gralora",
    "hira",
    "hra",
    "loftq",
    "loha",
    "lokr",
    "lora",
    "miss",
    "oft",
    "randlora",
    "rebase",
    "resize",
    "road",
    "shira",
    "subtract_adapters",
    "to_lora",
    "trainable_tokens",
    "vblora",
    "vera",
    "waveft",
]
