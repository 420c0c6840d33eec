"""What a run left in its folder, as reports read it. Nothing of the run is loaded."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

METRICS, STEP = "metrics.jsonl", "step.json"
WRITTEN = ("adapter", "base", "model")  # folders of weights
Points = list[tuple[float, float]]


def training_folders(folder: Path) -> list[Path]:
    """Where training left its records: the folder itself, or those of its stages in order."""
    stages = sorted(
        (p for p in folder.glob("stages/*") if (p / METRICS).is_file()),
        key=lambda p: int(p.name.partition("-")[0]),
    )
    return stages or ([folder] if (folder / METRICS).is_file() else [])


def rows(folder: Path, kind: str) -> list[dict[str, Any]]:
    """The rows of one kind ("train", "validation") of a training's metrics."""
    return [row for row in _rows(folder / METRICS) if row.get("kind") == kind]


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue  # the last line of a killed run may be cut


def curve(folder: Path, kind: str, name: str = "loss") -> Points:
    """(step, value) over a whole run; the steps of a chain's stages follow one another."""
    points: Points = []
    start = 0
    for part in training_folders(folder):
        found = [r for r in rows(part, kind) if r.get(name) is not None]
        points += [(start + r["step"], r[name]) for r in found]
        start += max((r["step"] for r in rows(part, "train")), default=0)
    return points


def step_numbers(folder: Path) -> dict[str, float | None]:
    """What training took: bytes and operations of the largest step, its median seconds, and the
    seconds of all steps, without compilation.
    """
    each = [_of_training(part) for part in training_folders(folder)]
    seconds = [x["train_seconds"] for x in each]
    return {
        "memory": _largest([x["memory"] for x in each]),
        "flops": _largest([x["flops"] for x in each]),
        "step_seconds": _largest([x["step_seconds"] for x in each]),
        "train_seconds": None if None in seconds or not seconds else sum(map(float, seconds)),
    }


def _largest(values: list[Any]) -> float | None:
    return max((v for v in values if v is not None), default=None)


def _of_training(part: Path) -> dict[str, Any]:
    told = read(part / STEP)
    logged = rows(part, "train")
    tokens = told.get("tokens")
    speeds = [r["tokens_per_second"] for r in logged if r.get("tokens_per_second")]
    step = None if not (speeds and tokens) else tokens / statistics.median(speeds)
    steps = max((r["step"] for r in logged), default=0)
    return {
        "memory": told.get("memory_bytes"),
        "flops": told.get("flops"),
        "step_seconds": step,
        "train_seconds": None if step is None else step * steps,
    }


def numbers(folder: Path) -> dict[str, Any]:
    """What a finished run measured at its end, what its training took, and what it wrote."""
    told = read(folder / "results.json")
    stages = [s.get("trained_parameters", 0) for s in told.get("stages", {}).values()]
    trained = max(stages) if stages else told.get("trained_parameters")
    return {
        **told.get("after", {}),
        **step_numbers(folder),
        "trained": trained,
        "disk": disk_bytes(folder),
    }


def disk_bytes(folder: Path) -> int:
    """Bytes of weights that a run wrote: an adapter, a base that is another one, a whole model."""
    return sum(weights_bytes(folder / name) for name in WRITTEN)


def weights_bytes(folder: Path) -> int:
    """Bytes of a folder's weights; 0 without a folder."""
    return sum(f.stat().st_size for f in folder.glob("*.safetensors"))


def read(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty where there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
