"""From records to token sequences with a mask of what to learn, and from those to rows of one
static shape.
"""

from __future__ import annotations

import bisect
import collections
import hashlib
import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import numpy as np

from peft_jax.data.chat import Turns, encode_chat
from peft_jax.data.records import Kind, Record
from peft_jax.data.skipped import MalformedRecordError, Skipped

logger = logging.getLogger("peft_jax")
TooLong = Literal["skip", "truncate", "stop"]


class Example(NamedTuple):
    """Token ids [n] and, for each, whether the model learns to predict it; `rule` is that of the
    first of these, 0 for none. `origin` is where it came from; a `divisible` one may be cut into
    pieces.
    """

    ids: np.ndarray
    learn: np.ndarray
    rule: int = 0
    origin: str = ""
    divisible: bool = False


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
        known = getattr(array, "digest", None)  # of rows on disk
        digest.update(known.encode() if known else np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]


class ChatOptions(NamedTuple):
    """Variables given to the chat template, and which turns are learnt (see `encode_chat`)."""

    options: Mapping[str, Any] = MappingProxyType({})
    turns: Turns = "all"


PLAIN = ChatOptions()


def encode(
    records: Iterable[Record],
    tokenizer: Any,
    kind: Kind | None = None,
    *,
    on_error: str = "skip",
    chat: ChatOptions = PLAIN,
    skipped: Skipped | None = None,
) -> Iterator[Example]:
    """Examples of records: text learns every token, completions and assistant turns only theirs,
    with an end token. A conversation may be several examples.

    Where no `kind` is given, each record is of the kind that its fields say. What a template or a
    tokenizer raises is the record's error: it is logged and counted in `skipped`, or raised as
    MalformedRecordError where `on_error` is "stop".
    """
    skipped = Skipped() if skipped is None else skipped
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for record, ids in _with_ids(records, tokenizer):
        try:
            own = kind or kind_of_record(record)
            if own == "chat":
                made = _chat(record, tokenizer, chat)
            elif own == "text":
                made = [_text(record, ids, end)]
            else:
                made = [_completion(record, ids, end)]
        except NotUsableError:
            raise
        except Exception as error:  # templates and tokenizers raise errors of any kind
            malformed = MalformedRecordError(f"{record.origin}: {_said_by(error)}")
            if on_error == "stop":
                raise malformed from error
            skipped.add(malformed)
            continue
        yield from made
    skipped.tell("encoding")


class NotUsableError(ValueError):
    """A tokenizer that cannot be used for any record of a kind."""


def _said_by(error: Exception) -> str:
    if isinstance(error, ValueError):
        return str(error)
    return f"{type(error).__name__}: {error}"


def kind_of_record(record: Record) -> Kind:
    """The kind that a record's fields say."""
    return (
        "chat" if "messages" in record.value else "text" if "text" in record.value else "completion"
    )


Ids = Callable[[str, bool], list[int]]  # a text's tokens, with special ones or without
TOGETHER = 512  # records whose texts are tokenized in one call, by all cores
CHARACTERS = 1 << 22  # and how many characters of theirs, at most


def _with_ids(records: Iterable[Record], tokenizer: Any) -> Iterator[tuple[Record, Ids]]:
    """Records with what gives the tokens of their texts."""
    batch: list[Record] = []
    size = 0
    for record in records:
        batch.append(record)
        size += sum(len(v) for v in record.value.values() if isinstance(v, str))
        if len(batch) == TOGETHER or size > CHARACTERS:
            yield from _tokenized(batch, tokenizer)
            batch, size = [], 0
    yield from _tokenized(batch, tokenizer)


def _tokenized(batch: list[Record], tokenizer: Any) -> Iterator[tuple[Record, Ids]]:
    known: dict[tuple[str, bool], list[int]] = {}
    for special, fields in ((True, ("text", "prompt")), (False, ("completion",))):
        found = (r.value.get(f) for r in batch for f in fields)
        texts = [text for text in found if isinstance(text, str)]
        if texts and len(batch) > 1:
            known |= _in_one_call(tokenizer, texts, special)

    def ids(text: str, special: bool) -> list[int]:
        if (text, special) in known:
            return known[text, special]
        return tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]

    for record in batch:
        yield record, ids


def _in_one_call(
    tokenizer: Any, texts: list[str], special: bool
) -> dict[tuple[str, bool], list[int]]:
    try:
        made = tokenizer(texts, add_special_tokens=special, verbose=False)["input_ids"]
    except Exception:  # then each is tokenized alone, so that the one to blame is named
        return {}
    return {(text, special): ids for text, ids in zip(texts, made, strict=True)}


def _text(record: Record, ids: Ids, end: list[int]) -> Example:
    said = ids(record.value["text"], True)
    said = said if end and said[-1:] == end else said + end  # some tokenizers add an end token
    learn = np.ones(len(said), bool)
    return Example(np.asarray(said, np.int32), learn, 0, record.origin, divisible=True)


def _completion(record: Record, ids: Ids, end: list[int]) -> Example:
    prompt = ids(record.value["prompt"], True)
    prompt = prompt[:-1] if prompt and prompt[-1:] == end else prompt  # as above
    both = np.asarray(prompt + ids(record.value["completion"], False) + end, np.int32)
    learn = np.arange(len(both)) >= len(prompt)
    return Example(both, learn, record.value.get("rule", 0), record.origin)


def _chat(record: Record, tokenizer: Any, chat: ChatOptions) -> list[Example]:
    if not getattr(tokenizer, "is_fast", False):
        raise NotUsableError(
            f"{type(tokenizer).__name__} gives no character offsets, which conversations need: "
            "bring a tokenizer.json"
        )
    if tokenizer.chat_template is None:
        raise NotUsableError(
            "the tokenizer has no chat template: set data.template to chatml or to a file, use "
            "kind: completion, or a model with a template"
        )
    value = record.value
    rows = encode_chat(
        tokenizer,
        value["messages"],
        value.get("tools"),
        turns=chat.turns,
        **{**chat.options, **template_options(value)},
    )
    return [Example(ids, learn, origin=record.origin) for ids, learn in rows]


def template_options(value: Mapping[str, Any]) -> dict[str, Any]:
    """The variables that a record gives to its chat template."""
    options: dict[str, Any] = {}
    for name in ("chat_template_kwargs", "template_options"):
        options |= value.get(name) or {}
    for name in ("enable_thinking", "documents"):
        if value.get(name) is not None:
            options[name] = value[name]
    return options


def fit(
    examples: Iterable[Example],
    length: int,
    kind: Kind | None = None,
    too_long: TooLong = "skip",
    *,
    skipped: Skipped | None = None,
) -> list[Example]:
    """Examples of at most `length` + 1 tokens (`length` predictions).

    Long texts are cut into pieces that overlap by one token, so that each token is predicted once.
    Longer completions and chats are passed over with a count, cut at the end, or refused, as
    `too_long` says. Raises ValueError, with a table of the reasons, where nothing is left.
    """
    return list(fitting(examples, length, kind, too_long, skipped=skipped))


def fitting(
    examples: Iterable[Example],
    length: int,
    kind: Kind | None = None,
    too_long: TooLong = "skip",
    *,
    skipped: Skipped | None = None,
) -> Iterator[Example]:
    """The examples of `fit`, one after another."""
    skipped = Skipped() if skipped is None else skipped
    long = empty = kept = 0
    for number, example in enumerate(examples):
        n = len(example.ids)
        parts = [example]
        if n > length + 1:
            where = example.origin or f"record {number}"
            if kind == "text" or (kind is None and example.divisible):
                parts = [_cut(example, at, length) for at in range(0, n - 1, length)]
            elif too_long == "truncate":
                parts = [_cut(example, 0, length)]
            elif too_long == "stop":
                raise ValueError(
                    f"{where} has {n} tokens; sequence_length is {length} (or set too_long: "
                    "truncate)"
                )
            else:
                long += 1
                skipped.add(f"{where}: {n} tokens, more than the row's {length}", told=False)
                continue
        for part in parts:
            if len(part.ids) > 1 and part.learn[1:].any():
                kept += 1
                yield part
            else:
                empty += 1
                where = example.origin or f"record {number}"
                skipped.add(f"{where}: nothing to learn within {length} tokens", told=False)
    if long:
        logger.warning(
            "%d records longer than %d tokens skipped (too_long: truncate keeps their beginning)",
            long,
            length,
        )
    if empty:
        logger.warning(
            "%d records have nothing to learn within %d tokens and are left out", empty, length
        )
    if not kept:
        raise ValueError(
            f"no record fits into sequence_length={length}, or none is left{skipped.table()}"
        )


def _cut(example: Example, start: int, length: int) -> Example:
    """`length` predictions of an example; the rule is that of its beginning."""
    cut = np.s_[start : start + length + 1]
    kept = example._replace(ids=example.ids[cut], learn=example.learn[cut])
    return kept._replace(rule=0) if example.divisible else kept


def pack(examples: list[Example], length: int, *, packing: bool = True) -> Rows:
    """Rows of `length` predictions: several examples a row (best fit, longest first) or one a row;
    where examples have rules, with int32 `rules` [N, T]: the number of the rule for what comes
    next, 0 for none.
    """
    bins = bins_of(examples, length, packing=packing)
    shape = (len(bins), length)
    rows = Rows(*(np.zeros(shape, t) for t in (np.int32, np.int32, np.float32, np.int32, np.int32)))
    rules = np.zeros(shape, np.int32)
    for row, members in enumerate(bins):
        start = 0
        for segment, index in enumerate(members, 1):
            ids, learn, rule = examples[index][:3]
            cut = np.s_[row, start : start + len(ids) - 1]
            rules[row, start + int(np.argmax(learn[1:]))] = rule
            rows.tokens[cut], rows.targets[cut], rows.weights[cut] = ids[:-1], ids[1:], learn[1:]
            rows.positions[cut], rows.segment_ids[cut] = np.arange(len(ids) - 1), segment
            start += len(ids) - 1
    return with_fields(rows, rules=rules) if rules.any() else rows


def bins_of(examples: Sequence[Example], length: int, *, packing: bool = True) -> list[list[int]]:
    """Which examples each row holds."""
    sizes = [len(e.ids) - 1 for e in examples]
    return _best_fit(sizes, length) if packing else [[i] for i in range(len(sizes))]


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
