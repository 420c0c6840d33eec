"""Records from files and hub datasets, each with its origin, so that a malformed one can be named.

What a record holds is decided by its `kind`: `text`; `prompt` and `completion`; `messages` (chat);
`text`, `label` and perhaps `text_pair` (classification); `tokens` and `tags` (tagging); `question`,
`context` and `answers` (question_answering, as in SQuAD); `anchor` and `positive` (pairs);
`subject`, `relation`, `object` and perhaps the subject's `aliases`, a list or "one|two" (facts).
Other formats of texts and conversations are told from their fields (see `formats`).
"""

from __future__ import annotations

import itertools
import json
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

from peft_jax.data.chat import ASSISTANT
from peft_jax.data.formats import Kind, converted, told
from peft_jax.data.readers import Raw, Record, read_raw
from peft_jax.data.skipped import MalformedRecordError, Skipped

_KINDS: tuple[Kind, ...] = typing.get_args(Kind)
FIELDS: dict[Kind, tuple[str, ...]] = {
    "text": ("text",),
    "completion": ("prompt", "completion"),
    "chat": ("messages",),
    "classification": ("text", "label"),
    "tagging": ("tokens", "tags"),
    "question_answering": ("question", "context", "answers"),
    "pairs": ("anchor", "positive"),
    "facts": ("subject", "relation", "object"),
    "preference": ("chosen", "rejected"),
}
OPTIONAL: dict[Kind, tuple[str, ...]] = {
    "classification": ("text_pair",),
    "facts": ("aliases",),
    "chat": (
        "tools",
        "chat_template_kwargs",
        "template_options",
        "enable_thinking",
        "documents",
    ),
    "preference": ("prompt",),
}


def read_records(
    path: str,
    *,
    kind: Kind | None = None,
    split: str = "train",
    columns: Mapping[str, str] | None = None,
    delimiter: str | None = None,
    on_error: Literal["skip", "stop"] = "skip",
    limit: int | None = None,
    skipped: Skipped | None = None,
) -> list[Record]:
    """All usable records of a source, at most `limit`.

    `path` is "builtin:NAME", a file (.jsonl, .json, .csv, .parquet, .arrow, .txt, each but Parquet
    and Arrow also with .gz) or a hub dataset id. Without a `kind`, the columns of the first record
    tell it. `columns` maps the fields of the kind to the source's names; with a `delimiter`, each
    line of a text file is split into the kind's fields. Of a table with a row a thing, `columns` of
    {"subject": NAME, "relation": "*"} make facts: each other column is a relation, and its cell the
    object. A malformed record is logged with file and line, counted in `skipped` and passed over,
    or ends the run with MalformedRecordError if `on_error` is "stop". Raises ValueError, with a
    table of the reasons, where nothing usable is left.
    """
    return list(
        iter_records(
            path,
            kind=kind,
            split=split,
            columns=columns,
            delimiter=delimiter,
            on_error=on_error,
            limit=limit,
            skipped=skipped,
        )
    )


def iter_records(
    path: str,
    *,
    kind: Kind | None = None,
    split: str = "train",
    columns: Mapping[str, str] | None = None,
    delimiter: str | None = None,
    on_error: Literal["skip", "stop"] = "skip",
    limit: int | None = None,
    skipped: Skipped | None = None,
) -> Iterator[Record]:
    """The records of `read_records`, one after another."""
    skipped = Skipped() if skipped is None else skipped
    first, raws = _peeked(path, split, columns, delimiter, kind)
    kind = kind or first
    names = _names(kind, columns)
    if kind == "facts" and names["relation"] == "*":
        raws, names = _cells(raws, names["subject"]), {field: field for field in FIELDS[kind]}
    count = 0
    for raw in raws:
        try:
            record = _check(raw, names, kind, bool(columns))
        except MalformedRecordError as error:
            if on_error == "stop":
                raise
            skipped.add(error)
            continue
        yield record
        count += 1
        if limit is not None and count >= limit:
            break
    skipped.tell(path)
    if not count:
        said = f" ({len(skipped)} malformed)" if len(skipped) else ""
        raise ValueError(f"{path} holds no usable {kind} record{said}{skipped.table()}")


def told_kind(
    path: str,
    *,
    split: str = "train",
    columns: Mapping[str, str] | None = None,
    delimiter: str | None = None,
) -> Kind:
    """The kind that the first record of a source tells by its columns, text where it tells none."""
    return _peeked(path, split, columns, delimiter, None)[0]


def _peeked(
    path: str,
    split: str,
    columns: Mapping[str, str] | None,
    delimiter: str | None,
    kind: Kind | None,
) -> tuple[Kind, Iterator[Raw]]:
    """The kind of a source's records where none is given, and the records."""
    if kind is None and columns:
        kind = next((k for k in _KINDS if set(columns) <= {*FIELDS[k], *OPTIONAL.get(k, ())}), None)
    if kind is None and delimiter is not None:
        kind = "completion"
    raws = read_raw(path, split, delimiter, FIELDS[kind] if kind else ())
    if kind is not None:
        return kind, raws
    seen: list[Raw] = []
    for raw in raws:
        seen.append(raw)
        if isinstance(raw, Record) and isinstance(raw.value, Mapping):
            kind = _kind_of(raw.value)
            break
    return kind or "text", itertools.chain(seen, raws)


def _kind_of(value: Mapping[str, Any]) -> Kind | None:
    found = told(value)
    if found is not None and found.name == "prompt and completion":
        spoken = isinstance(value["prompt"], list) or isinstance(value["completion"], list)
        return "chat" if spoken else "completion"
    return None if found is None else found.kind


def _names(kind: Kind, columns: Mapping[str, str] | None) -> dict[str, str]:
    optional = OPTIONAL.get(kind, ())
    names = {field: (columns or {}).get(field, field) for field in FIELDS[kind]}
    names |= {field: columns[field] for field in optional if columns and field in columns}
    if unknown := set(columns or {}) - {*names, *optional}:
        raise ValueError(
            f"columns names {sorted(unknown)[0]!r}; a {kind} record has {', '.join(names)}"
        )
    return names


def _cells(raws: Iterator[Raw], subject: str) -> Iterator[Raw]:
    """A fact for each cell of a table that is not empty."""
    for raw in raws:
        if (
            isinstance(raw, MalformedRecordError)
            or not isinstance(raw.value, Mapping)
            or subject not in raw.value
        ):
            yield (
                raw
                if isinstance(raw, MalformedRecordError)
                else MalformedRecordError(f"{raw.origin}: no field {subject!r}")
            )
            continue
        for relation, value in raw.value.items():
            if relation != subject and value not in (None, ""):
                yield Record(
                    {"subject": raw.value[subject], "relation": relation, "object": str(value)},
                    raw.origin,
                )


def _check(raw: Raw, names: Mapping[str, str], kind: Kind, named: bool) -> Record:
    """A record of the kind, in its fields. `named` says that columns were given their names."""
    if isinstance(raw, MalformedRecordError):
        raise raw
    if not isinstance(raw.value, Mapping):
        raise MalformedRecordError(
            f"{raw.origin}: expected an object, found {type(raw.value).__name__}"
        )
    given: Mapping[str, Any] = raw.value
    if not named and kind in ("text", "completion", "chat"):
        try:
            given = converted(given, kind)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise MalformedRecordError(f"{raw.origin}: {error}") from error
    value = {}
    for field, name in names.items():
        if name not in given:
            raise MalformedRecordError(f"{raw.origin}: {_missing(name, raw.value)}")
        value[field] = given[name]
    for field in OPTIONAL.get(kind, ()):
        if field not in names and given.get(field) is not None:
            value[field] = given[field]
    _CHECKS.get(kind, _check_texts)(value, names, raw.origin)
    return Record(value, raw.origin)


def _missing(name: str, value: Mapping[str, Any]) -> str:
    have = ", ".join(map(str, value))
    found = told(value)
    other = f", a {found.name} record" if found is not None else ""
    return f"no field {name!r} (fields here: {have}{other})"


def _check_texts(value: Mapping[str, Any], names: Mapping[str, str], origin: str) -> None:
    if wrong := [n for n, v in value.items() if not isinstance(v, str)]:
        raise MalformedRecordError(f"{origin}: {names.get(wrong[0], wrong[0])!r} is no text")


def _check_labelled(value: Mapping[str, Any], names: Mapping[str, str], origin: str) -> None:
    _check_texts({n: v for n, v in value.items() if n != "label"}, names, origin)
    if isinstance(value["label"], bool) or not isinstance(value["label"], str | int | float):
        raise MalformedRecordError(f"{origin}: {names['label']!r} is neither a name nor a number")


def _check_tags(value: Mapping[str, Any], names: Mapping[str, str], origin: str) -> None:
    tokens, tags = value["tokens"], value["tags"]
    if not isinstance(tokens, list) or not tokens or not all(isinstance(t, str) for t in tokens):
        raise MalformedRecordError(f"{origin}: {names['tokens']!r} is no list of words")
    if not isinstance(tags, list) or not all(isinstance(t, str | int) for t in tags):
        raise MalformedRecordError(f"{origin}: {names['tags']!r} is no list of tags")
    if len(tokens) != len(tags):
        raise MalformedRecordError(f"{origin}: {len(tokens)} tokens and {len(tags)} tags")


def _check_question(value: Mapping[str, Any], names: Mapping[str, str], origin: str) -> None:
    _check_texts({n: v for n, v in value.items() if n != "answers"}, names, origin)
    answers = value["answers"]
    good = (
        isinstance(answers, Mapping)
        and len(answers.get("text", ())) == len(answers.get("answer_start", ())) > 0
    )
    if not good:
        raise MalformedRecordError(
            f"{origin}: {names['answers']!r} should hold text and answer_start, one of each "
            "at least"
        )
    for text, start in zip(answers["text"], answers["answer_start"], strict=True):
        if value["context"][start : start + len(text)] != text:
            raise MalformedRecordError(f"{origin}: the context does not hold {text!r} at {start}")


def _check_fact(value: dict[str, Any], names: Mapping[str, str], origin: str) -> None:
    aliases = value.get("aliases", [])
    value |= {
        "aliases": [a.strip() for a in aliases.split("|") if a.strip()]
        if isinstance(aliases, str)
        else aliases
    }
    if not isinstance(value["aliases"], list) or not all(
        isinstance(a, str) for a in value["aliases"]
    ):
        raise MalformedRecordError(
            f"{origin}: {names.get('aliases', 'aliases')!r} is no list of names"
        )
    _check_texts({n: v for n, v in value.items() if n != "aliases"}, names, origin)
    if empty := [n for n in FIELDS["facts"] if not value[n].strip()]:
        raise MalformedRecordError(f"{origin}: {names[empty[0]]!r} is empty")
    if not value["aliases"]:
        del value["aliases"]


def _check_messages(value: dict[str, Any], names: Mapping[str, str], origin: str) -> None:
    """That messages are objects with roles, one of them the assistant's; of an empty content the
    template decides.
    """
    messages = value["messages"]
    if isinstance(messages, str):  # tables may keep them as JSON
        try:
            messages = value["messages"] = json.loads(messages)
        except json.JSONDecodeError as error:
            raise MalformedRecordError(f"{origin}: messages is no list, nor JSON") from error
    if not isinstance(messages, list) or not messages:
        raise MalformedRecordError(
            f"{origin}: messages must be a list of objects with role and content"
        )
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise MalformedRecordError(f"{origin}: messages[{i}] is no object with a role")
    if not any(m["role"] in ASSISTANT for m in messages):
        raise MalformedRecordError(f"{origin}: no assistant turn to learn from")


def _check_preference(value: dict[str, Any], names: Mapping[str, str], origin: str) -> None:
    """That both answers are texts or messages."""
    for name in ("chosen", "rejected"):
        if not isinstance(value[name], str | list):
            raise MalformedRecordError(f"{origin}: {names[name]!r} is neither text nor messages")


_CHECKS: dict[str, Callable[[dict[str, Any], Mapping[str, str], str], None]] = {
    "chat": _check_messages,
    "preference": _check_preference,
    "facts": _check_fact,
    "classification": _check_labelled,
    "tagging": _check_tags,
    "question_answering": _check_question,
}
