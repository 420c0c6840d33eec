"""Records from files and hub datasets, each with its origin, so that a malformed one can be named.

A record is a dict with `text`, or `prompt` and `completion`, or `messages` (chat). Which of them is decided by `kind`.
"""

from __future__ import annotations

import csv
import gzip
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

from peft_jax.data import builtin

logger = logging.getLogger("peft_jax")
Kind = Literal["text", "completion", "chat"]
FIELDS: dict[str, tuple[str, ...]] = {"text": ("text",), "completion": ("prompt", "completion"), "chat": ("messages",)}


class Record(NamedTuple):
    """A record's fields and where it came from ("file:line")."""

    value: dict[str, Any]
    origin: str


class MalformedRecordError(ValueError):
    """A record that cannot be used, named by file and line."""


def read_records(
    path: str,
    *,
    kind: Kind,
    split: str = "train",
    columns: Mapping[str, str] | None = None,
    delimiter: str | None = None,
    on_error: Literal["skip", "stop"] = "skip",
    limit: int | None = None,
) -> list[Record]:
    """All usable records of a source, at most `limit`.

    `path` is "builtin:NAME", a file (.jsonl, .json, .csv, .parquet, .txt, each but Parquet also with .gz) or a hub dataset
    id. `columns` maps the fields of the kind to the source's names; with a `delimiter`, each line of a text file is split
    into the kind's fields. A malformed record is logged with file and line and passed over, or ends the run with
    MalformedRecordError if `on_error` is "stop". Raises ValueError where nothing usable is left.
    """
    names = {field: (columns or {}).get(field, field) for field in FIELDS[kind]}
    if unknown := set(columns or {}) - set(names):
        raise ValueError(f"columns names {sorted(unknown)[0]!r}; a {kind} record has {', '.join(names)}")
    records: list[Record] = []
    bad = 0
    for raw in _raw(path, kind, split, delimiter):
        try:
            records.append(_check(raw, names, kind))
        except MalformedRecordError as error:
            if on_error == "stop":
                raise
            bad += 1
            if bad <= 5:
                logger.warning("%s (record skipped)", error)
        if limit is not None and len(records) >= limit:
            break
    if bad > 5:
        logger.warning("%s: %d malformed records skipped in all", path, bad)
    if not records:
        raise ValueError(f"{path} holds no usable {kind} record" + (f" ({bad} malformed)" if bad else ""))
    return records


def _check(raw: Record | MalformedRecordError, names: Mapping[str, str], kind: Kind) -> Record:
    if isinstance(raw, MalformedRecordError):
        raise raw
    if not isinstance(raw.value, Mapping):
        raise MalformedRecordError(f"{raw.origin}: expected an object, found {type(raw.value).__name__}")
    value = {}
    for field, name in names.items():
        if name not in raw.value:
            have = ", ".join(map(str, raw.value))
            raise MalformedRecordError(f"{raw.origin}: no field {name!r} (fields here: {have})")
        value[field] = raw.value[name]
    if kind == "chat":
        _check_messages(value["messages"], raw.origin)
    elif wrong := [n for n, v in value.items() if not isinstance(v, str)]:
        raise MalformedRecordError(f"{raw.origin}: {names[wrong[0]]!r} is no text")
    return Record(value, raw.origin)


def _check_messages(messages: Any, origin: str) -> None:
    good = isinstance(messages, list) and messages
    if not good or not all(isinstance(m, Mapping) and isinstance(m.get("content"), str) and m.get("role") for m in messages):
        raise MalformedRecordError(f"{origin}: messages must be a list of objects with role and content")
    if not any(m["role"] == "assistant" for m in messages):
        raise MalformedRecordError(f"{origin}: no assistant turn to learn from")


def _raw(path: str, kind: Kind, split: str, delimiter: str | None) -> Iterator[Record | MalformedRecordError]:
    if path.startswith("builtin:"):
        name = path.removeprefix("builtin:")
        for i, value in enumerate(builtin.dataset(name, split)):
            yield Record(value, f"{path}[{split}]:{i}")
        return
    file = Path(path).expanduser()
    suffix = "".join(file.suffixes[-2:] if file.suffix == ".gz" else [file.suffix]).removesuffix(".gz")
    if not file.is_file():
        if file.exists() or suffix in _READERS or path.startswith((".", "/", "~")):
            raise FileNotFoundError(f"data file {path} does not exist")
        yield from _hub(path, split)
        return
    reader = _READERS.get(suffix)
    if reader is None:
        raise ValueError(f"{path}: unknown kind of file; known: {', '.join(_READERS)} (and .gz)")
    if suffix == ".txt" and delimiter is not None:
        yield from _lines(file, delimiter, FIELDS[kind])
    else:
        yield from reader(file)


def _open(file: Path) -> IO[str]:
    return gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else file.open(encoding="utf-8", newline="")


def _jsonl(file: Path) -> Iterator[Record | MalformedRecordError]:
    with _open(file) as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                yield Record(json.loads(line), f"{file}:{number}")
            except json.JSONDecodeError as error:
                yield MalformedRecordError(f"{file}:{number}: not valid JSON ({error.msg} at column {error.colno})")


def _json(file: Path) -> Iterator[Record | MalformedRecordError]:
    with _open(file) as handle:
        try:
            values = json.load(handle)
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}:{error.lineno}: not valid JSON ({error.msg})") from error
    if not isinstance(values, list):
        raise ValueError(f"{file} should hold a JSON array of records")
    for i, value in enumerate(values):
        yield Record(value, f"{file}[{i}]")


def _csv(file: Path) -> Iterator[Record | MalformedRecordError]:
    with _open(file) as handle:
        rows = csv.DictReader(handle, strict=True)
        while True:
            try:
                row = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                yield MalformedRecordError(f"{file}:{rows.line_num}: {error}")
                continue
            if None in row or None in row.values():
                columns = len(rows.fieldnames or [])
                yield MalformedRecordError(f"{file}:{rows.line_num}: not {columns} columns as in the header")
            else:
                yield Record(dict(row), f"{file}:{rows.line_num}")


def _text(file: Path) -> Iterator[Record | MalformedRecordError]:
    with _open(file) as handle:
        yield Record({"text": handle.read()}, str(file))


def _lines(file: Path, delimiter: str, fields: tuple[str, ...]) -> Iterator[Record | MalformedRecordError]:
    with _open(file) as lines:
        for number, line in enumerate(lines, 1):
            parts = [part.strip() for part in line.split(delimiter)]
            if len(parts) != len(fields):
                yield MalformedRecordError(f"{file}:{number}: {len(parts)} fields, expected {len(fields)}")
            else:
                yield Record(dict(zip(fields, parts, strict=True)), f"{file}:{number}")


def _parquet(file: Path) -> Iterator[Record]:
    from datasets import Dataset

    for i, value in enumerate(Dataset.from_parquet(str(file))):
        yield Record(dict(value), f"{file}[{i}]")


def _hub(name: str, split: str) -> Iterator[Record]:
    from datasets import load_dataset

    identifier, _, configuration = name.partition(":")
    try:
        data = load_dataset(identifier, configuration or None, split=split)
    except Exception as error:
        raise FileNotFoundError(
            f"{name} is neither a file nor a dataset that can be downloaded ({type(error).__name__}: {error})"
        ) from error
    for i, value in enumerate(data):
        yield Record(dict(value), f"{name}[{split}]:{i}")


_READERS: dict[str, Callable[[Path], Iterator[Record | MalformedRecordError]]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".txt": _text,
    ".parquet": _parquet,
}
