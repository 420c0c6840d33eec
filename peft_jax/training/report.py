"""What a run shows and records: a progress line, metrics.jsonl, TensorBoard events; speed and
utilisation.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Self

import jax
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from peft_jax.core.files import finite
from peft_jax.core.partition import count
from peft_jax.core.tree import places

# Peak dense bfloat16 FLOP/s of one device, by JAX's device_kind (vendors' data sheets).
PEAK_FLOPS = {
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA L4": 121e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
}


def peak_flops() -> float | None:
    """The peak of all devices together; None where the kind is not known (a CPU, say)."""
    kind = jax.devices()[0].device_kind
    peak = next((value for name, value in PEAK_FLOPS.items() if kind.startswith(name)), None)
    return None if peak is None else peak * jax.device_count()


def memory_bytes() -> int:
    """Peak memory: of the first local device where it says so, else of this process."""
    stats = jax.local_devices()[0].memory_stats() if jax.default_backend() != "cpu" else None
    if stats and "peak_bytes_in_use" in stats:
        return int(stats["peak_bytes_in_use"])
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def active_parameters(model: Any, params: Any) -> tuple[float, float]:
    """(all, trained) parameters that one token goes through: of a mixture's experts as many as the
    router picks.
    """
    config: Any = getattr(model, "config", None)
    experts = getattr(config, "num_experts", 0)
    share = config.experts_per_token / experts if experts else 1.0
    total = trained = 0.0
    for path, x in places(params).items():
        ours = share if "experts" in path.split("/") else 1.0
        mine, all = count({"x": x})
        total, trained = total + ours * all, trained + ours * mine
    return total, trained


def step_flops_per_token(total: float, trained: float) -> float:
    """Model FLOPs of a training step for one token: 2N forward, 2N input gradient, 2 for each
    trained parameter.
    """
    return 4.0 * total + 2.0 * trained


class Reporter:
    """Writes metrics to `folder` and shows progress on `console`; only the first of several hosts
    does either.
    """

    def __init__(
        self,
        folder: Path,
        *,
        steps: int,
        start: int,
        measured: Collection[int] = (),
        flops_per_token: float,
        tensorboard: bool,
        console: Console,
    ):
        self._primary = jax.process_index() == 0
        self._flops, self._console, self._writer, self._jsonl = flops_per_token, console, None, None
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[line]}"),
        )
        self._progress = Progress(
            *columns,
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not self._primary,
        )
        self._task = self._progress.add_task("training", total=steps, completed=start, line="")
        if self._primary:
            folder.mkdir(parents=True, exist_ok=True)
            _drop_after(folder / "metrics.jsonl", start, measured)
            self._jsonl = (folder / "metrics.jsonl").open("a", encoding="utf-8")
            if tensorboard:
                from tensorboardX import SummaryWriter

                self._writer = SummaryWriter(str(folder / "tensorboard"))

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._progress.stop()
        if self._jsonl is not None:
            self._jsonl.close()
        if self._writer is not None:
            self._writer.close()

    def advance(self, step: int) -> None:
        """Move the bar."""
        self._progress.update(self._task, completed=step)

    def training(self, step: int, metrics: dict[str, float], tokens: int, seconds: float) -> None:
        """A log line of training: speed over the last `tokens` and `seconds`."""
        rate = tokens / max(seconds, 1e-9)
        row = {**metrics, "tokens_per_second": rate, "memory_bytes": memory_bytes()}
        peak = peak_flops()
        if peak:
            row["mfu"] = rate * self._flops / peak
        mfu = f" mfu {row['mfu']:.1%}" if peak else ""
        line = (
            f"loss {metrics['loss']:.3f}  {rate:,.0f} tok/s{mfu}  "
            f"{row['memory_bytes'] / 2**30:.2f} GiB"
        )
        self._progress.update(self._task, completed=step, line=line)
        self._write("train", step, row)
        if self._primary and not self._console.is_terminal:
            self._console.print(f"step {step}: {line}", highlight=False)

    def evaluation(self, step: int, metrics: dict[str, float]) -> None:
        """A log line of evaluation."""
        self._write("validation", step, metrics)
        if self._primary:
            shown = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
            self._progress.console.print(f"step {step}: validation {shown}", highlight=False)

    def _write(self, kind: str, step: int, row: dict[str, float]) -> None:
        if self._jsonl is not None:
            row = finite(row)
            self._jsonl.write(
                json.dumps({"kind": kind, "step": step, "time": round(time.time(), 3), **row})
                + "\n"
            )
            self._jsonl.flush()
        if self._writer is not None:
            for name, value in row.items():
                self._writer.add_scalar(f"{kind}/{name}", value, step)


def _drop_after(path: Path, step: int, measured: Collection[int]) -> None:
    """Rows of a run that is resumed from an earlier step are dropped, and evaluations that its
    checkpoint does not know (it has `measured` these), so that each stands once.
    """
    if not path.is_file():
        return
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
            known = row["kind"] == "train" or row["step"] in measured
            if row["step"] <= step and step > 0 and known:
                rows.append(line)
        except (json.JSONDecodeError, KeyError):
            continue  # the last line of a killed run may be cut
    path.write_text("".join(row + "\n" for row in rows), encoding="utf-8")


def before_and_after(before: Mapping[str, float], after: Mapping[str, float]) -> Table:
    """A row a number."""
    table = Table("", "before", "after")
    for name in before:
        table.add_row(name, f"{before[name]:.4g}", f"{after[name]:.4g}")
    return table
