"""Optimizers and schedules from configuration, all of them optax's."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from peft_jax.training.config import OptimizerConfig

OPTIMIZERS = ("adamw", "adam", "sgd", "lion", "adafactor")


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


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Clipping by global norm, then the optimizer. Weight decay spares vectors (biases and norms)."""
    rate = make_schedule(config, steps)
    decay = {"weight_decay": config.weight_decay, "mask": _matrices} if config.weight_decay else {}
    optimizer = {
        "adamw": lambda: optax.adamw(rate, config.b1, config.b2, config.eps, **{"weight_decay": 0.0, **decay}),
        "adam": lambda: optax.adam(rate, config.b1, config.b2, config.eps),
        "sgd": lambda: optax.sgd(rate, momentum=config.b1 or None),
        "lion": lambda: optax.lion(rate, config.b1, config.b2, **{"weight_decay": 0.0, **decay}),
        "adafactor": lambda: optax.adafactor(rate, weight_decay_rate=config.weight_decay or None),
    }[config.name]()
    if config.weight_decay and config.name in ("adam", "sgd"):
        raise ValueError(f"optimizer {config.name!r} has no weight decay; use adamw")
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), optimizer) if config.clip_norm else optimizer


def _matrices(params: Any) -> Any:
    return jax.tree.map(lambda x: jnp.ndim(x) >= 2, params)
