"""Quantization measured: perplexity by format and rounding, QLoRA against LoRA, memory and time of
a step.

    python benchmarks/quantization.py step                            # QLoRA against bfloat16 LoRA,
    312 million parameters python benchmarks/quantization.py table --data ../shared/data     # every
    format and rounding, on the embedded base python benchmarks/quantization.py calibrated --model
    FOLDER --text test.txt.gz --calibration valid.txt.gz  # a real model python
    benchmarks/quantization.py qlora --seeds 3                 # quality of QLoRA against LoRA

Each prints a Markdown table, with device, versions and commit; `--out` writes it to a file.
"""

from __future__ import annotations

import argparse
import functools
import gzip
import json
import math
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from measure import heading, held_out, held_out_loss, perplexity_of, publish, rows_of

import peft_jax
from peft_jax.core import places, select
from peft_jax.data import read_records
from peft_jax.data.batches import batch_at
from peft_jax.low_rank import loftq
from peft_jax.models import stack_layers
from peft_jax.models.decoder import Decoder
from peft_jax.objectives.tokens import next_token
from peft_jax.quantization import (
    FP4,
    FP8,
    MXFP4,
    NF4,
    Int,
    Quantized,
    adamw8bit,
    bits_per_weight,
    quantize_in_turn,
    quantize_weight,
)
from peft_jax.training.config import OptimizerConfig
from peft_jax.training.optimizer import make_optimizer
from peft_jax.training.step import init_state, make_step

# --------------------------------------------------------------------------------------------------
# step

VOCABULARY, STEP_ROWS, STEP_LENGTH = 32_000, 2, 256


def step_model() -> tuple[Decoder, dict[str, Any]]:
    """A Llama shape of 312 million parameters, in bfloat16, and its parameters' shapes."""
    from transformers import LlamaConfig

    from peft_jax.models.config import decoder_config

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=24,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=64,
        tie_word_embeddings=True,
    )
    model = Decoder(
        decoder_config(config), dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, remat="full"
    )
    return model, jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))[
        "params"
    ]


def random_params(shapes: Any, quantized: bool) -> Any:
    """Random weights made one by one, quantized as they come, so that the process never holds the
    dense model.
    """
    from peft_jax.core.tree import map_places

    paths = set(select(shapes, ["all-linear", "embed_tokens"])) if quantized else set()
    names = list(places(shapes))

    def one(path: str, leaf: Any) -> Any:
        w = 0.02 * jax.random.normal(jax.random.key(names.index(path)), leaf.shape, leaf.dtype)
        w = jnp.ones_like(w) if path.endswith("scale") else w
        if path not in paths:
            return w
        axes = {"in_axes": (-1,), "out_axes": (-2,)} if path.endswith("embedding") else {}
        return quantize_weight(path, w, NF4(), **axes)

    return map_places(one, shapes)


def run_step(kind: str, repeats: int) -> dict[str, float]:
    """Bytes and seconds of one training step of `kind`, lora or qlora."""
    model, shapes = step_model()
    params = random_params(shapes, kind == "qlora")
    held = sum(x.nbytes for x in jax.tree.leaves(params))
    params = peft_jax.lora(params, jax.random.key(0), rank=8, alpha=16)
    trainable, frozen = peft_jax.partition(params)
    optimizer = adamw8bit(1e-4) if kind == "qlora" else optax.adamw(1e-4)
    state = init_state(trainable, optimizer, 0)
    objective = functools.partial(next_token, chunk=128)
    tokens = (
        np.random.default_rng(0)
        .integers(0, VOCABULARY, (STEP_ROWS, STEP_LENGTH + 1))
        .astype(np.int32)
    )
    batch = {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "weights": np.ones((STEP_ROWS, STEP_LENGTH), np.float32),
    }
    start = time.perf_counter()
    step = (
        jax.jit(make_step(objective, peft_jax.bind(model), optimizer), donate_argnums=0)
        .lower(state, frozen, batch)
        .compile()
    )
    compiled = time.perf_counter() - start
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        state, metrics = step(state, frozen, batch)
        jax.block_until_ready(metrics)
        times.append(time.perf_counter() - start)
    memory = step.memory_analysis()
    peak = (
        memory.argument_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
    )
    return {
        "parameters": sum(math.prod(x.shape) for x in jax.tree.leaves(shapes)),
        "params": held,
        "temporaries": memory.temp_size_in_bytes,
        "peak": peak,
        "seconds": statistics.median(times),
        "compile": compiled,
        "process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "loss": float(metrics["loss"]),
    }


def step(args: argparse.Namespace) -> str:
    found: dict[str, list[dict[str, float]]] = {"lora": [], "qlora": []}
    for _ in range(args.rounds):
        for kind in found:  # each in a process of its own, taking turns
            command = [sys.executable, __file__, "one-step", "--kind", kind]
            found[kind].append(
                json.loads(
                    subprocess.run(
                        command, capture_output=True, text=True, check=True
                    ).stdout.splitlines()[-1]
                )
            )
            print(kind, found[kind][-1], flush=True)

    def pick(kind, name):
        return statistics.median(r[name] for r in found[kind])

    mib = 2**20
    lines = [
        "| | parameters, MiB | step's temporaries, MiB | all of the step, MiB | process, MiB | "
        "seconds a step |",
        "|---|---|---|---|---|---|",
    ]
    names = {
        "lora": "LoRA over bfloat16, AdamW",
        "qlora": "QLoRA: NF4 with doubled scales, 8-bit AdamW",
    }
    for kind, name in names.items():
        sizes = [pick(kind, n) / mib for n in ("params", "temporaries", "peak", "process")]
        lines.append(
            f"| {name} | "
            + " | ".join(f"{s:.0f}" for s in sizes)
            + f" | {pick(kind, 'seconds'):.2f} |"
        )
    ratio = [
        f"{pick('qlora', n) / pick('lora', n):.2f}"
        for n in ("params", "temporaries", "peak", "process", "seconds")
    ]
    lines.append("| ratio | " + " | ".join(ratio) + " |")
    bits = 8 * pick("qlora", "params") / pick("qlora", "parameters")
    note = (
        f"Llama shape, {pick('lora', 'parameters') / 1e6:.0f} million parameters, {STEP_ROWS} rows "
        f"of {STEP_LENGTH} tokens, "
        f"layers rematerialised, rank 8 on all linear layers; {bits:.3f} bits a weight, norms "
        "included. Sizes are those of the "
        f"compiled step's arrays and temporaries. {args.rounds} processes of each, in turn. On "
        "CPUs XLA keeps float32 copies "
        "of the bfloat16 weights for the whole step, which is most of what LoRA's temporaries are."
    )
    return heading("A QLoRA step") + f"\n{note}\n\n" + "\n".join(lines) + "\n"


# --------------------------------------------------------------------------------------------------
# table

PLANS: list[tuple[int, str, Any, str, dict[str, Any]]] = [
    (8, "int8, a scale an output", Int(bits=8), "nearest", {}),
    (8, "int8, activations too", Int(bits=8, activations="dynamic"), "nearest", {}),
    (8, "int8, activations too", Int(bits=8, activations="dynamic"), "smoothquant", {}),
    (8, "fp8 e4m3", FP8(), "nearest", {}),
    (8, "fp8 e4m3, activations too", FP8(activations="dynamic"), "nearest", {}),
    (8, "fp8 e5m2", FP8(type="e5m2"), "nearest", {}),
    (4, "nf4", NF4(double=False), "nearest", {}),
    (4, "nf4, doubled scales", NF4(), "nearest", {}),
    (4, "nf4", NF4(double=False), "gptq", {}),
    (4, "nf4", NF4(double=False), "awq", {}),
    (4, "fp4", FP4(), "nearest", {}),
    (4, "mxfp4", MXFP4(), "nearest", {}),
    (4, "mxfp4", MXFP4(), "gptq", {}),
    (4, "int4", Int(bits=4, block_size=64), "nearest", {}),
    (4, "int4", Int(bits=4, block_size=64), "stochastic", {}),
    (4, "int4", Int(bits=4, block_size=64), "gptq", {}),
    (4, "int4", Int(bits=4, block_size=64), "awq", {}),
    *[
        (3, "int3", Int(bits=3, block_size=64), rounding, options)
        for rounding, options in (
            ("nearest", {}),
            ("gptq", {}),
            ("gptq", {"activation_order": "dynamic"}),
            ("gptq", {"activation_order": False}),
            ("awq", {}),
        )
    ],
    *[
        (
            bits,
            f"int{bits}, zero points",
            Int(bits=bits, block_size=64, symmetric=False),
            rounding,
            options,
        )
        for bits in (4, 3, 2)
        for rounding, options in (
            ("nearest", {}),
            ("hqq", {}),
            ("gptq", {}),
            ("gptq", {"activation_order": "dynamic"}),
            ("gptq", {"activation_order": False}),
            ("awq", {}),
        )
    ],
]


def label_of(rounding: str, options: dict[str, Any]) -> str:
    """A rounding as the table calls it."""
    if not options:
        return rounding
    order = options["activation_order"]
    return f"{rounding}, {order} activation order" if order else f"{rounding}, inputs as they come"


def table(args: argparse.Namespace) -> str:
    model, params = peft_jax.load("builtin:base", scan_layers=False)
    train, held = held_out(Path(args.data), peft_jax.load_tokenizer("builtin:base"))
    batches = [{"tokens": jnp.asarray(train[16 * i : 16 * (i + 1)])} for i in range(args.batches)]
    scanned = model.clone(scan_layers=True)
    dense = perplexity_of(scanned, stack_layers(params), held)
    lines = [
        "| bits | format | rounding | bits a weight | perplexity |",
        "|---|---|---|---|---|",
        f"| 32 | none | | 32 | {dense:.3f} |",
    ]
    for bits, name, format, rounding, options in PLANS:
        label = label_of(rounding, options)
        if not re.search(args.plans, f"{name} {label}"):
            continue
        quantized = quantize_in_turn(
            peft_jax.bind(model), params, batches, format, rounding=rounding, **options
        )
        value = perplexity_of(scanned, stack_layers(quantized), held)
        lines.append(f"| {bits} | {name} | {label} | {mean_bits(quantized):.3f} | {value:.3f} |")
        print(lines[-1], flush=True)
    note = (
        f"Perplexity on {held.size:,} held-out tokens of the novels and plays that the embedded "
        "base (5.5 million parameters) "
        "was trained on; its linear layers quantized block by block, calibrated on "
        f"{16 * args.batches} rows of 256 training "
        "tokens; blocks of 64 inputs where the format has any (MXFP4: 32)."
    )
    return (
        heading("Formats and roundings on the embedded base")
        + f"\n{note}\n\n"
        + "\n".join(lines)
        + "\n"
    )


def mean_bits(tree: Any) -> float:
    """Mean bits a quantized weight takes, over the places."""
    nodes = [w for w in places(tree).values() if isinstance(w, Quantized)]
    return statistics.mean(bits_per_weight(w) for w in nodes)


# --------------------------------------------------------------------------------------------------
# calibrated

CALIBRATED: list[tuple[str, str, dict[str, Any]]] = [
    ("nearest", "nearest", {}),
    (
        "GPTQ, inputs as they come, no cap on tokens",
        "gptq",
        {"activation_order": False, "token_cap": None},
    ),
    ("GPTQ, inputs as they come", "gptq", {"activation_order": False}),
    ("GPTQ, dynamic activation order", "gptq", {"activation_order": "dynamic"}),
    ("GPTQ (static activation order)", "gptq", {}),
    ("AWQ", "awq", {}),
]


def calibrated(args: argparse.Namespace) -> str:
    """Roundings of a model folder by the text that they are calibrated on: like what is measured,
    and not.
    """
    model, params = peft_jax.load(args.model, scan_layers=False)
    scanned, tokenizer = model.clone(scan_layers=True), peft_jax.load_tokenizer(args.model)
    held = text_rows(read_text(Path(args.text)), tokenizer, args.rows)
    documents = "\n\n".join(
        r.value["text"] for r in read_records("builtin:python-docs", kind="text", split="train")
    )
    texts = {
        Path(args.calibration).name: read_text(Path(args.calibration)),
        "python-docs": documents,
    }
    rows = {name: text_rows(text, tokenizer, 16 * args.batches) for name, text in texts.items()}

    def value(tree):
        return perplexity_of(scanned, stack_layers(tree), held)

    lines = [
        f"| | {' | '.join(f'{b} bits, {name}' for b in (4, 3) for name in texts)} |",
        "|---|" + "---|" * 4,
    ]
    for label, rounding, options in CALIBRATED:
        cells: list[str] = []
        for bits in (4, 3):
            format = Int(bits=bits, block_size=64)
            for name in texts:
                if rounding == "nearest" and name == "python-docs":
                    cells.append(cells[-1])
                    continue
                batches = [
                    {"tokens": jnp.asarray(rows[name][16 * i : 16 * (i + 1)])}
                    for i in range(args.batches)
                ]
                start = time.perf_counter()
                tree = quantize_in_turn(
                    peft_jax.bind(model), params, batches, format, rounding=rounding, **options
                )
                cells.append(f"{value(tree):.1f}")
                print(
                    label, bits, name, cells[-1], f"{time.perf_counter() - start:.0f} s", flush=True
                )
        lines.append(f"| {label} | {' | '.join(cells)} |")
    note = (
        f"Perplexity of {args.name} on {held.size:,} tokens of {Path(args.text).name}, "
        f"{value(params):.1f} in float32; "
        "symmetric integers, blocks of 64 inputs, all linear layers, quantized one layer after "
        "the other; calibrated on "
        f"{16 * args.batches} rows of 256 tokens of the text that the column names, where the "
        "rounding asks for any. "
        "python-docs is what `data.train` is by default."
    )
    return heading("Roundings on a real model") + f"\n{note}\n\n" + "\n".join(lines) + "\n"


def read_text(path: Path) -> str:
    """A text file, perhaps gzipped."""
    data = path.read_bytes()
    return (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")


def text_rows(text: str, tokenizer: Any, count: int) -> np.ndarray:
    """The first `count` rows of 256 tokens of a text, [count, 256]."""
    ids = tokenizer(text[: count * 256 * 8], add_special_tokens=False)["input_ids"][: count * 256]
    return np.asarray(ids, np.int32).reshape(-1, 256)


# --------------------------------------------------------------------------------------------------
# qlora


def qlora(args: argparse.Namespace) -> str:
    model, params = peft_jax.load("builtin:base")
    half = jax.tree.map(
        lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), params
    )  # what 16 bits hold
    tokenizer = peft_jax.load_tokenizer("builtin:base")
    train, test = (rows_of("builtin:python-docs", s, "text", tokenizer) for s in ("train", "test"))
    contenders: dict[str, Callable[[jax.Array], Any]] = {
        "LoRA, 16 bits": lambda key: peft_jax.lora(half, key, rank=8, alpha=16),
        "QLoRA, nf4 with doubled scales": lambda key: peft_jax.lora(
            peft_jax.quantize(half, NF4()), key, rank=8, alpha=16
        ),
        "QLoRA, fp4": lambda key: peft_jax.lora(
            peft_jax.quantize(half, FP4()), key, rank=8, alpha=16
        ),
        "QLoRA, int2 with zero points": lambda key: peft_jax.lora(
            peft_jax.quantize(half, INT2), key, rank=8, alpha=16
        ),
        "LoftQ, int2 with zero points": lambda key: loftq(
            half, key, quantize=lambda tree: peft_jax.quantize(tree, INT2), rank=8, alpha=16
        ),
    }
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for seed in range(args.seeds):
        for name, make in contenders.items():
            found[name].append(
                _train(model, make(jax.random.key(seed)), train, test, args.steps, seed)
            )
            print(f"seed {seed}, {name}: {found[name][-1]:.4f}", flush=True)
    lines = [
        "| | held-out loss, nats/token (mean ± sd) | difference from LoRA, seed by seed |",
        "|---|---|---|",
    ]
    base = found["LoRA, 16 bits"]
    for name, losses in found.items():
        gaps = [a - b for a, b in zip(losses, base, strict=True)]
        gap = (
            f"{statistics.mean(gaps):+.4f} ± {statistics.stdev(gaps):.4f}"
            if name != "LoRA, 16 bits"
            else ""
        )
        lines.append(
            f"| {name} | {statistics.mean(losses):.4f} ± {statistics.stdev(losses):.4f} | {gap} |"
        )
    note = (
        f"Python's documentation, {args.seeds} seeds, {args.steps} steps of 8 rows of 128 "
        "tokens, AdamW, cosine schedule."
    )
    return (
        heading("QLoRA against LoRA on the embedded base")
        + f"\n{note}\n\n"
        + "\n".join(lines)
        + "\n"
    )


INT2 = Int(bits=2, block_size=64, symmetric=False)


def _train(model: Any, params: Any, train: Any, test: Any, steps: int, seed: int) -> float:
    trainable, frozen = peft_jax.partition(params)
    optimizer = make_optimizer(OptimizerConfig(learning_rate=3e-3, warmup_steps=10), steps)
    apply = peft_jax.bind(model)
    state = init_state(trainable, optimizer, seed)
    run = jax.jit(make_step(next_token, apply, optimizer), donate_argnums=0)
    for i in range(steps):
        state, _ = run(state, frozen, batch_at(train, i, 8, seed=seed))
    return held_out_loss(apply, state.trainable, frozen, test)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("step", "table", "calibrated", "qlora", "one-step"))
    parser.add_argument(
        "--data", default="../shared/data", help="folder with gutenberg and tinyshakespeare (table)"
    )
    parser.add_argument("--model", help="a model folder (calibrated)")
    parser.add_argument(
        "--name", default="the model", help="what the table calls --model (calibrated)"
    )
    parser.add_argument(
        "--text", help="a text file, perhaps gzipped, whose perplexity is measured (calibrated)"
    )
    parser.add_argument("--calibration", help="a text file to calibrate on (calibrated)")
    parser.add_argument(
        "--rows", type=int, default=32, help="rows of 256 tokens of --text (calibrated)"
    )
    parser.add_argument(
        "--plans",
        default="",
        help="a regular expression: only formats and roundings that match it (table)",
    )
    parser.add_argument(
        "--batches", type=int, default=8, help="calibration batches of 16 rows (table, calibrated)"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=150, help="training steps (qlora)")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each kind (step)")
    parser.add_argument(
        "--kind", choices=("lora", "qlora"), default="qlora", help=argparse.SUPPRESS
    )
    parser.add_argument("--out", help="a Markdown file for the table")
    args = parser.parse_args()
    if args.what == "one-step":
        print(json.dumps(run_step(args.kind, 4)))
        return
    publish(
        {"step": step, "table": table, "calibrated": calibrated, "qlora": qlora}[args.what](args),
        args.out,
    )


if __name__ == "__main__":
    main()
