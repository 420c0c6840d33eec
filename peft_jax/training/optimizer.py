"""Optimizers and schedules from configuration, all of them optax's."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax

from peft_jax.core.select import VECTORS, layer_axes, matches, number_layers
from peft_jax.core.tree import map_places, path_str, places
from peft_jax.core.where import options_of
from peft_jax.low_rank.lora import LoRA
from peft_jax.methods import METHODS
from peft_jax.quantization.adam8bit import adamw8bit
from peft_jax.training.config import OptimizerConfig


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Linear warm-up to the learning rate, then constant, linear or cosine decay to
    `final_fraction` of it.
    """
    warmup = min(config.warmup_steps, max(steps - 1, 0))
    peak, last, rest = (
        config.learning_rate,
        config.learning_rate * config.final_fraction,
        max(steps - warmup, 1),
    )
    after = {
        "constant": lambda: optax.constant_schedule(peak),
        "linear": lambda: optax.linear_schedule(peak, last, rest),
        "cosine": lambda: optax.cosine_decay_schedule(peak, rest, alpha=config.final_fraction),
    }[config.schedule]()
    return (
        optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])
        if warmup
        else after
    )


def make_optimizer(
    config: OptimizerConfig, steps: int, method: Mapping[str, Any] | None = None
) -> optax.GradientTransformationExtraArgs:
    """Clipping by global norm, the optimizer, and what the method makes of it (AdaLoRA's budget,
    masks that move).

    What weight decay spares is said by `decays`. An array of stacked layers is to the optimizer
    what the arrays of looped layers are. `method` is the configured method with its options.
    """
    if config.weight_decay and config.name in ("adam", "sgd"):
        raise ValueError(f"optimizer {config.name!r} has no weight decay; use adamw")
    rate = make_schedule(config, steps)
    share, mask = config.weight_decay, functools.partial(decay_mask, no_decay=config.no_decay)
    decay: dict[str, Any] = (
        {"weight_decay": share, "mask": mask} if share else {"weight_decay": 0.0}
    )
    adam = optax.scale_by_adam(config.b1, config.b2, config.eps)
    galore = functools.partial(
        optax.contrib.scale_by_galore, config.galore_rank, config.galore_every, base_optimizer=adam
    )
    optimizer = {
        "adamw": lambda: optax.adamw(rate, config.b1, config.b2, config.eps, **decay),
        "adamw8bit": lambda: adamw8bit(rate, config.b1, config.b2, config.eps, **decay),
        "adam": lambda: optax.adam(rate, config.b1, config.b2, config.eps),
        "sgd": lambda: optax.sgd(rate, momentum=config.b1 or None),
        "lion": lambda: optax.lion(rate, config.b1, config.b2, **decay),
        "adafactor": lambda: optax.chain(
            by_layer(
                optax.adafactor(None)
            ),  # without a rate, so that the decay is scaled by it too, as AdamW's
            *([optax.add_decayed_weights(-share, mask)] if share else []),
            optax.scale_by_learning_rate(rate, flip_sign=False),
        ),
        "galore": lambda: optax.chain(
            by_layer(_without_holes(galore()), matrices=True),
            *([optax.add_decayed_weights(share, mask)] if share else []),
            optax.scale_by_learning_rate(rate),
        ),
    }[config.name]()
    parts: list[optax.GradientTransformation]
    parts = [optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()]
    parts.append(optimizer)
    if config.lora_plus_ratio != 1.0:
        parts.append(lora_plus(config.lora_plus_ratio))
    chain, options = optax.chain(*parts), dict(method or {})
    record = METHODS.get(options.pop("name", ""))
    if record is not None and record.optimizer is not None:
        known = options_of(record.optimizer)
        return record.optimizer(chain, steps, **{k: v for k, v in options.items() if k in known})
    return optax.with_extra_args_support(chain)


def lora_plus(ratio: float) -> optax.GradientTransformation:
    """LoRA+ (Hayou et al. 2024, arXiv:2402.12354): updates of every B multiplied by `ratio`, put
    after the optimizer.
    """

    def scale(updates: Any, params: Any = None) -> Any:
        def grow(x):
            return x.replace(b=jax.tree.map(lambda b: b * ratio, x.b)) if isinstance(x, LoRA) else x

        return jax.tree.map(grow, updates, is_leaf=lambda x: isinstance(x, LoRA))

    return optax.stateless(scale)


def _without_holes(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """`optimizer`, which takes every leaf for an array, on a tree that has None where something
    does not train.
    """

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        new, state = optimizer.update(jax.tree.leaves(updates), state, jax.tree.leaves(params))
        return jax.tree.unflatten(jax.tree.structure(updates), cast("list[Any]", new)), state

    return optax.GradientTransformation(
        lambda params: optimizer.init(jax.tree.leaves(params)), update
    )


# The names that transformers' Trainer spares (get_decay_parameter_names), beside all that is in an
# nn.LayerNorm.
_SPARED = re.compile(r"bias|layernorm|rmsnorm|(?:^|/)norm(?:$|/)|_norm(?:$|/)")


def decays(path: str, x: Any, field: str, no_decay: Sequence[str] | None = None) -> bool:
    """Whether weight decay acts on the array that is called `field` in the node `x` at `path` (""
    where x is the array).

    By default as transformers' Trainer has it: on all but biases and norms, whatever the number of
    axes. `no_decay` says what is spared instead: targets (see `matches`) of places, or of places
    with their fields, as "magnitude".
    """
    name = f"{path}/{field}" if field else path
    if no_decay is not None:
        return not any(
            matches(n, pattern) for n in (path, name, number_layers(name)) for pattern in no_decay
        )
    if path.rpartition("/")[2] in VECTORS or _SPARED.search(name.lower()):
        return False
    return not any(re.fullmatch(pattern, field) for pattern in getattr(x, "biases", ()))


def decay_mask(params: Any, no_decay: Sequence[str] | None = None) -> Any:
    """The tree of `params` with True for each array that weight decay acts on; see `decays`.

    Raises ValueError for a pattern of `no_decay` that matches nothing.
    """
    for pattern in no_decay or ():
        arrays = (
            decays(p, x, field, [pattern])
            for p, x in places(params).items()
            for field in _fields(x)
        )
        if all(arrays):
            raise ValueError(f"optimizer.no_decay: {pattern!r} matches nothing that trains")

    def of(path: str, x: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda field, _: decays(path, x, path_str(field), no_decay), x
        )

    return map_places(of, params)


def _fields(x: Any) -> list[str]:
    return [path_str(path) for path, _ in jax.tree_util.tree_flatten_with_path(x)[0]]


def by_layer(
    optimizer: optax.GradientTransformation, *, matrices: bool = False
) -> optax.GradientTransformation:
    """`optimizer`, to which each of the layers stacked in an array is an array of its own.

    For an optimizer that goes by the shape or the norm of arrays. With `matrices`, stacks of
    matrices within a layer (those of experts) are taken apart too.
    """

    def split(tree: Any) -> Any:
        return jax.tree.map(lambda x, n: _parts(x, n, matrices), tree, layer_axes(tree))

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        new, state = optimizer.update(
            split(updates), state, None if params is None else split(params)
        )
        return jax.tree.map(_joined, updates, new), state

    return optax.GradientTransformation(lambda params: optimizer.init(split(params)), update)


def _parts(x: jax.Array, layers: int, matrices: bool) -> Any:
    """An array as tuples of what its leading axes count."""
    if not layers and not (matrices and jnp.ndim(x) > 2):
        return x
    return tuple(_parts(part, max(layers - 1, 0), matrices) for part in x)


def _joined(x: jax.Array, parts: Any) -> jax.Array:
    """The array of the tuples that `_parts` made of one like `x`."""
    return (
        jnp.stack([_joined(a, b) for a, b in zip(x, parts, strict=True)])
        if isinstance(parts, tuple)
        else parts
    )
