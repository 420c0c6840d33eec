"""Writes the tables of methods from their records: `python scripts/method_tables.py [--check]`.

A table stands between two comments, `<!-- methods: NAME -->` and `<!-- end -->`, a row of the
README's after its name; with `--check` nothing is written, and one that is not current is an error.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from peft_jax.methods import METHODS

ROOT = Path(__file__).parents[1]
FILES = ("docs/methods_sources.md", "README.md")
ROWS = {"methods": ("low_rank", "core"), "adapters": ("adapters",)}  # name -> folders


def sources() -> str:
    """What each method follows, and where it differs from that."""
    rows = ((f"`{m.name}`", m.follows, m.differs) for m in METHODS.values())
    return table(("method", "follows", "differs from it, and why"), rows)


def titles(folders: Iterable[str]) -> str:
    """The methods of some folders, as prose names them."""
    homes = {f"peft_jax.{folder}" for folder in folders}
    return ", ".join(
        m.title for m in METHODS.values() if m.function.__module__.rpartition(".")[0] in homes
    )


def table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    heads = list(heads)
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines).replace("|  |", "| |")


TABLES = {"sources": sources}


def filled(text: str, mark: str, blocks: Mapping[str, Callable[[], str]]) -> str:
    """`text` with what stands between `<!-- mark: NAME -->` and `<!-- end -->` made anew."""

    def write(found: re.Match[str]) -> str:
        return f"{found[1]}\n{blocks[found[2]]()}\n{found[3]}"

    pattern = rf"(<!-- {mark}: (\w+) -->)\n.*?(<!-- end -->)"
    return re.sub(pattern, write, text, flags=re.DOTALL)


def current(text: str) -> str:
    """`text` with its tables as the records have them."""

    def row(found: re.Match[str]) -> str:
        return f"| {found[1]} | {titles(ROWS[found[1]])} |"

    text = re.sub(rf"^\| ({'|'.join(ROWS)}) \| .*\|$", row, text, flags=re.MULTILINE)
    return filled(text, "methods", TABLES)


def write_files(names: Iterable[str], current: Callable[[str], str], *, check: bool) -> None:
    """Make files current; with `check` nothing is written, and one that is not is an error."""
    stale = []
    for name in names:
        text = (ROOT / name).read_text(encoding="utf-8")
        if (new := current(text)) != text:
            stale.append(name)
            if not check:
                (ROOT / name).write_text(new, encoding="utf-8")
    if stale and check:
        raise SystemExit(f"not current: {', '.join(stale)}; run python {sys.argv[0]}")


if __name__ == "__main__":
    write_files(FILES, current, check="--check" in sys.argv)
