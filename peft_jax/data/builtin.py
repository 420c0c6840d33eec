"""Data that every machine already has: Python's own documentation and docstrings, and a table of
countries.

Splits are fixed by a hash of each record's name, so they are the same on every machine with the
same Python.
"""

from __future__ import annotations

import ast
import csv
import functools
import hashlib
import inspect
import re
import sysconfig
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path

SPLITS = ("train", "validation", "test")


def dataset(name: str, split: str) -> list[dict[str, str]]:
    """The records of a built-in dataset's split, or "all" of them. Raises ValueError naming what
    there is.
    """
    if name not in DATASETS:
        raise ValueError(f"there is no built-in dataset {name!r}; there are {', '.join(DATASETS)}")
    if split not in (*SPLITS, "all"):
        raise ValueError(
            f"built-in datasets have the splits {', '.join(SPLITS)} and all, not {split!r}"
        )
    return [record for key, record in DATASETS[name]() if split in ("all", split_of(key))]


def split_of(key: str) -> str:
    """80% train, 10% validation, 10% test, by a hash of the key."""
    bucket = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") % 10
    return "validation" if bucket == 8 else "test" if bucket == 9 else "train"


@functools.cache
def python_docs() -> list[tuple[str, dict[str, str]]]:
    """The language reference's topics as plain text (about 465 kB), by topic."""
    from pydoc_data.topics import topics

    return [(name, {"text": _tidy(text)}) for name, text in sorted(topics.items())]


def _tidy(text: str) -> str:
    """Paragraphs on one line each, code blocks as they stand."""
    blocks = re.split(r"\n\s*\n", text.strip("\n"))
    joined = (
        b.rstrip() if re.match(r"\s{3,}", b) else re.sub(r"\s*\n\s*", " ", b.strip())
        for b in blocks
    )
    return "\n\n".join(joined)


@functools.cache
def python_docstrings() -> list[tuple[str, dict[str, str]]]:
    """Standard library: qualified name with signature -> the docstring's first sentence (about
    4,800 pairs).
    """
    pairs: dict[str, dict[str, str]] = {}
    root = Path(sysconfig.get_paths()["stdlib"])
    for file in sorted(root.rglob("*.py")):
        relative = file.relative_to(root)
        if set(relative.parts) & {
            "test",
            "tests",
            "idlelib",
            "lib2to3",
            "site-packages",
            "__pycache__",
            "turtledemo",
        }:
            continue
        module = ".".join(relative.with_suffix("").parts).removesuffix(".__init__")
        try:
            tree = ast.parse(file.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for name, node in _functions(tree, module):
            sentence = _first_sentence(ast.get_docstring(node))
            if sentence:
                pairs[name] = {"prompt": f"{name}{_signature(node)}\n", "completion": sentence}
    return sorted(pairs.items())


def _functions(
    node: ast.AST, prefix: str
) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            name = f"{prefix}.{child.name}"
            yield name, child
            if isinstance(child, ast.ClassDef):
                yield from _functions(child, name)


def _signature(node: ast.AST) -> str:
    if isinstance(node, ast.ClassDef):
        return f"({', '.join(ast.unparse(base) for base in node.bases)})" if node.bases else ""
    assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    return f"({ast.unparse(node.args)})"


def _first_sentence(doc: str | None) -> str:
    paragraph = re.sub(r"\s+", " ", inspect.cleandoc(doc or "").split("\n\n")[0]).strip()
    sentence = re.split(r"(?<=[.!?])\s", paragraph)[0]
    return sentence if 15 <= len(sentence) <= 200 else ""


@functools.cache
def countries() -> list[tuple[str, dict[str, str]]]:
    """Question and answer about each country: capital, continent, currency, official or main
    language.
    """
    questions = {
        "capital": "What is the capital of {}?",
        "continent": "On which continent is {}?",
        "currency": "What is the currency of {}?",
        "language": "Which language is spoken in {}?",
    }
    records = []
    for row in country_table():
        for column, question in questions.items():
            answer = {"prompt": question.format(row["name"]) + "\n", "completion": row[column]}
            records.append((f"{row['name']}/{column}", answer))
    return records


@functools.cache
def country_facts() -> list[tuple[str, dict[str, str]]]:
    """The same facts as triples."""
    return [
        (f"{row['name']}/{column}", {"subject": row["name"], "relation": column, "object": value})
        for row in country_table()
        for column, value in row.items()
        if column != "name"
    ]


def country_table() -> list[dict[str, str]]:
    """The table itself: name, capital, continent, currency, language."""
    file = resources.files("peft_jax") / "assets" / "countries.csv"
    with file.open(encoding="utf-8") as handle:
        return list(csv.DictReader(handle))


DATASETS: dict[str, Callable[[], list[tuple[str, dict[str, str]]]]] = {
    "python-docs": python_docs,
    "python-docstrings": python_docstrings,
    "countries": countries,
    "country-facts": country_facts,
}
