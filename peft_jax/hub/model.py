"""The model of a run as the configuration names it, and an adapter that it starts from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
from jax.sharding import Mesh

from peft_jax.core.options import ConfigError, configuration, option
from peft_jax.core.stage import Context, Stage, State
from peft_jax.hub.adapters import load_adapter
from peft_jax.hub.checkpoint import fresh_model, load, load_fresh
from peft_jax.models.blocks import Task


@configuration
class ModelConfig:
    path: str = option(
        "builtin:base", "Hugging Face folder or repository id, or builtin:base (the embedded model)"
    )
    revision: str | None = option(None, "repository revision")
    dtype: str | None = option(
        None,
        "float32, bfloat16 or (not in training) float16; by default float32 on the CPU, else the "
        "checkpoint's",
    )
    task: Task | None = option(
        None, "what the model is for, as sequence_classification; by default as its checkpoint says"
    )
    adapter: str | None = option(None, "PEFT adapter folder or repository to start from")
    roles: dict[str, list[str]] | None = option(
        None, "what a model of your own calls its modules, as {q: [mixer/wq], down: [w2]}"
    )
    fresh: bool = option(False, "start from random parameters, not from the checkpoint's")
    config: dict[str, Any] = option(
        {}, "of a fresh model: values in place of config.json's, as {num_hidden_layers: 4}"
    )
    scan_layers: bool = option(
        True, "stack and scan the layers, so that compile time does not grow with depth"
    )
    remat: Literal["none", "full", "dots"] = option(
        "none", "rematerialisation: keep all, only layer inputs, or weight products", alters=False
    )
    attention: Literal["xla", "cudnn", "splash"] | None = option(
        None, "attention implementation; by default the best", alters=False
    )


def open_model(
    section: ModelConfig,
    folder: Path,
    *,
    labels: Sequence[str] | int | None,
    mesh: Mesh | None,
    seed: int,
    each: Callable[[str, Any], Any] | None = None,
) -> tuple[Any, Any]:
    """(model, params) of a checkpoint's `folder` as the section says. `labels` are the classes of
    its head, and `each` takes each array as soon as it is read (see `load`).
    """
    options = {**_options(section), "labels": labels, "seed": seed, "mesh": mesh}
    if section.fresh:
        return load_fresh(folder, config=section.config, **options)
    return load(folder, each=each, **options)


def planned_model(section: ModelConfig, folder: Path) -> Any:
    """The model that `open_model` gives, without its parameters: of `folder` the config alone is
    read.
    """
    return fresh_model(folder, config=section.config, **_options(section))


def _options(section: ModelConfig) -> dict[str, Any]:
    return {
        "task": section.task,
        "dtype": _dtype(section.dtype),
        "scan_layers": section.scan_layers,
        "remat": section.remat,
        "attention_implementation": section.attention,
    }


def _dtype(name: str | None) -> Any:
    if name not in (None, "float32", "bfloat16", "float16"):
        raise ConfigError(f"option 'model.dtype': {name!r} is none of float32, bfloat16, float16")
    return name if name is None else jnp.dtype(name)


def _check(section: ModelConfig) -> None:
    if section.config and not section.fresh:
        raise ConfigError(
            "model.config is that of a fresh model: set model.fresh=true, or prune.keep for a "
            "smaller one"
        )


def _run(section: ModelConfig, state: State, context: Context) -> State:
    assert section.adapter is not None
    return state.replace(params=load_adapter(state.params, section.adapter), numbers={})


STAGE = Stage(
    "adapter",
    "the adapter to start from",
    ModelConfig,
    _run,
    sections=("model",),
    check=_check,
    asked=lambda section: section.adapter is not None,
    wants="model.adapter, a PEFT adapter folder or repository",
)
