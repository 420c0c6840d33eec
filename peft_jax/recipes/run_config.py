"""The configuration of a run as one dataclass: its own sections, and those of all stages.

Checking is strict: an unknown key, a wrong type or an impossible value is one sentence that names
the key, and the nearest valid one.
"""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Mapping
from typing import Any

from pydantic import TypeAdapter, ValidationError

from peft_jax.core.options import ConfigError, configuration, dotted, option, settings_of
from peft_jax.core.select import nearest
from peft_jax.hub.model import ModelConfig
from peft_jax.hub.quantized import TOOLS
from peft_jax.recipes.sections import (
    CompareConfig,
    EvaluateConfig,
    GenerateConfig,
    InjectConfig,
    TeachConfig,
)
from peft_jax.recipes.stages import ORDER, STAGES
from peft_jax.training.config import OptimizerConfig, TrainConfig
from peft_jax.training.data import DataConfig, check_data, check_source
from peft_jax.training.lesson import DistillConfig, distills


@dataclasses.dataclass(frozen=True)
class _Model:
    """What a run is about."""

    output: str = option(
        "runs/default",
        "folder for checkpoints, metrics and the exported adapter",
        alters=False,
    )
    model: ModelConfig = option(ModelConfig(), "the model")


# The sections of stages that have one of their own, under their names.
_Stages: Any = dataclasses.make_dataclass(
    "_Stages",
    [
        (name, stage.section, option(stage.section(), stage.help, alters=name in ORDER))
        for name, stage in STAGES.items()
        if stage.places() == (name,) and stage.section is not None
    ],
    bases=(_Model,),
    frozen=True,
    namespace={"__module__": __name__},
)


@configuration
class RunConfig(_Stages):
    """A whole run. Sections of stages (prune, quantize, ...) stand beside these."""

    method: dict[str, Any] = option({"name": "lora"}, "the method's name and its options")
    data: DataConfig = option(DataConfig(), "the data")
    optimizer: OptimizerConfig = option(OptimizerConfig(), "the optimizer")
    train: TrainConfig = option(TrainConfig(), "the training loop")
    distill: DistillConfig = option(DistillConfig(), "learning from teachers")
    teach: TeachConfig = option(TeachConfig(), "what `peft-jax teach` writes", alters=False)
    inject: InjectConfig = option(
        InjectConfig(), "what `peft-jax inject` does with facts", alters=False
    )
    evaluate: EvaluateConfig = option(EvaluateConfig(), "evaluation", alters=False)
    generate: GenerateConfig = option(GenerateConfig(), "generation", alters=False)
    compare: CompareConfig = option(
        CompareConfig(), "what `peft-jax compare` sets side by side", alters=False
    )
    mesh: dict[str, int] = option(
        {},
        "sizes of expert, data, fsdp, sequence and tensor; one may be -1; empty: data over all",
        alters=False,
    )
    sharding: dict[str, list[str | list[str] | None]] = option(
        {},
        "how weights are split, ahead of what roles say: pattern of whole paths to the mesh's axes "
        "for the last axes, as {.*up/kernel: [fsdp, tensor]}",
        alters=False,
    )
    stages: list[str | dict[str, Any]] = option(
        [],
        "what is done, in this order, as [prune, train, merge, quantize, train]; a stage of other "
        "options than those of its sections: {name: train, method: {name: lora, rank: 4}}. Empty: "
        "prune, factorize, quantize, adapter and train, those that are asked for",
        alters=False,
    )
    resume: bool = option(True, "continue from the newest checkpoint in `output`", alters=False)
    resume_with: list[str] = option(
        [],
        "options that a run that is continued may change, as [optimizer.learning_rate]; any other "
        "change is refused",
        alters=False,
    )


_NAMES = dict(dotted(RunConfig))
ALTERS = tuple(name for name, alters in _NAMES.items() if alters)
LEAVES = tuple(name for name, alters in _NAMES.items() if not alters)


def settings(config: RunConfig) -> dict[str, Any]:
    """Dotted name -> value, as JSON has it, of each field that alters what is trained."""
    return settings_of(config) | {"method": {"name": "lora", **config.method}}


def checked(tree: Mapping[str, Any]) -> RunConfig:
    """A checked RunConfig from nested mappings, but for what its stages change. Raises ConfigError
    with one sentence.
    """
    try:
        config = TypeAdapter(RunConfig).validate_python(dict(tree))
    except ValidationError as error:
        raise ConfigError(_sentence(error)) from error
    _check(config)
    return config


def _sentence(error: ValidationError) -> str:
    first = error.errors()[0]
    where = [str(part) for part in first["loc"]]
    key = ".".join(where)
    if first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        section = functools.reduce(section_in, where[:-1], RunConfig)
        known = (
            [f.name for f in dataclasses.fields(section)]
            if dataclasses.is_dataclass(section)
            else []
        )
        place = f"in {'.'.join(where[:-1])}" if where[:-1] else "at the top"
        return (
            f"unknown option {key!r}.{nearest(where[-1], known)} Options {place}: "
            f"{', '.join(known)}"
        )
    return f"option {key!r}: {first['msg'][0].lower()}{first['msg'][1:]}, got {first['input']!r}"


def section_in(section: Any, name: str) -> Any:
    """What a field of a section, or an item of a list of them, is."""
    kind = (
        typing.get_type_hints(section).get(name)
        if dataclasses.is_dataclass(section)
        else element_of(section)
    )
    if isinstance(kind, types.UnionType):
        kind = next((k for k in typing.get_args(kind) if k is not type(None)), None)
    return kind


def element_of(kind: Any) -> Any:
    """What a list or the values of a mapping are; None for anything else."""
    return typing.get_args(kind)[-1] if typing.get_origin(kind) in (list, dict) else None


def _check(config: RunConfig) -> None:
    positive = {
        "generate.max_tokens": config.generate.max_tokens,
        "evaluate.batch_size": config.evaluate.batch_size,
        "evaluate.max_tokens": config.evaluate.max_tokens,
        "teach.k": config.teach.k,
        "teach.shard_rows": config.teach.shard_rows,
    }
    for name, value in positive.items():
        if value < 1:
            raise ConfigError(f"option {name!r} must be at least 1, got {value}")
    if (tool := config.quantize.tool) is not None and tool not in TOOLS:
        raise ConfigError(
            f"option 'quantize.tool': unknown tool {tool!r}.{nearest(tool, TOOLS)} There are "
            f"{', '.join(TOOLS)}"
        )
    if unknown := [name for name in config.resume_with if name not in ALTERS]:
        raise ConfigError(
            f"option 'resume_with': {unknown[0]!r} is no option that alters what is "
            f"trained.{nearest(unknown[0], ALTERS)}"
        )
    check_data(config.data)
    check_source("inject.retained", config.inject.retained)
    for stage in STAGES.values():
        if stage.section is not None:
            stage.check(stage.section_of(config))
    _check_together(config)


def _check_together(config: RunConfig) -> None:
    """Raise ConfigError for sections that do not go together."""
    d, t, data = config.distill, config.train, config.data
    if data.validation is None and (t.eval_every or t.patience):
        raise ConfigError("train.eval_every and train.patience need data.validation")
    if d.on_policy is not None and data.packing:
        raise ConfigError("distill.on_policy continues one prompt a row: set data.packing=false")
    k = data.knowledge
    taught = [n for n in ("triples", "entities", "allowed_weight", "lexicon") if getattr(k, n)]
    if taught and distills(d):
        raise ConfigError(
            f"data.knowledge.{taught[0]} is for a model that trains by itself, not from teachers: "
            "leave one out"
        )
    asked = [name for name in ("factorize", "quantize") if is_asked(config, name)]
    if len(asked) == 2 and not config.stages:
        raise ConfigError("factorize and quantize.format cannot both store a weight: choose one")


def is_asked(config: RunConfig, name: str) -> bool:
    """Whether a stage's section says that anything is to be done."""
    return STAGES[name].asked(STAGES[name].section_of(config))


def to_dict(config: RunConfig) -> dict[str, Any]:
    """The configuration as plain nested dicts, for YAML."""
    return dataclasses.asdict(config)  # type: ignore[call-overload]
