"""Rows of records, for each task of a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from peft_jax.data import (
    Record,
    encode,
    encode_classification,
    encode_questions,
    encode_sources,
    encode_tagging,
    fit,
    pack,
)
from peft_jax.data.skipped import Skipped
from peft_jax.training.data import Subject, names_of_labels


def token_rows(s: Subject, records: Sequence[Record]) -> Any:
    """Rows of tokens, packed where the data is to be."""
    d, skipped = s.data, Skipped()
    examples = encode(records, s.tokenizer, on_error=d.on_error, chat=d.chat, skipped=skipped)
    fitting = fit(examples, d.sequence_length, too_long=d.too_long, skipped=skipped)
    return pack(fitting, d.sequence_length, packing=d.packing)


def source_rows(s: Subject, records: Sequence[Record]) -> Any:
    """Rows of an encoder-decoder."""
    d = s.data
    return encode_sources(
        records, s.tokenizer, d.sequence_length, s.model.config.start_token, d.target_length
    )


def classified_rows(s: Subject, records: Sequence[Record]) -> Any:
    """Rows with a label or a number."""
    return without_types(s, _classified(s, records))


def _classified(s: Subject, records: Sequence[Record]) -> Any:
    labels = names_of_labels(s.model)
    return encode_classification(
        records, s.tokenizer, s.data.sequence_length, labels, on_error=s.data.on_error
    )


def tagged_rows(s: Subject, records: Sequence[Record]) -> Any:
    """Rows with a label a token."""
    labels = names_of_labels(s.model) or []
    rows = encode_tagging(
        records, s.tokenizer, s.data.sequence_length, labels, on_error=s.data.on_error
    )
    return without_types(s, rows)


class _Untyped(NamedTuple):
    """`LabelledRows` for a model without types."""

    tokens: np.ndarray
    segment_ids: np.ndarray
    labels: np.ndarray
    weights: np.ndarray


def without_types(s: Subject, rows: Any) -> Any:
    """Rows as the model takes them: without types, where it has none."""
    if getattr(s.model, "typed", False):
        return rows
    return _Untyped(rows.tokens, rows.segment_ids, rows.labels, rows.weights)


def question_rows(s: Subject, records: Sequence[Record]) -> Any:
    """Rows with the place of an answer."""
    return without_types(s, questions_of(s, records)[0])


def questions_of(s: Subject, records: Sequence[Record]) -> Any:
    """(rows, where each comes from) of questions about contexts."""
    return encode_questions(
        records, s.tokenizer, s.data.sequence_length, s.data.stride, on_error=s.data.on_error
    )
