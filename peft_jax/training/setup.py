"""From a RunConfig to a model that is ready to train: loaded, pruned, quantized, placed, and the
rows of its data.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from peft_jax.core.bind import bind
from peft_jax.core.calibrate import calibrate
from peft_jax.core.reparametrised import MATRIX
from peft_jax.core.roles import register_roles, roles_from
from peft_jax.core.select import is_target, select
from peft_jax.core.sharding import check_rules, make_mesh, shard
from peft_jax.core.tree import places
from peft_jax.data import Record, read_records
from peft_jax.data.batches import batch_at
from peft_jax.hub import load, load_adapter, load_tokenizer, local_folder
from peft_jax.hub.checkpoint import load_fresh, read_config
from peft_jax.knowledge.facts import read_templates, relation_questions, verbalise
from peft_jax.knowledge.retrieval import passages_of, with_passages
from peft_jax.low_rank.svd import factorize
from peft_jax.models.blocks import Task
from peft_jax.models.families import task_of
from peft_jax.models.layers import stack_layers, unstack_layers
from peft_jax.quantization.blocks import quantize_in_turn
from peft_jax.quantization.formats import Format
from peft_jax.quantization.quantize import EMBEDDING, quantize, quantize_weight
from peft_jax.quantization.quantized import Quantized
from peft_jax.quantization.rounding import needed_statistics
from peft_jax.training.config import (
    ConfigError,
    PruneConfig,
    QuantizeConfig,
    RunConfig,
    SourceConfig,
    check_quantize,
)
from peft_jax.training.prune import shrunk, sparsified
from peft_jax.training.tasks import TASKS, Subject, facts_of, objective_of, rows_of, wanted_labels

logger = logging.getLogger("peft_jax")


class Setup(NamedTuple):
    """A loaded model with its tokenizer and, where the configuration asks for one, its mesh."""

    model: Any
    params: Any
    tokenizer: Any
    mesh: Mesh | None
    folder: Path


def start_distributed() -> None:
    """Join the other hosts where a launcher (TPU pod, SLURM, JAX_COORDINATOR_ADDRESS) started
    several.
    """
    several = (
        os.environ.get("JAX_COORDINATOR_ADDRESS") or int(os.environ.get("SLURM_NTASKS", "1")) > 1
    )
    pod = len(os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",")) > 1
    if not (several or pod) or jax.distributed.is_initialized():
        return
    names = {"num_processes": "JAX_NUM_PROCESSES", "process_id": "JAX_PROCESS_ID"}
    jax.distributed.initialize(
        **{k: int(os.environ[v]) for k, v in names.items() if v in os.environ}
    )


def set_up(config: RunConfig) -> Setup:
    """Load the model (and the adapter to start from), placed on the mesh that the configuration
    describes.
    """
    describe_model(config)
    mesh = make_mesh(config.mesh) if config.mesh or jax.device_count() > 1 else None
    c, q = config.model, QuantizeConfig() if is_loftq(config) else config.quantize
    folder = local_folder(c.path, c.revision)
    format = check_quantize(q)
    calibrated = format is not None and bool(needed_statistics(q.rounding, format))
    whole = (
        format is None or calibrated or prunes(config) or factorizes(config)
    )  # else weights are quantized as they are read
    options: dict[str, Any] = {
        "task": c.task,
        "labels": _labels(config, folder),
        "seed": config.train.seed,
        "dtype": _dtype(c.dtype),
        "mesh": mesh,
        "scan_layers": c.scan_layers,
        "remat": c.remat,
        "attention_implementation": c.attention,
    }
    if c.fresh:
        whole = True
        model, params = load_fresh(folder, config=c.config, **options)
    else:
        each = None if whole else functools.partial(_quantize_read, config, format)
        model, params = load(folder, each=each, **options)
    setup = Setup(model, params, load_tokenizer(folder), mesh, folder)
    if prunes(config):
        batches = calibration_batches(config, setup, config.prune.calibration_batches)
        setup = masked(config, made_smaller(config, setup, batches), batches)
    if factorizes(config):
        setup = setup._replace(params=_factorized(config, setup))
    if format is not None and whole:
        setup = setup._replace(params=quantized_tree(config, setup, format))
    elif format is not None:
        for path in select(
            params, q.targets, q.exclude
        ):  # raises for a target that matches nothing
            if not isinstance(places(params)[path], Quantized):
                raise ConfigError(
                    f"quantize.targets name some of the layers stacked at {path}; set "
                    "model.scan_layers=false"
                )
    return setup._replace(params=load_adapter(setup.params, c.adapter)) if c.adapter else setup


def describe_model(config: RunConfig) -> None:
    """Make known what the configuration says of a model's modules and how its weights are split.

    Raises ValueError for a role and a mesh axis that there are none of.
    """
    roles, rules = config.model.roles or {}, config.sharding
    if not (roles or rules):
        return
    specs = [
        (pattern, PartitionSpec(*(tuple(a) if isinstance(a, list) else a for a in axes)))
        for pattern, axes in rules.items()
    ]
    check_rules(specs)
    register_roles(roles_from(f"configuration {roles} {rules}", roles, rules=tuple(specs)))


def _labels(config: RunConfig, folder: Path) -> Sequence[str] | int | None:
    """The classes that the head is to have: the configured ones, the checkpoint's own (None), or
    the training data's.
    """
    if config.data.labels:
        return config.data.labels
    hf_config = read_config(folder)
    task = task_of(hf_config, config.model.task)
    if TASKS[task].labels is None:
        return None
    known = None
    if task_of(hf_config) == task:
        names = hf_config.id2label
        known = 1 if len(names) == 1 else [names[i] for i in sorted(names)]
    return wanted_labels(
        task, read_source(config, config.data.train, task), known, config.data.label_kind
    )


def subject_of(config: RunConfig, setup: Setup) -> Subject:
    """The model as tasks see it."""
    return Subject(setup.model, setup.tokenizer, config.data, config.train.batch_size, setup.mesh)


def prunes(config: RunConfig) -> bool:
    return (
        masks(config.prune) or bool(config.prune.keep) or config.prune.keep_parameters is not None
    )


def factorizes(config: RunConfig) -> bool:
    """Whether the configuration factorizes the base."""
    return config.factorize.keep is not None or config.factorize.error is not None


def _factorized(config: RunConfig, setup: Setup) -> Any:
    """The tree with the weights that are to be products of low rank as these."""
    f = config.factorize
    where: dict[str, Any] = {"targets": f.targets, "exclude": f.exclude}
    found = None
    if f.activations:
        batches = calibration_batches(config, setup, f.calibration_batches)
        found = calibrate(bind(setup.model), setup.params, batches, **where)
    params, _ = factorize(setup.params, keep=f.keep, error=f.error, statistics=found, **where)
    return params if setup.mesh is None else shard(params, setup.mesh)


def masks(p: PruneConfig) -> bool:
    return p.sparsity is not None or p.pattern is not None


def made_smaller(config: RunConfig, setup: Setup, batches: list[dict[str, Any]]) -> Setup:
    """The model made smaller, where the configuration asks for it."""
    model, params = shrunk(config.prune, setup.model, setup.params, batches)
    return setup._replace(
        model=model, params=params if setup.mesh is None else shard(params, setup.mesh)
    )


def masked(config: RunConfig, setup: Setup, batches: list[dict[str, Any]]) -> Setup:
    """The tree masked, where the configuration asks for it."""
    if not masks(config.prune):
        return setup
    objective = objective_of(config, subject_of(config, setup))

    def mask(looped, tree):
        return sparsified(config.prune, looped, tree, batches, config.train.seed, objective)

    params = _layer_by_layer(setup.model, setup.params, mask)
    return setup._replace(params=params if setup.mesh is None else shard(params, setup.mesh))


def unlike_text(config: RunConfig) -> bool:
    """Whether a model of the user's is calibrated on the default training data, which nobody chose
    for it.
    """
    return config.data.train == SourceConfig() and not config.model.path.startswith("builtin:")


def calibration_batches(config: RunConfig, setup: Setup, count: int) -> list[dict[str, Any]]:
    """The first batches of the training rows."""
    if unlike_text(config):
        logger.warning(
            "calibrating on %s, which data.train is by default: statistics of text unlike what the "
            "model is to read can do "
            "worse than none (3-bit GPTQ worse than nearest); set data.train.path to text of the "
            "model's use",
            config.data.train.path,
        )
    return first_batches(config, make_rows(config, config.data.train, setup), count)


def first_batches(config: RunConfig, rows: Any, count: int) -> list[dict[str, Any]]:
    """The batches that training on these rows begins with."""
    return [
        batch_at(rows, i, config.train.batch_size, seed=config.train.seed) for i in range(count)
    ]


def _layer_by_layer(model: Any, params: Any, change: Callable[[Any, Any], Any]) -> Any:
    """`change(model, params)` of the model with its layers looped; the tree is stacked again where
    it was.
    """
    if not model.scan_layers:
        return change(model, params)
    return stack_layers(change(model.clone(scan_layers=False), unstack_layers(params)))


def is_loftq(config: RunConfig) -> bool:
    """Whether LoRA's start quantizes the base itself."""
    if config.method.get("name", "lora") != "lora" or config.method.get("init") != "loftq":
        return False
    format = check_quantize(config.quantize)
    if format is None or needed_statistics(config.quantize.rounding, format):
        raise ConfigError(
            "method.init=loftq needs quantize.format, and a quantize.rounding that takes no data"
        )
    return True


def _quantize_read(config: RunConfig, format: Format, path: str, w: jax.Array) -> Any:
    """An array of the checkpoint as soon as it is read, quantized where the configuration says
    so.
    """
    q = config.quantize
    if not is_target(path, w, q.targets, q.exclude):
        return w
    in_axes, out_axes = EMBEDDING if path.endswith("embedding") else MATRIX
    return quantize_weight(
        path,
        w,
        format,
        rounding=q.rounding,
        seed=config.train.seed,
        in_axes=in_axes,
        out_axes=out_axes,
        **q.rounding_options,
    )


def quantized_tree(config: RunConfig, setup: Setup, format: Format) -> Any:
    """The tree quantized, with statistics of the training rows where the rounding needs them."""
    q = config.quantize
    where: dict[str, Any] = {"targets": q.targets, "exclude": q.exclude}
    options = {"seed": config.train.seed, "rounding": q.rounding, **where, **q.rounding_options}
    if needed_statistics(q.rounding, format):
        batches = calibration_batches(config, setup, q.calibration_batches)

        def change(looped, tree):
            return quantize_in_turn(
                bind(looped), tree, batches, format, token_cap=q.token_cap, **options
            )

        params = _layer_by_layer(setup.model, setup.params, change)
    else:
        params = quantize(setup.params, format, **options)
    return params if setup.mesh is None else shard(params, setup.mesh)


def _dtype(name: str | None) -> Any:
    if name not in (None, "float32", "bfloat16", "float16"):
        raise ConfigError(f"option 'model.dtype': {name!r} is none of float32, bfloat16, float16")
    return name if name is None else jnp.dtype(name)


def read_source(config: RunConfig, source: SourceConfig, task: Task) -> list[Record]:
    """The records of one source. Raises ConfigError for a kind that the task does not take."""
    d, kinds = config.data, TASKS[task].kinds
    kind = d.kind or kinds[0]
    if kind not in kinds:
        raise ConfigError(
            f"option 'data.kind': a {task} model learns from {' or '.join(kinds)} records, "
            f"not {kind}"
        )
    training = source is config.data.train
    if kind == "facts":
        asking = not training if source.phrasing is None else source.phrasing == "held_out"
        records = facts_of(d, source)
        if task == "sequence_classification":
            return relation_questions(records)
        records = verbalise(
            _ruled(config, records), templates_of(config), held_out=d.held_out, asking=asking
        )
    else:
        records = read_records(
            source.path,
            kind=kind,
            split=source.split,
            columns=d.columns,
            delimiter=d.delimiter,
            on_error=d.on_error,
            limit=source.limit,
        )
    return _with_passages(config, records, config.train.seed if training else None)


def templates_of(config: RunConfig) -> dict[str, list[str]]:
    """The ways to say each relation. Raises ConfigError where there are none."""
    if config.data.templates is None:
        raise ConfigError(
            "data.kind=facts needs data.templates, a YAML file of ways to say each relation"
        )
    return read_templates(Path(config.data.templates))


def _ruled(config: RunConfig, facts: list[Record]) -> list[Record]:
    """Facts with the number of their relation's rule, where there are any."""
    if not config.data.knowledge.allowed_weight:
        return facts
    relations = list(
        dict.fromkeys(f.value["relation"] for f in facts_of(config.data, config.data.train))
    )
    number = {relation: n for n, relation in enumerate(relations, 1)}
    return [
        f._replace(value={**f.value, "rule": number.get(f.value["relation"], 0)}) for f in facts
    ]


def _with_passages(config: RunConfig, records: list[Record], seed: int | None) -> list[Record]:
    """Completions with the passages that are read before them, where there are any."""
    k = config.data.knowledge
    if k.passages is None:
        return records
    if "prompt" not in records[0].value:
        raise ConfigError(
            "data.knowledge.passages are read before prompts: of facts and completions"
        )
    if k.passages_kind == "facts":
        passages = passages_of(facts_of(config.data, k.passages), templates_of(config))
    else:
        texts = read_records(
            k.passages.path, kind="text", split=k.passages.split, limit=k.passages.limit
        )
        passages = [p.strip() for t in texts for p in t.value["text"].split("\n\n") if p.strip()]
    return with_passages(
        records, passages, each=k.passages_each, oracle_share=k.oracle_share, seed=seed
    )


def make_rows(config: RunConfig, source: SourceConfig, setup: Setup) -> Any:
    """The rows of one source, as the model's task has them; those of data.train with what is
    replayed beside them.
    """
    rows = rows_of(subject_of(config, setup), read_source(config, source, setup.model.task))
    if config.data.replay is None or source is not config.data.train:
        return rows
    other = text_rows(config, config.data.replay, setup)
    times, share = passes(config), config.data.replay_share
    count = round(times * len(rows.tokens) * share / (1.0 - share))
    rng = np.random.default_rng(config.train.seed)
    chosen = np.concatenate(
        [rng.permutation(len(other.tokens)) for _ in range(-(-count // len(other.tokens)))]
    )[:count]
    return _beside(
        rows._make(np.tile(x, (times, *[1] * (x.ndim - 1))) for x in rows), other, chosen
    )


def passes(config: RunConfig) -> int:
    """How often the rows of data.train are among those trained on: as often as they are to be seen
    where others are replayed, so that these are not the same ones each time.
    """
    return (
        1
        if config.data.replay is None or config.train.steps is not None
        else max(1, round(config.train.epochs))
    )


def text_rows(config: RunConfig, source: SourceConfig, setup: Setup) -> Any:
    """The rows of plain text, whatever kind the data is of."""
    if setup.model.task not in ("causal_lm", "masked_lm"):
        raise ConfigError(
            f"plain text is nothing for a {setup.model.task} model: leave data.replay and "
            "inject.retained out"
        )
    knowledge = dataclasses.replace(config.data.knowledge, passages=None)
    data = dataclasses.replace(config.data, kind="text", columns={}, knowledge=knowledge)
    config = dataclasses.replace(config, data=data)
    return rows_of(subject_of(config, setup), read_source(config, source, setup.model.task))


def _beside(rows: Any, other: Any, chosen: np.ndarray) -> Any:
    """Rows and the chosen ones of others after them; fields that the others lack are zero there."""

    def none(values):
        return np.zeros((len(chosen), *values.shape[1:]), values.dtype)

    def more(name, values):
        return getattr(other, name)[chosen] if hasattr(other, name) else none(values)

    return rows._make(
        np.concatenate([values, more(name, values)]) for name, values in rows._asdict().items()
    )
