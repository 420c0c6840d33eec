"""peft_jax: parameter-efficient fine-tuning of language models in JAX and Flax.

The names that every program needs stand here; the others in namespaces: `peft_jax.low_rank`,
`.adapters`, `.quantization`, `.pruning`, `.distillation`, `.knowledge`, and the floors that these
stand on. All of them are loaded when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peft_jax import adapters as adapters
    from peft_jax import core as core
    from peft_jax import data as data
    from peft_jax import distillation as distillation
    from peft_jax import generation as generation
    from peft_jax import hub as hub
    from peft_jax import knowledge as knowledge
    from peft_jax import low_rank as low_rank
    from peft_jax import models as models
    from peft_jax import objectives as objectives
    from peft_jax import pruning as pruning
    from peft_jax import quantization as quantization
    from peft_jax import recipes as recipes
    from peft_jax import training as training
    from peft_jax.core.bind import bind as bind
    from peft_jax.core.merge import merge as merge
    from peft_jax.core.mesh import make_mesh as make_mesh
    from peft_jax.core.partition import combine as combine
    from peft_jax.core.partition import partition as partition
    from peft_jax.core.sharding import shard as shard
    from peft_jax.generation.generate import generate as generate
    from peft_jax.hub import load as load
    from peft_jax.hub import load_adapter as load_adapter
    from peft_jax.hub import load_tokenizer as load_tokenizer
    from peft_jax.hub import save as save
    from peft_jax.hub import save_adapter as save_adapter
    from peft_jax.low_rank.lora import lora as lora
    from peft_jax.pruning.prune import prune as prune
    from peft_jax.quantization.quantize import quantize as quantize

__version__ = "0.1.0"

_HOMES = {  # name -> the module that has it
    "bind": "peft_jax.core.bind",
    "combine": "peft_jax.core.partition",
    "generate": "peft_jax.generation.generate",
    "load": "peft_jax.hub",
    "load_adapter": "peft_jax.hub",
    "load_tokenizer": "peft_jax.hub",
    "lora": "peft_jax.low_rank.lora",
    "make_mesh": "peft_jax.core.mesh",
    "merge": "peft_jax.core.merge",
    "partition": "peft_jax.core.partition",
    "prune": "peft_jax.pruning.prune",
    "quantize": "peft_jax.quantization.quantize",
    "save": "peft_jax.hub",
    "save_adapter": "peft_jax.hub",
    "shard": "peft_jax.core.sharding",
}
_NAMESPACES = (
    "adapters",
    "core",
    "data",
    "distillation",
    "generation",
    "hub",
    "knowledge",
    "low_rank",
    "models",
    "objectives",
    "pruning",
    "quantization",
    "recipes",
    "training",
)
__all__ = [*_HOMES, *_NAMESPACES]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name in _NAMESPACES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
