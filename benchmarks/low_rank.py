"""Factorization of the embedded base: perplexity, time and bytes against kept parameters.

    python benchmarks/low_rank.py

Prints a Markdown table, with device, versions and commit; `--out` writes it to a file.
"""

from __future__ import annotations

import argparse
import math

import jax
import jax.numpy as jnp
import numpy as np
from measure import best_time, heading, held_out_loss, publish, rows_of

import peft_jax
from peft_jax.core import calibrate, places, select
from peft_jax.data.batches import batch_at
from peft_jax.low_rank import factorize

ROWS = 4

# --------------------------------------------------------------------------------------------------
# svd


def svd() -> str:
    model, params = peft_jax.load("builtin:base")
    tokenizer = peft_jax.load_tokenizer("builtin:base")
    text, held_out = (
        rows_of("builtin:python-docs", s, "text", tokenizer) for s in ("train", "test")
    )
    apply = peft_jax.bind(model)
    batches = [batch_at(text, i, ROWS, seed=0) for i in range(16)]
    covariances = calibrate(apply, params, batches)
    kinds = {
        "SVD": {},
        "ASVD": {"statistics": covariances, "whitening": "scale"},
        "SVD-LLM": {"statistics": covariances},
        "SVD-LLM, by energy": {"statistics": covariances, "allocation": "energy"},
    }
    linear = sum(places(params)[p].size for p in select(params))

    def bytes_of(tree):
        return sum(x.nbytes for x in jax.tree.leaves(tree))

    run = jax.jit(apply)
    big = jnp.asarray(np.random.default_rng(0).integers(0, 4000, (16, 256)))
    dense_time = best_time(lambda: run(params, big))
    lines = [
        "| kept | " + " | ".join(kinds) + " | bytes (expected) | forward time (FLOPs) |",
        "|---|" + "---|" * (len(kinds) + 2),
    ]
    whole = math.exp(held_out_loss(apply, *peft_jax.partition(params), held_out))
    lines.append(
        f"| 100% | {' | '.join([f'{whole:.2f}'] * len(kinds))} | 1.00 (1.00) | 1.00 (1.00) |"
    )
    total = sum(x.size for x in jax.tree.leaves(params))
    embedding = places(params)["model/embed_tokens/embedding"].size
    for keep in (0.9, 0.8, 0.6, 0.4):
        row = []
        for options in kinds.values():
            tree, _ = factorize(params, keep=keep, **options)
            row.append(f"{math.exp(held_out_loss(apply, *peft_jax.partition(tree), held_out)):.2f}")
        tree, _ = factorize(params, keep=keep)
        kept = sum(sum(x.size for x in jax.tree.leaves(places(tree)[p])) for p in select(params))
        size, expected = bytes_of(tree) / bytes_of(params), 1 - (linear - kept) / total
        seconds = best_time(lambda tree=tree: run(tree, big)) / dense_time
        flops = (kept + embedding) / (
            linear + embedding
        )  # the tied head multiplies with the embedding
        lines.append(
            f"| {keep:.0%} | {' | '.join(row)} | {size:.2f} ({expected:.2f}) | {seconds:.2f} "
            f"({flops:.2f}) |"
        )
    note = (
        "Perplexity on held-out Python documentation, linear layers factorized, "
        "calibrated on 16 batches of the training part."
    )
    return heading("Factorization of the embedded base") + f"\n{note}\n\n" + "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", help="a Markdown file for the table")
    args = parser.parse_args()
    publish(svd(), args.out)


if __name__ == "__main__":
    main()
