"""The page of a run, or of several beside each other, from what they left in their folders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from peft_jax.core.files import write_json
from peft_jax.reports import page
from peft_jax.reports.comparison import by_layer
from peft_jax.reports.figures import Series, curves
from peft_jax.reports.folder import (
    Points,
    curve,
    disk_bytes,
    read,
    step_numbers,
    training_folders,
)

REPORT, ABOUT, CONFIG = "report.html", "about.json", "config.yaml"
# What commands write, and what it is called.
RESULTS = {
    "results.json": "On the held-out data",
    "injection.json": "What the model knows",
    "pruning.json": "Pruning",
    "quantization.json": "Quantization",
    "evaluation.json": "Evaluation",
    "teaching.json": "Teaching",
}
NESTED = ("before", "after", "samples", "stages", "weights", "sensitivity", "tokens")
Columns = dict[str, Mapping[str, Any]]  # column -> row -> value


class View(NamedTuple):
    """A run as its page has it."""

    name: str
    tables: Mapping[str, Columns]
    numbers: Mapping[str, Any]
    curves: Mapping[str, Points]
    samples: Mapping[str, Mapping[str, str]]  # prompt -> column -> text
    layers: Mapping[str, Any]
    config: str
    about: Mapping[str, Any]


def write_run(folder: Path) -> Path:
    """Write `folder`/report.html, and about.json with what this process runs on."""
    write_json(folder / ABOUT, page.about())
    return write_views([folder], folder / REPORT)


def write_views(folders: Sequence[Path], path: Path) -> Path:
    """Write the page of some runs. Raises ValueError for a folder that holds none, and for two of
    the same name.
    """
    names = _names(folders)
    views = [view_of(folder, name) for folder, name in zip(folders, names, strict=True)]
    several = len(views) > 1
    values = {
        "title": " | ".join(names) if several else names[0],
        "several": several,
        "views": views,
        "tables": _together(views),
        "numbers": _numbers(views),
        "figures": _figures(views),
        "samples": _samples(views),
    }
    page.write(path, page.render("runs.html.j2", values))
    return path


def _names(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart."""
    if len({f.resolve() for f in folders}) < len(folders):
        raise ValueError("a folder is named twice: name each run once")
    depth = 1
    while True:
        names = ["/".join(f.resolve().parts[-depth:]) for f in folders]
        if len(set(names)) == len(names):
            return names
        depth += 1


def view_of(folder: Path, name: str) -> View:
    """What is known of a run. Raises ValueError for a folder that holds none."""
    told = {file: read(folder / file) for file in RESULTS}
    if not any(told.values()) and not training_folders(folder):
        raise ValueError(
            f"{folder} holds no run: there is none of {', '.join(RESULTS)} or metrics.jsonl"
        )
    path = folder / CONFIG
    config = path.read_text(encoding="utf-8") if path.is_file() else ""
    numbers: dict[str, Any] = {}
    for found in told.values():
        scalars = {k: v for k, v in found.items() if k not in NESTED}
        numbers |= {k: v for k, v in scalars.items() if isinstance(v, int | float | str)}
    took = {**step_numbers(folder), "bytes_written": disk_bytes(folder) or None}
    numbers |= {k: v for k, v in took.items() if v is not None}
    found = {"loss": curve(folder, "train"), "validation": curve(folder, "validation")}
    found["speed"] = curve(folder, "train", "tokens_per_second")
    return View(
        name,
        {RESULTS[file]: columns for file, x in told.items() if (columns := _columns(x))},
        numbers,
        found,
        _texts(told["results.json"].get("samples", {}), config),
        by_layer(_layers(told["pruning.json"].get("weights", {}))),
        config,
        read(folder / ABOUT),
    )


def _columns(told: Mapping[str, Any]) -> Columns:
    """Metrics before, after each stage, and after."""
    stages = told.get("stages", {})
    if stages:
        return {label: stage["metrics"] for label, stage in stages.items()}
    return {when: told[when] for when in ("before", "after") if told.get(when)}


def _texts(samples: Mapping[str, Sequence[str]], config: str) -> dict[str, dict[str, str]]:
    prompts = ((yaml.safe_load(config) or {}).get("generate") or {}).get("prompts") or []
    return {
        prompt: {when: texts[i] for when, texts in samples.items() if i < len(texts)}
        for i, prompt in enumerate(prompts)
    }


def _layers(weights: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The weights of a pruning report as those of a comparison."""
    found = []
    for path, row in weights.items():
        parts = path.split("/")
        numbers = [int(p.rpartition("_")[2]) for p in parts if p.rpartition("_")[2].isdigit()]
        what = {"sparsity": row["sparsity"], "bits": 32, "rank": None}
        found.append({"weight": parts[-2], "layer": numbers[0] if numbers else -1, **what})
    return found


def _together(views: Sequence[View]) -> dict[str, tuple[list[str], dict[str, list[Any]]]]:
    """title -> (heads of the columns, row -> values), of all runs beside each other."""
    found = {}
    for title in dict.fromkeys(t for v in views for t in v.tables):
        columns = [(v, name) for v in views for name in v.tables.get(title, {})]
        heads = [f"{v.name}: {name}" if len(views) > 1 else name for v, name in columns]
        keys = dict.fromkeys(k for v, name in columns for k in v.tables[title][name])
        rows = {k: [v.tables[title][name].get(k) for v, name in columns] for k in keys}
        found[title] = (heads, rows)
    return found


def _numbers(views: Sequence[View]) -> dict[str, list[Any]]:
    keys = dict.fromkeys(k for v in views for k in v.numbers)
    return {k: [v.numbers.get(k) for v in views] for k in keys}


def _figures(views: Sequence[View]) -> dict[str, str]:
    """title -> SVG."""

    def series(*kinds: str) -> Series:
        found = {}
        for v in views:
            for kind in kinds:
                parts = [v.name] * (len(views) > 1) + [kind] * (len(kinds) > 1)
                if v.curves[kind]:
                    found[" ".join(parts) or kind] = v.curves[kind]
        return found

    wanted = {
        "Loss": curves("loss", series("loss", "validation"), x="step", y="loss"),
        "Speed": curves("speed", series("speed"), x="step", y="tokens per second"),
    }
    return {title: svg for title, svg in wanted.items() if svg is not None}


def _samples(views: Sequence[View]) -> dict[str, list[tuple[str, str]]]:
    """prompt -> (whose, text)."""
    found: dict[str, list[tuple[str, str]]] = {}
    for v in views:
        for prompt, texts in v.samples.items():
            for when, text in texts.items():
                whose = f"{v.name}: {when}" if len(views) > 1 else when
                found.setdefault(prompt, []).append((whose, text))
    return found
