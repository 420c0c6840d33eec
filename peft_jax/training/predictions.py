"""What a model with a head predicts, and how that is measured."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from peft_jax.core.bind import bind
from peft_jax.core.sharding import fetch
from peft_jax.data import Record, encode_pairs, evaluation_batches
from peft_jax.knowledge.inputs import reads_knowledge
from peft_jax.models.tables import check_rows, first_position
from peft_jax.objectives.contrast import embed_texts
from peft_jax.objectives.reading import inputs_of
from peft_jax.training.beside import with_knowledge
from peft_jax.training.data import Subject, names_of_labels
from peft_jax.training.encoding import (
    classified_rows,
    questions_of,
    tagged_rows,
    without_types,
)
from peft_jax.training.loop import on_devices
from peft_jax.training.metrics import OF_ANSWERS, OF_LABELS, OF_NUMBERS, seqeval


def predict(subject: Subject, params: Any, rows: Any) -> np.ndarray:
    """A head's logits for all rows, float32 [N, ...]."""
    check_rows(subject.model, rows, before=first_position(params))
    apply = reads_knowledge(subject.model)

    @jax.jit
    def run(params: Any, batch: Any) -> jax.Array:
        return apply(params, batch["tokens"], **inputs_of(batch))

    parts = [
        fetch(run(params, on_devices(b, subject.mesh)))
        for b in evaluation_batches(rows, subject.batch_size)
    ]
    return np.concatenate(parts)[: len(rows.tokens)]


def label_scores(
    s: Subject, params: Any, records: Sequence[Record], names: Sequence[str]
) -> dict[str, float]:
    """Metrics of the labels, or numbers, of texts."""
    rows = with_knowledge(s, classified_rows(s, records))
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
    label = "0" if names is None else names[0]
    records = [Record({"text": t, "label": label}, t) for t in texts]
    rows = with_knowledge(s, classified_rows(s, records))
    return [
        f"{row[0]:.4g}" if names is None else names[int(row.argmax())]
        for row in predict(s, params, rows)
    ]


def tag_scores(
    s: Subject, params: Any, records: Sequence[Record], names: Sequence[str]
) -> dict[str, float]:
    """Metrics of tokens' labels."""
    rows = with_knowledge(s, tagged_rows(s, records))
    labels = np.asarray(names_of_labels(s.model))
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
    rows, origins = questions_of(s, records)
    logits = predict(s, params, without_types(s, rows))
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


def answer_scores(
    s: Subject, params: Any, records: Sequence[Record], names: Sequence[str]
) -> dict[str, float]:
    """Metrics of the best answers."""
    found = answers(s, params, records)
    gold = [r.value["answers"]["text"] for r in records]
    return {
        n: float(np.mean([OF_ANSWERS[n](a, g) for a, g in zip(found, gold, strict=True)]))
        for n in names
    }


def retrieved(
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
