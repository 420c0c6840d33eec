"""A comparison as a page, a text, JSON and a table, from the records of its runs."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from peft_jax.core.files import write_json
from peft_jax.reports import page
from peft_jax.reports.figures import Point, Series, bars, curves, scatter
from peft_jax.reports.measures import (
    Measure,
    Summary,
    Verdict,
    measures,
    spread_of,
    summary,
    verdict,
)

SHOWN = {"": page.number, "bytes": page.in_bytes, "giga": page.in_billions}
FILES = ("report.html", "report.md", "report.json", "report.csv")


class Recipe(NamedTuple):
    """A recipe with the records of its runs, one for each seed, and the losses of its rates."""

    name: str
    title: str
    technique: str | None
    rate: float | None
    rates: Mapping[str, float | None]  # rate -> loss on the validation data
    runs: Sequence[Mapping[str, Any]]
    curves: Mapping[str, Any]  # of the first seed: kind -> (step, loss)


class Comparison(NamedTuple):
    """What is compared, and what it was made with."""

    title: str
    quality: str
    reference: str
    seeds: Sequence[int]
    forgetting: str  # what text it is measured on
    base: Mapping[str, Any]
    recipes: Sequence[Recipe]
    config: Mapping[str, Any]
    about: Mapping[str, Any]


class Row(NamedTuple):
    """A recipe as the report has it."""

    recipe: Recipe
    numbers: Mapping[str, Summary]
    verdicts: Sequence[Verdict]

    @property
    def gains(self) -> list[Verdict]:
        """What is better than the reference, the greatest ratio first."""
        found = [v for v in self.verdicts if v.sign > 0]
        return sorted(found, key=lambda v: -(v.ratio or 0.0))

    @property
    def costs(self) -> list[Verdict]:
        return [v for v in self.verdicts if v.sign < 0]


def rows_of(comparison: Comparison) -> list[Row]:
    """Each recipe's numbers over its seeds, and how they stand to the reference's."""
    all = measures(comparison.quality)
    numbers = {
        r.name: {m.key: summary([run["numbers"].get(m.key) for run in r.runs]) for m in all}
        for r in comparison.recipes
    }
    other = numbers[comparison.reference]
    return [
        Row(
            r,
            numbers[r.name],
            _verdicts(all, numbers[r.name], other, r.name == comparison.reference),
        )
        for r in comparison.recipes
    ]


def _verdicts(
    all: Sequence[Measure], mine: Mapping[str, Summary], other: Mapping[str, Summary], same: bool
) -> list[Verdict]:
    found = [] if same else [verdict(m, mine[m.key], other[m.key]) for m in all]
    return [v for v in found if v is not None]


def write_comparison(comparison: Comparison, out: Path) -> None:
    """Write report.html, report.md, report.json and report.csv into a folder."""
    rows = rows_of(comparison)
    values = {
        "c": comparison,
        "rows": rows,
        "measures": measures(comparison.quality),
        "reference": next(r.recipe.title for r in rows if r.recipe.name == comparison.reference),
        "searched": any(r.recipe.rates for r in rows),
        "figures": _figures(comparison, rows),
        "layers": {r.recipe.title: by_layer(r.recipe.runs[0].get("layers", [])) for r in rows},
        "config": yaml.safe_dump(dict(comparison.config), sort_keys=False),
        "cells": _cells(comparison, rows),
    }
    page.write(out / "report.html", page.render("compare.html.j2", values))
    page.write(out / "report.md", page.render("compare.md.j2", values))
    page.write(out / "report.csv", _csv(comparison, rows))
    write_json(out / "report.json", _json(comparison, rows))


def _cells(comparison: Comparison, rows: Sequence[Row]) -> list[list[str]]:
    """The table of all measures as text, a row each."""

    def cell(measure: Measure, found: Summary) -> str:
        if measure.kind == "scored":
            return spread_of(found)
        return SHOWN[measure.unit](found.mean)

    all = measures(comparison.quality)
    return [[row.recipe.title, *(cell(m, row.numbers[m.key]) for m in all)] for row in rows]


def _points(comparison: Comparison, rows: Sequence[Row], x: str, scale: float) -> list[Point]:
    found = []
    for row in rows:
        at, quality = row.numbers[x].mean, row.numbers["quality"]
        if at is None or quality.mean is None:
            continue
        same = row.recipe.name == comparison.reference
        place = (at / scale, quality.mean, quality.spread or 0.0, same)
        found.append(Point(row.recipe.title, *place))
    return found


def _figures(comparison: Comparison, rows: Sequence[Row]) -> dict[str, str]:
    """title -> SVG."""
    lower = measures(comparison.quality)[0].better == "lower"
    y = f"{comparison.quality} on the test data ({'lower' if lower else 'higher'} is better)"
    how: dict[str, Any] = {"y": y, "lower": lower}
    first: Series = {r.recipe.title: r.recipe.curves.get("train", []) for r in rows}
    held: Series = {r.recipe.title: r.recipe.curves.get("validation", []) for r in rows}
    memory = _points(comparison, rows, "memory", 1e6)
    trained = _points(comparison, rows, "trained", 1.0)
    disk = {r.recipe.title: (r.numbers["disk"].mean or 0.0) / 1e6 for r in rows}
    of = next(r.numbers["disk"].mean for r in rows if r.recipe.name == comparison.reference)
    found = {
        "Quality against memory": scatter(
            "memory", memory, x="memory of a training step, MB", log=False, **how
        ),
        "Quality against trained parameters": scatter(
            "trained", trained, x="trained parameters", log=True, **how
        ),
        "Bytes to store for the task": bars(
            "disk", disk, x="MB on disk", line=None if of is None else of / 1e6
        ),
        "Loss in training": curves("loss", first, x="step", y="loss, nats per token"),
        "Loss on the validation data": curves(
            "validation", held, x="step", y="loss, nats per token"
        ),
    }
    return {title: svg for title, svg in found.items() if svg is not None}


def by_layer(layers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Layers down, weights across: what is not as in the base of sparsity, bits and rank."""
    changed = [x for x in layers if x["sparsity"] > 0.005 or x["rank"] or x["bits"] not in (32, 16)]
    kinds = list(dict.fromkeys(x["weight"] for x in changed))
    numbers = sorted({x["layer"] for x in changed})
    table = {n: {x["weight"]: _shown(x) for x in changed if x["layer"] == n} for n in numbers}
    return {"kinds": kinds, "rows": table}


def _shown(x: Mapping[str, Any]) -> str:
    parts = []
    if x["sparsity"] > 0.005:
        parts.append(f"{x['sparsity']:.0%} zeros")
    if x["bits"] not in (32, 16):
        parts.append(f"{x['bits']:.3g} bits")
    if x["rank"]:
        parts.append(f"rank {x['rank']}")
    return ", ".join(parts)


def _csv(comparison: Comparison, rows: Sequence[Row]) -> str:
    """A row for each run, and one for their means."""
    out = io.StringIO()
    keys = [m.key for m in measures(comparison.quality)]
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["recipe", "technique", "rate", "seed", *keys])
    for row in rows:
        r = row.recipe
        start = [r.name, r.technique or "", "" if r.rate is None else r.rate]
        for seed, run in zip(comparison.seeds, r.runs, strict=True):
            writer.writerow([*start, seed, *(run["numbers"].get(k) for k in keys)])
        writer.writerow([*start, "mean", *(row.numbers[k].mean for k in keys)])
    return out.getvalue()


def _json(comparison: Comparison, rows: Sequence[Row]) -> dict[str, Any]:
    """All numbers of the report."""
    recipes = []
    for row in rows:
        r = row.recipe
        told = {
            "name": r.name,
            "title": r.title,
            "technique": r.technique,
            "rate": r.rate,
            "rates": dict(r.rates),
            "runs": [dict(run) for run in r.runs],
            "numbers": {key: found._asdict() for key, found in row.numbers.items()},
            "beside_reference": [v._asdict() for v in row.verdicts],
            "gains": [v.said for v in row.gains],
            "costs": [v.said for v in row.costs],
            "curves": dict(r.curves),
        }
        recipes.append(told)
    c = comparison
    return {
        "quality": c.quality,
        "reference": c.reference,
        "seeds": list(c.seeds),
        "forgetting": c.forgetting,
        "rates_searched": any(r.rates for r in c.recipes),
        "base": dict(c.base),
        "recipes": recipes,
        "config": dict(c.config),
        "about": dict(c.about),
    }
