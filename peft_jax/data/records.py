"""Records from files and hub datasets, each with its origin, so that a malformed one can be named.

What a record holds is decided by `kind`: `text`; `prompt` and `completion`; `messages` (chat);
`text`, `label` and perhaps `text_pair` (classification); `tokens` and `tags` (tagging); `question`,
`context` and `answers` (question_answering, as in SQuAD); `anchor` and `positive` (pairs);
`subject`, `relation`, `object` and perhaps the subject's `aliases`, a list or "one|two" (facts).
"""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from peft_jax.core.files import numbered_lines, open_text
from peft_jax.data import builtin

logger = logging.getLogger("peft_jax")
csv.field_size_limit(2**31 - 1)  # a long text is a field like any other
Kind = Literal[
    "text",
    "completion",
    "chat",
    "classification",
    "tagging",
    "question_answering",
    "pairs",
    "facts",
]
FIELDS: dict[str, tuple[str, ...]] = {
    "text": ("text",),
    "completion": ("prompt", "completion"),
    "chat": ("messages",),
    "classification": ("text", "label"),
    "tagging": ("tokens", "tags"),
    "question_answering": ("question", "context", "answers"),
    "pairs": ("anchor", "positive"),
    "facts": ("subject", "relation", "object"),
}
OPTIONAL: dict[str, tuple[str, ...]] = {"classification": ("text_pair",), "facts": ("aliases",)}


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

    `path` is "builtin:NAME", a file (.jsonl, .json, .csv, .parquet, .txt, each but Parquet also
    with .gz) or a hub dataset id. `columns` maps the fields of the kind to the source's names; with
    a `delimiter`, each line of a text file is split into the kind's fields. Of a table with a row a
    thing, `columns` of {"subject": NAME, "relation": "*"} make facts: each other column is a
    relation, and its cell the object. A malformed record is logged with file and line and passed
    over, or ends the run with MalformedRecordError if `on_error` is "stop". Raises ValueError where
    nothing usable is left.
    """
    optional = OPTIONAL.get(kind, ())
    names = {field: (columns or {}).get(field, field) for field in FIELDS[kind]}
    names |= {field: columns[field] for field in optional if columns and field in columns}
    if unknown := set(columns or {}) - {*names, *optional}:
        raise ValueError(
            f"columns names {sorted(unknown)[0]!r}; a {kind} record has {', '.join(names)}"
        )
    records: list[Record] = []
    bad = 0
    raws = _raw(path, kind, split, delimiter)
    if kind == "facts" and names["relation"] == "*":
        raws, names = _cells(raws, names["subject"]), {field: field for field in FIELDS[kind]}
    for raw in raws:
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
        raise ValueError(
            f"{path} holds no usable {kind} record" + (f" ({bad} malformed)" if bad else "")
        )
    return records


def _cells(
    raws: Iterator[Record | MalformedRecordError], subject: str
) -> Iterator[Record | MalformedRecordError]:
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


def _check(raw: Record | MalformedRecordError, names: Mapping[str, str], kind: Kind) -> Record:
    if isinstance(raw, MalformedRecordError):
        raise raw
    if not isinstance(raw.value, Mapping):
        raise MalformedRecordError(
            f"{raw.origin}: expected an object, found {type(raw.value).__name__}"
        )
    value = {}
    for field, name in names.items():
        if name not in raw.value:
            have = ", ".join(map(str, raw.value))
            raise MalformedRecordError(f"{raw.origin}: no field {name!r} (fields here: {have})")
        value[field] = raw.value[name]
    for field in OPTIONAL.get(kind, ()):
        if field not in names and raw.value.get(field) is not None:
            value[field] = raw.value[field]
    _CHECKS.get(kind, _check_texts)(value, names, raw.origin)
    return Record(value, raw.origin)


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


def _check_messages(value: Mapping[str, Any], names: Mapping[str, str], origin: str) -> None:
    messages = value["messages"]
    good = isinstance(messages, list) and messages
    if not good or not all(
        isinstance(m, Mapping) and isinstance(m.get("content"), str) and m.get("role")
        for m in messages
    ):
        raise MalformedRecordError(
            f"{origin}: messages must be a list of objects with role and content"
        )
    if not any(m["role"] == "assistant" for m in messages):
        raise MalformedRecordError(f"{origin}: no assistant turn to learn from")


_CHECKS: dict[str, Callable[[dict[str, Any], Mapping[str, str], str], None]] = {
    "chat": _check_messages,
    "facts": _check_fact,
    "classification": _check_labelled,
    "tagging": _check_tags,
    "question_answering": _check_question,
}


def _raw(
    path: str, kind: Kind, split: str, delimiter: str | None
) -> Iterator[Record | MalformedRecordError]:
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
        yield from _lines(file, delimiter, FIELDS[kind])
    else:
        yield from reader(file)


def _jsonl(file: Path) -> Iterator[Record | MalformedRecordError]:
    for number, line in numbered_lines(file):
        try:
            yield Record(json.loads(line), f"{file}:{number}")
        except json.JSONDecodeError as error:
            yield MalformedRecordError(
                f"{file}:{number}: not valid JSON ({error.msg} at column {error.colno})"
            )


def _json(file: Path) -> Iterator[Record | MalformedRecordError]:
    with open_text(file) as handle:
        try:
            values = json.load(handle)
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}:{error.lineno}: not valid JSON ({error.msg})") from error
    if not isinstance(values, list):
        raise ValueError(f"{file} should hold a JSON array of records")
    for i, value in enumerate(values):
        yield Record(value, f"{file}[{i}]")


def _csv(file: Path) -> Iterator[Record | MalformedRecordError]:
    with open_text(file) as handle:
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
                yield MalformedRecordError(
                    f"{file}:{rows.line_num}: not {columns} columns as in the header"
                )
            else:
                yield Record(dict(row), f"{file}:{rows.line_num}")


def _text(file: Path) -> Iterator[Record | MalformedRecordError]:
    with open_text(file) as handle:
        yield Record({"text": handle.read().replace("\r\n", "\n")}, str(file))


def _lines(
    file: Path, delimiter: str, fields: tuple[str, ...]
) -> Iterator[Record | MalformedRecordError]:
    with open_text(file) as lines:
        for number, line in enumerate(lines, 1):
            parts = [part.strip() for part in line.split(delimiter)]
            if len(parts) != len(fields):
                yield MalformedRecordError(
                    f"{file}:{number}: {len(parts)} fields, expected {len(fields)}"
                )
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
            f"{name} is neither a file nor a dataset that can be downloaded "
            f"({type(error).__name__}: {error})"
        ) from error
    for i, value in enumerate(data):
        yield Record(dict(value), f"{name}[{split}]:{i}")


def _rdf(file: Path) -> Iterator[Record | MalformedRecordError]:
    """Triples of N-Triples or Turtle; things are called by their label in the file, or the last
    part of their name.
    """
    try:
        import rdflib
    except ImportError as error:
        raise ImportError("reading RDF needs rdflib: pip install peft-jax[rdf]") from error
    graph = rdflib.Graph()
    if file.name.removesuffix(".gz").endswith(".nt"):
        with open_text(file) as lines:
            for number, line in enumerate(lines, 1):
                try:
                    graph.parse(data=line, format="nt")
                except Exception as error:  # of several kinds
                    yield MalformedRecordError(
                        f"{file}:{number}: not a triple ({' '.join(str(error).split())[:80]})"
                    )
    else:
        with open_text(file) as handle:
            try:
                graph.parse(data=handle.read(), format="turtle")
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


def _conllu(file: Path) -> Iterator[Record | MalformedRecordError]:
    """Sentences of a treebank: `tokens` (the words' forms), `lemma`, `upos`, `xpos`, `feats`,
    `head`, `deprel`, a value a word, and what its comments say (`sent_id`, `text`). Multiword
    tokens and empty nodes are passed over. `head_offset` says how far a word's head is from it, up
    to 8 words ("-2", "+1", "far-", "far+"), or "root": parsing as tagging (Strzyz et al. 2019).
    """
    with open_text(file) as lines:
        words: list[list[str]] = []
        comments: dict[str, str] = {}
        bad: MalformedRecordError | None = None
        start = 1
        for number, line in enumerate([*lines, "\n"], 1):
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
                        columns["head_offset"] = [
                            _offset(at, head) for at, head in enumerate(heads, 1)
                        ]
                    yield Record(
                        {"tokens": columns.pop("form"), **columns, **comments}, f"{file}:{start}"
                    )
                words, comments, bad, start = [], {}, None, number + 1


def _offset(at: int, head: int) -> str:
    far = head - at
    return (
        "root" if head == 0 else f"{far:+d}" if abs(far) <= 8 else f"far{'+' if far > 0 else '-'}"
    )


_READERS: dict[str, Callable[[Path], Iterator[Record | MalformedRecordError]]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".txt": _text,
    ".parquet": _parquet,
    ".conllu": _conllu,
    ".nt": _rdf,
    ".ttl": _rdf,
}
