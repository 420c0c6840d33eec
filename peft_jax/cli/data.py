"""What `peft-jax data` prints: examples with the learnt tokens coloured, numbers, a histogram."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from peft_jax.recipes.data import Sample, SourceReport

LONGEST = 3000  # characters of an example that are shown
WIDTH = 40  # characters of the longest bar


def print_data(console: Console, reports: Sequence[SourceReport]) -> None:
    """Print reports; where the output is no terminal, learnt text stands between « and »."""
    coloured = console.is_terminal
    for report in reports:
        for sample in report.samples:
            console.rule(Text(sample.origin))
            console.print(_sample(sample, coloured), highlight=False, soft_wrap=True)
    if any(report.samples for report in reports):
        how = "green is learnt" if coloured else "« » is learnt"
        console.rule(Text(how))
    console.print(_table(reports))
    for line in _histogram(reports[0].lengths):
        console.print(line, highlight=False, markup=False)
    for report in reports:
        if len(report.skipped):
            said = f"\n{report.name}{report.skipped.table()}"
            console.print(said, highlight=False, markup=False, soft_wrap=True)


def _sample(sample: Sample, coloured: bool) -> Text:
    text = Text()
    inside = False
    for piece in sample.pieces:
        if not coloured and piece.learnt != inside:
            text.append("«" if piece.learnt else "»")
            inside = piece.learnt
        if len(text) > LONGEST:
            text.append(" ...", "dim")
            break
        style = "bold green" if piece.learnt else "dim"
        text.append(piece.text, f"{style} reverse" if piece.special else style)
    if inside:
        text.append("»")
    return text


def _table(reports: Sequence[SourceReport]) -> Table:
    table = Table("", *(r.name for r in reports))
    for column in table.columns[1:]:
        column.justify = "right"

    def row(name: str, values: Iterator[str]) -> None:
        table.add_row(name, *values)

    row("records", (f"{r.records:,}" for r in reports))
    row("skipped", (f"{len(r.skipped):,}" for r in reports))
    row("examples", (f"{r.examples:,}" for r in reports))
    row("tokens", (f"{int(r.lengths.sum()):,}" for r in reports))
    row("learnt", (f"{r.learnt:,}" for r in reports))
    row("rows", (f"{r.rows:,}" for r in reports))
    row("filled", (f"{r.filled:.1%}" for r in reports))
    row("median length", (f"{int(np.median(r.lengths)):,}" for r in reports))
    row("longest", (escape(r.longest) for r in reports))
    return table


def _histogram(lengths: np.ndarray, bins: int = 10) -> Iterator[str]:
    """A line for each range of lengths."""
    top = int(lengths.max())
    step = max(1, -(-top // bins))
    counts = np.bincount((lengths - 1) // step, minlength=1)
    yield "\ntokens in an example"
    for i, count in enumerate(counts):
        bar = "█" * round(WIDTH * count / counts.max())
        yield f"{i * step + 1:>7,} to {(i + 1) * step:>7,} {count:>9,} {bar}"
