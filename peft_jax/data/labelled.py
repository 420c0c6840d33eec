"""Rows with labels: of whole texts, of words, of answers in a context, of pairs that belong
together; masked text; and a source and a target for encoder-decoders.

Texts are cut or padded to one length by the tokenizer, which must be a fast one where words or
characters have to be found again. N rows, T tokens, U target tokens.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from peft_jax.data.records import MalformedRecordError, Record
from peft_jax.data.spans import covers, trimmed, with_offsets

logger = logging.getLogger("peft_jax")


class LabelledRows(NamedTuple):
    """tokens, segment_ids (1, and 0 for padding) and token_type_ids [N, T]; labels and weights [N]
    of texts, [N, T] of words; of answers labels [N, 2], the first and the last token.
    """

    tokens: np.ndarray
    segment_ids: np.ndarray
    token_type_ids: np.ndarray
    labels: np.ndarray
    weights: np.ndarray


class MaskedRows(NamedTuple):
    """tokens and segment_ids [N, T]; weights [N, T] are 1 where a token may be masked and 0 for
    special ones and padding.
    """

    tokens: np.ndarray
    segment_ids: np.ndarray
    weights: np.ndarray


class PairRows(NamedTuple):
    """Two texts that belong together: tokens, segment_ids, other_tokens and other_segment_ids [N,
    T]; weights [N].
    """

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
    """What it takes to turn predicted tokens into an answer: the record, the row's number, and the
    characters [T, 2] of the context that each token stands for (-1 outside it).
    """

    record: int
    row: int
    offsets: np.ndarray


_NUMBER = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*")


def label_names(records: Sequence[Record], field: str = "label") -> list[str] | None:
    """The names of all labels (or tags), in order; None where labels are numbers with a fraction,
    which are regressed.

    Numbers may be written as text, as a CSV file has them; whole ones are ordered as numbers.
    """
    found = [
        v
        for r in records
        for v in (r.value[field] if isinstance(r.value[field], list) else [r.value[field]])
    ]
    names = {_label(v) for v in found}
    if not all(map(_NUMBER.fullmatch, names)):
        return sorted(names)
    if any(not float(n).is_integer() or "." in n for n in names):
        return None
    return sorted(names, key=float)


def _label(value: Any) -> str:
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def label_ids(names: Sequence[str]) -> dict[str, int]:
    """What a record may call each of a model's classes: its name, its name in other case where that
    is no other class's, or, where no name is a number itself, its number.
    """
    lower = [n.casefold() for n in names]
    ids = {n: i for i, n in enumerate(lower) if lower.count(n) == 1}
    if not any(map(_NUMBER.fullmatch, names)):
        ids |= {str(i): i for i in range(len(names))}
    return ids | {n: i for i, n in enumerate(names)}


def _id_of(value: Any, ids: dict[str, int], names: Sequence[str], origin: str) -> int:
    name = _label(value)
    if (found := ids.get(name, ids.get(name.casefold()))) is None:
        known = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
        raise MalformedRecordError(f"{origin}: label {value!r} is none of {known}")
    return found


def usable(
    records: Sequence[Record], read: Callable[[Record], Any], on_error: str
) -> tuple[list[Record], list[Any]]:
    """The records of which `read` makes something, and what it makes; a malformed one is logged and
    passed over, or ends the run with MalformedRecordError where `on_error` is "stop", or where none
    is left.
    """
    kept: list[Record] = []
    made: list[Any] = []
    bad: list[MalformedRecordError] = []
    for record in records:
        try:
            made.append(read(record))
            kept.append(record)
        except MalformedRecordError as error:
            if on_error == "stop":
                raise
            bad.append(error)
            if len(bad) <= 5:
                logger.warning("%s (record skipped)", error)
    if bad and not kept:
        raise bad[0]
    if len(bad) > 5:
        logger.warning("%d of %d records skipped in all", len(bad), len(records))
    return kept, made


def _padded(rows: Sequence[Any], length: int, value: Any = 0) -> np.ndarray:
    """Lists of numbers (or of tuples) as one array, filled up on the right."""
    tail = np.shape(rows[0])[1:]
    out = np.full((len(rows), length, *tail), value, np.int32)
    for row, ids in zip(out, rows, strict=True):
        row[: len(ids)] = ids
    return out


def _texts(tokenizer: Any, length: int, *texts: Any, offsets: bool = False, **options: Any) -> Any:
    """(the encoding, tokens, segments and types [N, T]); what pads a row is 0 where the tokenizer
    has no token for that.
    """
    run = (
        functools.partial(with_offsets, tokenizer)
        if offsets
        else functools.partial(tokenizer, verbose=False)
    )
    encoded = run(*texts, **{"truncation": True, "max_length": length, **options})
    ids = encoded["input_ids"]
    types = encoded.get("token_type_ids") or [[0] * len(row) for row in ids]
    arrays = [
        _padded(ids, length, tokenizer.pad_token_id or 0),
        _padded([[1] * len(row) for row in ids], length),
    ]
    return encoded, [*arrays, _padded(types, length)]


def encode_classification(
    records: Sequence[Record],
    tokenizer: Any,
    length: int,
    labels: Sequence[str] | None,
    *,
    on_error: str = "stop",
) -> LabelledRows:
    """Rows of texts (or pairs of texts) with their labels' numbers, or (`labels` None) numbers to
    regress, float32.

    Raises MalformedRecordError for a label that is not among `labels` (see `label_ids`) unless
    `on_error` is "skip", and ValueError where only some records have a pair.
    """
    pairs = [r.value.get("text_pair") is not None for r in records]
    if any(pairs) and not all(pairs):
        raise ValueError("some records have a text_pair and others none")
    ids, names = ({}, []) if labels is None else (label_ids(labels), labels)
    read = _number if labels is None else lambda r: _id_of(r.value["label"], ids, names, r.origin)
    records, values = usable(records, read, on_error)
    texts = [[r.value[side] for r in records] for side in ("text", "text_pair")[: 1 + all(pairs)]]
    _, (tokens, seen, types) = _texts(tokenizer, length, *texts)
    kind = np.float32 if labels is None else np.int32
    return LabelledRows(
        tokens, seen, types, np.asarray(values, kind), np.ones(len(records), np.float32)
    )


def _number(record: Record) -> float:
    try:
        return float(record.value["label"])
    except ValueError as error:
        raise MalformedRecordError(
            f"{record.origin}: label {record.value['label']!r} is no number"
        ) from error


def encode_tagging(
    records: Sequence[Record],
    tokenizer: Any,
    length: int,
    labels: Sequence[str],
    *,
    on_error: str = "stop",
) -> LabelledRows:
    """Rows of words with their tags, each at the word's first token. Words beyond the row's length
    are told in a warning.

    Raises MalformedRecordError for an unknown tag unless `on_error` is "skip".
    """
    ids = label_ids(labels)
    records, tags = usable(
        records, lambda r: [_id_of(t, ids, labels, r.origin) for t in r.value["tags"]], on_error
    )
    words = _words(tokenizer, [r.value["tokens"] for r in records])
    encoded, (tokens, seen, types) = _texts(tokenizer, length, words, is_split_into_words=True)
    values, weights = np.zeros(tokens.shape, np.int32), np.zeros(tokens.shape, np.float32)
    for row in range(len(records)):
        before = None
        for i, word in enumerate(encoded.word_ids(row)):
            if word is not None and word != before:
                values[row, i], weights[row, i] = tags[row][word], 1.0
            before = word
    if lost := sum(map(len, tags)) - int(weights.sum()):
        logger.warning(
            "%d of %d words lie beyond data.sequence_length=%d (or have no token) and are neither "
            "learnt nor scored",
            lost,
            sum(map(len, tags)),
            length,
        )
    return LabelledRows(tokens, seen, types, values, weights)


def _words(tokenizer: Any, sentences: Sequence[Sequence[str]]) -> Sequence[Sequence[str]]:
    """Words as the tokenizer is to get them: with the blank before them that byte-level ones
    (GPT-2, RoBERTa) tell words by.
    """
    glued = tokenizer(
        ["a", "b"], is_split_into_words=True, add_special_tokens=False, verbose=False
    )["input_ids"]
    return (
        [[f" {w}" for w in words] for words in sentences]
        if tokenizer.decode(glued).strip() == "ab"
        else sentences
    )


def encode_questions(
    records: Sequence[Record],
    tokenizer: Any,
    length: int,
    stride: int | None = None,
    *,
    on_error: str = "stop",
) -> tuple[LabelledRows, list[Question]]:
    """(rows of questions with their contexts, where each row came from); long contexts become
    several rows that overlap by `stride` tokens (a quarter of the length). A row without the answer
    has the labels 0, 0, its first token.

    Raises MalformedRecordError for a question that leaves no room for its context, unless
    `on_error` is "skip".
    """
    stride = length // 4 if stride is None else stride
    special = tokenizer.num_special_tokens_to_add(pair=True)

    def room(n):
        return length - special - n

    def asked(record: Record) -> Record:
        n = len(
            tokenizer(record.value["question"], add_special_tokens=False, verbose=False)[
                "input_ids"
            ]
        )
        if room(n) <= stride:
            raise MalformedRecordError(
                f"{record.origin}: the question's {n} tokens leave {max(room(n), 0)} of "
                f"data.sequence_length={length} for the "
                f"context, which needs more than data.stride={stride}"
            )
        return record

    numbers = {id(r): i for i, r in enumerate(records)}
    records, _ = usable(records, asked, on_error)
    questions, contexts = (
        [r.value["question"] for r in records],
        [r.value["context"] for r in records],
    )
    encoded, (tokens, seen, kinds) = _texts(
        tokenizer,
        length,
        questions,
        contexts,
        truncation="only_second",
        stride=stride,
        return_overflowing_tokens=True,
        offsets=True,
    )
    places = _padded(encoded["offset_mapping"], length)
    labels, origins = [], []
    for row, record in enumerate(encoded["overflow_to_sample_mapping"]):
        inside = np.zeros(length, bool)
        inside[: len(encoded["input_ids"][row])] = [s == 1 for s in encoded.sequence_ids(row)]
        offsets = np.where(inside[:, None], places[row], -1)
        start, end = _answer(records[record])
        first = np.flatnonzero(inside & (offsets[:, 0] <= start) & (offsets[:, 1] > start))
        last = np.flatnonzero(inside & (offsets[:, 0] < end) & (offsets[:, 1] >= end))
        labels.append((first[0], last[-1]) if len(first) and len(last) else (0, 0))
        origins.append(Question(numbers[id(records[record])], row, offsets))
    spans = np.asarray(labels, np.int32)
    return LabelledRows(tokens, seen, kinds, spans, np.ones(len(labels), np.float32)), origins


def _answer(record: Record) -> tuple[int, int]:
    """Where the first answer begins and ends in its context."""
    context, answers = record.value["context"], record.value["answers"]
    start = answers["answer_start"][0]
    return trimmed(context, (start, start + len(answers["text"][0])))


def encode_pairs(records: Sequence[Record], tokenizer: Any, length: int) -> PairRows:
    """Rows of two texts that belong together."""
    (first, seen, _), (second, other, _) = (
        _texts(tokenizer, length, [r.value[side] for r in records])[1]
        for side in ("anchor", "positive")
    )
    return PairRows(first, seen, second, other, np.ones(len(records), np.float32))


def encode_masked(records: Sequence[Record], tokenizer: Any, length: int) -> MaskedRows:
    """Rows of text for a masked language model, long texts in several; of facts in words
    ({"prompt", "completion", "object_at"}) only the object, the characters `object_at` of the
    completion, may be masked. Raises ValueError for a tokenizer without a mask.
    """
    if tokenizer.mask_token_id is None:
        raise ValueError("the tokenizer has no mask token, which a masked language model needs")
    if "object_at" in records[0].value:
        return _masked_objects(records, tokenizer, length)
    encoded, (tokens, seen, _) = _texts(
        tokenizer,
        length,
        [r.value["text"] for r in records],
        return_overflowing_tokens=True,
        return_special_tokens_mask=True,
    )
    special = _padded(encoded["special_tokens_mask"], length, 1)
    return MaskedRows(tokens, seen, (1 - special).astype(np.float32))


def _masked_objects(records: Sequence[Record], tokenizer: Any, length: int) -> MaskedRows:
    values = [r.value for r in records]
    texts = [v["prompt"] + v["completion"] for v in values]
    encoded, (tokens, seen, _) = _texts(tokenizer, length, texts, offsets=True)
    offsets = _padded(encoded["offset_mapping"], length)
    weights = np.zeros(tokens.shape, np.float32)
    for i, (value, text) in enumerate(zip(values, texts, strict=True)):
        start, end = (len(value["prompt"]) + at for at in value["object_at"])
        weights[i] = covers(offsets[i], trimmed(text, (start, end)))
    return MaskedRows(tokens, seen, weights)


def encode_sources(
    records: Sequence[Record],
    tokenizer: Any,
    length: int,
    start_token: int,
    target_length: int | None = None,
) -> SourceRows:
    """Rows of prompts and their completions, ended by the end token; decoder_tokens are the targets
    moved by one.
    """
    target_length = target_length or length
    _, (tokens, seen, _) = _texts(tokenizer, length, [r.value["prompt"] for r in records])
    targets = tokenizer(
        [r.value["completion"] for r in records], add_special_tokens=False, verbose=False
    )["input_ids"]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    shape = (len(records), target_length)
    rows = SourceRows(tokens, seen, *(np.zeros(shape, t) for t in (np.int32, np.int32, np.float32)))
    for row, ids in enumerate(targets):
        ids = (ids[: target_length - len(end)]) + end
        rows.targets[row, : len(ids)], rows.weights[row, : len(ids)] = ids, 1.0
        rows.decoder_tokens[row, : len(ids)] = [start_token, *ids[:-1]]
    return rows
