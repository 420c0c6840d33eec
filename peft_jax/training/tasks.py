"""What each task of a model makes of records, which objective it has, and how its predictions are
measured.

A task is a line of `TASKS`; the loop, the step and the commands know none of them.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from peft_jax.core.bind import bind
from peft_jax.core.sharding import fetch
from peft_jax.data import (
    Record,
    encode,
    encode_classification,
    encode_masked,
    encode_pairs,
    encode_questions,
    encode_sources,
    encode_tagging,
    evaluation_batches,
    fit,
    label_ids,
    label_names,
    pack,
    read_records,
    with_fields,
)
from peft_jax.knowledge.constraints import constrained, objects_of, read_lexicon
from peft_jax.knowledge.facts import part_of
from peft_jax.knowledge.inputs import (
    attach_triples,
    make_lexicon,
    make_triples,
    mark_entities,
    read_entities,
    reads_knowledge,
)
from peft_jax.models.blocks import Task
from peft_jax.models.tables import check_rows, first_position
from peft_jax.objectives.contrast import contrast, embed_texts
from peft_jax.objectives.labels import ANSWERS, LABELS, squared_error
from peft_jax.objectives.objective import make_objective
from peft_jax.objectives.reading import Objective, Reading, cross_entropy, inputs_of
from peft_jax.objectives.tokens import TOKENS, balanced, masked_reading, next_token
from peft_jax.training.config import ConfigError, DataConfig, RunConfig, SourceConfig
from peft_jax.training.loop import on_devices
from peft_jax.training.metrics import OF_ANSWERS, OF_LABELS, OF_NUMBERS, seqeval

Model = Any
Scores = Callable[["Subject", Any, Sequence[Record], Sequence[str]], dict[str, float]]


class Subject(NamedTuple):
    """A model with what it takes to use it: its tokenizer, the data's options, the batch size and
    the mesh.
    """

    model: Model
    tokenizer: Any
    data: DataConfig
    batch_size: int
    mesh: Mesh | None


class TaskSpec(NamedTuple):
    """A task: the kinds of records (the usual one first), the rows made of them, how the loss reads
    a batch (None where it is not over distributions), the metrics beyond the loss (those measured
    unless others are asked for first) and how they are computed, the field of records with labels,
    and the objective where it is more than the reading's cross-entropy.
    """

    kinds: tuple[str, ...]
    rows: Callable[[Subject, Sequence[Record]], Any]
    reading: Callable[[Subject], Reading | None]
    metrics: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    scores: Scores | None = None
    labels: str | None = None
    objective: Callable[[RunConfig, Subject], Objective | None] = lambda config, subject: None


def objective_of(config: RunConfig, subject: Subject) -> Objective:
    """What training minimises."""
    objective = _objective(config, subject)
    if not _informed(subject):
        return objective
    return lambda apply, params, batch, rng: objective(reads_knowledge(apply), params, batch, rng)


def _objective(config: RunConfig, subject: Subject) -> Objective:
    task, chunk = TASKS[subject.model.task], config.train.loss_chunk
    reading = task.reading(subject)
    if config.train.objective is not None:
        return _named_objective(config, subject, reading)
    if tables := rule_tables(subject):
        if reading is None:
            raise ConfigError("data.knowledge: rules are for losses over distributions")
        return balanced(
            functools.partial(constrained, reading, tables, chunk=chunk), config.train.router_loss
        )
    if (own := task.objective(config, subject)) is not None:
        return own
    assert reading is not None  # a task has one of the two
    return functools.partial(cross_entropy, reading, chunk=chunk)


def _named_objective(config: RunConfig, subject: Subject, reading: Reading | None) -> Objective:
    """The objective `train.objective`. Raises ConfigError for an unknown one, and beside others."""
    if config.distill.teachers or rule_tables(subject):
        raise ConfigError(
            "train.objective stands in the place of the task's, and distill.teachers and the rules "
            "of data.knowledge are objectives of their own: leave one of them out"
        )
    try:
        options = config.train.objective_options
        return make_objective(config.train.objective or "", subject.model.task, reading, options)
    except ValueError as error:
        raise ConfigError(f"option 'train.objective': {error}") from error


# -------------------------------------------------------------------------------------------------
# knowledge beside the data


def _informed(s: Subject) -> bool:
    return s.data.knowledge.triples is not None or s.data.knowledge.entities is not None


def rows_of(s: Subject, records: Sequence[Record]) -> Any:
    """The rows of records, with what is known about them beside."""
    k, rows = s.data.knowledge, TASKS[s.model.task].rows(s, records)
    if k.lexicon is not None:
        if s.model.task != "token_classification":
            raise ConfigError(
                "data.knowledge.lexicon says the labels of words, and this is a "
                f"{s.model.task} model"
            )
        words, _ = read_lexicon(Path(k.lexicon), names_of_labels(s.model) or [])
        marked = mark_entities(rows, make_lexicon(s.tokenizer, words), everywhere=True)
        rows = with_fields(rows, rules=np.where(rows.weights > 0, marked.entities, 0))
    rows = rows if (add := beside(s)) is None else add(rows)
    check_rows(s.model, rows, tokenizer=s.tokenizer)
    return rows


def beside(s: Subject) -> Callable[[Any], Any] | None:
    """What sets the triples and entities of `data.knowledge` beside rows of tokens; None where
    there are none.

    Raises ConfigError for an encoder-decoder.
    """
    k = s.data.knowledge
    if _informed(s) and s.model.task == "seq2seq_lm":
        raise ConfigError(
            "data.knowledge: triples and entities are for encoders and decoders, not for "
            "encoder-decoders"
        )
    steps: list[Callable[[Any], Any]] = []
    if k.entities is not None:
        steps.append(
            functools.partial(
                mark_entities, lexicon=make_lexicon(s.tokenizer, read_entities(Path(k.entities))[0])
            )
        )
    if k.triples is not None:
        triples = make_triples(s.tokenizer, facts_of(s.data, k.triples))
        steps.append(
            functools.partial(
                attach_triples, triples=triples, most=k.triples_each, room=k.triples_room
            )
        )
    return (lambda rows: functools.reduce(lambda r, step: step(r), steps, rows)) if steps else None


def facts_of(data: DataConfig, source: SourceConfig) -> list[Record]:
    """The facts of a source, those of the subjects that it is to have."""
    facts = read_records(
        source.path,
        kind="facts",
        split=source.split,
        columns=data.columns if data.kind == "facts" else None,
        delimiter=data.delimiter,
        on_error=data.on_error,
        limit=source.limit,
    )
    return facts if source.part is None else part_of(facts, source.part, data.unseen)


def rule_tables(s: Subject) -> dict[str, tuple[np.ndarray, float]]:
    """The tables of `constrained`: the objects that relations allow, or the labels that a lexicon
    gives words.
    """
    k = s.data.knowledge
    if k.lexicon is not None:
        return {
            "prior": (
                read_lexicon(Path(k.lexicon), names_of_labels(s.model) or [])[1],
                k.lexicon_weight,
            )
        }
    if k.allowed_weight:
        if s.model.task != "causal_lm":
            raise ConfigError(
                "data.knowledge.allowed_weight is for causal language models, not a "
                f"{s.model.task} model"
            )
        width = s.model.config.vocab_size
        return {
            "allowed": (
                objects_of(facts_of(s.data, s.data.train), s.tokenizer, width)[1],
                k.allowed_weight,
            )
        }
    return {}


def names_of_labels(model: Model) -> list[str] | None:
    """The names of a model's classes; None of a model that regresses."""
    hf = json.loads(model.config.hf_config)
    if model.config.num_labels == 1:
        return None
    names = hf.get("id2label") or {}
    return [names.get(str(i), f"LABEL_{i}") for i in range(model.config.num_labels)]


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


def predict(subject: Subject, params: Any, rows: Any) -> np.ndarray:
    """A head's logits for all rows, float32 [N, ...]."""
    check_rows(subject.model, rows, before=first_position(params))
    apply = reads_knowledge(bind(subject.model))

    @jax.jit
    def run(params: Any, batch: Any) -> jax.Array:
        return apply(params, batch["tokens"], **inputs_of(batch))

    parts = [
        fetch(run(params, on_devices(b, subject.mesh)))
        for b in evaluation_batches(rows, subject.batch_size)
    ]
    return np.concatenate(parts)[: len(rows.tokens)]


# --------------------------------------------------------------------------------------------------
# language models


def _token_rows(s: Subject, records: Sequence[Record]) -> Any:
    d, kind = s.data, kind_of(s)
    examples = encode(records, s.tokenizer, kind, on_error=d.on_error)
    return pack(
        fit(examples, d.sequence_length, kind, d.too_long), d.sequence_length, packing=d.packing
    )


def kind_of(s: Subject) -> Any:
    """The kind of records that the data holds."""
    return s.data.kind or TASKS[s.model.task].kinds[0]


def _next_token(config: RunConfig, s: Subject) -> Objective:
    if config.train.router_loss and not getattr(s.model.config, "num_experts", 0):
        raise ConfigError(
            f"option 'train.router_loss': a {s.model.config.model_type} model has no experts "
            "to balance"
        )
    return functools.partial(
        next_token, chunk=config.train.loss_chunk, router_loss=config.train.router_loss
    )


def _masked(s: Subject) -> Reading:
    return masked_reading(
        mask_token=s.tokenizer.mask_token_id,
        vocab_size=s.model.config.vocab_size,
        share=s.data.mask_share,
    )


def _source_rows(s: Subject, records: Sequence[Record]) -> Any:
    d = s.data
    return encode_sources(
        records, s.tokenizer, d.sequence_length, s.model.config.start_token, d.target_length
    )


# --------------------------------------------------------------------------------------------------
# labels


def _classified_rows(s: Subject, records: Sequence[Record]) -> Any:
    return _without_types(s, _classified(s, records))


def _classified(s: Subject, records: Sequence[Record]) -> Any:
    labels = names_of_labels(s.model)
    return encode_classification(
        records, s.tokenizer, s.data.sequence_length, labels, on_error=s.data.on_error
    )


def _tagged_rows(s: Subject, records: Sequence[Record]) -> Any:
    labels = names_of_labels(s.model) or []
    rows = encode_tagging(
        records, s.tokenizer, s.data.sequence_length, labels, on_error=s.data.on_error
    )
    return _without_types(s, rows)


class _Untyped(NamedTuple):
    """`LabelledRows` for a model without types."""

    tokens: np.ndarray
    segment_ids: np.ndarray
    labels: np.ndarray
    weights: np.ndarray


def _without_types(s: Subject, rows: Any) -> Any:
    if getattr(s.model, "typed", False):
        return rows
    return _Untyped(rows.tokens, rows.segment_ids, rows.labels, rows.weights)


def _label_reading(s: Subject) -> Reading | None:
    return None if names_of_labels(s.model) is None else LABELS


def _label_scores(
    s: Subject, params: Any, records: Sequence[Record], names: Sequence[str]
) -> dict[str, float]:
    rows = rows_of(s, records)
    logits = predict(s, params, rows)
    labels = names_of_labels(s.model)
    regressed = labels is None
    known: dict[str, Any] = OF_NUMBERS
    if labels is not None:
        known = {name: functools.partial(of, classes=len(labels)) for name, of in OF_LABELS.items()}
    if wrong := [n for n in names if n not in known]:
        what = "numbers" if regressed else "labels"
        raise ValueError(f"the metric {wrong[0]} is none of {what}; there are {', '.join(known)}")
    predicted = logits[:, 0] if regressed else logits.argmax(-1)
    return {n: known[n](predicted.tolist(), rows.labels.tolist()) for n in names}


def classify(s: Subject, params: Any, texts: Sequence[str]) -> list[str]:
    """The label of each text, or the number that the model gives it."""
    names = names_of_labels(s.model)
    rows = rows_of(
        s, [Record({"text": t, "label": "0" if names is None else names[0]}, t) for t in texts]
    )
    return [
        f"{row[0]:.4g}" if names is None else names[int(row.argmax())]
        for row in predict(s, params, rows)
    ]


def _tag_scores(
    s: Subject, params: Any, records: Sequence[Record], names: Sequence[str]
) -> dict[str, float]:
    rows, labels = rows_of(s, records), np.asarray(names_of_labels(s.model))
    predicted, counts = predict(s, params, rows).argmax(-1), rows.weights > 0
    flat = predicted[counts].tolist(), rows.labels[counts].tolist()
    result = {n: OF_LABELS[n](*flat, len(labels)) for n in names if n in OF_LABELS}
    if "seqeval" in names:
        by_row = [
            [labels[row[seen]].tolist() for row, seen in zip(x, counts, strict=True)]
            for x in (predicted, rows.labels)
        ]
        result["seqeval"] = seqeval(*by_row)
    return result


def answers(s: Subject, params: Any, records: Sequence[Record], longest: int = 30) -> list[str]:
    """The best answer to each question: the span of at most `longest` tokens with the highest
    scores of its ends.
    """
    rows, origins = _asked(s, records)
    logits = predict(s, params, _without_types(s, rows))
    best: dict[int, tuple[float, str]] = {}
    span = np.triu(np.ones((rows.tokens.shape[1],) * 2, bool)) & ~np.triu(
        np.ones((rows.tokens.shape[1],) * 2, bool), longest
    )
    for q in origins:
        inside = q.offsets[:, 0] >= 0
        scores = logits[q.row, :, 0][:, None] + logits[q.row, :, 1][None]
        scores = np.where(span & inside[:, None] & inside[None], scores, -np.inf)
        first, last = np.unravel_index(int(scores.argmax()), scores.shape)
        text = records[q.record].value["context"][q.offsets[first, 0] : q.offsets[last, 1]]
        if scores[first, last] > best.get(q.record, (-np.inf, ""))[0]:
            best[q.record] = (float(scores[first, last]), text)
    return [best.get(i, (0.0, ""))[1] for i in range(len(records))]


def _answer_scores(
    s: Subject, params: Any, records: Sequence[Record], names: Sequence[str]
) -> dict[str, float]:
    found = answers(s, params, records)
    gold = [r.value["answers"]["text"] for r in records]
    return {
        n: float(np.mean([OF_ANSWERS[n](a, g) for a, g in zip(found, gold, strict=True)]))
        for n in names
    }


def _question_rows(s: Subject, records: Sequence[Record]) -> Any:
    return _without_types(s, _asked(s, records)[0])


def _asked(s: Subject, records: Sequence[Record]) -> Any:
    return encode_questions(
        records, s.tokenizer, s.data.sequence_length, s.data.stride, on_error=s.data.on_error
    )


def _retrieved(
    s: Subject, params: Any, records: Sequence[Record], names: Sequence[str]
) -> dict[str, float]:
    """How often the nearest of all texts is that of a text's own pair, or one that reads the
    same.
    """
    rows, apply = encode_pairs(records, s.tokenizer, s.data.sequence_length), bind(s.model)
    run = jax.jit(lambda params, tokens, seen: embed_texts(apply, params, tokens, seen))
    sides = []
    for tokens, seen in (
        (rows.tokens, rows.segment_ids),
        (rows.other_tokens, rows.other_segment_ids),
    ):
        parts = [
            run(params, tokens[i : i + s.batch_size], seen[i : i + s.batch_size])
            for i in range(0, len(tokens), s.batch_size)
        ]
        sides.append(np.concatenate(list(map(fetch, parts))))
    nearest = (sides[0] @ sides[1].T).argmax(-1)
    same = (rows.other_tokens[nearest] == rows.other_tokens) | (rows.other_segment_ids == 0)
    return {
        "retrieval": float(
            np.mean(
                same.all(-1) & (rows.other_segment_ids[nearest] == rows.other_segment_ids).all(-1)
            )
        )
    }


_LANGUAGE = ("perplexity",)
TASKS: dict[str, TaskSpec] = {
    "causal_lm": TaskSpec(
        ("text", "completion", "chat", "facts"),
        _token_rows,
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
        _source_rows,
        lambda s: TOKENS,
        _LANGUAGE,
        ("exact_match", "bleu", "rouge"),
    ),
    "sequence_classification": TaskSpec(
        ("classification", "facts"),
        _classified_rows,
        _label_reading,
        ("accuracy", "f1"),
        ("matthews", *OF_NUMBERS),
        _label_scores,
        "label",
        lambda config, s: squared_error if names_of_labels(s.model) is None else None,
    ),
    "token_classification": TaskSpec(
        ("tagging",),
        _tagged_rows,
        lambda s: LABELS,
        ("accuracy", "f1"),
        ("matthews", "seqeval"),
        _tag_scores,
        "tags",
    ),
    "question_answering": TaskSpec(
        ("question_answering",),
        _question_rows,
        lambda s: ANSWERS,
        ("exact_match", "f1"),
        (),
        _answer_scores,
    ),
    "feature_extraction": TaskSpec(
        ("pairs",),
        lambda s, records: encode_pairs(records, s.tokenizer, s.data.sequence_length),
        lambda s: None,
        ("retrieval",),
        (),
        _retrieved,
        objective=lambda config, s: functools.partial(
            contrast, temperature=s.data.temperature, same=s.data.same_texts == "negatives"
        ),
    ),
}
