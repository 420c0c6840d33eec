"""Pruning as a stage of a run: the base made smaller, and masked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax

from peft_jax.core.bind import bind
from peft_jax.core.calibrate import gradients
from peft_jax.core.options import ConfigError, configuration, option
from peft_jax.core.stage import Batches, Context, Needs, Stage, State
from peft_jax.models.layers import layer_by_layer
from peft_jax.objectives.reading import Objective
from peft_jax.pruning.blocks import prune_in_turn
from peft_jax.pruning.distribution import check_distribution, check_pattern, check_sparsity
from peft_jax.pruning.experts import prune_experts
from peft_jax.pruning.prune import check_score, prune
from peft_jax.pruning.scores import NEEDS, of_gradients
from peft_jax.pruning.structured import prune_structured, sizes_for
from peft_jax.pruning.students import take_layers

Loss = Callable[[Any, Any], jax.Array]


@configuration
class PruneConfig:
    sparsity: float | None = option(
        None, "share of the weights to prune, as 0.5; empty, without a pattern: none"
    )
    pattern: str | None = option(None, "N:M, as 2:4, or blocks of inputs by outputs, as 16x16")
    score: str = option(
        "wanda", "magnitude, random, snip, taylor, movement, wanda, ria or sparsegpt"
    )
    score_options: dict[str, Any] = option(
        {}, "options of the score, as {damping: 0.01}, and compare (output or matrix)"
    )
    distribution: str = option("uniform", "how much of which weight: uniform, erk, global or owl")
    distribution_options: dict[str, Any] = option(
        {}, "options of the distribution, as {spread: 0.08}"
    )
    targets: str | list[str] = option("all-linear", "what to prune")
    exclude: list[str] = option([], "what to leave dense")
    mask_updates: bool = option(
        True, "mask adapters over pruned weights too, so that the merged model keeps its zeros"
    )
    keep: dict[Literal["layers", "heads", "kv_heads", "units", "channels", "experts"], int] = (
        option(
            {},
            "make the model smaller: how many of its layers, heads, ... stay, as {layers: 12, "
            "units: 2048}",
        )
    )
    keep_parameters: float | None = option(
        None, "make the model smaller: the share of its parameters that stays"
    )
    by: Literal["layers", "width"] = option(
        "width", "what keep_parameters takes away: layers, or heads and units"
    )
    importance: Literal["activation", "fluctuation", "magnitude", "spaced"] = option(
        "activation",
        "which layers, heads, ... stay; spaced: layers at even distances, of any family",
    )
    compensate: bool = option(False, "put the mean of what is taken away into biases (llama)")
    calibration_batches: int = option(
        8, "batches of the training data that scores and importance look at"
    )
    sensitivity: list[float] = option(
        [0.25, 0.5, 0.75],
        "shares at which `peft-jax prune` prunes each layer alone (without a pattern)",
        alters=False,
    )


def check_prune(section: PruneConfig) -> None:
    """Raise ConfigError for a score, distribution, pattern or size that cannot be."""
    shares = [*([] if section.sparsity is None else [section.sparsity]), *section.sensitivity]
    try:
        check_score(section.score, set(section.score_options) - {"compare"})
        if masks(section):
            check_pattern(section.pattern, section.sparsity, section.distribution)
        check_distribution(section.distribution, section.distribution_options)
        for share in shares:
            check_sparsity(share)
    except ValueError as error:
        raise ConfigError(f"option 'prune': {error}") from error
    if section.keep_parameters is not None and section.keep:
        raise ConfigError(
            "prune.keep says what stays, and prune.keep_parameters chooses it: give one of them"
        )


def masks(section: PruneConfig) -> bool:
    """Whether weights are masked."""
    return section.sparsity is not None or section.pattern is not None


def prunes(section: PruneConfig) -> bool:
    """Whether anything is pruned."""
    return masks(section) or bool(section.keep) or section.keep_parameters is not None


def made_smaller(section: PruneConfig, state: State, context: Context) -> State:
    """The model made smaller, where the section says so."""
    model, params = _shrunk(section, state.model, state.params, context.batches)
    return state.replace(model=model, params=context.placed(params))


def masked(section: PruneConfig, state: State, context: Context) -> State:
    """The tree masked, where the section says so."""
    if not masks(section):
        return state
    objective = context.objective(state.model)

    def mask(looped: Any, tree: Any) -> Any:
        return sparsified(section, looped, tree, context.batches, context.seed, objective)

    params = layer_by_layer(state.model, state.params, mask)
    return state.replace(params=context.placed(params))


def _shrunk(section: PruneConfig, model: Any, params: Any, batches: Batches) -> tuple[Any, Any]:
    """(model, params) made smaller as the section says; as they are where it says nothing."""
    sizes = dict(section.keep)
    if section.importance == "spaced":
        if section.keep_parameters is not None or set(sizes) != {"layers"}:
            raise ConfigError(
                "prune.importance=spaced takes layers alone, as prune.keep={layers: 6}"
            )
        return take_layers(model, params, sizes["layers"])
    if (experts := sizes.pop("experts", None)) is not None:
        model, params = prune_experts(model, params, batches, experts)
    if section.keep_parameters is not None:
        sizes |= sizes_for(model, section.keep_parameters, section.by)
    if not sizes:
        return model, params
    return prune_structured(
        model, params, batches, score=section.importance, compensate=section.compensate, **sizes
    )


def sparsified(
    section: PruneConfig, model: Any, params: Any, batches: Batches, seed: int, objective: Objective
) -> Any:
    """`params`, with looped layers, masked as the section says; scores of gradients are those of
    `objective`.
    """
    options = dict(options_of(section, seed), **section.score_options)
    options |= {
        "distribution": section.distribution,
        "distribution_options": section.distribution_options,
    }
    if of_gradients(section.score):
        found = gradients_of(section, loss_of(objective, model), params, batches)
        return prune(params, section.sparsity, statistics=found, **options)
    return prune_in_turn(bind(model), params, batches, section.sparsity, **options)


def options_of(section: PruneConfig, seed: int) -> dict[str, Any]:
    """The options that `prune` and `sensitivity` share."""
    return {
        "score": section.score,
        "pattern": section.pattern,
        "targets": section.targets,
        "exclude": section.exclude,
        "seed": seed,
    }


def loss_of(objective: Objective, model: Any) -> Loss:
    """(params, batch) -> the loss."""
    apply = bind(model)
    return lambda params, batch: objective(apply, params, batch, None)[0]


def gradients_of(
    section: PruneConfig, loss: Loss, params: Any, batches: Batches
) -> Mapping[str, Any]:
    """The gradients that the section's score is made of, by their names."""
    where: dict[str, Any] = {"targets": section.targets, "exclude": section.exclude}
    return {
        name: gradients(loss, params, batches, square=name == "squared_gradient", **where)
        for name in NEEDS[section.score]
    }


def _needs(section: PruneConfig) -> Needs:
    return Needs(
        section.calibration_batches, NEEDS.get(section.score, ()) if masks(section) else ()
    )


def _run(section: PruneConfig, state: State, context: Context) -> State:
    state = masked(section, made_smaller(section, state, context), context)
    return state.replace(mask_updates=section.mask_updates, numbers={})


STAGE = Stage(
    "prune",
    "pruning of the base, before anything else",
    PruneConfig,
    _run,
    needs=_needs,
    check=check_prune,
    asked=prunes,
    wants=(
        "prune.sparsity, prune.pattern, prune.keep or prune.keep_parameters, as in "
        "prune.sparsity=0.5"
    ),
)
