"""Writes the tables of methods from their records: `python scripts/method_tables.py [--check]`.

A table stands between two comments, `<!-- methods: NAME -->` and `<!-- end -->`; with `--check`
nothing is written, and one that is not current is an error.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from pathlib import Path

from peft_jax.methods import METHODS

ROOT = Path(__file__).parents[1]
FILES = ("docs/methods_sources.md",)


def sources() -> str:
    """What each method follows, and where it differs from that."""
    rows = ((f"`{m.name}`", m.follows, m.differs) for m in METHODS.values())
    return table(("method", "follows", "differs from it, and why"), rows)


def table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    heads = list(heads)
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines).replace("|  |", "| |")


TABLES = {"sources": sources}


def current(text: str) -> str:
    """`text` with its tables as the records have them."""

    def write(found: re.Match[str]) -> str:
        return f"{found[1]}\n{TABLES[found[2]]()}\n{found[3]}"

    pattern = r"(<!-- methods: (\w+) -->)\n.*?(<!-- end -->)"
    return re.sub(pattern, write, text, flags=re.DOTALL)


def main() -> None:
    stale = []
    for name in FILES:
        path = ROOT / name
        text = path.read_text(encoding="utf-8")
        if (new := current(text)) != text:
            stale.append(name)
            if "--check" not in sys.argv:
                path.write_text(new, encoding="utf-8")
    if stale and "--check" in sys.argv:
        raise SystemExit(f"not current: {', '.join(stale)}; run python scripts/method_tables.py")


if __name__ == "__main__":
    main()
