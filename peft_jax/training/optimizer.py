"""Optimizers and schedules from configuration, all of them optax's."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from peft_jax.low_rank.lora import LoRA
from peft_jax.methods import METHOD_OPTIMIZERS
from peft_jax.quantization.adam8bit import adamw8bit
from peft_jax.training.config import OptimizerConfig


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Linear warm-up to the learning rate, then constant, linear or cosine decay to `final_fraction` of it."""
    warmup = min(config.warmup_steps, max(steps - 1, 0))
    peak, last, rest = config.learning_rate, config.learning_rate * config.final_fraction, max(steps - warmup, 1)
    after = {
        "constant": lambda: optax.constant_schedule(peak),
        "linear": lambda: optax.linear_schedule(peak, last, rest),
        "cosine": lambda: optax.cosine_decay_schedule(peak, rest, alpha=config.final_fraction),
    }[config.schedule]()
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup]) if warmup else after


def make_optimizer(
    config: OptimizerConfig, steps: int, method: Mapping[str, Any] | None = None
) -> optax.GradientTransformationExtraArgs:
    """Clipping by global norm, the optimizer, and what the method makes of it (AdaLoRA's budget, masks that move).

    Weight decay spares vectors (biases and norms). `method` is the configured method with its options.
    """
    rate = make_schedule(config, steps)
    decay = {"weight_decay": config.weight_decay, "mask": _matrices} if config.weight_decay else {}
    optimizer = {
        "adamw": lambda: optax.adamw(rate, config.b1, config.b2, config.eps, **{"weight_decay": 0.0, **decay}),
        "adamw8bit": lambda: adamw8bit(rate, config.b1, config.b2, config.eps, **decay),
        "adam": lambda: optax.adam(rate, config.b1, config.b2, config.eps),
        "sgd": lambda: optax.sgd(rate, momentum=config.b1 or None),
        "lion": lambda: optax.lion(rate, config.b1, config.b2, **{"weight_decay": 0.0, **decay}),
        "adafactor": lambda: optax.adafactor(rate, weight_decay_rate=config.weight_decay or None),
        "galore": lambda: _by_layer(
            optax.contrib.galore(
                rate,
                config.galore_rank,
                config.galore_every,
                base_optimizer=optax.scale_by_adam(config.b1, config.b2, config.eps),
                **({"weight_decay": config.weight_decay, "mask": _matrices} if config.weight_decay else {}),
            )
        ),
    }[config.name]()
    if config.weight_decay and config.name in ("adam", "sgd"):
        raise ValueError(f"optimizer {config.name!r} has no weight decay; use adamw")
    parts = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
    parts.append(optimizer)
    if config.lora_plus_ratio != 1.0:
        parts.append(lora_plus(config.lora_plus_ratio))
    chain, options = optax.chain(*parts), dict(method or {})
    if wrap := METHOD_OPTIMIZERS.get(options.pop("name", "")):
        known = inspect.signature(wrap).parameters
        return wrap(chain, steps, **{k: v for k, v in options.items() if k in known})
    return optax.with_extra_args_support(chain)


def lora_plus(ratio: float) -> optax.GradientTransformation:
    """LoRA+ (Hayou et al. 2024, arXiv:2402.12354): updates of every B multiplied by `ratio`, put after the optimizer."""

    def scale(updates: Any, params: Any = None) -> Any:
        grow = lambda x: x.replace(b=jax.tree.map(lambda b: b * ratio, x.b)) if isinstance(x, LoRA) else x
        return jax.tree.map(grow, updates, is_leaf=lambda x: isinstance(x, LoRA))

    return optax.stateless(scale)


def _by_layer(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """An optimizer of matrices on trees whose layers are stacked: each layer's matrix is one of its own."""

    def split(tree: Any) -> Any:
        return jax.tree.map(lambda x: tuple(x) if jnp.ndim(x) > 2 else x, tree)

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        new, state = optimizer.update(split(updates), state, split(params))
        return jax.tree.map(lambda old, x: jnp.stack(x) if jnp.ndim(old) > 2 else x, updates, new), state

    return optax.GradientTransformation(lambda params: optimizer.init(split(params)), update)


def _matrices(params: Any) -> Any:
    return jax.tree.map(lambda x: jnp.ndim(x) >= 2, params)
