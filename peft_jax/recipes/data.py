"""`peft-jax data`: what a run would learn, before it runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from peft_jax.core.options import ConfigError
from peft_jax.data import Example, Record, encode, fit, pack
from peft_jax.data.skipped import Skipped
from peft_jax.data.source import SourceConfig
from peft_jax.hub import local_folder
from peft_jax.hub.checkpoint import read_config
from peft_jax.models.blocks import Task
from peft_jax.models.families import task_of
from peft_jax.recipes.run_config import RunConfig
from peft_jax.recipes.setup import opened, subject_in, tokenizer_in
from peft_jax.training.data import Subject
from peft_jax.training.rows import read_source
from peft_jax.training.tasks import TASKS, rows_of


class Shown(NamedTuple):
    """A piece of text: whether it is learnt, and whether it is a special token."""

    text: str
    learnt: bool
    special: bool


class Sample(NamedTuple):
    """A row of a record as the model reads it."""

    origin: str
    pieces: list[Shown]


class SourceReport(NamedTuple):
    """What becomes of one source: records, examples (a conversation may be several), their
    lengths, tokens learnt, and rows with the share of them that is filled.
    """

    name: str
    records: int
    examples: int
    lengths: np.ndarray
    learnt: int
    rows: int
    filled: float
    longest: str
    skipped: Skipped
    samples: list[Sample]


def run_data(config: RunConfig, shown: int = 3) -> list[SourceReport]:
    """What training would learn of data.train (or data.sources), and what it would be measured on;
    the first `shown` examples of the training data as the model reads them.
    """
    folder = local_folder(config.model.path, config.model.revision)
    task = task_of(read_config(folder), config.model.task)
    d = config.data
    sources = {"train": d.train, "validation": d.validation, "test": d.test}
    there = {name: source for name, source in sources.items() if source is not None}
    counts = {name: shown if name == "train" else 0 for name in there}
    if task == "causal_lm":
        tokenizer = tokenizer_in(config, folder)
        return [_of_texts(config, tokenizer, task, n, s, counts[n]) for n, s in there.items()]
    subject = subject_in(config, opened(config))
    return [_of_rows(subject, n, s, counts[n]) for n, s in there.items()]


def _of_texts(
    config: RunConfig, tokenizer: Any, task: Task, name: str, source: SourceConfig, shown: int
) -> SourceReport:
    """Of what a causal language model learns from, which needs no model."""
    d, skipped = config.data, Skipped()
    records = read_source(d, source, task, config.train.seed, skipped)
    made = list(encode(records, tokenizer, on_error=d.on_error, chat=d.chat, skipped=skipped))
    fitting = fit(made, d.sequence_length, too_long=d.too_long, skipped=skipped)
    rows = pack(fitting, d.sequence_length, packing=d.packing)
    lengths = np.asarray([len(e.ids) for e in made])
    longest = made[int(lengths.argmax())]
    return SourceReport(
        name,
        len(records),
        len(made),
        lengths,
        int((rows.weights > 0).sum()),
        len(rows.tokens),
        float((rows.segment_ids > 0).mean()),
        f"{lengths.max():,} tokens, {longest.origin}",
        skipped,
        [Sample(e.origin, pieces_of(tokenizer, e)) for e in made[:shown]],
    )


def _of_rows(subject: Subject, name: str, source: SourceConfig, shown: int) -> SourceReport:
    """Of what another model learns from, by the rows that the model's task makes."""
    skipped = Skipped()
    records = read_source(subject.data, source, subject.model.task, subject.seed, skipped)
    rows = rows_of(subject, records)
    lengths = (rows.segment_ids > 0).sum(1)
    longest = int(lengths.argmax())
    return SourceReport(
        name,
        len(records),
        len(rows.tokens),
        lengths,
        int((rows.weights > 0).sum()),
        len(rows.tokens),
        float((rows.segment_ids > 0).mean()),
        f"{lengths.max():,} tokens, row {longest}",
        skipped,
        [_sample(subject, rows, records, i) for i in range(min(shown, len(rows.tokens)))],
    )


def _sample(subject: Subject, rows: Any, records: Sequence[Record], i: int) -> Sample:
    used = rows.segment_ids[i] > 0
    ids = rows.tokens[i][used]
    same = rows.weights.shape == rows.tokens.shape
    learn = rows.weights[i][used] > 0 if same else np.zeros(len(ids), bool)
    pieces = pieces_of(subject.tokenizer, Example(ids, learn))
    if len(records) != len(rows.tokens):
        return Sample(f"row {i}", pieces)
    field = TASKS[subject.model.task].labels
    if field is not None:
        pieces.append(Shown(f" -> {records[i].value[field]}", learnt=True, special=False))
    return Sample(records[i].origin, pieces)


def pieces_of(tokenizer: Any, example: Example) -> list[Shown]:
    """The text of an example in pieces, each wholly learnt or not, each special token alone."""
    special = set(tokenizer.all_special_ids)
    special |= {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    pieces: list[Shown] = []
    start = 0
    ids, learn = example.ids.tolist(), example.learn.tolist()
    for end in range(1, len(ids) + 1):
        alone = ids[start] in special or (end < len(ids) and ids[end] in special)
        if end == len(ids) or alone or learn[end] != learn[start]:
            text = tokenizer.decode(ids[start:end], skip_special_tokens=False)
            pieces.append(Shown(text, learn[start], ids[start] in special))
            start = end
    return pieces


def check_shown(count: int) -> None:
    """Raise ConfigError for a number of examples that cannot be shown."""
    if count < 0:
        raise ConfigError(f"--records must not be negative, got {count}")
