"""Quantization as a stage of a run: the base in a storage format."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax

from peft_jax.core.bind import bind
from peft_jax.core.options import ConfigError, configuration, option
from peft_jax.core.reparametrised import MATRIX
from peft_jax.core.select import is_target, select
from peft_jax.core.stage import Context, Needs, Stage, State
from peft_jax.core.tree import nodes_in, places
from peft_jax.models.layers import layer_by_layer
from peft_jax.quantization.blocks import quantize_in_turn
from peft_jax.quantization.formats import Format, make_format
from peft_jax.quantization.quantize import EMBEDDING, bits_per_weight, quantize, quantize_weight
from peft_jax.quantization.quantized import Quantized
from peft_jax.quantization.rounding import check_rounding, needed_statistics


@configuration
class QuantizeConfig:
    format: str | None = option(
        None, "nf4, fp4, fp8, mxfp4, int8, int4, int3, int2; empty: the weights stay as they are"
    )
    options: dict[str, Any] = option({}, "options of the format, as {block_size: 64, double: true}")
    rounding: str = option("nearest", "nearest, stochastic, gptq, awq, smoothquant or hqq")
    rounding_options: dict[str, Any] = option({}, "options of the rounding, as {damping: 0.01}")
    targets: str | list[str] = option("all-linear", "what to quantize")
    exclude: list[str] = option([], "what to leave in high precision")
    calibration_batches: int = option(
        8, "batches of the training data that a calibrated rounding looks at"
    )
    token_cap: float | None = option(
        4.0,
        "gptq and awq: how many times the median token a token may count for; empty: the few that "
        "are written large rule",
    )


def check_quantize(section: QuantizeConfig) -> Format | None:
    """The format that the base is to have, None where it stays as it is. Raises ConfigError for an
    unknown format, rounding or option.
    """
    if section.format is None:
        return None
    try:
        check_rounding(section.rounding, section.rounding_options)
        return make_format(section.format, **section.options)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"option 'quantize': {error}") from error


def _needs(section: QuantizeConfig) -> Needs:
    format = check_quantize(section)
    found = () if format is None else tuple(needed_statistics(section.rounding, format))
    return Needs(section.calibration_batches, found) if found else Needs()


def quantize_options(section: QuantizeConfig, seed: int) -> dict[str, Any]:
    """The section as options of `quantize`, but for the format."""
    return {
        "seed": seed,
        "rounding": section.rounding,
        "targets": section.targets,
        "exclude": section.exclude,
        **section.rounding_options,
    }


def _run(section: QuantizeConfig, state: State, context: Context) -> State:
    format = check_quantize(section)
    assert format is not None
    options = quantize_options(section, context.seed)
    if _needs(section).batches:
        change = functools.partial(_in_turn, section, format, context.batches, options)
        params = layer_by_layer(state.model, state.params, change)
    else:
        params = quantize(state.params, format, **options)
    params = context.placed(params)
    return state.replace(params=params, numbers={"bits": mean_bits(params)})


def mean_bits(params: Any) -> float:
    """Bits that a quantized weight of the tree takes, all counted."""
    nodes = [w for x in places(params).values() for w in nodes_in(x) if isinstance(w, Quantized)]
    sizes = [math.prod(w.shape) for w in nodes]
    return sum(bits_per_weight(w) * n for w, n in zip(nodes, sizes, strict=True)) / sum(sizes)


def _in_turn(
    section: QuantizeConfig,
    format: Format,
    batches: Any,
    options: dict[str, Any],
    looped: Any,
    tree: Any,
) -> Any:
    """The tree with looped layers quantized one after the other."""
    return quantize_in_turn(
        bind(looped), tree, batches, format, token_cap=section.token_cap, **options
    )


def _as_read(section: QuantizeConfig, seed: int) -> Any:
    """(what becomes of an array of the checkpoint as soon as it is read, a check of the tree); None
    where the rounding looks at data.
    """
    format = check_quantize(section)
    if format is None or _needs(section).batches:
        return None
    return functools.partial(_read, section, seed, format), functools.partial(_check, section)


def _read(section: QuantizeConfig, seed: int, format: Format, path: str, w: jax.Array) -> Any:
    if not is_target(path, w, section.targets, section.exclude):
        return w
    in_axes, out_axes = EMBEDDING if path.endswith("embedding") else MATRIX
    return quantize_weight(
        path,
        w,
        format,
        rounding=section.rounding,
        seed=seed,
        in_axes=in_axes,
        out_axes=out_axes,
        **section.rounding_options,
    )


def _check(section: QuantizeConfig, params: Any) -> None:
    """Raise ValueError for a target that matches nothing, or some of the layers of a stack."""
    known = places(params)
    for path in select(params, section.targets, section.exclude):
        if not isinstance(known[path], Quantized):
            raise ConfigError(
                f"quantize.targets name some of the layers stacked at {path}; set "
                "model.scan_layers=false"
            )


STAGE = Stage(
    "quantize",
    "quantization of the base: with LoRA over it, QLoRA",
    QuantizeConfig,
    _run,
    needs=_needs,
    check=check_quantize,
    asked=lambda section: section.format is not None,
    wants="quantize.format, as in quantize.format=nf4",
    as_read=_as_read,
)
