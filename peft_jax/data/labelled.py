"""Rows with labels: of whole texts, of words, of answers in a context, of pairs that belong together; masked text; and a
source and a target for encoder-decoders.

Texts are cut or padded to one length by the tokenizer, which must be a fast one where words or characters have to be found
again. N rows, T tokens, U target tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from peft_jax.data.records import MalformedRecordError, Record
from peft_jax.data.spans import covers, trimmed, with_offsets


class LabelledRows(NamedTuple):
    """tokens, segment_ids (1, and 0 for padding) and token_type_ids [N, T]; labels and weights [N] of texts, [N, T] of words;
    of answers labels [N, 2], the first and the last token.
    """

    tokens: np.ndarray
    segment_ids: np.ndarray
    token_type_ids: np.ndarray
    labels: np.ndarray
    weights: np.ndarray


class MaskedRows(NamedTuple):
    """tokens and segment_ids [N, T]; weights [N, T] are 1 where a token may be masked and 0 for special ones and padding."""

    tokens: np.ndarray
    segment_ids: np.ndarray
    weights: np.ndarray


class PairRows(NamedTuple):
    """Two texts that belong together: tokens, segment_ids, other_tokens and other_segment_ids [N, T]; weights [N]."""

    tokens: np.ndarray
    segment_ids: np.ndarray
    other_tokens: np.ndarray
    other_segment_ids: np.ndarray
    weights: np.ndarray


class SourceRows(NamedTuple):
    """tokens and segment_ids [N, T] of sources; decoder_tokens, targets and weights [N, U]."""

    tokens: np.ndarray
    segment_ids: np.ndarray
    decoder_tokens: np.ndarray
    targets: np.ndarray
    weights: np.ndarray


class Question(NamedTuple):
    """What it takes to turn predicted tokens into an answer: the record, the row's number, and the characters [T, 2] of the
    context that each token stands for (-1 outside it).
    """

    record: int
    row: int
    offsets: np.ndarray


def label_names(records: Sequence[Record], field: str = "label") -> list[str] | None:
    """The names of all labels (or tags), sorted; None where labels are numbers with a fraction, which are regressed."""
    found = [v for r in records for v in (r.value[field] if isinstance(r.value[field], list) else [r.value[field]])]
    if any(isinstance(v, float) and not float(v).is_integer() for v in found):
        return None
    numbers = all(not isinstance(v, str) for v in found)
    return [str(int(v)) for v in sorted(set(found))] if numbers else sorted({str(v) for v in found})


def _label(value: Any) -> str:
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _id_of(value: Any, ids: dict[str, int], origin: str) -> int:
    if _label(value) not in ids:
        known = ", ".join(list(ids)[:8]) + (", ..." if len(ids) > 8 else "")
        raise MalformedRecordError(f"{origin}: label {value!r} is none of {known}")
    return ids[_label(value)]


def _texts(tokenizer: Any, length: int, *texts: Any, **options: Any) -> Any:
    encoded = tokenizer(*texts, truncation=True, max_length=length, padding="max_length", verbose=False, **options)
    types = encoded.get("token_type_ids") or [[0] * length] * len(encoded["input_ids"])
    arrays = [np.asarray(x, np.int32) for x in (encoded["input_ids"], encoded["attention_mask"], types)]
    return encoded, arrays


def encode_classification(records: Sequence[Record], tokenizer: Any, length: int, labels: Sequence[str] | None) -> LabelledRows:
    """Rows of texts (or pairs of texts) with their labels' numbers, or (`labels` None) numbers to regress, float32.

    Raises MalformedRecordError for a label that is not among `labels`, and ValueError where only some records have a pair.
    """
    texts, pairs = [r.value["text"] for r in records], [r.value.get("text_pair") for r in records]
    if any(p is not None for p in pairs) and any(p is None for p in pairs):
        raise ValueError("some records have a text_pair and others none")
    _, (tokens, seen, types) = _texts(tokenizer, length, texts, *([pairs] if pairs[0] is not None else []))
    ids = None if labels is None else {name: i for i, name in enumerate(labels)}
    if ids is None:
        values = np.asarray([_number(r) for r in records], np.float32)
    else:
        values = np.asarray([_id_of(r.value["label"], ids, r.origin) for r in records], np.int32)
    return LabelledRows(tokens, seen, types, values, np.ones(len(records), np.float32))


def _number(record: Record) -> float:
    try:
        return float(record.value["label"])
    except ValueError as error:
        raise MalformedRecordError(f"{record.origin}: label {record.value['label']!r} is no number") from error


def encode_tagging(records: Sequence[Record], tokenizer: Any, length: int, labels: Sequence[str]) -> LabelledRows:
    """Rows of words with their tags, each at the word's first token. Raises MalformedRecordError for an unknown tag."""
    encoded, (tokens, seen, types) = _texts(tokenizer, length, [r.value["tokens"] for r in records], is_split_into_words=True)
    ids = {name: i for i, name in enumerate(labels)}
    values, weights = np.zeros(tokens.shape, np.int32), np.zeros(tokens.shape, np.float32)
    for row, record in enumerate(records):
        tags = [_id_of(t, ids, record.origin) for t in record.value["tags"]]
        before = None
        for i, word in enumerate(encoded.word_ids(row)):
            if word is not None and word != before:
                values[row, i], weights[row, i] = tags[word], 1.0
            before = word
    return LabelledRows(tokens, seen, types, values, weights)


def encode_questions(
    records: Sequence[Record], tokenizer: Any, length: int, stride: int | None = None
) -> tuple[LabelledRows, list[Question]]:
    """(rows of questions with their contexts, where each row came from); long contexts become several rows that overlap by
    `stride` tokens (a quarter of the length). A row without the answer has the labels 0, 0, its first token.
    """
    stride = length // 4 if stride is None else stride
    questions, contexts = [r.value["question"] for r in records], [r.value["context"] for r in records]
    encoded = with_offsets(
        tokenizer, questions, contexts, truncation="only_second", max_length=length, stride=stride, padding="max_length",
        return_overflowing_tokens=True,
    )  # fmt: skip
    types = encoded.get("token_type_ids") or np.zeros((len(encoded["input_ids"]), length))
    labels, origins = [], []
    for row, record in enumerate(encoded["overflow_to_sample_mapping"]):
        inside = np.asarray([s == 1 for s in encoded.sequence_ids(row)])
        offsets = np.where(inside[:, None], np.asarray(encoded["offset_mapping"][row]), -1)
        answers = records[record].value["answers"]
        start = answers["answer_start"][0]
        start, end = trimmed(contexts[record], (start, start + len(answers["text"][0])))
        first = np.flatnonzero(inside & (offsets[:, 0] <= start) & (offsets[:, 1] > start))
        last = np.flatnonzero(inside & (offsets[:, 0] < end) & (offsets[:, 1] >= end))
        labels.append((first[0], last[-1]) if len(first) and len(last) else (0, 0))
        origins.append(Question(record, row, offsets))
    tokens, seen, kinds, spans = (
        np.asarray(x, np.int32) for x in (encoded["input_ids"], encoded["attention_mask"], types, labels)
    )
    return LabelledRows(tokens, seen, kinds, spans, np.ones(len(labels), np.float32)), origins


def encode_pairs(records: Sequence[Record], tokenizer: Any, length: int) -> PairRows:
    """Rows of two texts that belong together."""
    (first, seen, _), (second, other, _) = (
        _texts(tokenizer, length, [r.value[side] for r in records])[1] for side in ("anchor", "positive")
    )
    return PairRows(first, seen, second, other, np.ones(len(records), np.float32))


def encode_masked(records: Sequence[Record], tokenizer: Any, length: int) -> MaskedRows:
    """Rows of text for a masked language model, long texts in several; of facts in words ({"prompt", "completion",
    "object_at"}) only the object, the characters `object_at` of the completion, may be masked. Raises ValueError for a
    tokenizer without a mask.
    """
    if tokenizer.mask_token_id is None:
        raise ValueError("the tokenizer has no mask token, which a masked language model needs")
    if "object_at" in records[0].value:
        return _masked_objects(records, tokenizer, length)
    encoded, (tokens, seen, _) = _texts(
        tokenizer, length, [r.value["text"] for r in records], return_overflowing_tokens=True, return_special_tokens_mask=True
    )
    return MaskedRows(tokens, seen, 1.0 - np.asarray(encoded["special_tokens_mask"], np.float32))


def _masked_objects(records: Sequence[Record], tokenizer: Any, length: int) -> MaskedRows:
    values = [r.value for r in records]
    texts = [v["prompt"] + v["completion"] for v in values]
    encoded = with_offsets(tokenizer, texts, truncation=True, max_length=length, padding="max_length")
    tokens, seen, offsets = (np.asarray(encoded[n], np.int32) for n in ("input_ids", "attention_mask", "offset_mapping"))
    weights = np.zeros(tokens.shape, np.float32)
    for i, (value, text) in enumerate(zip(values, texts, strict=True)):
        start, end = (len(value["prompt"]) + at for at in value["object_at"])
        weights[i] = covers(offsets[i], trimmed(text, (start, end)))
    return MaskedRows(tokens, seen, weights)


def encode_sources(
    records: Sequence[Record], tokenizer: Any, length: int, start_token: int, target_length: int | None = None
) -> SourceRows:
    """Rows of prompts and their completions, ended by the end token; decoder_tokens are the targets moved by one."""
    target_length = target_length or length
    _, (tokens, seen, _) = _texts(tokenizer, length, [r.value["prompt"] for r in records])
    targets = tokenizer([r.value["completion"] for r in records], add_special_tokens=False, verbose=False)["input_ids"]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    shape = (len(records), target_length)
    rows = SourceRows(tokens, seen, *(np.zeros(shape, t) for t in (np.int32, np.int32, np.float32)))
    for row, ids in enumerate(targets):
        ids = (ids[: target_length - len(end)]) + end
        rows.targets[row, : len(ids)], rows.weights[row, : len(ids)] = ids, 1.0
        rows.decoder_tokens[row, : len(ids)] = [start_token, *ids[:-1]]
    return rows
