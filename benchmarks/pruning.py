"""Pruning measured: perplexity by score and sparsity, recovery, smaller models.

    python benchmarks/pruning.py table --data ../shared/data      # every score, on the embedded
    base python benchmarks/pruning.py recover --data ../shared/data    # half of the weights gone,
    and LoRA on 5% of the text python benchmarks/pruning.py structured                       # 30%
    fewer parameters: bytes, step and generation python benchmarks/pruning.py shrunk --data
    ../shared/data     # and perplexity python benchmarks/pruning.py product
    # bytes and products of the forms that weights take

Each prints Markdown tables, with device, versions and commit; `--out` writes them to a file.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from measure import best_time, heading, held_out, perplexity_of, publish

import peft_jax
from peft_jax.core import count, full, gradients, matmul, places
from peft_jax.models import stack_layers
from peft_jax.models.config import decoder_config
from peft_jax.models.decoder import Decoder
from peft_jax.objectives.tokens import next_token
from peft_jax.pruning import (
    Masked,
    compress,
    densify,
    mask_updates,
    prune_in_turn,
    prune_structured,
    sizes_for,
)
from peft_jax.training.config import OptimizerConfig
from peft_jax.training.optimizer import make_optimizer
from peft_jax.training.step import init_state, make_step

SPARSITIES: list[dict[str, Any]] = [
    *({"sparsity": s} for s in (0.2, 0.4, 0.5, 0.6, 0.7)),
    {"pattern": "2:4"},
    {"pattern": "4:8"},
]
SCORES: dict[str, dict[str, Any]] = {
    "random": {"score": "random"},
    "movement": {"score": "movement"},
    "snip": {"score": "snip"},
    "taylor": {"score": "taylor"},
    "magnitude": {"score": "magnitude"},
    "magnitude, ranked within outputs": {"score": "magnitude", "compare": "output"},
    "ria": {"score": "ria"},
    "wanda": {"score": "wanda"},
    "wanda, ranked over the matrix": {"score": "wanda", "compare": "matrix"},
    "sparsegpt": {"score": "sparsegpt"},
}
CALIBRATED = ("ria", "wanda", "sparsegpt")
DISTRIBUTIONS = [
    (score, d)
    for score in ("magnitude", "wanda", "sparsegpt")
    for d in ("uniform", "erk", "global", "owl")
]


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

        def loss(params, batch):
            return next_token(self.apply, params, batch, jax.random.key(0))[0]

        def of(square):
            return gradients(loss, self.params, [batch_of(p) for p in parts], square=square)

        self.statistics = {"gradient": of(False), "squared_gradient": of(True)}

    def prune(self, score: str, **options: Any) -> Any:
        if score in CALIBRATED or options.get("distribution") == "owl":
            return prune_in_turn(self.apply, self.params, self.batches, score=score, **options)
        return peft_jax.prune(self.params, score=score, statistics=self.statistics, **options)

    def perplexity(self, params: Any) -> float:
        return perplexity_of(self.scanned, stack_layers(densify(params)), self.held)


def table(args: argparse.Namespace) -> str:
    base = Base(Path(args.data), args.batches)
    dense = base.perplexity(base.params)
    names = [o.get("pattern") or f"{o['sparsity']:.0%}" for o in SPARSITIES]
    lines = ["| score | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for name, what in SCORES.items():
        found = [base.perplexity(base.prune(**what, **options)) for options in SPARSITIES]
        lines.append(f"| {name} | " + " | ".join(f"{p:.2f}" for p in found) + " |")
        print(lines[-1], flush=True)
    shares = (0.5, 0.6, 0.7)
    more = [
        "| score | distribution | " + " | ".join(f"{s:.0%}" for s in shares) + " |",
        "|---" * (len(shares) + 2) + "|",
    ]
    for score, distribution in DISTRIBUTIONS:
        if (score, distribution) == ("sparsegpt", "global"):
            continue  # it has no score before its turn comes
        found = [
            base.perplexity(base.prune(score, sparsity=s, distribution=distribution))
            for s in shares
        ]
        more.append(f"| {score} | {distribution} | " + " | ".join(f"{p:.2f}" for p in found) + " |")
        print(more[-1], flush=True)
    note = (
        f"Perplexity on {base.held.size:,} held-out tokens of the novels and plays that the "
        "embedded base (5.5 million "
        f"parameters) was trained on; {dense:.2f} dense. Its linear layers pruned, calibrated on "
        f"{16 * args.batches} rows of "
        "256 training tokens, block by block where the score looks at inputs; nothing is trained "
        "afterwards."
    )
    return (
        heading("Pruning the embedded base")
        + f"\n{note}\n\n"
        + "\n".join(lines)
        + "\n\n"
        + "\n".join(more)
        + "\n"
    )


# --------------------------------------------------------------------------------------------------
# recovery


def recover(args: argparse.Namespace) -> str:
    base = Base(Path(args.data), args.batches)
    dense = base.perplexity(base.params)
    few = base.train[: len(base.train) // 20]
    lines = [
        "| pruned by | sparsity | perplexity | recovered by | trained | perplexity (mean ± sd) | "
        "won back | zeros kept |",
        "|---|---|---|---|---|---|---|---|",
    ]
    methods = {
        "LoRA, updates masked": (
            lambda t, key: mask_updates(peft_jax.lora(t, key, rank=8, alpha=16)),
            1e-3,
        ),
        "full fine-tuning of what is kept": (lambda t, key: full(t), FULL_RATE),
    }
    for score, sparsity in (("magnitude", 0.5), ("sparsegpt", 0.5)):
        pruned = stack_layers(base.prune(score, sparsity=sparsity))
        lost = perplexity_of(base.scanned, pruned, base.held)
        zeros = {
            p: np.asarray(w.kept()) for p, w in places(pruned).items() if isinstance(w, Masked)
        }
        for name, (make, rate) in methods.items():
            found, kept, trained = [], True, 0
            for seed in range(args.seeds):
                params = make(pruned, jax.random.key(seed))
                trained = count(params)[0]
                merged = densify(
                    peft_jax.merge(fine_tune(base.scanned, params, few, args.steps, seed, rate))
                )
                arrays = {p: np.asarray(w) for p, w in places(merged).items()}
                kept &= all((arrays[p][~zeros[p]].view(np.uint32) == 0).all() for p in zeros)
                found.append(perplexity_of(base.scanned, merged, base.held))
            back = [(lost - p) / (lost - dense) for p in found]
            lines.append(
                f"| {score} | {sparsity:.0%} | {lost:.2f} | {name} | {trained:,} | "
                f"{statistics.mean(found):.2f} ± "
                f"{statistics.stdev(found):.2f} | {statistics.mean(back):.0%} ± "
                f"{statistics.stdev(back):.0%} | "
                f"{'all, bit for bit' if kept else 'no'} |"
            )
            print(lines[-1], flush=True)
    note = (
        f"The embedded base, {dense:.2f} dense; {args.seeds} seeds, {args.steps} steps of 8 rows "
        "of 256 tokens out of "
        f"{few.size:,} tokens, 5% of its training text, with AdamW at 1e-3 (full: 2e-4). "
        "Perplexity is of the merged model on "
        "the held-out text; won back is the share of what pruning lost."
    )
    return heading("Recovery after pruning") + f"\n{note}\n\n" + "\n".join(lines) + "\n"


FULL_RATE = 2e-4  # learning rate of full fine-tuning


def fine_tune(model: Any, params: Any, rows: np.ndarray, steps: int, seed: int, rate: float) -> Any:
    """`params` after training on rows of tokens."""
    trainable, frozen = peft_jax.partition(params)
    optimizer = make_optimizer(OptimizerConfig(learning_rate=rate, warmup_steps=10), steps)
    state = init_state(trainable, optimizer, seed)
    step = jax.jit(make_step(next_token, peft_jax.bind(model), optimizer), donate_argnums=0)
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        state, _ = step(state, frozen, batch_of(rows[rng.choice(len(rows), 8, replace=False)]))
    return peft_jax.combine(state.trainable, frozen)


# --------------------------------------------------------------------------------------------------
# structured


def structured(args: argparse.Namespace) -> str:
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=4,
        head_dim=64,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
    )
    model = Decoder(decoder_config(config))
    params = model.init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]
    batches = [{"tokens": jax.random.randint(jax.random.key(1), (4, 128), 3, 4096)}]
    models = {"as it is": (model, params)}
    for by in ("layers", "width"):
        models[f"30% fewer parameters by {by}"] = prune_structured(
            model, params, batches, **sizes_for(model, 0.7, by)
        )
    rows = {name: sizes_and_times(*m) for name, m in models.items()}
    base = rows["as it is"]
    lines = [
        "| | parameters | bytes of the folder | FLOPs a step | step, s | ratio (expected) | "
        "tokens/s | ratio (expected) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, r in rows.items():

        def ratio(key, r=r):
            return r[key] / base[key]

        lines.append(
            f"| {name} | {r['parameters']:,} ({ratio('parameters'):.3f}) | {r['bytes']:,} "
            f"({ratio('bytes'):.3f}) | "
            f"{r['flops'] / 1e9:.0f} G | {r['step']:.2f} | {ratio('step'):.2f} "
            f"({ratio('flops'):.2f}) | {r['speed']:.0f} | "
            f"{ratio('speed'):.2f} ({1 / ratio('bytes'):.2f}) |"
        )
        print(lines[-1], flush=True)
    note = (
        "Llama shape 768/2048, 12 layers, 12 query and 4 key/value heads, vocabulary 4,096, "
        "float32, random weights; a step "
        "is full fine-tuning of 4 rows of 256 tokens with AdamW, generation (tokens/s) greedy for "
        "8 prompts at once. Expected: "
        "a step in proportion to its FLOPs, 6 for each token and weight of a product and "
        "attention's own; generation, which "
        "reads every weight for each token, in inverse proportion to the bytes."
    )
    return heading("Models with 30% fewer parameters") + f"\n{note}\n\n" + "\n".join(lines) + "\n"


def shrunk(args: argparse.Namespace) -> str:
    base = Base(Path(args.data), args.batches)
    few, tree = base.train[: len(base.train) // 20], stack_layers(base.params)
    lines = [
        "| by | importance | parameters | perplexity | after 5% of the text |",
        "|---|---|---|---|---|",
    ]
    for by, score in (
        ("layers", "activation"),
        ("width", "magnitude"),
        ("width", "activation"),
        ("width", "fluctuation"),
    ):
        sizes = sizes_for(base.scanned, 0.7, by)
        small, less = prune_structured(base.scanned, tree, base.batches, score=score, **sizes)
        tuned = fine_tune(small, full(less), few, args.steps, 0, FULL_RATE)
        shares = f"{count(less)[1]:,} ({count(less)[1] / count(tree)[1]:.2f})"
        values = [perplexity_of(small, t, base.held) for t in (less, peft_jax.merge(tuned))]
        lines.append(f"| {by} | {score} | {shares} | {values[0]:.1f} | {values[1]:.1f} |")
        print(lines[-1], flush=True)
    whole = perplexity_of(base.scanned, tree, base.held)
    note = (
        f"The embedded base, {whole:.2f} whole, cut down to at most 70% of its parameters "
        f"(whole layers: three of six), then {args.steps} steps of full fine-tuning on 5% of its "
        "training text."
    )
    return heading("A smaller embedded base") + f"\n{note}\n\n" + "\n".join(lines) + "\n"


def sizes_and_times(model: Any, params: Any) -> dict[str, float]:
    """Parameters, bytes of the Hugging Face folder, FLOPs and seconds of a step, tokens generated a
    second.
    """
    c, (rows, length) = model.config, (4, 256)
    with tempfile.TemporaryDirectory() as folder:
        peft_jax.save(folder, model, params)
        size = sum(p.stat().st_size for p in Path(folder).glob("*.safetensors"))
    products = sum(
        w.size for w in places(params).values() if w.ndim > 1
    )  # a tied embedding counts as the head
    attention = (
        c.num_layers * 2 * 2 * c.num_heads * c.head_dim * length / 2
    )  # forward, causal, for each token
    trainable, frozen = peft_jax.partition(full(params))
    optimizer = optax.adamw(1e-4)
    state = init_state(trainable, optimizer, 0)
    step = jax.jit(make_step(next_token, peft_jax.bind(model), optimizer))
    batch = batch_of(
        np.random.default_rng(0).integers(3, c.vocab_size, (rows, length + 1)).astype(np.int32)
    )
    seconds = best_time(lambda: step(state, frozen, batch)[1], 5)
    tokenizer = peft_jax.load_tokenizer("builtin:base")
    prompts = ["It was the best of times"] * 8

    def generate(tokens: int) -> float:
        return best_time(
            lambda: peft_jax.generate(
                model, params, prompts, tokenizer=tokenizer, max_tokens=tokens, temperature=0.0
            ),
            5,
        )

    short, long = generate(32), generate(96)
    return {
        "parameters": count(params)[1],
        "bytes": size,
        "step": seconds,
        "speed": 8 * 64 / (long - short),
        "flops": rows * length * (6 * products + 3 * attention),
    }


# --------------------------------------------------------------------------------------------------
# products


def product(args: argparse.Namespace) -> str:
    n, tokens = 2048, 512
    dense = {"a": {"kernel": jax.random.normal(jax.random.key(0), (n, n), jnp.bfloat16)}}
    forms = {
        "dense": dense,
        "50% masked": peft_jax.prune(dense, 0.5),
        "2:4, values and places": compress(peft_jax.prune(dense, pattern="2:4")),
        **{
            f"blocks of 128x128, {s:.0%} gone": compress(
                peft_jax.prune(dense, s, pattern="128x128", compare="output")
            )
            for s in (0.5, 0.75, 0.875)
        },
    }
    x = jax.random.normal(jax.random.key(1), (tokens, n))
    lines = [
        "| weight | bytes, of dense bfloat16 | product with 512 tokens, ms | of dense |",
        "|---|---|---|---|",
    ]
    run = jax.jit(lambda x, w: matmul(x, w))

    def size(w):
        return sum(a.nbytes for a in jax.tree.leaves(w))

    times = {
        name: best_time(lambda t=tree: run(x, t["a"]["kernel"]), 60) for name, tree in forms.items()
    }
    for name, tree in forms.items():
        share, time = size(tree) / size(dense), times[name]
        lines.append(f"| {name} | {share:.4f} | {1000 * time:.1f} | {time / times['dense']:.2f} |")
    note = (
        f"A matrix of {n} x {n} in bfloat16, products in float32. N:M groups are unpacked "
        "into a dense matrix for each product."
    )
    return heading("Products with pruned weights") + f"\n{note}\n\n" + "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("table", "recover", "structured", "shrunk", "product"))
    parser.add_argument(
        "--data", default="../shared/data", help="folder with gutenberg and tinyshakespeare"
    )
    parser.add_argument("--batches", type=int, default=8, help="calibration batches of 16 rows")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--steps", type=int, default=150, help="training steps (recover, structured)"
    )
    parser.add_argument("--out", help="a Markdown file for the tables")
    args = parser.parse_args()
    run = {
        "table": table,
        "recover": recover,
        "structured": structured,
        "shrunk": shrunk,
        "product": product,
    }
    publish(run[args.what](args), args.out)


if __name__ == "__main__":
    main()
