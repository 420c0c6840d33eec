"""Pruning measured: perplexity by score and sparsity, recovery, smaller models.

    python benchmarks/pruning.py table --data ../shared/data      # every score, on the embedded base
    python benchmarks/pruning.py recover --data ../shared/data    # half of the weights gone, and LoRA on 5% of the text
    python benchmarks/pruning.py structured --data ../shared/data # 30% fewer parameters: bytes, step and generation

Each prints Markdown tables, with device, versions and commit; `--out` writes them to a file.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from measure import heading, held_out, perplexity_of, publish

import peft_jax
from peft_jax.training.objective import next_token

SPARSITIES: list[dict[str, Any]] = [
    *({"sparsity": s} for s in (0.2, 0.4, 0.5, 0.6, 0.7)),
    {"pattern": "2:4"},
    {"pattern": "4:8"},
]
SCORES = ("random", "movement", "snip", "taylor", "magnitude", "ria", "wanda", "sparsegpt")
CALIBRATED = ("ria", "wanda", "sparsegpt")
DISTRIBUTIONS = [(score, d) for score in ("magnitude", "wanda", "sparsegpt") for d in ("uniform", "erk", "global", "owl")]


def batch_of(rows: np.ndarray) -> dict[str, np.ndarray]:
    """Rows of tokens as a batch of the training objective."""
    tokens, targets = rows[:, :-1], rows[:, 1:]
    return {"tokens": tokens, "targets": targets, "weights": np.ones(tokens.shape, np.float32)}


class Base:
    """The embedded base with its calibration batches, and what pruning by any score needs."""

    def __init__(self, data: Path, batches: int) -> None:
        self.model, self.params = peft_jax.load("builtin:base", scan_layers=False)
        self.scanned = self.model.clone(scan_layers=True)
        self.train, self.held = held_out(data, peft_jax.load_tokenizer("builtin:base"))
        parts = [self.train[16 * i : 16 * (i + 1)] for i in range(batches)]
        self.apply = peft_jax.bind(self.model)
        self.batches = [{"tokens": jnp.asarray(p)} for p in parts]
        loss = lambda params, batch: next_token(self.apply, params, batch, jax.random.key(0))[0]
        of = lambda square: peft_jax.gradients(loss, self.params, [batch_of(p) for p in parts], square=square)
        self.statistics = {"gradient": of(False), "squared_gradient": of(True)}

    def prune(self, score: str, **options: Any) -> Any:
        if score in CALIBRATED or options.get("distribution") == "owl":
            return peft_jax.prune_in_turn(self.apply, self.params, self.batches, score=score, **options)
        return peft_jax.prune(self.params, score=score, statistics=self.statistics, **options)

    def perplexity(self, params: Any) -> float:
        return perplexity_of(self.scanned, peft_jax.stack_layers(peft_jax.densify(params)), self.held)


def table(args: argparse.Namespace) -> str:
    base = Base(Path(args.data), args.batches)
    dense = base.perplexity(base.params)
    names = [o.get("pattern") or f"{o['sparsity']:.0%}" for o in SPARSITIES]
    lines = ["| score | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for score in SCORES:
        found = [base.perplexity(base.prune(score, **options)) for options in SPARSITIES]
        lines.append(f"| {score} | " + " | ".join(f"{p:.2f}" for p in found) + " |")
        print(lines[-1], flush=True)
    shares = (0.5, 0.6, 0.7)
    more = ["| score | distribution | " + " | ".join(f"{s:.0%}" for s in shares) + " |", "|---" * (len(shares) + 2) + "|"]
    for score, distribution in DISTRIBUTIONS:
        if (score, distribution) == ("sparsegpt", "global"):
            continue  # it has no score before its turn comes
        found = [base.perplexity(base.prune(score, sparsity=s, distribution=distribution)) for s in shares]
        more.append(f"| {score} | {distribution} | " + " | ".join(f"{p:.2f}" for p in found) + " |")
        print(more[-1], flush=True)
    note = (
        f"Perplexity on {base.held.size:,} held-out tokens of the novels and plays that the embedded base (5.5 million "
        f"parameters) was trained on; {dense:.2f} dense. Its linear layers pruned, calibrated on {16 * args.batches} rows of "
        "256 training tokens, block by block where the score looks at inputs; nothing is trained afterwards."
    )
    return heading("Pruning the embedded base") + f"\n{note}\n\n" + "\n".join(lines) + "\n\n" + "\n".join(more) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("table",))
    parser.add_argument("--data", default="../shared/data", help="folder with gutenberg and tinyshakespeare")
    parser.add_argument("--batches", type=int, default=8, help="calibration batches of 16 rows")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", help="a Markdown file for the tables")
    args = parser.parse_args()
    publish({"table": table}[args.what](args), args.out)


if __name__ == "__main__":
    main()
