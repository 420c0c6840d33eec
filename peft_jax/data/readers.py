"""Bytes to records: files of every kind, gzipped or not, and hub datasets, each record with the
file and line that it came from.

What cannot be read is a MalformedRecordError in its place where what follows can be read, and a
ValueError that names the file and the line where it cannot.
"""

from __future__ import annotations

import csv
import gzip
import itertools
import json
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from peft_jax.data import builtin
from peft_jax.data.skipped import MalformedRecordError

csv.field_size_limit(2**31 - 1)  # a long text is a field like any other


class Record(NamedTuple):
    """A record's fields and where it came from ("file:line")."""

    value: dict[str, Any]
    origin: str


Raw = Record | MalformedRecordError


def read_raw(
    path: str, split: str, delimiter: str | None = None, fields: tuple[str, ...] = ()
) -> Iterator[Raw]:
    if path.startswith("builtin:"):
        name = path.removeprefix("builtin:")
        for i, value in enumerate(builtin.dataset(name, split)):
            yield Record(value, f"{path}[{split}]:{i}")
        return
    file = Path(path).expanduser()
    suffix = "".join(file.suffixes[-2:] if file.suffix == ".gz" else [file.suffix]).removesuffix(
        ".gz"
    )
    if not file.is_file():
        if file.exists() or suffix in _READERS or path.startswith((".", "/", "~")):
            raise FileNotFoundError(f"data file {path} does not exist")
        yield from _hub(path, split)
        return
    reader = _READERS.get(suffix)
    if reader is None:
        raise ValueError(f"{path}: unknown kind of file; known: {', '.join(_READERS)} (and .gz)")
    if suffix == ".txt" and delimiter is not None:
        yield from _lines(file, delimiter, fields)
    else:
        yield from reader(file)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(n for n in names if names.count(n) > 1)
        raise ValueError(f"the field {twice!r} stands there twice")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def lines_of(file: Path) -> Iterator[tuple[int, str | MalformedRecordError]]:
    """(number, text) of the lines of a file in UTF-8, gzipped or not, with their ends; a line that
    is no UTF-8 is an error in its place. A byte-order mark at the beginning is left out.

    Raises ValueError for a file in UTF-16 or UTF-32, and for one that ends in the middle of its
    compressed data.
    """
    number = 0
    try:
        with _opened(file) as handle:
            for line in itertools.chain.from_iterable(map(_split, handle)):
                number += 1
                if number == 1:
                    _check_encoding(file, line)
                    line = line.removeprefix(b"\xef\xbb\xbf")
                try:
                    yield number, line.decode("utf-8")
                except UnicodeDecodeError as error:
                    yield (
                        number,
                        MalformedRecordError(
                            f"{file}:{number}: not UTF-8 (byte {error.object[error.start]:#04x} at "
                            f"column {error.start + 1})"
                        ),
                    )
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{file}:{number + 1}: not whole gzip data ({error})") from error


def _split(line: bytes) -> list[bytes]:
    """A line that ends with a line feed, split after carriage returns that end lines too."""
    return re.split(rb"(?<=\r)(?!\n)(?=.)", line, flags=re.DOTALL) if b"\r" in line else [line]


def _opened(file: Path) -> IO[bytes] | gzip.GzipFile:
    return gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb")


def _check_encoding(file: Path, line: bytes) -> None:
    if line.startswith((b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff")):
        raise ValueError(f"{file}:1: the file is in UTF-16 or UTF-32; save it as UTF-8")


def text_of_file(file: Path) -> str:
    """The whole text of a file. Raises ValueError naming the line that is no UTF-8."""
    parts = []
    for _, line in lines_of(file):
        if isinstance(line, MalformedRecordError):
            raise ValueError(str(line)) from line
        parts.append(line)
    return "".join(parts)


def _jsonl(file: Path) -> Iterator[Raw]:
    for number, line in lines_of(file):
        if isinstance(line, MalformedRecordError):
            yield line
        elif line.strip():
            yield _from_json(line, f"{file}:{number}")


def _from_json(text: str, origin: str) -> Raw:
    try:
        value = _DECODER.decode(text)
        if "\\u" in text:
            _check_characters(value)
        return Record(value, origin)
    except json.JSONDecodeError as error:
        return MalformedRecordError(
            f"{origin}: not valid JSON ({error.msg} at column {error.colno})"
        )
    except RecursionError:
        return MalformedRecordError(f"{origin}: not valid JSON (nested too deep)")
    except ValueError as error:  # a field twice, a number of too many digits
        return MalformedRecordError(f"{origin}: {error}")


def _check_characters(value: Any) -> None:
    """Raise ValueError for half of a surrogate pair, which is no character."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{error.object[error.start]!r} is half a character") from error


def _json(file: Path) -> Iterator[Raw]:
    text = text_of_file(file)
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}:{error.lineno}: not valid JSON ({error.msg})") from error
    except RecursionError as error:
        raise ValueError(f"{file}: not valid JSON (nested too deep)") from error
    if not isinstance(values, list):
        raise ValueError(f"{file} should hold a JSON array of records")
    for i, value in enumerate(values):
        yield Record(value, f"{file}[{i}]")


class _Lines:
    """The lines of a file for a reader of CSV, and those that are no UTF-8."""

    def __init__(self, file: Path) -> None:
        self.bad: list[MalformedRecordError] = []
        self.lines = lines_of(file)

    def __iter__(self) -> Iterator[str]:
        for _, line in self.lines:
            if isinstance(line, MalformedRecordError):
                self.bad.append(line)
            else:
                yield line


def _csv(file: Path) -> Iterator[Raw]:
    lines = _Lines(file)
    rows = csv.reader(lines, strict=True)
    header = _header(file, rows)
    skipped = 0
    while True:
        before = rows.line_num
        try:
            row = next(rows, None)
        except csv.Error as error:
            yield MalformedRecordError(f"{file}:{before + 1}: {error}")
            continue
        while skipped < len(lines.bad):
            yield lines.bad[skipped]
            skipped += 1
        if row is None:
            return
        origin = f"{file}:{rows.line_num + skipped}"
        if not row:
            continue
        if len(row) != len(header):
            yield MalformedRecordError(f"{origin}: not {len(header)} columns as in the header")
        else:
            yield Record(dict(zip(header, row, strict=True)), origin)


def _header(file: Path, rows: Iterator[list[str]]) -> list[str]:
    header = next((row for row in rows if row), [])
    if twice := [name for name in header if header.count(name) > 1]:
        raise ValueError(f"{file}:1: the column {twice[0]!r} stands there twice")
    return header


def _text(file: Path) -> Iterator[Raw]:
    yield Record({"text": text_of_file(file).replace("\r\n", "\n")}, str(file))


def _lines(file: Path, delimiter: str, fields: tuple[str, ...]) -> Iterator[Raw]:
    for number, line in lines_of(file):
        if isinstance(line, MalformedRecordError):
            yield line
            continue
        parts = [part.strip() for part in line.split(delimiter)]
        if len(parts) != len(fields):
            yield MalformedRecordError(
                f"{file}:{number}: {len(parts)} fields, expected {len(fields)}"
            )
        else:
            yield Record(dict(zip(fields, parts, strict=True)), f"{file}:{number}")


def _table(file: Path) -> Iterator[Raw]:
    """The rows of a Parquet or Arrow file, read by random access."""
    from datasets import Dataset

    try:
        if file.suffix == ".parquet":
            rows = Dataset.from_parquet(str(file))
        else:
            rows = Dataset.from_file(str(file))
    except Exception as error:  # Arrow raises errors of many kinds
        said = " ".join(str(error.__cause__ or error).split())[:200]
        raise ValueError(f"{file} is not a whole {file.suffix[1:]} file: {said}") from error
    for i, value in enumerate(rows):
        yield Record(dict(value), f"{file}[{i}]")


def _hub(name: str, split: str) -> Iterator[Record]:
    from datasets import load_dataset

    identifier, _, configuration = name.partition(":")
    try:
        data = load_dataset(identifier, configuration or None, split=split)
    except Exception as error:
        raise FileNotFoundError(
            f"{name} is neither a file nor a dataset that can be downloaded "
            f"({type(error).__name__}: {error})"
        ) from error
    for i, value in enumerate(data):
        yield Record(dict(value), f"{name}[{split}]:{i}")


def _rdf(file: Path) -> Iterator[Raw]:
    """Triples of N-Triples or Turtle; things are called by their label in the file, or the last
    part of their name.
    """
    try:
        import rdflib
    except ImportError as error:
        raise ImportError("reading RDF needs rdflib: pip install peft-jax[rdf]") from error
    graph = rdflib.Graph()
    if file.name.removesuffix(".gz").endswith(".nt"):
        for number, line in lines_of(file):
            if isinstance(line, MalformedRecordError):
                yield line
                continue
            try:
                graph.parse(data=line, format="nt")
            except Exception as error:  # of several kinds
                yield MalformedRecordError(
                    f"{file}:{number}: not a triple ({' '.join(str(error).split())[:80]})"
                )
    else:
        text = text_of_file(file)
        try:
            graph.parse(data=text, format="turtle")
        except Exception as error:  # of several kinds
            raise ValueError(
                f"{file} is not valid Turtle: {' '.join(str(error).split())[:200]}"
            ) from error
    labels = (rdflib.RDFS.label, rdflib.SKOS.prefLabel)
    for s, p, o in sorted(graph):
        if p not in labels:
            subject, relation, thing = (_called(graph, x, labels) for x in (s, p, o))
            yield Record(
                {"subject": subject, "relation": relation, "object": thing},
                f"{file} ({s.n3()} {p.n3()})",
            )


def _called(graph: Any, thing: Any, labels: Any) -> str:
    for label in labels:
        if (value := graph.value(thing, label)) is not None:
            return str(value)
    text = str(thing)
    if not text.startswith(("http:", "https:", "urn:")):
        return text
    return text.rstrip("/#").replace("#", "/").rpartition("/")[2].replace("_", " ")


_CONLLU = ("form", "lemma", "upos", "xpos", "feats", "head", "deprel")


def _conllu(file: Path) -> Iterator[Raw]:
    """Sentences of a treebank: `tokens` (the words' forms), `lemma`, `upos`, `xpos`, `feats`,
    `head`, `deprel`, a value a word, and what its comments say (`sent_id`, `text`). Multiword
    tokens and empty nodes are passed over. `head_offset` says how far a word's head is from it, up
    to 8 words ("-2", "+1", "far-", "far+"), or "root": parsing as tagging (Strzyz et al. 2019).
    """
    words: list[list[str]] = []
    comments: dict[str, str] = {}
    bad: MalformedRecordError | None = None
    start = 1
    for number, line in itertools.chain(lines_of(file), [(0, "\n")]):
        if isinstance(line, MalformedRecordError):
            bad = bad or line
            continue
        line = line.rstrip("\r\n")
        if line.startswith("#"):
            name, _, value = line[1:].partition("=")
            comments[name.strip()] = value.strip()
        elif line.strip():
            parts = line.split("\t")
            if len(parts) != 10:
                bad = bad or MalformedRecordError(
                    f"{file}:{number}: {len(parts)} columns, CoNLL-U has 10"
                )
            elif parts[0].isdigit():
                words.append(parts[1:8])
                if not (parts[6] == "_" or parts[6].isdigit()):
                    bad = bad or MalformedRecordError(
                        f"{file}:{number}: the head {parts[6]!r} is no word's number"
                    )
        else:
            columns: dict[str, list[str]] = (
                dict(zip(_CONLLU, map(list, zip(*words, strict=True)), strict=True))
                if words
                else {}
            )
            heads = [int(h) for h in columns.get("head", ()) if h.isdigit()]
            if bad is None and any(h > len(words) for h in heads):
                bad = MalformedRecordError(
                    f"{file}:{start}: the head {max(heads)} is none of the sentence's "
                    f"{len(words)} words"
                )
            if bad is not None:
                yield bad
            elif words:
                if len(heads) == len(words):
                    columns["head_offset"] = [_offset(at, head) for at, head in enumerate(heads, 1)]
                yield Record(
                    {"tokens": columns.pop("form"), **columns, **comments}, f"{file}:{start}"
                )
            words, comments, bad, start = [], {}, None, number + 1


def _offset(at: int, head: int) -> str:
    far = head - at
    return (
        "root" if head == 0 else f"{far:+d}" if abs(far) <= 8 else f"far{'+' if far > 0 else '-'}"
    )


_READERS: dict[str, Callable[[Path], Iterator[Raw]]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".txt": _text,
    ".parquet": _table,
    ".arrow": _table,
    ".conllu": _conllu,
    ".nt": _rdf,
    ".ttl": _rdf,
}
