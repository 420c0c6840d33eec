"""Every method on two embedded tasks: quality, size and cost beside full fine-tuning.

    python benchmarks/methods.py --seeds 3 --steps 60

Prints a Markdown table, with device, versions and commit; `--out` writes it to a file. `--only`
takes some of the methods, `--rates` multiplies their learning rates.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from typing import Any

import jax
from measure import LENGTH, heading, held_out_loss, publish, rows_of

import peft_jax
from peft_jax.core import count
from peft_jax.data.batches import batch_at
from peft_jax.methods import METHODS
from peft_jax.objectives.tokens import next_token
from peft_jax.training.config import OptimizerConfig
from peft_jax.training.optimizer import make_optimizer
from peft_jax.training.step import init_state, make_step

ROWS = 4
TASKS = {
    "docstrings": ("builtin:python-docstrings", "completion"),
    "documentation": ("builtin:python-docs", "text"),
}
PLACED = {
    "pfeiffer": "bottleneck",
    "parallel": "bottleneck",
}  # rows that are a method with other options

# (method's options, learning rate): sizes near LoRA's of rank 8, rates from the methods' papers,
# scaled to this model.
SETTINGS: dict[str, tuple[dict[str, Any], float]] = {
    "lora": ({"rank": 8, "alpha": 16}, 3e-3),
    "dora": ({"rank": 8, "alpha": 16}, 3e-3),
    "adalora": (
        {"init_rank": 12, "target_rank": 8, "alpha": 24, "warmup": 20, "final": 40, "every": 5},
        5e-3,
    ),
    "vera": ({"rank": 256}, 2e-2),
    "loha": ({"rank": 4, "alpha": 8}, 5e-3),
    "lokr": ({"rank": 8, "alpha": 16}, 5e-3),
    "oft": ({"block_size": 16}, 3e-3),
    "boft": ({"block_size": 8}, 3e-3),
    "hra": ({"rank": 8}, 3e-3),
    "fourierft": ({"frequencies": 4000, "scale": 150.0}, 2e-1),
    "waveft": ({"frequencies": 4000, "scale": 25.0}, 3e-3),
    "randlora": ({"rank": 32}, 3e-3),
    "vblora": ({"rank": 4, "vectors": 90, "length": 64}, 1e-2),
    "miss": ({"rank": 16}, 3e-3),
    "shira": ({"rank": 8}, 3e-3),
    "c3a": ({"block_size": 64, "init": "zeros"}, 1e-1),
    "road": ({"group_size": 32}, 1e-2),
    "hira": ({"rank": 8}, 1e-2),
    "gralora": ({"rank": 8, "alpha": 16.0}, 3e-3),
    "delora": ({"rank": 8, "strength": 8.0}, 3e-3),
    "trainable_tokens": ({"ids": list(range(200))}, 3e-3),
    "bottleneck": ({"size": 32}, 9e-3),
    "pfeiffer": ({"placement": "pfeiffer", "size": 64}, 9e-3),
    "parallel": ({"placement": "parallel", "size": 64}, 5e-3),
    "compacter": ({"size": 32}, 1.5e-2),
    "reft": ({"rank": 16}, 9e-3),
    "ia3": ({}, 6e-2),
    "ln_tuning": ({}, 3e-2),
    "prompt_tuning": ({"num_virtual_tokens": 20, "init": "vocabulary"}, 1e-1),
    "p_tuning": ({"num_virtual_tokens": 20}, 3e-2),
    "multitask_prompt_tuning": ({"num_virtual_tokens": 20}, 9e-1),
    "prefix_tuning": ({"num_virtual_tokens": 20}, 9e-2),
    "adaption_prompt": ({"adapter_len": 10}, 9e-2),
    "unipelt": ({}, 9e-3),
    "mix_and_match": ({"num_virtual_tokens": 20, "size": 64}, 5e-3),
    "invertible": ({}, 9e-3),
    "full": ({}, 1e-3),
}


def methods(args: argparse.Namespace) -> None:
    model, base = peft_jax.load("builtin:base")
    tokenizer = peft_jax.load_tokenizer("builtin:base")
    data = {
        task: [rows_of(source, s, kind, tokenizer) for s in ("train", "test")]
        for task, (source, kind) in TASKS.items()
    }
    names = args.only or list(SETTINGS)
    found: dict[tuple[str, str], list[tuple[float, int, float, int]]] = {
        (n, t): [] for n in names for t in TASKS
    }
    before = [
        f"{held_out_loss(peft_jax.bind(model), *peft_jax.partition(base), test):.4f}"
        for _, test in data.values()
    ]
    for seed in range(args.seeds):
        for name, task in found:
            train, test = data[task]
            found[name, task].append(
                _train(name, model, base, train, test, args.steps, seed, args.rates)
            )
            loss, trained, seconds, _ = found[name, task][-1]
            print(
                f"seed {seed}, {name}, {task}: {loss:.4f}, {trained:,} trained, "
                f"{seconds * 1e3:.0f} ms a step",
                flush=True,
            )
        publish(_table(names, found, before, args.steps, seed + 1), args.out)


def _table(names: list[str], found: Any, before: list[str], steps: int, seeds: int) -> str:
    """What has been found so far."""
    columns = " | ".join(f"{task}, nats/token (mean ± sd)" for task in TASKS)
    lines = [
        f"| method | trained | {columns} | ms a step | step's temporaries, MiB |",
        "|---|---|---|---|---|---|",
    ]
    lines.append(f"| none | 0 | {' | '.join(before)} | | |")
    first = next(iter(TASKS))
    for name in sorted(names, key=lambda n: statistics.mean(r[0] for r in found[n, first])):
        cells = []
        for task in TASKS:
            losses = [r[0] for r in found[name, task]]
            spread = statistics.stdev(losses) if len(losses) > 1 else math.nan
            cells.append(f"{statistics.mean(losses):.4f} ± {spread:.4f}")
        runs = [r for task in TASKS for r in found[name, task]]
        seconds, (_, trained, _, memory) = statistics.median(r[2] for r in runs), runs[0]
        lines.append(
            f"| {name} | {trained:,} | {' | '.join(cells)} | {seconds * 1e3:.0f} | "
            f"{memory / 2**20:.0f} |"
        )
    text = (
        f"{seeds} seeds, {steps} steps of {ROWS} rows of {LENGTH} tokens, AdamW, cosine "
        "schedule; test losses.\n"
    )
    return (
        heading("Every method on two tasks, on the embedded base")
        + f"\n{text}\n"
        + "\n".join(lines)
        + "\n"
    )


def _train(
    name: str, model: Any, base: Any, train: Any, test: Any, steps: int, seed: int, rates: float
) -> tuple[float, int, float, int]:
    options, rate = SETTINGS[name]
    method = PLACED.get(name, name)
    params = METHODS[method](base, jax.random.key(seed), **options)
    trainable, frozen = peft_jax.partition(params)
    config = OptimizerConfig(learning_rate=rate * rates, warmup_steps=10)
    optimizer = make_optimizer(config, steps, {"name": method, **options})
    apply = peft_jax.bind(model)
    state = init_state(trainable, optimizer, seed)
    batch = batch_at(train, 0, ROWS, seed=seed)
    step = (
        jax.jit(make_step(next_token, apply, optimizer), donate_argnums=0)
        .lower(state, frozen, batch)
        .compile()
    )
    times = []
    for i in range(steps):
        batch = batch_at(train, i, ROWS, seed=seed)
        start = time.perf_counter()
        state, metrics = step(state, frozen, batch)
        jax.block_until_ready(metrics)
        times.append(time.perf_counter() - start)
    memory = step.memory_analysis()
    loss = held_out_loss(apply, state.trainable, frozen, test)
    return (
        loss,
        count(params)[0],
        statistics.median(times),
        memory.temp_size_in_bytes if memory else 0,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60, help="training steps of each method")
    parser.add_argument("--only", nargs="*", choices=SETTINGS, help="these methods alone")
    parser.add_argument("--rates", type=float, default=1.0, help="a factor of all learning rates")
    parser.add_argument("--out", help="a Markdown file for the table")
    args = parser.parse_args()
    methods(args)


if __name__ == "__main__":
    main()
