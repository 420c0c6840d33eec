"""From a RunConfig to a result: what the commands do, callable from Python as well."""

from __future__ import annotations

import dataclasses
import functools
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import yaml
from rich.console import Console

from peft_jax.core.bind import bind
from peft_jax.core.calibrate import calibrate, gradients
from peft_jax.core.coverage import ledger, tokens_in_words
from peft_jax.core.files import write_json
from peft_jax.core.merge import merge
from peft_jax.core.partition import combine, count, partition
from peft_jax.core.reparametrised import replace_arrays
from peft_jax.core.sharding import fetch, shard
from peft_jax.core.tree import is_node, map_places, places
from peft_jax.core.weight import Weight, materialize
from peft_jax.data import fingerprint as fingerprint_of
from peft_jax.distillation.objective import of_student
from peft_jax.generation.generate import generate
from peft_jax.hub import save, save_adapter
from peft_jax.knowledge.inputs import entity_fusion, read_entities, reads_knowledge
from peft_jax.low_rank.loftq import loftq
from peft_jax.models.layers import unstack_layers
from peft_jax.models.tables import check_rows, first_position
from peft_jax.pruning.masked import mask_updates
from peft_jax.pruning.prune import sparsity_of
from peft_jax.quantization.quantize import bits_per_weight, quantize
from peft_jax.quantization.quantized import Quantized
from peft_jax.training.checkpoint import Checkpoints, fingerprint, weights_of
from peft_jax.training.config import (
    ConfigError,
    PruneConfig,
    QuantizeConfig,
    RunConfig,
    check_method,
    check_quantize,
    to_dict,
)
from peft_jax.training.evaluate import generated_metrics, perplexity
from peft_jax.training.loop import Result, check_batch, initial_state, train
from peft_jax.training.optimizer import make_optimizer
from peft_jax.training.prune import Report
from peft_jax.training.report import active_parameters, step_flops_per_token
from peft_jax.training.resume import ALTERS, settings
from peft_jax.training.setup import (
    Setup,
    calibration_batches,
    factorizes,
    first_batches,
    is_loftq,
    made_smaller,
    make_rows,
    masked,
    masks,
    passes,
    prunes,
    quantized_tree,
    read_source,
    set_up,
    subject_of,
)
from peft_jax.training.tasks import TASKS, beside, classify, kind_of, objective_of, usual_metrics
from peft_jax.training.teach import Lesson, distills, lesson

ADAPTER, MODEL, BASE, CHECKPOINTS = "adapter", "model", "base", "checkpoints"
TASK_TYPES = {  # PEFT's names
    "causal_lm": "CAUSAL_LM",
    "seq2seq_lm": "SEQ_2_SEQ_LM",
    "sequence_classification": "SEQ_CLS",
    "token_classification": "TOKEN_CLS",
    "question_answering": "QUESTION_ANS",
    "feature_extraction": "FEATURE_EXTRACTION",
}


def add_method(config: RunConfig, setup: Setup, rows: Any = None) -> Any:
    """The tree with the configured method in it, placed on the mesh.

    Starts that need statistics take them from the training rows, which are made where they are not
    given.
    """
    method, options = check_method(config.method)
    function: Any = method
    if is_loftq(config):
        q = config.quantize
        where = {
            "targets": q.targets,
            "exclude": q.exclude,
            "rounding": q.rounding,
            **q.rounding_options,
        }
        options = {k: v for k, v in options.items() if k != "init"} | {
            "quantize": functools.partial(
                quantize, format=check_quantize(q), seed=config.train.seed, **where
            )
        }
        function = loftq
    elif names := method.statistics(options):
        rows = make_rows(config, config.data.train, setup) if rows is None else rows
        layout = {} if method.layout is None else {"layout": method.layout(setup.params)}
        options["statistics"] = {
            name: _statistics(config, setup, rows, name, options | layout) for name in names
        }
    if method.takes_model:
        options["model"] = setup.model
    params = function(setup.params, jax.random.key(config.train.seed), **options)
    if (entities := config.data.knowledge.entities) is not None:
        if any(isinstance(w, Weight) and w.whole for w in places(params).values()):
            raise ConfigError(
                "data.knowledge.entities are kept in an adapter: choose a method that leaves the "
                "base as it is"
            )
        params = entity_fusion(
            params, read_entities(Path(entities))[1], adapter=options.get("adapter", "default")
        )
    heads = {
        p: "module"
        for p, w in places(params).items()
        if _is_head(setup.model, p) and not is_node(w)
    }
    params = replace_arrays(params, heads, name=options.get("adapter", "default"))
    params = mask_updates(params) if config.prune.mask_updates else params
    return params if setup.mesh is None else shard(params, setup.mesh)


def _is_head(model: Any, path: str) -> bool:
    """Whether a place is of a head that is not the language model's own, which trains whole beside
    whatever method.
    """
    return model.task not in ("causal_lm", "masked_lm", "seq2seq_lm") and bool(
        set(path.split("/")) & set(model.heads)
    )


def _statistics(
    config: RunConfig, setup: Setup, rows: Any, statistic: str, options: Mapping[str, Any]
) -> dict[str, Any]:
    """What `calibrate` gives for `statistic`, or gradients, over 8 batches of the training rows."""
    batches = first_batches(config, rows, 8)
    apply, where = (
        bind(setup.model),
        {k: options[k] for k in ("targets", "exclude", "layout") if k in options},
    )
    if statistic != "gradient":
        return calibrate(apply, setup.params, batches, statistic=statistic, **where)  # type: ignore[arg-type]
    objective = objective_of(config, subject_of(config, setup))
    return gradients(
        lambda params, batch: objective(apply, params, batch, None)[0],
        setup.params,
        batches,
        **where,
    )


def train_steps(config: RunConfig, rows: Any) -> int:
    """The number of optimizer steps."""
    if config.train.steps is not None:
        return config.train.steps
    wanted = config.train.epochs / passes(config) * len(rows.tokens)
    return max(
        1, math.ceil(round(wanted, 6) / config.train.batch_size)
    )  # every row of the last epoch is seen


def identity(
    config: RunConfig, setup: Setup, rows: Any, taught: Lesson | None = None
) -> dict[str, Any]:
    """What a checkpoint must have in common with the run that continues it."""
    return {
        "settings": settings(config),
        "base": fingerprint(setup.folder),
        "task": setup.model.task,
        "data": fingerprint_of(rows),
        **({} if taught is None else taught.identity),
    }


def run_training(
    config: RunConfig, console: Console | None = None, setup: Setup | None = None
) -> Result:
    """The whole of `peft-jax train`: samples and evaluation before, training, both again, and the
    export.

    A `setup` that there is already is taken as it is.
    """
    console = console or Console()
    console.quiet = jax.process_index() != 0
    say = functools.partial(console.print, highlight=False, markup=False, soft_wrap=True)
    out = Path(config.output)
    setup = set_up(config) if setup is None else setup
    check_batch(config.train, config.data.sequence_length, setup.mesh)
    rows = make_rows(config, config.data.train, setup)
    validation = (
        make_rows(config, config.data.validation, setup) if config.data.validation else None
    )
    test = make_rows(config, config.data.test, setup) if config.data.test else validation
    params = add_method(config, setup, rows)
    trained, total = count(params)
    steps = train_steps(config, rows)
    taught = lesson(config, setup, params, rows) if distills(config) else None
    say(
        f"{setup.model.config.model_type} model, {total:,} parameters, {trained:,} trained "
        f"({trained / total:.2%}); "
        f"{len(rows.tokens):,} rows of {config.data.sequence_length} tokens; {steps:,} steps",
    )
    for part in (rows, validation, test):
        check_rows(setup.model, part, before=first_position(params))
    who = identity(config, setup, rows, taught)
    _open_output(config, out, who)
    if jax.process_index() == 0:
        (out / "config.yaml").write_text(
            yaml.safe_dump(to_dict(config), sort_keys=False), encoding="utf-8"
        )
    before = _measure(config, setup, setup.params, test)
    samples = {"before": _samples(config, setup, setup.params)}
    if before:
        say(f"before: {_shown(before)}")
    objective = objective_of(config, subject_of(config, setup))
    result = train(
        setup.model,
        params if taught is None else taught.params,
        rows if taught is None else taught.rows,
        make_optimizer(config.optimizer, steps, config.method),
        config.train,
        steps=steps,
        mesh=setup.mesh,
        validation=validation,
        objective=objective if taught is None else taught.objective,
        evaluation=None if taught is None else of_student(objective),
        folder=out,
        resume=config.resume,
        identity=who,
        resume_with=config.resume_with,
        flops_per_token=None
        if taught is None
        else _flops_with_teachers(setup.model, params, taught),
        console=console,
    )
    if taught is not None:
        result = result._replace(params=result.params["student"])
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
        write_json(
            out / "results.json",
            {
                "before": before,
                "after": after,
                "trained_parameters": trained,
                "parameters": total,
                "steps": result.step,
                "skipped_steps": result.skipped,
                "samples": samples,
            },
        )
    bad = (
        f"; {result.skipped} of {result.step} steps skipped, whose gradient was not finite"
        if result.skipped
        else ""
    )
    say(f"written: {exported}{bad}")
    return result


def _open_output(config: RunConfig, out: Path, who: dict[str, Any]) -> None:
    """The folder to write to: refused where it holds another run that is to be continued, and
    without a run's records where a new one begins. Nothing is written or taken away before.
    """
    if config.resume and (out / CHECKPOINTS).is_dir():
        there = Checkpoints(
            out / CHECKPOINTS,
            keep=config.train.keep_checkpoints,
            identity=who,
            resume_with=config.resume_with,
        )
        try:
            there.check()
        finally:
            there.close()
    elif not config.resume and jax.process_index() == 0:
        for name in (CHECKPOINTS, "best", "metrics.jsonl", "tensorboard"):
            stale = out / name
            shutil.rmtree(stale, ignore_errors=True) if stale.is_dir() else stale.unlink(
                missing_ok=True
            )
    out.mkdir(parents=True, exist_ok=True)


def _flops_with_teachers(model: Any, student: Any, taught: Lesson) -> float:
    """Of a student's step, and of a forward pass through each teacher, for one token."""
    return step_flops_per_token(*active_parameters(model, student)) + 2.0 * taught.judged


def _measure(config: RunConfig, setup: Setup, params: Any, rows: Any) -> dict[str, float]:
    """The loss and the wanted metrics on the held-out data. Raises ConfigError for a metric that
    the task does not have.
    """
    held, task = config.data.test or config.data.validation, TASKS[setup.model.task]
    if held is None or rows is None:
        return {}
    e, subject, language = config.evaluate, subject_of(config, setup), "perplexity" in task.metrics
    names = [*(e.metrics or usual_metrics(subject))]
    there = (*task.metrics, *task.others)
    if unknown := [n for n in names if n not in there]:
        raise ConfigError(
            f"evaluate.metrics: a {setup.model.task} model has no {unknown[0]!r}; it has "
            f"{', '.join(there)}"
        )
    metrics: dict[str, float] = {}
    if not language or "perplexity" in names:
        objective = objective_of(config, subject)
        metrics = perplexity(
            setup.model,
            params,
            rows,
            batch_size=config.train.batch_size,
            mesh=setup.mesh,
            objective=objective,
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
        reads_knowledge(setup.model),
        params,
        records,
        setup.tokenizer,
        wanted,
        limit=e.limit,
        max_tokens=e.max_tokens,
        batch_size=e.batch_size,
        beside=beside(subject),
    )


def run_evaluation(config: RunConfig) -> dict[str, float]:
    """The whole of `peft-jax evaluate`: the configured metrics of the model (with its adapter) on
    the held-out data.
    """
    setup = set_up(config)
    held = config.data.test or config.data.validation
    if held is None:
        raise ConfigError("evaluate needs data.validation or data.test")
    check_batch(config.train, config.data.sequence_length, setup.mesh)
    return _measure(config, setup, setup.params, make_rows(config, held, setup))


def run_generation(config: RunConfig) -> list[str]:
    """The whole of `peft-jax generate`: continuations of the configured prompts."""
    if not config.generate.prompts:
        raise ConfigError(
            "generate needs generate.prompts, as in 'generate.prompts=[Once upon a time]'"
        )
    setup = set_up(config)
    return _samples(config, setup, setup.params)


def run_quantization(config: RunConfig, console: Console | None = None) -> Path:
    """The whole of `peft-jax quantize`: perplexity before and after, and the quantized model's
    folder.
    """
    if check_quantize(config.quantize) is None:
        raise ConfigError("quantize needs quantize.format, as in quantize.format=nf4")
    say = functools.partial(
        (console or Console()).print, highlight=False, markup=False, soft_wrap=True
    )
    held = config.data.test or config.data.validation
    plain = set_up(dataclasses.replace(config, quantize=QuantizeConfig()))
    rows = make_rows(config, held, plain) if held else None
    before = _measure(config, plain, plain.params, rows)
    say(f"before: {_shown(before)}")
    del plain
    with ledger() as book:
        setup = set_up(config)
    nodes = [w for w in places(setup.params).values() if isinstance(w, Quantized)]
    bits = sum(bits_per_weight(w) * math.prod(w.shape) for w in nodes) / sum(
        math.prod(w.shape) for w in nodes
    )
    after = _measure(config, setup, setup.params, rows)
    say(f"after:  {_shown(after)} at {bits:.3f} bits a quantized weight")
    for path, tokens in book.tokens.items():
        if tokens.ndim:
            say(f"tokens each expert of {path} saw: {tokens_in_words(tokens)}")
    out = Path(config.output) / MODEL
    save(out, setup.model, setup.params, tokenizer=setup.tokenizer)
    seen = {path: fetch(tokens).astype(int).tolist() for path, tokens in book.tokens.items()}
    write_json(
        out.parent / "quantization.json",
        {"before": before, "after": after, "bits": bits, "tokens": seen},
    )
    say(f"written: {out}")
    return out


def run_pruning(config: RunConfig, console: Console | None = None) -> Path:
    """The whole of `peft-jax prune`: perplexity before and after, what became of each weight, how
    sensitive each layer is, a picture, and the pruned (and, where asked for, quantized) model's
    folder.
    """
    if not prunes(config):
        raise ConfigError(
            "prune needs prune.sparsity, prune.pattern, prune.keep or prune.keep_parameters, as in "
            "prune.sparsity=0.5"
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
    batches = calibration_batches(config, plain, config.prune.calibration_batches)
    small = made_smaller(config, plain, batches)
    setup = masked(config, small, batches)
    out.mkdir(parents=True, exist_ok=True)
    if masks(config.prune):

        def looped(tree):
            return unstack_layers(tree) if small.model.scan_layers else tree

        model = small.model.clone(scan_layers=False)
        objective = objective_of(config, subject_of(config, small))
        trees = looped(small.params), looped(setup.params)
        report = Report(config.prune, model, *trees, batches, config.train.seed, objective)
        report.show(console)
        numbers |= report.to_dict()
        picture = report.plot(out / "pruning.png")
        say(f"picture: {picture or 'none, for want of matplotlib: pip install peft-jax[plots]'}")
    if (format := check_quantize(config.quantize)) is not None:
        setup = setup._replace(params=quantized_tree(config, setup, format))
    shares = sparsity_of(setup.params, targets=config.prune.targets, exclude=config.prune.exclude)
    numbers |= {
        "after": _measure(config, setup, setup.params, rows),
        "parameters": count(setup.params)[1],
    }
    zeros = (
        f", {np.mean([s.mean() for s in shares.values()]):.2%} zeros a weight"
        if masks(config.prune)
        else ""
    )
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
        reads_knowledge(setup.model),
        params,
        g.prompts,
        tokenizer=setup.tokenizer,
        max_tokens=g.max_tokens,
        temperature=g.temperature,
        top_k=g.top_k,
        top_p=g.top_p,
        stop=g.stop,
        seed=g.seed,
        cache_dtype=g.cache,
        beside=beside(subject_of(config, setup)),
    )


def _show_samples(say: Any, config: RunConfig, samples: dict[str, list[str]]) -> None:
    for i, prompt in enumerate(config.generate.prompts):
        say(f"\nprompt: {prompt}")
        for when, texts in samples.items():
            say(f"{when}: {' '.join(texts[i].split())}")


def _shown(metrics: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())


def export(
    config: RunConfig, setup: Setup, params: Any, out: Path, *, merged: bool = False
) -> Path:
    """Write what was trained: a PEFT adapter folder, or (full fine-tuning, or `merged`) a Hugging
    Face model folder.

    On several hosts all of them call this.
    """
    nodes = places(params).values()
    whole = merged or any(isinstance(w, Weight) and w.whole for w in nodes)
    if whole:
        arrays = map_places(lambda _, w: _cast(w, setup.model.param_dtype), merge(params))
        save(out / MODEL, setup.model, arrays, tokenizer=setup.tokenizer)
        return out / MODEL
    options = check_method(config.method)[1]
    base, revision = config.model.path, config.model.revision
    if prunes(config) or factorizes(config):  # the adapter is one of the smaller model
        base, revision = str(out / BASE), None
        save(out / BASE, setup.model, setup.params, tokenizer=setup.tokenizer)
    kind = TASK_TYPES.get(setup.model.task)
    save_adapter(
        out / ADAPTER,
        params,
        name=options.get("adapter", "default"),
        base=base,
        revision=revision,
        task_type=kind,
    )
    return out / ADAPTER


def _cast(w: Any, dtype: Any) -> Any:
    """An array, or what a pruned weight stands for, in `dtype`; quantized and factorized weights as
    they are.
    """
    if isinstance(w, Weight) and (not w.pruned or isinstance(getattr(w, "base", None), Quantized)):
        return w
    return materialize(w).astype(dtype)


def run_export(config: RunConfig, *, merged: bool) -> Path:
    """The whole of `peft-jax export`: the newest (or best) checkpoint in `output` as an adapter or
    a merged model.
    """
    out = Path(config.output)
    chosen = next(
        (n for n in ("best", "checkpoints") if (out / n).is_dir() and any((out / n).iterdir())),
        None,
    )
    if chosen is None:
        raise ConfigError(f"there is no checkpoint in {out}; run `peft-jax train` first")
    setup = set_up(config)
    rows = make_rows(config, config.data.train, setup)
    params = add_method(config, setup, rows)
    taught = lesson(config, setup, params, rows) if distills(config) else None
    whole = params if taught is None else taught.params
    state = weights_of(initial_state(whole, optax.identity(), config.train.seed, setup.mesh))
    how = [
        name for name in ALTERS if name.startswith(("optimizer.", "train."))
    ]  # it was trained: only what it is counts
    checkpoints = Checkpoints(
        out / chosen, keep=1, identity=identity(config, setup, rows, taught), resume_with=how
    )
    try:
        checkpoints.check()
        state, _ = checkpoints.restore(state)
    finally:
        checkpoints.close()
    trained = combine(state.trainable, partition(whole)[1])
    return export(
        config, setup, trained if taught is None else trained["student"], out, merged=merged
    )
