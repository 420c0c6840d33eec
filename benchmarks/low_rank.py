"""The low-rank family measured on the embedded base: quality and cost of every method, of factorization, and of a bank.

    python benchmarks/low_rank.py methods --seeds 3     # every method on Python's docstrings, beside full fine-tuning
    python benchmarks/low_rank.py svd                   # perplexity, time and bytes against kept parameters
    python benchmarks/low_rank.py bank                  # 64 rows over 32 adapters against 64 rows over one

Each prints a Markdown table, with device, versions and commit; `--out` writes it to a file.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from measure import LENGTH, best_time, heading, held_out_loss, publish, rows_of

import peft_jax
from peft_jax.data.batches import batch_at
from peft_jax.methods import METHODS
from peft_jax.training.config import OptimizerConfig
from peft_jax.training.objective import next_token
from peft_jax.training.optimizer import make_optimizer
from peft_jax.training.step import init_state, make_step

ROWS = 4

# (method's options, learning rate): sizes near LoRA's of rank 8, rates from the methods' papers, scaled to this model.
SETTINGS: dict[str, tuple[dict[str, Any], float]] = {
    "lora": ({"rank": 8, "alpha": 16}, 3e-3),
    "dora": ({"rank": 8, "alpha": 16}, 3e-3),
    "adalora": ({"init_rank": 12, "target_rank": 8, "alpha": 24, "warmup": 20, "final": 40, "every": 5}, 5e-3),
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
    "full": ({}, 1e-3),
}


# ---------------------------------------------------------------------------------------------------------- methods


def methods(args: argparse.Namespace) -> str:
    model, base = peft_jax.load("builtin:base")
    tokenizer = peft_jax.load_tokenizer("builtin:base")
    train, test = (rows_of("builtin:python-docstrings", s, "completion", tokenizer) for s in ("train", "test"))
    names = args.only or list(METHODS)
    found: dict[str, list[tuple[float, int, float, int]]] = {n: [] for n in names}
    for seed in range(args.seeds):
        for name in names:
            found[name].append(_train(name, model, base, train, test, args.steps, seed))
            loss, trained, seconds, _ = found[name][-1]
            print(f"seed {seed}, {name}: {loss:.4f} nats/token, {trained:,} trained, {seconds * 1e3:.0f} ms a step", flush=True)
    before = held_out_loss(peft_jax.bind(model), *peft_jax.partition(base), test)
    lines = [
        "| method | trained | test loss, nats/token (mean ± sd) | ms a step | step's temporaries, MiB |",
        "|---|---|---|---|---|",
    ]
    lines.append(f"| none | 0 | {before:.4f} | | |")
    for name in sorted(names, key=lambda n: statistics.mean(r[0] for r in found[n])):
        losses = [r[0] for r in found[name]]
        spread = statistics.stdev(losses) if len(losses) > 1 else math.nan
        seconds, memory = statistics.median(r[2] for r in found[name]), found[name][0][3]
        lines.append(
            f"| {name} | {found[name][0][1]:,} | {statistics.mean(losses):.4f} ± {spread:.4f} | {seconds * 1e3:.0f} | "
            f"{memory / 2**20:.0f} |"
        )
    text = f"{args.seeds} seeds, {args.steps} steps of {ROWS} rows of {LENGTH} tokens, AdamW, cosine schedule.\n"
    return heading("Every method on Python's docstrings, on the embedded base") + f"\n{text}\n" + "\n".join(lines) + "\n"


def _train(name: str, model: Any, base: Any, train: Any, test: Any, steps: int, seed: int) -> tuple[float, int, float, int]:
    options, rate = SETTINGS[name]
    params = METHODS[name](base, jax.random.key(seed), **options)
    trainable, frozen = peft_jax.partition(params)
    optimizer = make_optimizer(OptimizerConfig(learning_rate=rate, warmup_steps=10), steps, {"name": name, **options})
    apply = peft_jax.bind(model)
    state = init_state(trainable, optimizer, seed)
    batch = batch_at(train, 0, ROWS, seed=seed)
    step = jax.jit(make_step(next_token, apply, optimizer), donate_argnums=0).lower(state, frozen, batch).compile()
    times = []
    for i in range(steps):
        batch = batch_at(train, i, ROWS, seed=seed)
        start = time.perf_counter()
        state, metrics = step(state, frozen, batch)
        jax.block_until_ready(metrics)
        times.append(time.perf_counter() - start)
    memory = step.memory_analysis()
    loss = held_out_loss(apply, state.trainable, frozen, test)
    return loss, peft_jax.count(params)[0], statistics.median(times), memory.temp_size_in_bytes if memory else 0


# -------------------------------------------------------------------------------------------------------------- svd


def svd(args: argparse.Namespace) -> str:
    model, params = peft_jax.load("builtin:base")
    tokenizer = peft_jax.load_tokenizer("builtin:base")
    text, held_out = (rows_of("builtin:python-docs", s, "text", tokenizer) for s in ("train", "test"))
    apply = peft_jax.bind(model)
    batches = [batch_at(text, i, ROWS, seed=0) for i in range(16)]
    covariances = peft_jax.calibrate(apply, params, batches)
    kinds = {
        "SVD": {},
        "ASVD": {"statistics": covariances, "whitening": "scale"},
        "SVD-LLM": {"statistics": covariances},
        "SVD-LLM, by energy": {"statistics": covariances, "allocation": "energy"},
    }
    linear = sum(peft_jax.places(params)[p].size for p in peft_jax.select(params))
    bytes_of = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree))
    run = jax.jit(apply)
    big = jnp.asarray(np.random.default_rng(0).integers(0, 4000, (16, 256)))
    dense_time = best_time(lambda: run(params, big))
    lines = [
        "| kept | " + " | ".join(kinds) + " | bytes (expected) | forward time (FLOPs) |",
        "|---|" + "---|" * (len(kinds) + 2),
    ]
    whole = math.exp(held_out_loss(apply, *peft_jax.partition(params), held_out))
    lines.append(f"| 100% | {' | '.join([f'{whole:.2f}'] * len(kinds))} | 1.00 (1.00) | 1.00 (1.00) |")
    total = sum(x.size for x in jax.tree.leaves(params))
    embedding = peft_jax.places(params)["model/embed_tokens/embedding"].size
    for keep in (0.9, 0.8, 0.6, 0.4):
        row = []
        for options in kinds.values():
            tree, _ = peft_jax.factorize(params, keep=keep, **options)
            row.append(f"{math.exp(held_out_loss(apply, *peft_jax.partition(tree), held_out)):.2f}")
        tree, _ = peft_jax.factorize(params, keep=keep)
        kept = sum(sum(x.size for x in jax.tree.leaves(peft_jax.places(tree)[p])) for p in peft_jax.select(params))
        size, expected = bytes_of(tree) / bytes_of(params), 1 - (linear - kept) / total
        seconds = best_time(lambda tree=tree: run(tree, big)) / dense_time
        flops = (kept + embedding) / (linear + embedding)  # the tied head multiplies with the embedding
        lines.append(f"| {keep:.0%} | {' | '.join(row)} | {size:.2f} ({expected:.2f}) | {seconds:.2f} ({flops:.2f}) |")
    note = (
        "Perplexity on held-out Python documentation, linear layers factorized, calibrated on 16 batches of the training part."
    )
    return heading("Factorization of the embedded base") + f"\n{note}\n\n" + "\n".join(lines) + "\n"


# ------------------------------------------------------------------------------------------------------------- bank


def bank(args: argparse.Namespace) -> str:
    model, params = peft_jax.load("builtin:base")
    apply = jax.jit(peft_jax.bind(model))
    one = peft_jax.lora(params, jax.random.key(0), rank=8)
    many = peft_jax.bank(params, jax.random.key(0), size=32, rank=8)
    many = peft_jax.set_adapter(many, 3, one)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 4000, (64, LENGTH)))
    ids = jnp.arange(64) % 32
    contenders = {
        "the base alone": lambda: apply(params, tokens),
        "one adapter": lambda: apply(one, tokens),
        "64 rows over 32 adapters": lambda: apply(many, tokens, adapter_ids=ids),
    }
    times: dict[str, list[float]] = {n: [] for n in contenders}
    for run in contenders.values():
        jax.block_until_ready(run())
    compiled = apply._cache_size()
    for _ in range(args.rounds):
        for name, run in contenders.items():
            times[name].append(best_time(run, 1))
    many = peft_jax.set_adapter(many, 5, one)
    jax.block_until_ready(apply(many, tokens, adapter_ids=ids[::-1]))
    assert apply._cache_size() == compiled, "putting an adapter in compiled again"
    base = statistics.median(times["one adapter"])
    lines = ["| | seconds, median | against one adapter |", "|---|---|---|"]
    lines += [f"| {n} | {statistics.median(t):.3f} | {statistics.median(t) / base:.2f} |" for n, t in times.items()]
    note = (
        f"Forward pass of 64 rows of {LENGTH} tokens, LoRA of rank 8 on all linear layers, {args.rounds} rounds taking turns. "
    )
    return heading("A bank of adapters") + f"\n{note}Putting an adapter in compiled nothing.\n\n" + "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("methods", "svd", "bank"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200, help="training steps of each method")
    parser.add_argument("--only", nargs="*", choices=SETTINGS, help="these methods alone")
    parser.add_argument("--rounds", type=int, default=10, help="turns of each contender of the bank")
    parser.add_argument("--out", help="a Markdown file for the table")
    args = parser.parse_args()
    publish({"methods": methods, "svd": svd, "bank": bank}[args.what](args), args.out)


if __name__ == "__main__":
    main()
