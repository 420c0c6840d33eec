"""`peft-jax evaluate` and `peft-jax generate`: what a model measures, and what it writes."""

from __future__ import annotations

from pathlib import Path

import jax

from peft_jax.core.files import write_json
from peft_jax.core.options import ConfigError
from peft_jax.recipes.chain import finished
from peft_jax.recipes.measure import held_out, held_rows, measure, samples_of
from peft_jax.recipes.report import leave_report
from peft_jax.recipes.run_config import RunConfig
from peft_jax.recipes.setup import Setup, set_up
from peft_jax.training.loop import check_batch


def model_of(config: RunConfig) -> Setup:
    """The model that a configuration describes; where it lists stages, what they made."""
    return finished(config) if config.stages else set_up(config)


def run_evaluation(config: RunConfig) -> dict[str, float]:
    """The whole of `peft-jax evaluate`: the configured metrics of the model (with its adapter) on
    the held-out data.
    """
    setup = model_of(config)
    if held_out(config) is None:
        raise ConfigError("evaluate needs data.validation or data.test")
    check_batch(config.train, config.data.sequence_length, setup.mesh)
    found = measure(config, setup, setup.params, held_rows(config, setup))
    out = Path(config.output)
    out.mkdir(parents=True, exist_ok=True)
    if jax.process_index() == 0:
        write_json(out / "evaluation.json", {"after": found})
    leave_report(config)
    return found


def run_generation(config: RunConfig) -> list[str]:
    """The whole of `peft-jax generate`: continuations of the configured prompts."""
    if not config.generate.prompts:
        raise ConfigError(
            "generate needs generate.prompts, as in 'generate.prompts=[Once upon a time]'"
        )
    setup = model_of(config)
    return samples_of(config, setup, setup.params)
