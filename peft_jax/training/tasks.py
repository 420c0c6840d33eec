"""What each task of a model makes of records, which objective it has, and how its predictions are
measured.

A task is a line of `TASKS`; the loop, the step and the commands know none of them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from peft_jax.core.options import ConfigError
from peft_jax.data import Record, encode_masked, encode_pairs, label_ids, label_names
from peft_jax.data.formats import Kind
from peft_jax.knowledge.constraints import constrained
from peft_jax.knowledge.inputs import reads_knowledge
from peft_jax.models.blocks import Task
from peft_jax.objectives.contrast import contrast
from peft_jax.objectives.labels import ANSWERS, LABELS, squared_error
from peft_jax.objectives.objective import make_objective
from peft_jax.objectives.reading import Objective, Reading, cross_entropy
from peft_jax.objectives.tokens import TOKENS, balanced, masked_reading, next_token
from peft_jax.training.beside import is_informed, rule_tables, with_knowledge
from peft_jax.training.data import Subject, kind_in, names_of_labels
from peft_jax.training.encoding import (
    classified_rows,
    question_rows,
    source_rows,
    tagged_rows,
    token_rows,
)
from peft_jax.training.metrics import OF_NUMBERS
from peft_jax.training.predictions import answer_scores, label_scores, retrieved, tag_scores

Scores = Callable[[Subject, Any, Sequence[Record], Sequence[str]], dict[str, float]]


class TaskSpec(NamedTuple):
    """A task: the kinds of records (the usual one first), the rows made of them, how the loss reads
    a batch (None where it is not over distributions), the metrics beyond the loss (those measured
    unless others are asked for first) and how they are computed, the field of records with labels,
    and the objective where it is more than the reading's cross-entropy.
    """

    kinds: tuple[Kind, ...]
    rows: Callable[[Subject, Sequence[Record]], Any]
    reading: Callable[[Subject], Reading | None]
    metrics: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    scores: Scores | None = None
    labels: str | None = None
    objective: Callable[[Subject], Objective | None] = lambda subject: None


def objective_of(subject: Subject) -> Objective:
    """What training minimises."""
    objective = _objective(subject)
    if not is_informed(subject):
        return objective
    return lambda apply, params, batch, rng: objective(reads_knowledge(apply), params, batch, rng)


def _objective(subject: Subject) -> Objective:
    task, chunk = TASKS[subject.model.task], subject.loss_chunk
    reading = task.reading(subject)
    if subject.objective is not None:
        return _named_objective(subject, reading)
    if tables := rule_tables(subject):
        if reading is None:
            raise ConfigError("data.knowledge: rules are for losses over distributions")
        return balanced(
            functools.partial(constrained, reading, tables, chunk=chunk), subject.router_loss
        )
    if (own := task.objective(subject)) is not None:
        return own
    assert reading is not None  # a task has one of the two
    return functools.partial(cross_entropy, reading, chunk=chunk)


def _named_objective(subject: Subject, reading: Reading | None) -> Objective:
    """The objective `train.objective`. Raises ConfigError for an unknown one, and beside rules."""
    if rule_tables(subject):
        raise ConfigError(
            "train.objective stands in the place of the task's, and the rules of data.knowledge "
            "are an objective of their own: leave one of them out"
        )
    try:
        name, options = subject.objective or "", subject.objective_options
        return make_objective(name, subject.model.task, reading, options)
    except ValueError as error:
        raise ConfigError(f"option 'train.objective': {error}") from error


def rows_of(s: Subject, records: Sequence[Record]) -> Any:
    """The rows of records, with what is known about them beside."""
    return with_knowledge(s, TASKS[s.model.task].rows(s, records))


def kind_of(s: Subject) -> Any:
    """The kind of records that the data holds."""
    return kind_in(s.data, s.data.train, TASKS[s.model.task].kinds)


def wanted_labels(
    task: Task,
    records: Sequence[Record],
    known: Sequence[str] | int | None,
    kind: str | None = None,
) -> Sequence[str] | int | None:
    """The classes that a head needs for these records, 1 for a number; None where the checkpoint's
    own head is right.

    `known` are the checkpoint's classes (1 where it regresses, None where it has no such head),
    which rule: records name them or, where no name is a number, number them. `kind` says what
    labels are, "names" or "numbers", by default the records. Raises ConfigError for labels that the
    checkpoint does not know.
    """
    field = TASKS[task].labels
    if field is None:
        return None
    values = [
        v
        for r in records
        for v in (r.value[field] if isinstance(r.value[field], list) else [r.value[field]])
    ]
    numbers = kind == "numbers" or (
        kind is None and (known == 1 or label_names(records, field) is None)
    )
    if numbers and field == "label":
        return None if known == 1 else 1
    found = sorted({str(v) for v in values}) if kind == "names" else label_names(records, field)
    if known is None or isinstance(known, int):
        return found
    found, ids = found or [], label_ids(known)
    if strange := [n for n in found if n not in ids and n.casefold() not in ids]:
        raise ConfigError(
            f"the data has the labels {_listed(found)}, the checkpoint's classes are "
            f"{_listed(known)}, and {strange[0]!r} is "
            "none of them: name them alike, or set data.labels to the names of a new head"
        )
    return None


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:12]) + (f", ... ({len(names)} in all)" if len(names) > 12 else "")


def usual_metrics(s: Subject) -> tuple[str, ...]:
    """What is measured where nothing else is asked for."""
    task = TASKS[s.model.task]
    return (
        tuple(OF_NUMBERS)
        if task.labels == "label" and names_of_labels(s.model) is None
        else task.metrics
    )


# --------------------------------------------------------------------------------------------------
# language models


def _next_token(s: Subject) -> Objective:
    if s.router_loss and not getattr(s.model.config, "num_experts", 0):
        raise ConfigError(
            f"option 'train.router_loss': a {s.model.config.model_type} model has no experts "
            "to balance"
        )
    return functools.partial(next_token, chunk=s.loss_chunk, router_loss=s.router_loss)


def _masked(s: Subject) -> Reading:
    return masked_reading(
        mask_token=s.tokenizer.mask_token_id,
        vocab_size=s.model.config.vocab_size,
        share=s.data.mask_share,
    )


# --------------------------------------------------------------------------------------------------
# labels


def _label_reading(s: Subject) -> Reading | None:
    return None if names_of_labels(s.model) is None else LABELS


_LANGUAGE = ("perplexity",)
TASKS: dict[str, TaskSpec] = {
    "causal_lm": TaskSpec(
        ("text", "completion", "chat", "facts"),
        token_rows,
        lambda s: TOKENS,
        _LANGUAGE,
        ("exact_match", "bleu", "rouge"),
        objective=_next_token,
    ),
    "masked_lm": TaskSpec(
        ("text", "facts"),
        lambda s, records: encode_masked(records, s.tokenizer, s.data.sequence_length),
        _masked,
        _LANGUAGE,
    ),
    "seq2seq_lm": TaskSpec(
        ("completion",),
        source_rows,
        lambda s: TOKENS,
        _LANGUAGE,
        ("exact_match", "bleu", "rouge"),
    ),
    "sequence_classification": TaskSpec(
        ("classification", "facts"),
        classified_rows,
        _label_reading,
        ("accuracy", "f1"),
        ("matthews", *OF_NUMBERS),
        label_scores,
        "label",
        lambda s: squared_error if names_of_labels(s.model) is None else None,
    ),
    "token_classification": TaskSpec(
        ("tagging",),
        tagged_rows,
        lambda s: LABELS,
        ("accuracy", "f1"),
        ("matthews", "seqeval"),
        tag_scores,
        "tags",
    ),
    "question_answering": TaskSpec(
        ("question_answering",),
        question_rows,
        lambda s: ANSWERS,
        ("exact_match", "f1"),
        (),
        answer_scores,
    ),
    "feature_extraction": TaskSpec(
        ("pairs",),
        lambda s, records: encode_pairs(records, s.tokenizer, s.data.sequence_length),
        lambda s: None,
        ("retrieval",),
        (),
        retrieved,
        objective=lambda s: functools.partial(
            contrast, temperature=s.data.temperature, same=s.data.same_texts == "negatives"
        ),
    ),
}
