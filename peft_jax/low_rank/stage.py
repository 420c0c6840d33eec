"""Low-rank factorization as a stage of a run: weights of the base as products."""

from __future__ import annotations

from typing import Any

from peft_jax.core.bind import bind
from peft_jax.core.calibrate import calibrate
from peft_jax.core.options import ConfigError, configuration, option
from peft_jax.core.stage import Context, Needs, Stage, State
from peft_jax.low_rank.svd import factorize


@configuration
class FactorizeConfig:
    keep: float | None = option(
        None, "make weights products of low rank: the share of the targets' parameters that stays"
    )
    error: float | None = option(None, "or the largest relative error of a weight")
    activations: bool = option(
        True, "best for outputs on the training data (SVD-LLM), not for the weights themselves"
    )
    targets: str | list[str] = option("all-linear", "what to factorize")
    exclude: list[str] = option([], "what to leave whole")
    calibration_batches: int = option(
        8, "batches of the training data that activations are taken from"
    )


def check_factorize(section: FactorizeConfig) -> None:
    """Raise ConfigError where both set the ranks."""
    if section.keep is not None and section.error is not None:
        raise ConfigError("factorize.keep and factorize.error both set the ranks: give one of them")


def _run(section: FactorizeConfig, state: State, context: Context) -> State:
    where: dict[str, Any] = {"targets": section.targets, "exclude": section.exclude}
    found = None
    if section.activations:
        found = calibrate(bind(state.model), state.params, context.batches, **where)
    options: dict[str, Any] = {"keep": section.keep, "error": section.error, **where}
    params, _ = factorize(state.params, statistics=found, **options)
    return state.replace(params=context.placed(params), numbers={})


def _needs(section: FactorizeConfig) -> Needs:
    looks = section.activations
    return Needs(section.calibration_batches, ("covariance",)) if looks else Needs()


STAGE = Stage(
    "factorize",
    "low-rank factorization of the base, after pruning",
    FactorizeConfig,
    _run,
    needs=_needs,
    check=check_factorize,
    asked=lambda section: section.keep is not None or section.error is not None,
    wants="factorize.keep or factorize.error, as in factorize.keep=0.5",
)
