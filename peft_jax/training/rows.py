"""The rows of a source: its records, those of its task, with what is replayed or read beside."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from rich.progress import Progress, TextColumn, TimeElapsedColumn

from peft_jax.core.options import ConfigError
from peft_jax.core.stage import Batches
from peft_jax.data import Record, read_records
from peft_jax.data.batches import batch_at
from peft_jax.data.cache import cache_key, identity_of_file, open_rows, write_rows
from peft_jax.data.encode import fitting
from peft_jax.data.mixture import mixed
from peft_jax.data.records import Kind, iter_records
from peft_jax.data.skipped import Skipped
from peft_jax.data.source import SourceConfig
from peft_jax.data.workers import encode_with
from peft_jax.distillation.match import tokenizer_hash
from peft_jax.knowledge.facts import relation_questions, verbalise
from peft_jax.knowledge.retrieval import passages_of, with_passages
from peft_jax.knowledge.section import KnowledgeConfig
from peft_jax.models.blocks import Task
from peft_jax.training.data import DataConfig, Subject, facts_of, kind_in, templates_of
from peft_jax.training.tasks import TASKS, rows_of

logger = logging.getLogger("peft_jax")


def read_source(
    data: DataConfig,
    source: SourceConfig,
    task: Task,
    seed: int,
    skipped: Skipped | None = None,
) -> list[Record]:
    """The records of one source; what is passed over is counted in `skipped`. Raises ConfigError
    for a kind that the task does not take.
    """
    kinds = TASKS[task].kinds
    if source is data.train and data.sources:
        return _mixed(data, task, seed, skipped)
    kind = kind_in(data, source, kinds)
    if kind not in kinds:
        raise ConfigError(
            f"option 'data.kind': a {task} model learns from {' or '.join(kinds)} records, "
            f"not {kind}"
        )
    training = source is data.train
    if kind == "facts":
        asking = not training if source.phrasing is None else source.phrasing == "held_out"
        records = facts_of(data, source)
        if task == "sequence_classification":
            return relation_questions(records)
        facts, ways = _ruled(data, records), templates_of(data)
        records = verbalise(facts, ways, held_out=data.held_out, asking=asking)
    else:
        records = list(_records(data, source, kind, skipped))
    return _with_passages(data, records, seed if training else None)


def _mixed(data: DataConfig, task: Task, seed: int, skipped: Skipped | None) -> list[Record]:
    """The records of data.sources, each as often as it is to be seen."""
    parts = []
    for source in data.sources:
        own = dataclasses.replace(
            data,
            train=source,
            sources=[],
            kind=source.kind or data.kind,
            columns=source.columns or data.columns,
        )
        parts.append(read_source(own, own.train, task, seed, skipped))
    return mixed(parts, data.sources, seed)


def _ruled(data: DataConfig, facts: list[Record]) -> list[Record]:
    """Facts with the number of their relation's rule, where there are any."""
    if not data.knowledge.allowed_weight:
        return facts
    relations = list(dict.fromkeys(f.value["relation"] for f in facts_of(data, data.train)))
    number = {relation: n for n, relation in enumerate(relations, 1)}
    return [
        f._replace(value={**f.value, "rule": number.get(f.value["relation"], 0)}) for f in facts
    ]


def _records(
    data: DataConfig, source: SourceConfig, kind: Kind | None, skipped: Skipped | None
) -> Iterator[Record]:
    """The records of a source, one after another, read as the configuration says."""
    return iter_records(
        source.path,
        kind=kind,
        split=source.split,
        columns=data.columns,
        delimiter=data.delimiter,
        on_error=data.on_error,
        limit=source.limit,
        skipped=skipped,
    )


def _with_passages(data: DataConfig, records: list[Record], seed: int | None) -> list[Record]:
    """Completions with the passages that are read before them, where there are any."""
    k = data.knowledge
    if k.passages is None:
        return records
    if "prompt" not in records[0].value:
        raise ConfigError(
            "data.knowledge.passages are read before prompts: of facts and completions"
        )
    if k.passages_kind == "facts":
        passages = passages_of(facts_of(data, k.passages), templates_of(data))
    else:
        source = k.passages
        texts = read_records(source.path, kind="text", split=source.split, limit=source.limit)
        passages = [p.strip() for t in texts for p in t.value["text"].split("\n\n") if p.strip()]
    return with_passages(
        records, passages, each=k.passages_each, oracle_share=k.oracle_share, seed=seed
    )


def records_of(subject: Subject, source: SourceConfig) -> list[Record]:
    """The records of one source, as the subject's model learns from them."""
    return read_source(subject.data, source, subject.model.task, subject.seed)


def make_rows(subject: Subject, source: SourceConfig) -> Any:
    """The rows of one source, as the model's task has them; those of data.train with what is
    replayed beside them.
    """
    data, times = subject.data, subject.passes
    if data.cache is not None and subject.model.task == "causal_lm":
        rows = cached_rows(subject, source)
    else:
        rows = rows_of(subject, records_of(subject, source))
    if data.replay is None or source is not data.train:
        return rows
    other, share = text_rows(subject, data.replay), data.replay_share
    count = round(times * len(rows.tokens) * share / (1.0 - share))
    rng = np.random.default_rng(subject.seed)
    chosen = np.concatenate(
        [rng.permutation(len(other.tokens)) for _ in range(-(-count // len(other.tokens)))]
    )[:count]
    seen = rows._make(np.tile(x, (times, *[1] * (x.ndim - 1))) for x in rows)
    return _beside(seen, other, chosen)


def cached_rows(subject: Subject, source: SourceConfig) -> Any:
    """The rows of one source of a causal language model, from data.cache; made there first where
    they are not. Of several processes the first one makes them. Raises ConfigError for data that a
    cache does not hold.
    """
    data = subject.data
    if data.knowledge != KnowledgeConfig() or data.kind == "facts":
        raise ConfigError("data.cache holds no facts and no knowledge beside data: leave it out")
    folder = Path(str(data.cache)) / _key(subject, source)
    if open_rows(folder) is None and jax.process_index() == 0:
        _make_cache(subject, source, folder)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(folder.name)
    rows = open_rows(folder)
    if rows is None:
        raise ConfigError(f"data.cache={data.cache} is no folder that all processes share")
    return rows


def _key(subject: Subject, source: SourceConfig) -> str:
    d, tokenizer = subject.data, subject.tokenizer
    sources = d.sources if source is d.train and d.sources else [source]
    return cache_key(
        sources=[(dataclasses.asdict(s), identity_of_file(s.path)) for s in sources],
        seed=subject.seed if len(sources) > 1 else None,
        tokenizer=tokenizer_hash(tokenizer),
        special=[tokenizer.special_tokens_map, getattr(tokenizer, "add_bos_token", None)],
        template=tokenizer.chat_template,
        options=[d.kind, d.columns, d.delimiter, d.template_options, d.turns, d.on_error],
        rows=[d.sequence_length, d.packing, d.too_long],
    )


def _make_cache(subject: Subject, source: SourceConfig, folder: Path) -> None:
    d, skipped = subject.data, Skipped()
    if source is d.train and d.sources:
        records = read_source(d, source, "causal_lm", subject.seed, skipped)
    else:
        kind = kind_in(d, source, TASKS["causal_lm"].kinds)
        records = _records(d, source, kind, skipped)
    examples = encode_with(
        d.workers,
        records,
        subject.tokenizer,
        on_error=d.on_error,
        chat=d.chat,
        skipped=skipped,
    )
    fits = fitting(examples, d.sequence_length, too_long=d.too_long, skipped=skipped)
    with Progress(TextColumn("{task.description}"), TimeElapsedColumn(), transient=True) as bar:
        task = bar.add_task("reading the data", total=None)

        def tell(examples: int, rows: int) -> None:
            bar.update(task, description=f"{examples:,} examples in {rows:,} rows")

        write_rows(folder, fits, d.sequence_length, packing=d.packing, tell=tell)
    logger.info("%d records skipped while %s was made", len(skipped), folder)


def text_rows(subject: Subject, source: SourceConfig) -> Any:
    """The rows of plain text, whatever kind the data is of."""
    if subject.model.task not in ("causal_lm", "masked_lm"):
        raise ConfigError(
            f"plain text is nothing for a {subject.model.task} model: leave data.replay and "
            "inject.retained out"
        )
    plain = subject._replace(data=subject.data.as_text())
    return rows_of(plain, records_of(plain, source))


def _beside(rows: Any, other: Any, chosen: np.ndarray) -> Any:
    """Rows and the chosen ones of others after them; fields that the others lack are zero there."""

    def none(values):
        return np.zeros((len(chosen), *values.shape[1:]), values.dtype)

    def more(name, values):
        return getattr(other, name)[chosen] if hasattr(other, name) else none(values)

    return rows._make(
        np.concatenate([values, more(name, values)]) for name, values in rows._asdict().items()
    )


def first_batches(subject: Subject, rows: Any, count: int) -> Batches:
    """The batches that training on these rows begins with."""
    return [batch_at(rows, i, subject.batch_size, seed=subject.seed) for i in range(count)]
