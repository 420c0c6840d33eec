"""The configured method: its options, checked, and the tree with it inside."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jax
from pydantic import TypeAdapter, ValidationError

from peft_jax.core.bind import bind
from peft_jax.core.calibrate import calibrate, gradients
from peft_jax.core.method import Method, Options
from peft_jax.core.options import ConfigError
from peft_jax.core.reparametrised import replace_arrays
from peft_jax.core.select import nearest
from peft_jax.core.sharding import shard
from peft_jax.core.tree import is_node, places
from peft_jax.core.weight import Weight
from peft_jax.core.where import Option
from peft_jax.knowledge.inputs import entity_fusion, read_entities
from peft_jax.low_rank.loftq import loftq
from peft_jax.methods import METHODS
from peft_jax.pruning.masked import mask_updates
from peft_jax.quantization.formats import Format
from peft_jax.quantization.quantize import quantize
from peft_jax.quantization.rounding import needed_statistics
from peft_jax.quantization.stage import QuantizeConfig, check_quantize, quantize_options
from peft_jax.training.data import Subject
from peft_jax.training.rows import first_batches, make_rows
from peft_jax.training.tasks import objective_of

GIVEN = ("layout", "model", "statistics")  # what a run, or its caller, gives a method


def name_of(method: Options) -> str:
    """The name of the configured method."""
    return method.get("name", "lora")


def check_method(method: Options) -> tuple[Method, dict[str, Any]]:
    """(the method, its checked options). Raises ConfigError for an unknown name, option or type."""
    options = {k: v for k, v in method.items() if k != "name"}
    name = name_of(method)
    if name not in METHODS:
        raise ConfigError(
            f"unknown method {name!r}.{nearest(str(name), METHODS)} Methods: {', '.join(METHODS)}"
        )
    known = method_options(name)
    for key, value in options.items():
        if key not in known:
            raise ConfigError(
                f"unknown option 'method.{key}' of {name}.{nearest(key, known)} Options of {name}: "
                f"{', '.join(known)}"
            )
        try:
            options[key] = TypeAdapter(known[key].annotation).validate_python(value)
        except ValidationError as error:
            first = error.errors()[0]
            raise ConfigError(
                f"option 'method.{key}': {first['msg'].lower()}, got {value!r}"
            ) from error
    return METHODS[name], options


def method_options(name: str) -> dict[str, Option]:
    """A method's options, those left out that a run gives it."""
    return {n: o for n, o in METHODS[name].options.items() if n not in GIVEN}


def ends_otherwise(method: Options) -> bool:
    """Whether the method is another model before the last step."""
    tells = METHODS[name_of(method)].ends_otherwise
    return tells is not None and bool(tells(method))


def is_loftq(method: Options) -> bool:
    """Whether LoRA's start quantizes the base itself."""
    return name_of(method) == "lora" and method.get("init") == "loftq"


def add_method(
    method: Options,
    params: Any,
    subject: Subject,
    rows: Any = None,
    *,
    base_format: QuantizeConfig,
    masked: bool = True,
) -> Any:
    """The tree with the configured method in it, placed on the mesh.

    Starts that need statistics take them from the training rows, which are made where they are not
    given. `base_format` is what LoftQ makes of the base; `masked` says whether adapters over pruned
    weights are masked too.
    """
    record, options = check_method(method)
    function: Any = record
    adapter = options.get("adapter", "default")
    if is_loftq(method):
        function, options = loftq, _of_loftq(options, base_format, subject.seed)
    elif found := _found(record, options, params, subject, rows):
        options["statistics"] = found
    if record.takes_model:
        options["model"] = subject.model
    params = function(params, jax.random.key(subject.seed), **options)
    params = _with_entities(params, subject.data.knowledge.entities, adapter)
    heads = {
        p: "module"
        for p, w in places(params).items()
        if _is_head(subject.model, p) and not is_node(w)
    }
    params = replace_arrays(params, heads, name=adapter)
    params = mask_updates(params) if masked else params
    return params if subject.mesh is None else shard(params, subject.mesh)


def check_loftq(base_format: QuantizeConfig) -> Format:
    """The format of LoftQ's base. Raises ConfigError where it can have none."""
    format = check_quantize(base_format)
    if format is None or needed_statistics(base_format.rounding, format):
        raise ConfigError(
            "method.init=loftq needs quantize.format, and a quantize.rounding that takes no data"
        )
    return format


def _of_loftq(options: Options, base_format: QuantizeConfig, seed: int) -> dict[str, Any]:
    """The options of LoftQ, which quantizes the base."""
    own = quantize_options(base_format, seed)
    how = functools.partial(quantize, format=check_loftq(base_format), **own)
    return {k: v for k, v in options.items() if k != "init"} | {"quantize": how}


def _found(
    method: Method, options: Options, params: Any, subject: Subject, rows: Any
) -> dict[str, Any]:
    """The statistics of the training rows that the method, or its start, takes, by their names."""
    names = method.statistics(options)
    if not names:
        return {}
    rows = make_rows(subject, subject.data.train) if rows is None else rows
    layout = {} if method.layout is None else {"layout": method.layout(params)}
    where = {**options, **layout}
    return {name: _statistics(params, subject, rows, name, where) for name in names}


def _statistics(
    params: Any, subject: Subject, rows: Any, statistic: str, options: Options
) -> dict[str, Any]:
    """What `calibrate` gives for `statistic`, or gradients, over 8 batches of the training rows."""
    batches, apply = first_batches(subject, rows, 8), bind(subject.model)
    where = {k: options[k] for k in ("targets", "exclude", "layout") if k in options}
    if statistic != "gradient":
        return calibrate(apply, params, batches, statistic=statistic, **where)  # type: ignore[arg-type]
    objective = objective_of(subject)

    def loss(params: Any, batch: Any) -> jax.Array:
        return objective(apply, params, batch, None)[0]

    return gradients(loss, params, batches, **where)


def _with_entities(params: Any, entities: str | None, adapter: str) -> Any:
    """The tree with vectors of entities beside its embedding, where there are any."""
    if entities is None:
        return params
    if any(isinstance(w, Weight) and w.whole for w in places(params).values()):
        raise ConfigError(
            "data.knowledge.entities are kept in an adapter: choose a method that leaves the "
            "base as it is"
        )
    return entity_fusion(params, read_entities(Path(entities))[1], adapter=adapter)


def _is_head(model: Any, path: str) -> bool:
    """Whether a place is of a head that is not the language model's own, which trains whole beside
    whatever method.
    """
    return model.task not in ("causal_lm", "masked_lm", "seq2seq_lm") and bool(
        set(path.split("/")) & set(model.heads)
    )
