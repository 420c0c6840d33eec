"""The registry of methods. A new one is a file with a function `(params, key, *, options) ->
params` and a line here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from peft_jax.adapters.bitfit import bitfit
from peft_jax.adapters.bottleneck import bottleneck
from peft_jax.adapters.compacter import compacter
from peft_jax.adapters.ia3 import ia3
from peft_jax.adapters.invertible import invertible
from peft_jax.adapters.llama_adapter import adaption_prompt
from peft_jax.adapters.ln_tuning import ln_tuning
from peft_jax.adapters.prefix import prefix_tuning
from peft_jax.adapters.prompt import cpt, multitask_prompt_tuning, p_tuning, prompt_tuning
from peft_jax.adapters.reft import reft
from peft_jax.adapters.unipelt import mix_and_match, unipelt
from peft_jax.core.partition import full
from peft_jax.low_rank.adalora import adalora, adalora_optimizer
from peft_jax.low_rank.boft import boft
from peft_jax.low_rank.c3a import c3a
from peft_jax.low_rank.delora import delora
from peft_jax.low_rank.dora import dora
from peft_jax.low_rank.fourierft import fourierft
from peft_jax.low_rank.gralora import gralora
from peft_jax.low_rank.hira import hira
from peft_jax.low_rank.hra import hra
from peft_jax.low_rank.loha import loha
from peft_jax.low_rank.lokr import lokr
from peft_jax.low_rank.lora import lora
from peft_jax.low_rank.miss import miss
from peft_jax.low_rank.oft import oft
from peft_jax.low_rank.randlora import randlora
from peft_jax.low_rank.road import road
from peft_jax.low_rank.shira import shira
from peft_jax.low_rank.trainable_tokens import trainable_tokens
from peft_jax.low_rank.vblora import vblora
from peft_jax.low_rank.vera import vera
from peft_jax.low_rank.waveft import waveft
from peft_jax.pruning.sparse_training import prunes_on_the_way, sparse, sparse_optimizer
from peft_jax.quantization.qalora import qalora
from peft_jax.quantization.qat import qat
from peft_jax.quantization.qat import statistics_of as qat_statistics

METHODS: dict[str, Callable[..., Any]] = {
    "lora": lora,
    "dora": dora,
    "adalora": adalora,
    "vera": vera,
    "loha": loha,
    "lokr": lokr,
    "oft": oft,
    "boft": boft,
    "hra": hra,
    "fourierft": fourierft,
    "waveft": waveft,
    "randlora": randlora,
    "vblora": vblora,
    "miss": miss,
    "shira": shira,
    "c3a": c3a,
    "road": road,
    "hira": hira,
    "gralora": gralora,
    "delora": delora,
    "trainable_tokens": trainable_tokens,
    "qalora": qalora,
    "qat": qat,
    "sparse": sparse,
    "bottleneck": bottleneck,
    "compacter": compacter,
    "ia3": ia3,
    "bitfit": bitfit,
    "ln_tuning": ln_tuning,
    "prompt_tuning": prompt_tuning,
    "p_tuning": p_tuning,
    "multitask_prompt_tuning": multitask_prompt_tuning,
    "cpt": cpt,
    "prefix_tuning": prefix_tuning,
    "adaption_prompt": adaption_prompt,
    "reft": reft,
    "unipelt": unipelt,
    "mix_and_match": mix_and_match,
    "invertible": invertible,
    "full": full,
}

# Whether a method, given its options, is another model before the last step, so that an earlier
# evaluation says nothing of it.
ENDS_OTHERWISE: dict[str, Callable[[Mapping[str, Any]], bool]] = {"sparse": prunes_on_the_way}

# The statistics of the training rows (see `calibrate`) that a method, given its options, takes as
# `statistics` by their names.
METHOD_STATISTICS: dict[str, Callable[[Mapping[str, Any]], tuple[str, ...]]] = {
    "qat": qat_statistics
}

# What a method makes of the optimizer: (optimizer, steps, **its own options of the method) -> an
# optax transformation.
METHOD_OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "adalora": adalora_optimizer,
    "sparse": sparse_optimizer,
}
