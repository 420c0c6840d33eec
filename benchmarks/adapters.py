"""Adapters together: banks of many, and AdapterFusion of several, on the embedded base.

    python benchmarks/adapters.py bank      # 64 rows over 32 adapters against 64 rows over one, for
    four methods python benchmarks/adapters.py fusion    # three adapters of three tasks, and their
    fusion on each

Each prints a Markdown table, with device, versions and commit; `--out` writes it to a file.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from measure import LENGTH, best_time, heading, held_out_loss, publish, rows_of

import peft_jax
from peft_jax.adapters import bottleneck, fuse_adapters, ia3, prefix_tuning
from peft_jax.core import set_adapter
from peft_jax.data.batches import batch_at
from peft_jax.objectives.tokens import next_token
from peft_jax.training.config import OptimizerConfig
from peft_jax.training.optimizer import make_optimizer
from peft_jax.training.step import init_state, make_step

ROWS, SIZE = 64, 32
KINDS = {
    "LoRA, rank 8": lambda p, k: peft_jax.lora(p, k, rank=8),
    "bottleneck, 32 units": lambda p, k: bottleneck(p, k, size=32, init="bert"),
    "prefix, 20 tokens": lambda p, k: prefix_tuning(p, k, num_virtual_tokens=20),
    "IA3": lambda p, k: ia3(p, k),
}


def bank(args: argparse.Namespace) -> str:
    model, params = peft_jax.load("builtin:base")
    lines = [
        "| | base, s | one adapter, s | 64 rows over 32, s | against one | largest error "
        "of a row |",
        "|---|---|---|---|---|---|",
    ]
    for name, make in KINDS.items():
        (base, one, many), error = _measure_bank(model, params, make, args.rounds)
        lines.append(
            f"| {name} | {base:.3f} | {one:.3f} | {many:.3f} | {many / one:.2f} | {error:.1e} |"
        )
        print(lines[-1], flush=True)
    note = (
        f"Forward pass of {ROWS} rows of {LENGTH} tokens, {args.rounds} rounds taking "
        "turns. A swap compiled nothing."
    )
    return heading("Banks of adapters") + f"\n{note}\n\n" + "\n".join(lines) + "\n"


def _measure_bank(model: Any, params: Any, make: Any, rounds: int) -> tuple[list[float], float]:
    """(seconds of the base, of one adapter and of the bank; the largest relative error of a row
    against its adapter alone).
    """
    apply = jax.jit(peft_jax.bind(model))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 4000, (ROWS, LENGTH)))
    ids = jnp.arange(ROWS) % SIZE
    trees = [_moved(make(params, jax.random.key(i)), i) for i in range(SIZE)]
    many = peft_jax.core.bank(trees[0], SIZE)
    for i, tree in enumerate(trees):
        many = set_adapter(many, i, tree)
    contenders = [
        lambda: apply(params, tokens),
        lambda: apply(trees[0], tokens),
        lambda: apply(many, tokens, adapter_ids=ids),
    ]
    out, error = contenders[2](), 0.0
    for row in range(SIZE):
        alone = apply(trees[row], tokens[row : row + 1])
        error = max(error, float(jnp.abs(out[row : row + 1] - alone).max() / jnp.abs(alone).max()))
    for run in contenders:
        jax.block_until_ready(run())
    compiled = apply._cache_size()
    times = [[best_time(run, 1) for run in contenders] for _ in range(rounds)]
    swapped = set_adapter(many, 5, trees[1])
    jax.block_until_ready(apply(swapped, tokens, adapter_ids=ids[::-1]))
    assert apply._cache_size() == compiled, "putting an adapter in compiled again"
    return [statistics.median(column) for column in zip(*times, strict=True)], error


def _moved(params: Any, seed: int) -> Any:
    trainable, frozen = peft_jax.partition(params)
    leaves, structure = jax.tree.flatten(trainable)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    moved = [x + 0.05 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return peft_jax.combine(jax.tree.unflatten(structure, moved), frozen)


TASKS = {
    "docstrings": ("builtin:python-docstrings", "completion"),
    "documentation": ("builtin:python-docs", "text"),
    "countries": ("builtin:countries", "completion"),
}


def fusion(args: argparse.Namespace) -> str:
    model, base = peft_jax.load("builtin:base")
    tokenizer = peft_jax.load_tokenizer("builtin:base")
    data = {
        t: [rows_of(source, s, kind, tokenizer) for s in ("train", "test")]
        for t, (source, kind) in TASKS.items()
    }
    apply = peft_jax.bind(model)
    found: dict[str, dict[str, list[float]]] = {}

    def measure(name: str, tree: Any, tasks: Any = TASKS) -> None:
        for task in tasks:
            loss = held_out_loss(apply, *peft_jax.partition(tree), data[task][1])
            found.setdefault(name, {}).setdefault(task, []).append(loss)

    for seed in range(args.seeds):
        tree = base
        for i, task in enumerate(TASKS):
            fresh = bottleneck(
                base, jax.random.key(10 * seed + i), placement="pfeiffer", size=64, adapter=task
            )
            trained = _train(apply, fresh, data[task][0], args.steps, 9e-3, seed)
            measure(f"adapter of {task}", trained)
            node = trained["model"]["layers"]["mlp_residual"][f"bottleneck_{task}"]
            layers = tree["model"]["layers"]
            beside = {**layers.get("mlp_residual", {}), f"bottleneck_{task}": node}
            tree = {
                **tree,
                "model": {**tree["model"], "layers": {**layers, "mlp_residual": beside}},
            }
        for task in TASKS:
            fused = fuse_adapters(tree, jax.random.key(seed), list(TASKS))
            measure(
                "fusion, trained on the task",
                _train(apply, fused, data[task][0], args.steps, 1e-3, seed),
                [task],
            )
        print(
            seed,
            {n: {t: round(v[-1], 4) for t, v in r.items()} for n, r in found.items()},
            flush=True,
        )
    lines = [f"| | {' | '.join(TASKS)} |", "|---" * (len(TASKS) + 1) + "|"]
    for name, row in found.items():
        cells = [
            f"{statistics.mean(row[t]):.4f} ± "
            f"{statistics.stdev(row[t]) if args.seeds > 1 else 0:.4f}"
            for t in TASKS
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    note = (
        f"Test loss, nats per token (mean ± sd of {args.seeds} seeds); {args.steps} steps "
        f"of 4 rows of {LENGTH} tokens each."
    )
    return heading("AdapterFusion of three adapters") + f"\n{note}\n\n" + "\n".join(lines) + "\n"


def _train(apply: Any, params: Any, rows: Any, steps: int, rate: float, seed: int) -> Any:
    trainable, frozen = peft_jax.partition(params)
    optimizer = make_optimizer(OptimizerConfig(learning_rate=rate, warmup_steps=10), steps)
    state = init_state(trainable, optimizer, seed)
    step = jax.jit(make_step(next_token, apply, optimizer), donate_argnums=0)
    for i in range(steps):
        state, _ = step(state, frozen, batch_at(rows, i, 4, seed=seed))
    return peft_jax.combine(state.trainable, frozen)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("bank", "fusion"))
    parser.add_argument("--rounds", type=int, default=7, help="turns of each contender of the bank")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--steps", type=int, default=60, help="training steps of each adapter and fusion"
    )
    parser.add_argument("--out", help="a Markdown file for the table")
    args = parser.parse_args()
    publish({"bank": bank, "fusion": fusion}[args.what](args), args.out)


if __name__ == "__main__":
    main()
