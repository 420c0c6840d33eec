"""From a RunConfig to a result: what the commands do, callable from Python as well."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import yaml
from jax.sharding import Mesh
from rich.console import Console

from peft_jax.core.bind import bind
from peft_jax.core.calibrate import calibrate, gradients
from peft_jax.core.files import write_json
from peft_jax.core.reparametrised import MATRIX
from peft_jax.core.sharding import fetch, make_mesh, shard
from peft_jax.core.tree import combine, count, is_node, is_target, map_places, merge, partition, places, select
from peft_jax.core.weight import Trainable, Weight, materialize
from peft_jax.data import Record, read_records
from peft_jax.data import fingerprint as fingerprint_of
from peft_jax.data.batches import batch_at
from peft_jax.hub import load, load_adapter, load_tokenizer, local_folder, save, save_adapter
from peft_jax.hub.checkpoint import read_config
from peft_jax.low_rank.init import STATISTICS
from peft_jax.low_rank.loftq import loftq
from peft_jax.models.blocks import Task
from peft_jax.models.families import task_of
from peft_jax.models.layers import stack_layers, unstack_layers
from peft_jax.pruning.masked import mask_updates
from peft_jax.pruning.prune import sparsity_of
from peft_jax.quantization.blocks import quantize_in_turn
from peft_jax.quantization.formats import Format
from peft_jax.quantization.quantize import EMBEDDING, bits_per_weight, quantize, quantize_weight
from peft_jax.quantization.quantized import Quantized
from peft_jax.quantization.rounding import needed_statistics
from peft_jax.training.checkpoint import Checkpoints, fingerprint
from peft_jax.training.config import (
    ConfigError,
    PruneConfig,
    QuantizeConfig,
    RunConfig,
    SourceConfig,
    check_method,
    check_quantize,
    to_dict,
)
from peft_jax.training.evaluate import generated_metrics, perplexity
from peft_jax.training.generate import generate
from peft_jax.training.loop import Result, check_batch, initial_state, train
from peft_jax.training.optimizer import make_optimizer
from peft_jax.training.prune import Report, shrunk, sparsified
from peft_jax.training.tasks import TASKS, Subject, classify, kind_of, usual_metrics, wanted_labels

ADAPTER, MODEL, BASE = "adapter", "model", "base"
TASK_TYPES = {  # PEFT's names
    "causal_lm": "CAUSAL_LM", "seq2seq_lm": "SEQ_2_SEQ_LM", "sequence_classification": "SEQ_CLS",
    "token_classification": "TOKEN_CLS", "question_answering": "QUESTION_ANS", "feature_extraction": "FEATURE_EXTRACTION",
}  # fmt: skip


class Setup(NamedTuple):
    """A loaded model with its tokenizer and, where the configuration asks for one, its mesh."""

    model: Any
    params: Any
    tokenizer: Any
    mesh: Mesh | None
    folder: Path


def start_distributed() -> None:
    """Join the other hosts where a launcher (TPU pod, SLURM, JAX_COORDINATOR_ADDRESS) started several."""
    several = os.environ.get("JAX_COORDINATOR_ADDRESS") or int(os.environ.get("SLURM_NTASKS", "1")) > 1
    pod = len(os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",")) > 1
    if not (several or pod) or jax.distributed.is_initialized():
        return
    names = {"num_processes": "JAX_NUM_PROCESSES", "process_id": "JAX_PROCESS_ID"}
    jax.distributed.initialize(**{k: int(os.environ[v]) for k, v in names.items() if v in os.environ})


def set_up(config: RunConfig) -> Setup:
    """Load the model (and the adapter to start from), placed on the mesh that the configuration describes."""
    mesh = make_mesh(config.mesh) if config.mesh or jax.device_count() > 1 else None
    c, q = config.model, QuantizeConfig() if _is_loftq(config) else config.quantize
    folder = local_folder(c.path, c.revision)
    format = check_quantize(q)
    calibrated = format is not None and bool(needed_statistics(q.rounding, format))
    whole = format is None or calibrated or _prunes(config)  # else weights are quantized as they are read
    labels = _labels(config, folder)
    model, params = load(
        folder,
        task=c.task,
        labels=labels,
        seed=config.train.seed,
        dtype=_dtype(c.dtype),
        mesh=mesh,
        scan_layers=c.scan_layers,
        remat=c.remat,
        attention_implementation=c.attention,
        each=None if whole else functools.partial(_quantize_read, config, format),
    )
    setup = Setup(model, params, load_tokenizer(folder), mesh, folder)
    if _prunes(config):
        batches = _calibration(config, setup, config.prune.calibration_batches)
        setup = _masked(config, _shrunk(config, setup, batches), batches)
    if format is not None and whole:
        setup = setup._replace(params=_quantized(config, setup, format))
    elif format is not None:
        for path in select(params, q.targets, q.exclude):  # raises for a target that matches nothing
            if not isinstance(places(params)[path], Quantized):
                raise ConfigError(f"quantize.targets name some of the layers stacked at {path}; set model.scan_layers=false")
    return setup._replace(params=load_adapter(setup.params, c.adapter)) if c.adapter else setup


def _labels(config: RunConfig, folder: Path) -> Sequence[str] | int | None:
    """The classes that the head is to have: the configured ones, or the training data's where the checkpoint's are others."""
    if config.data.labels:
        return config.data.labels
    hf_config = read_config(folder)
    task = task_of(hf_config, config.model.task)
    if TASKS[task].labels is None:
        return None
    own = task_of(hf_config) == task
    known = list(getattr(hf_config, "id2label", {}).values()) if own else None
    return wanted_labels(task, read_source(config, config.data.train, task), known)


def subject_of(config: RunConfig, setup: Setup) -> Subject:
    """The model as tasks see it."""
    return Subject(setup.model, setup.tokenizer, config.data, config.train.batch_size, setup.mesh)


def _prunes(config: RunConfig) -> bool:
    return _masks(config.prune) or bool(config.prune.keep) or config.prune.keep_parameters is not None


def _masks(p: PruneConfig) -> bool:
    return p.sparsity is not None or p.pattern is not None


def _shrunk(config: RunConfig, setup: Setup, batches: list[dict[str, Any]]) -> Setup:
    """The model made smaller, where the configuration asks for it."""
    model, params = shrunk(config.prune, setup.model, setup.params, batches)
    return setup._replace(model=model, params=params if setup.mesh is None else shard(params, setup.mesh))


def _masked(config: RunConfig, setup: Setup, batches: list[dict[str, Any]]) -> Setup:
    """The tree masked, where the configuration asks for it."""
    if not _masks(config.prune):
        return setup
    mask = lambda looped, tree: sparsified(config.prune, looped, tree, batches, config.train.seed)
    params = _layer_by_layer(setup.model, setup.params, mask)
    return setup._replace(params=params if setup.mesh is None else shard(params, setup.mesh))


def _calibration(config: RunConfig, setup: Setup, count: int) -> list[dict[str, Any]]:
    """The first batches of the training rows."""
    rows = make_rows(config, config.data.train, setup)
    return [batch_at(rows, i, config.train.batch_size, seed=config.train.seed) for i in range(count)]


def _layer_by_layer(model: Any, params: Any, change: Callable[[Any, Any], Any]) -> Any:
    """`change(model, params)` of the model with its layers looped; the tree is stacked again where it was."""
    if not model.scan_layers:
        return change(model, params)
    return stack_layers(change(model.clone(scan_layers=False), unstack_layers(params)))


def _is_loftq(config: RunConfig) -> bool:
    """Whether LoRA's start quantizes the base itself."""
    if config.method.get("name", "lora") != "lora" or config.method.get("init") != "loftq":
        return False
    format = check_quantize(config.quantize)
    if format is None or needed_statistics(config.quantize.rounding, format):
        raise ConfigError("method.init=loftq needs quantize.format, and a quantize.rounding that takes no data")
    return True


def _quantize_read(config: RunConfig, format: Format, path: str, w: jax.Array) -> Any:
    """An array of the checkpoint as soon as it is read, quantized where the configuration says so."""
    q = config.quantize
    if not is_target(path, w, q.targets, q.exclude):
        return w
    in_axes, out_axes = EMBEDDING if path.endswith("/embedding") else MATRIX
    return quantize_weight(
        path, w, format, rounding=q.rounding, seed=config.train.seed, in_axes=in_axes, out_axes=out_axes, **q.rounding_options
    )


def _quantized(config: RunConfig, setup: Setup, format: Format) -> Any:
    """The tree quantized, with statistics of the training rows where the rounding needs them."""
    q = config.quantize
    where: dict[str, Any] = {"targets": q.targets, "exclude": q.exclude}
    options = {"seed": config.train.seed, "rounding": q.rounding, **where, **q.rounding_options}
    if needed_statistics(q.rounding, format):
        batches = _calibration(config, setup, q.calibration_batches)
        change = lambda looped, tree: quantize_in_turn(bind(looped), tree, batches, format, **options)
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
        raise ConfigError(f"option 'data.kind': a {task} model learns from {' or '.join(kinds)} records, not {kind}")
    return read_records(
        source.path, kind=kind, split=source.split, columns=d.columns, delimiter=d.delimiter, on_error=d.on_error,
        limit=source.limit,
    )  # fmt: skip


def make_rows(config: RunConfig, source: SourceConfig, setup: Setup) -> Any:
    """The rows of one source, as the model's task has them."""
    task = setup.model.task
    return TASKS[task].rows(subject_of(config, setup), read_source(config, source, task))


def add_method(config: RunConfig, setup: Setup, rows: Any = None) -> Any:
    """The tree with the configured method in it, placed on the mesh.

    Starts that need statistics take them from the training rows, which are made where they are not given.
    """
    function, options = check_method(config.method)
    if _is_loftq(config):
        q = config.quantize
        where = {"targets": q.targets, "exclude": q.exclude, "rounding": q.rounding, **q.rounding_options}
        options = {k: v for k, v in options.items() if k != "init"} | {
            "quantize": functools.partial(quantize, format=check_quantize(q), seed=config.train.seed, **where)
        }
        function = loftq
    elif statistic := STATISTICS.get(options.get("init", "")):
        rows = make_rows(config, config.data.train, setup) if rows is None else rows
        options["statistics"] = _statistics(config, setup, rows, statistic, options)
    params = function(setup.params, jax.random.key(config.train.seed), **options)
    params = map_places(functools.partial(_head_trains, setup.model), params)
    params = mask_updates(params) if config.prune.mask_updates else params
    return params if setup.mesh is None else shard(params, setup.mesh)


def _head_trains(model: Any, path: str, w: Any) -> Any:
    """A place of a head that is not the language model's own trains whole, beside whatever method."""
    head = model.task not in ("causal_lm", "masked_lm", "seq2seq_lm") and set(path.split("/")) & set(model.heads)
    return Trainable(w, saved_as="module") if head and not is_node(w) else w


def _statistics(config: RunConfig, setup: Setup, rows: Any, statistic: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Covariances or gradients over 8 batches of the training rows."""
    batches = [batch_at(rows, i, config.train.batch_size, seed=config.train.seed) for i in range(8)]
    apply, where = bind(setup.model), {k: options[k] for k in ("targets", "exclude") if k in options}
    if statistic == "covariance":
        return calibrate(apply, setup.params, batches, **where)
    objective = TASKS[setup.model.task].objective(config, subject_of(config, setup))
    return gradients(lambda params, batch: objective(apply, params, batch, None)[0], setup.params, batches, **where)


def train_steps(config: RunConfig, rows: Any) -> int:
    """The number of optimizer steps."""
    if config.train.steps is not None:
        return config.train.steps
    return max(1, round(config.train.epochs * len(rows.tokens) / config.train.batch_size))


def identity(config: RunConfig, setup: Setup, rows: Any) -> dict[str, Any]:
    """What a checkpoint must have in common with the run that continues it."""
    return {
        "base": {"path": config.model.path, "revision": config.model.revision, "hash": fingerprint(setup.folder)},
        "task": setup.model.task,
        "data": fingerprint_of(rows),
        "method": json.loads(json.dumps(config.method)),
        "prune": to_dict(config)["prune"],
        "quantize": to_dict(config)["quantize"],
        "batch_size": config.train.batch_size,
        "seed": config.train.seed,
    }


def run_training(config: RunConfig, console: Console | None = None) -> Result:
    """The whole of `peft-jax train`: samples and evaluation before, training, both again, and the export."""
    console = console or Console()
    console.quiet = jax.process_index() != 0
    say = functools.partial(console.print, highlight=False, markup=False, soft_wrap=True)
    out = Path(config.output)
    if not config.resume and out.exists():
        for name in ("checkpoints", "best", "metrics.jsonl", "tensorboard"):
            stale = out / name
            shutil.rmtree(stale, ignore_errors=True) if stale.is_dir() else stale.unlink(missing_ok=True)
    setup = set_up(config)
    check_batch(config.train, config.data.sequence_length, setup.mesh)
    rows = make_rows(config, config.data.train, setup)
    validation = make_rows(config, config.data.validation, setup) if config.data.validation else None
    test = make_rows(config, config.data.test, setup) if config.data.test else validation
    params = add_method(config, setup, rows)
    trained, total = count(params)
    steps = train_steps(config, rows)
    say(
        f"{setup.model.config.model_type} model, {total:,} parameters, {trained:,} trained ({trained / total:.2%}); "
        f"{len(rows.tokens):,} rows of {config.data.sequence_length} tokens; {steps:,} steps",
    )
    out.mkdir(parents=True, exist_ok=True)
    if jax.process_index() == 0:
        (out / "config.yaml").write_text(yaml.safe_dump(to_dict(config), sort_keys=False), encoding="utf-8")
    before = _measure(config, setup, setup.params, test)
    samples = {"before": _samples(config, setup, setup.params)}
    if before:
        say(f"before: {_shown(before)}")
    result = train(
        setup.model,
        params,
        rows,
        make_optimizer(config.optimizer, steps, config.method),
        config.train,
        steps=steps,
        mesh=setup.mesh,
        validation=validation,
        objective=TASKS[setup.model.task].objective(config, subject_of(config, setup)),
        folder=out,
        resume=config.resume,
        identity=identity(config, setup, rows),
        console=console,
    )
    if result.interrupted:
        say(f"stopped at step {result.step} by SIGTERM; the checkpoint is in {out / 'checkpoints'}")
        return result
    after = _measure(config, setup, result.params, test)
    if after:
        say(f"after:  {_shown(after)}")
    samples["after"] = _samples(config, setup, result.params)
    _show_samples(say, config, samples)
    exported = export(config, setup, result.params, out)
    if jax.process_index() == 0:
        write_json(out / "results.json", {
            "before": before, "after": after, "trained_parameters": trained, "parameters": total, "steps": result.step,
            "skipped_steps": result.skipped, "samples": samples,
        })  # fmt: skip
    say(f"written: {exported}")
    return result


def _measure(config: RunConfig, setup: Setup, params: Any, rows: Any) -> dict[str, float]:
    """The loss and the wanted metrics on the held-out data. Raises ConfigError for a metric that the task does not have."""
    held, task = config.data.test or config.data.validation, TASKS[setup.model.task]
    if held is None or rows is None:
        return {}
    e, subject, language = config.evaluate, subject_of(config, setup), "perplexity" in task.metrics
    names = [*(e.metrics or usual_metrics(subject))]
    there = (*task.metrics, *task.others)
    if unknown := [n for n in names if n not in there]:
        raise ConfigError(f"evaluate.metrics: a {setup.model.task} model has no {unknown[0]!r}; it has {', '.join(there)}")
    metrics: dict[str, float] = {}
    if not language or "perplexity" in names:
        objective = task.objective(config, subject)
        metrics = perplexity(
            setup.model, params, rows, batch_size=config.train.batch_size, mesh=setup.mesh, objective=objective
        )
    wanted = [n for n in names if n != "perplexity"]
    if not wanted:
        return metrics
    records = read_source(config, held, setup.model.task)
    if task.scores is not None:
        return {"loss": metrics["loss"], **task.scores(subject, params, records, wanted)}
    if kind_of(subject) == "text":
        raise ConfigError(f"evaluate.metrics {wanted[0]!r} needs data of kind completion or chat")
    return metrics | generated_metrics(
        setup.model, params, records, setup.tokenizer, wanted, limit=e.limit, max_tokens=e.max_tokens, batch_size=e.batch_size
    )


def run_evaluation(config: RunConfig) -> dict[str, float]:
    """The whole of `peft-jax evaluate`: the configured metrics of the model (with its adapter) on the held-out data."""
    setup = set_up(config)
    held = config.data.test or config.data.validation
    if held is None:
        raise ConfigError("evaluate needs data.validation or data.test")
    check_batch(config.train, config.data.sequence_length, setup.mesh)
    return _measure(config, setup, setup.params, make_rows(config, held, setup))


def run_generation(config: RunConfig) -> list[str]:
    """The whole of `peft-jax generate`: continuations of the configured prompts."""
    if not config.generate.prompts:
        raise ConfigError("generate needs generate.prompts, as in 'generate.prompts=[Once upon a time]'")
    setup = set_up(config)
    return _samples(config, setup, setup.params)


def run_quantization(config: RunConfig, console: Console | None = None) -> Path:
    """The whole of `peft-jax quantize`: perplexity before and after, and the quantized model's folder."""
    if check_quantize(config.quantize) is None:
        raise ConfigError("quantize needs quantize.format, as in quantize.format=nf4")
    say = functools.partial((console or Console()).print, highlight=False, markup=False, soft_wrap=True)
    held = config.data.test or config.data.validation
    plain = set_up(dataclasses.replace(config, quantize=QuantizeConfig()))
    rows = make_rows(config, held, plain) if held else None
    say(f"before: {_shown(_measure(config, plain, plain.params, rows))}")
    del plain
    setup = set_up(config)
    nodes = [w for w in places(setup.params).values() if isinstance(w, Quantized)]
    bits = sum(bits_per_weight(w) * math.prod(w.shape) for w in nodes) / sum(math.prod(w.shape) for w in nodes)
    say(f"after:  {_shown(_measure(config, setup, setup.params, rows))} at {bits:.3f} bits a quantized weight")
    out = Path(config.output) / MODEL
    save(out, setup.model, setup.params, tokenizer=setup.tokenizer)
    say(f"written: {out}")
    return out


def run_pruning(config: RunConfig, console: Console | None = None) -> Path:
    """The whole of `peft-jax prune`: perplexity before and after, what became of each weight, how sensitive each layer is, a
    picture, and the pruned (and, where asked for, quantized) model's folder.
    """
    if not _prunes(config):
        raise ConfigError(
            "prune needs prune.sparsity, prune.pattern, prune.keep or prune.keep_parameters, as in prune.sparsity=0.5"
        )
    console = console or Console()
    say = functools.partial(console.print, highlight=False, markup=False, soft_wrap=True)
    held, out = config.data.test or config.data.validation, Path(config.output)
    plain = set_up(dataclasses.replace(config, prune=PruneConfig(), quantize=QuantizeConfig()))
    rows = make_rows(config, held, plain) if held else None
    numbers: dict[str, Any] = {
        "before": _measure(config, plain, plain.params, rows),
        "parameters_before": count(plain.params)[1],
    }
    say(f"before: {_shown(numbers['before'])}, {numbers['parameters_before']:,} parameters")
    batches = _calibration(config, plain, config.prune.calibration_batches)
    small = _shrunk(config, plain, batches)
    setup = _masked(config, small, batches)
    out.mkdir(parents=True, exist_ok=True)
    if _masks(config.prune):
        looped = lambda tree: unstack_layers(tree) if small.model.scan_layers else tree
        model = small.model.clone(scan_layers=False)
        report = Report(config.prune, model, looped(small.params), looped(setup.params), batches, config.train.seed)
        report.show(console)
        numbers |= report.to_dict()
        say(f"picture: {report.plot(out / 'pruning.png') or 'none, for want of matplotlib: pip install peft-jax[plots]'}")
    if (format := check_quantize(config.quantize)) is not None:
        setup = setup._replace(params=_quantized(config, setup, format))
    shares = sparsity_of(setup.params, targets=config.prune.targets, exclude=config.prune.exclude)
    numbers |= {"after": _measure(config, setup, setup.params, rows), "parameters": count(setup.params)[1]}
    zeros = f", {np.mean([s.mean() for s in shares.values()]):.2%} zeros a weight" if _masks(config.prune) else ""
    say(f"after:  {_shown(numbers['after'])}, {numbers['parameters']:,} parameters{zeros}")
    save(out / MODEL, setup.model, setup.params, tokenizer=setup.tokenizer)
    write_json(out / "pruning.json", numbers)
    say(f"written: {out / MODEL}")
    return out / MODEL


def _samples(config: RunConfig, setup: Setup, params: Any) -> list[str]:
    g, task = config.generate, setup.model.task
    if not g.prompts:
        return []
    if task == "sequence_classification":
        return [f" -> {label}" for label in classify(subject_of(config, setup), params, g.prompts)]
    if task not in ("causal_lm", "seq2seq_lm"):
        raise ConfigError(f"generate.prompts are of no use to a {task} model")
    return generate(
        setup.model, params, g.prompts, tokenizer=setup.tokenizer, max_tokens=g.max_tokens, temperature=g.temperature,
        top_k=g.top_k, top_p=g.top_p, stop=g.stop, seed=g.seed, cache_dtype=g.cache,
    )  # fmt: skip


def _show_samples(say: Any, config: RunConfig, samples: dict[str, list[str]]) -> None:
    for i, prompt in enumerate(config.generate.prompts):
        say(f"\nprompt: {prompt}")
        for when, texts in samples.items():
            say(f"{when}: {' '.join(texts[i].split())}")


def _shown(metrics: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())


def export(config: RunConfig, setup: Setup, params: Any, out: Path, *, merged: bool = False) -> Path:
    """Write what was trained: a PEFT adapter folder, or (full fine-tuning, or `merged`) a Hugging Face model folder."""
    params = jax.tree.map(fetch, params) if jax.process_count() > 1 else params
    nodes = places(params).values()
    whole = merged or any(isinstance(w, Weight) and w.whole for w in nodes)
    if jax.process_index() != 0:
        return out
    if whole:
        arrays = map_places(lambda _, w: _cast(w, setup.model.param_dtype), merge(params))
        save(out / MODEL, setup.model, arrays, tokenizer=setup.tokenizer)
        return out / MODEL
    options = check_method(config.method)[1]
    base, revision = config.model.path, config.model.revision
    if _prunes(config):  # the adapter is one of the pruned model
        base, revision = str(out / BASE), None
        save(out / BASE, setup.model, setup.params, tokenizer=setup.tokenizer)
    kind = TASK_TYPES.get(setup.model.task)
    save_adapter(out / ADAPTER, params, name=options.get("adapter", "default"), base=base, revision=revision, task_type=kind)
    return out / ADAPTER


def _cast(w: Any, dtype: Any) -> Any:
    """An array, or what a pruned weight stands for, in `dtype`; quantized and factorized weights as they are."""
    if isinstance(w, Weight) and (not w.pruned or isinstance(getattr(w, "base", None), Quantized)):
        return w
    return materialize(w).astype(dtype)


def run_export(config: RunConfig, *, merged: bool) -> Path:
    """The whole of `peft-jax export`: the newest (or best) checkpoint in `output` as an adapter or a merged model."""
    out = Path(config.output)
    chosen = next((n for n in ("best", "checkpoints") if (out / n).is_dir() and any((out / n).iterdir())), None)
    if chosen is None:
        raise ConfigError(f"there is no checkpoint in {out}; run `peft-jax train` first")
    setup = set_up(config)
    rows = make_rows(config, config.data.train, setup)
    params = add_method(config, setup, rows)
    optimizer = make_optimizer(config.optimizer, train_steps(config, rows), config.method)
    state = initial_state(params, optimizer, config.train.seed, setup.mesh)
    checkpoints = Checkpoints(out / chosen, keep=1, identity=identity(config, setup, rows))
    try:
        state, _ = checkpoints.restore(state)
    finally:
        checkpoints.close()
    return export(config, setup, combine(state.trainable, partition(params)[1]), out, merged=merged)
