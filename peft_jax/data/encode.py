"""From records to token sequences with a mask of what to learn, and from those to rows of one
static shape.
"""

from __future__ import annotations

import bisect
import collections
import hashlib
import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any, Literal, NamedTuple

import numpy as np

from peft_jax.data.records import Kind, MalformedRecordError, Record
from peft_jax.data.spans import with_offsets

logger = logging.getLogger("peft_jax")
TooLong = Literal["skip", "truncate", "stop"]


class Example(NamedTuple):
    """Token ids [n] and, for each, whether the model learns to predict it; `rule` is that of the
    first of these, 0 for none.
    """

    ids: np.ndarray
    learn: np.ndarray
    rule: int = 0


class Rows(NamedTuple):
    """Packed training rows, each array [N, T]: int32 tokens, targets, positions, segment_ids;
    float32 loss weights.

    `targets` are the next tokens. Segment 0 is padding; positions restart with each segment.
    """

    tokens: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    positions: np.ndarray
    segment_ids: np.ndarray


def with_fields(rows: Any, **fields: np.ndarray) -> Any:
    """Rows (a NamedTuple of arrays) with these fields too, or in place of those of the same
    name.
    """
    fields = rows._asdict() | fields
    return collections.namedtuple("Rows", fields)(**fields)


def fingerprint(rows: Any) -> str:
    """A short hash of rows (a NamedTuple of arrays), by which a checkpoint knows its data."""
    digest = hashlib.sha256()
    for array in rows:
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]


def encode(
    records: Iterable[Record], tokenizer: Any, kind: Kind, *, on_error: str = "skip"
) -> Iterator[Example]:
    """Examples of records: text learns every token, completions and assistant turns only theirs,
    with an end token.
    """
    for record in records:
        try:
            yield _ENCODERS[kind](record, tokenizer)
        except MalformedRecordError as error:
            if on_error == "stop":
                raise
            logger.warning("%s (record skipped)", error)


def _ids(tokenizer: Any, text: str, special: bool) -> list[int]:
    return tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]


def _end(tokenizer: Any) -> list[int]:
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def _text(record: Record, tokenizer: Any) -> Example:
    ids, end = _ids(tokenizer, record.value["text"], True), _end(tokenizer)
    ids = ids if end and ids[-1:] == end else ids + end  # some tokenizers add an end token
    return Example(np.asarray(ids, np.int32), np.ones(len(ids), bool))


def _completion(record: Record, tokenizer: Any) -> Example:
    prompt = _ids(tokenizer, record.value["prompt"], True)
    prompt = (
        prompt[:-1] if prompt and prompt[-1:] == _end(tokenizer) else prompt
    )  # some tokenizers add an end token
    answer = _ids(tokenizer, record.value["completion"], False) + _end(tokenizer)
    learn = np.r_[np.zeros(len(prompt), bool), np.ones(len(answer), bool)]
    return Example(np.asarray(prompt + answer, np.int32), learn, record.value.get("rule", 0))


def _chat(record: Record, tokenizer: Any) -> Example:
    """The tokenizer's template over all messages; what an assistant turn adds to the rendered text
    is learnt.
    """
    messages = record.value["messages"]
    if tokenizer.chat_template is None:
        raise ValueError(
            "the tokenizer has no chat template; use kind: completion, or a model with a template"
        )

    def render(upto, prompt):
        return tokenizer.apply_chat_template(
            messages[:upto], tokenize=False, add_generation_prompt=prompt
        )

    text = render(len(messages), False)
    spans = []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            before, after = render(i, True), render(i + 1, False)
            if not (text.startswith(before) and text.startswith(after)):
                raise MalformedRecordError(
                    f"{record.origin}: the chat template rewrites earlier turns"
                )
            spans.append((len(before), len(after)))
    encoded = with_offsets(tokenizer, text, add_special_tokens=False)
    learn = [any(a <= start < b for a, b in spans) for start, _ in encoded["offset_mapping"]]
    return Example(np.asarray(encoded["input_ids"], np.int32), np.asarray(learn, bool))


_ENCODERS = {"text": _text, "completion": _completion, "chat": _chat, "facts": _completion}


def fit(examples: Iterable[Example], length: int, kind: Kind, too_long: TooLong) -> list[Example]:
    """Examples of at most `length` + 1 tokens (`length` predictions).

    Long texts are cut into pieces that overlap by one token, so that each token is predicted once.
    Longer completions and chats are passed over with a count, cut at the end, or refused, as
    `too_long` says.
    """
    result: list[Example] = []
    skipped = 0
    for number, example in enumerate(examples):
        n = len(example.ids)
        if n <= length + 1:
            result.append(example)
        elif kind == "text":
            cuts = range(0, n - 1, length)
            result += [
                Example(example.ids[s : s + length + 1], example.learn[s : s + length + 1])
                for s in cuts
            ]
        elif too_long == "truncate":
            result.append(
                example._replace(ids=example.ids[: length + 1], learn=example.learn[: length + 1])
            )
        elif too_long == "stop":
            raise ValueError(
                f"record {number} has {n} tokens; sequence_length is {length} (or set too_long: "
                "truncate)"
            )
        else:
            skipped += 1
    if skipped:
        logger.warning(
            "%d records longer than %d tokens skipped (too_long: truncate keeps their beginning)",
            skipped,
            length,
        )
    taught = [e for e in result if len(e.ids) > 1 and e.learn[1:].any()]
    if len(taught) < len(result):
        logger.warning(
            "%d records have nothing to learn within %d tokens and are left out",
            len(result) - len(taught),
            length,
        )
    result = taught
    if not result:
        raise ValueError(f"no record fits into sequence_length={length}")
    return result


def pack(examples: list[Example], length: int, *, packing: bool = True) -> Rows:
    """Rows of `length` predictions: several examples a row (best fit, longest first) or one a row;
    where examples have rules, with int32 `rules` [N, T]: the number of the rule for what comes
    next, 0 for none.
    """
    sizes = [len(e.ids) - 1 for e in examples]
    bins = _best_fit(sizes, length) if packing else [[i] for i in range(len(sizes))]
    shape = (len(bins), length)
    rows = Rows(*(np.zeros(shape, t) for t in (np.int32, np.int32, np.float32, np.int32, np.int32)))
    rules = np.zeros(shape, np.int32)
    for row, members in enumerate(bins):
        start = 0
        for segment, index in enumerate(members, 1):
            ids, learn, rule = examples[index]
            cut = np.s_[row, start : start + len(ids) - 1]
            rules[row, start + int(np.argmax(learn[1:]))] = rule
            rows.tokens[cut], rows.targets[cut], rows.weights[cut] = ids[:-1], ids[1:], learn[1:]
            rows.positions[cut], rows.segment_ids[cut] = np.arange(len(ids) - 1), segment
            start += len(ids) - 1
    return with_fields(rows, rules=rules) if rules.any() else rows


def _best_fit(sizes: list[int], length: int) -> list[list[int]]:
    """Best-fit decreasing bin packing; O(n log length)."""
    bins: list[list[int]] = []
    open_bins: dict[int, list[int]] = defaultdict(list)  # free space -> bins
    spaces: list[int] = []  # sorted, those of open_bins that are not empty
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        at = bisect.bisect_left(spaces, sizes[index])
        if at < len(spaces):
            space = spaces[at]
            target = open_bins[space].pop()
            if not open_bins[space]:
                spaces.pop(at)
        else:
            space, target = length, len(bins)
            bins.append([])
        bins[target].append(index)
        left = space - sizes[index]
        if left:
            if not open_bins[left]:
                bisect.insort(spaces, left)
            open_bins[left].append(target)
    return bins
