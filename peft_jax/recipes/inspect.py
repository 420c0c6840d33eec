"""`peft-jax inspect`: the tree that would train."""

from __future__ import annotations

from typing import Any

from peft_jax.recipes.evaluate import model_of
from peft_jax.recipes.run_config import RunConfig
from peft_jax.recipes.setup import subject_in
from peft_jax.training.method import add_method
from peft_jax.training.stage import STAGE


def run_inspection(config: RunConfig) -> Any:
    """The tree with the method in it; where the configuration lists stages, what they made."""
    setup = model_of(config)
    if config.stages:
        return setup.params
    section = STAGE.section_of(config)
    return add_method(
        section.method,
        setup.params,
        subject_in(config, setup),
        base_format=section.quantize,
        masked=setup.state.mask_updates,
    )
