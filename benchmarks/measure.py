"""What the benchmarks have in common: the heading of a table, rows of the embedded data, times and
losses.
"""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import peft_jax
from peft_jax.data import encode, fit, pack, read_records
from peft_jax.data.batches import evaluation_batches
from peft_jax.objectives.tokens import next_token
from peft_jax.training.step import make_evaluation

LENGTH = 128


def heading(title: str) -> str:
    """A title, and a line that says when, what and on what."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    versions = ", ".join(f"{n} {importlib.metadata.version(n)}" for n in ("jax", "flax", "optax"))
    device = jax.devices()[0].device_kind if jax.default_backend() != "cpu" else _cpu()
    return (
        f"# {title}\n\n{datetime.now(UTC):%Y-%m-%d}, commit {commit}, {device}, "
        f"{os.cpu_count()} CPUs; {versions}.\n"
    )


def _cpu() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    return next(
        (line.split(":")[1].strip() for line in lines if "model name" in line), platform.machine()
    )


def publish(text: str, out: str | None) -> None:
    """Print a table, and write it to a file where one is named."""
    print(text)
    if out:
        Path(out).write_text(text, encoding="utf-8")


def rows_of(source: str, split: str, kind: str, tokenizer: Any) -> Any:
    """Packed rows of LENGTH tokens of one source."""
    examples = encode(read_records(source, kind=kind, split=split), tokenizer, kind)
    return pack(fit(examples, LENGTH, kind, "cut"), LENGTH)


def best_time(run: Callable[[], Any], repeats: int = 10) -> float:
    """Median seconds of `run`, after one that compiles."""
    jax.block_until_ready(run())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def held_out_loss(apply: Any, trainable: Any, frozen: Any, rows: Any) -> float:
    """Mean loss over rows, nats per token."""
    evaluate = jax.jit(make_evaluation(next_token, apply))
    total = weight = 0.0
    for batch in evaluation_batches(rows, 32):
        metrics = evaluate(trainable, frozen, batch)
        total += float(metrics["loss"]) * float(metrics["weight"])
        weight += float(metrics["weight"])
    return total / weight


def held_out(data: Path, tokenizer: Any) -> tuple[np.ndarray, np.ndarray]:
    """(training, held-out) rows of 256 tokens of the texts that the embedded base was trained
    on.
    """
    sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
    from pretrain_base import paragraphs, token_streams

    streams = token_streams(paragraphs(data), tokenizer, 0)
    train, held = (s[: len(s) // 256 * 256].reshape(-1, 256) for s in streams)
    return train, held


def perplexity_of(model: Any, params: Any, rows: np.ndarray) -> float:
    """Perplexity of a model on rows of tokens, of the tokens after each row's first."""

    @jax.jit
    def loss(params: Any, tokens: jax.Array) -> jax.Array:
        logits = peft_jax.bind(model)(params, tokens)[:, :-1]
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], -1).mean()

    size = 16
    parts = [rows[i : i + size] for i in range(0, len(rows) // size * size, size)]
    return math.exp(statistics.mean(float(loss(params, jnp.asarray(p))) for p in parts))
