"""Fills the README's figures in from result files: `python scripts/readme_figures.py [--check]`.

Three kinds of places are written; with --check nothing is, and one that is not current is an error.

- `[0.96](benchmarks/results/FILE.md "ROW: COLUMN")`: the first number of that cell of the file's
  tables. A row is named by its first cell, or by several of its cells, as "nf4 & gptq".
- `<!-- figures: techniques -->` to `<!-- end -->`: what each technique gains, of the comparison in
  benchmarks/results/compare_quickstart.json.
- `<!-- figures: picture -->` to `<!-- end -->`: its picture, docs/compare.svg, and what it was run
  on.

`--take runs/compare` first takes that comparison's results over.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from pathlib import Path
from typing import Any

from method_tables import ROOT, filled, table, write_files

from peft_jax.core.files import write_json
from peft_jax.reports.figures import Point, scatter

FILES = ("README.md",)
RESULTS = ROOT / "benchmarks" / "results"
COMPARISON, PICTURE = RESULTS / "compare_quickstart.json", ROOT / "docs" / "compare.svg"
LINK = re.compile(r'\[([^\]]+)\]\((benchmarks/results/[\w.-]+\.md) "([^"]+): ([^":]+)"\)')
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:e-?\d+)?")
# Of each recipe of the comparison: the line of code that is its idea.
CODE = {
    "lora": "peft_jax.lora(params, key, rank=8)",
    "adapter": "peft_jax.adapters.bottleneck(params, key, size=32)",
    "qlora": 'peft_jax.lora(peft_jax.quantize(params, "nf4"), key)',
    "pruned": "peft_jax.prune(params, statistics=found, sparsity=0.5)",
    "distilled": 'distill: {teachers: [{path: "runs/full/model"}]}',
    "factorized": "peft_jax.low_rank.factorize(params, keep=0.5)",
    "knowledge": "stages: [facts, merge, train]",
}
# And what it is for: the gains that are told first, by words of theirs.
MEANT = {
    "lora": ("trained parameters", "less training time", "less memory"),
    "adapter": ("trained parameters", "less training time", "less memory"),
    "qlora": ("on the device", "trained parameters", "less memory"),
    "pruned": ("parameters to store", "less forgotten", "less training time"),
    "distilled": ("generates", "on disk", "less training time"),
    "factorized": ("FLOPs", "on disk", "generates"),
    "knowledge": ("accuracy", "less forgotten", "trained parameters"),
}
LARGE = ("curves", "rates")  # of a recipe, and of its runs:
OF_RUNS = ("layers", "samples", "identity")


def take(folder: Path) -> None:
    """Take a finished comparison over: its numbers, its text and its picture."""
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    for recipe in report["recipes"]:
        for name in LARGE:
            recipe.pop(name, None)
        for run, name in ((r, n) for r in recipe["runs"] for n in OF_RUNS):
            run.pop(name, None)
    report.pop("config")
    write_json(COMPARISON, report)
    shutil.copy(folder / "report.md", COMPARISON.with_suffix(".md"))
    PICTURE.write_text(drawn(report), encoding="utf-8")


def drawn(report: dict[str, Any]) -> str:
    """Quality against the memory of a training step."""
    points = []
    for recipe in report["recipes"]:
        found = recipe["numbers"]
        quality, memory = found["quality"], found["memory"]["mean"]
        same = recipe["name"] == report["reference"]
        place = (memory / 1e6, quality["mean"], quality["spread"] or 0.0, same)
        points.append(Point(recipe["title"], *place))
    label = f"{report['quality']} on held-out data"
    svg = scatter(
        "compare",
        points,
        x="memory of a training step, MB",
        y=label,
        lower=report["quality"] in ("loss", "perplexity"),
        log=False,
    )
    assert svg is not None
    return svg


def comparison() -> dict[str, Any]:
    return json.loads(COMPARISON.read_text(encoding="utf-8"))


def techniques() -> str:
    """Each technique with its line of code, what it gains where it is meant to, and its costs."""
    rows = []
    for recipe in comparison()["recipes"]:
        if recipe["name"] in CODE:
            meant = MEANT[recipe["name"]]
            gains = [gain for words in meant for gain in recipe["gains"] if words in gain]
            told = "; ".join(gains[:3]) or "no advantage on this task"
            costs = "; ".join(recipe["costs"]) or "none"
            rows.append((recipe["technique"], f"`{CODE[recipe['name']]}`", told, costs))
    return table(("technique", "in one line", "gains over full fine-tuning", "costs"), rows)


def picture() -> str:
    report = comparison()
    about, seeds = report["about"], len(report["seeds"])
    said = f"{about['device']}, {about['cpus']} CPUs, jax {about['versions']['jax']}"
    return (
        "![Quality against memory of each recipe](docs/compare.svg)\n\n"
        f"{len(report['recipes'])} recipes on one task, {seeds} seeds each ({said}; "
        f"[all numbers](benchmarks/results/{COMPARISON.stem}.md))."
    )


def cell(path: Path, row: str, column: str) -> str:
    """The first number of a cell. Raises ValueError where the file's tables have no such cell."""
    heads: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("|"):
            heads = []
            continue
        cells = [c.strip() for c in line.strip("|").split("|")]
        if not heads:
            heads = cells
        elif column in heads and _is(row, cells):
            found = NUMBER.search(cells[heads.index(column)])
            if found is not None:
                return found[0]
    raise ValueError(f"{path.name} has no number in the row {row!r}, column {column!r}")


def _is(row: str, cells: list[str]) -> bool:
    parts = row.split(" & ")
    return cells[0] == row if len(parts) == 1 else set(parts) <= set(cells)


def current(text: str) -> str:
    """`text` with its figures as the result files have them."""

    def linked(found: re.Match[str]) -> str:
        _, file, row, column = found.groups()
        return f'[{cell(ROOT / file, row, column)}]({file} "{row}: {column}")'

    blocks = {"techniques": techniques, "picture": picture}
    return filled(LINK.sub(linked, text), "figures", blocks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--take", type=Path, help="the folder of a comparison")
    args = parser.parse_args()
    if args.take is not None:
        take(args.take)
    write_files(FILES, current, check=args.check)


if __name__ == "__main__":
    main()
