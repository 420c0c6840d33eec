"""Compression by depth: seconds and memory of GPTQ and SparseGPT, one layer after the other, beside
PyTorch.

    python benchmarks/compression_depth.py --depths 4 8 16 32 --rounds 2

Each figure is a process of its own, taking turns. The peer is a plain transcription of the
published procedure over `transformers` layers: the same rows, blocks and damping, inputs one by
one. `--out` writes the Markdown table.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

import numpy as np

from peft_jax.pruning import prune_in_turn
from peft_jax.quantization import Int, quantize_in_turn

HIDDEN, UNITS, HEADS, VOCABULARY = 512, 1408, 8, 4096
ROWS, LENGTH, BATCH, BLOCK, DAMPING = 32, 256, 8, 64, 0.01
METHODS = {"gptq": "GPTQ, int4", "sparsegpt": "SparseGPT, 50%"}


def sizes(depth: int) -> dict[str, Any]:
    """The Llama shape of a model of so many like layers."""
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": UNITS,
        "num_hidden_layers": depth,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "head_dim": HIDDEN // HEADS,
    }


def tokens() -> np.ndarray:
    """Calibration rows [ROWS, LENGTH], half of each row drawn from a few tokens."""
    rng = np.random.default_rng(0)
    return np.where(
        rng.random((ROWS, LENGTH)) < 0.5,
        rng.integers(0, 64, (ROWS, LENGTH)),
        rng.integers(0, VOCABULARY, (ROWS, LENGTH)),
    )


def ours(method: str, depth: int) -> tuple[float, int]:
    """(seconds, compiling included; bytes of memory beyond the model's) with this package."""
    import jax
    import jax.numpy as jnp
    from transformers import LlamaConfig

    import peft_jax
    from peft_jax.models.config import decoder_config
    from peft_jax.models.decoder import Decoder

    model = Decoder(decoder_config(LlamaConfig(**sizes(depth))), scan_layers=False)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    jax.block_until_ready(params)
    rows = tokens()
    batches = [{"tokens": jnp.asarray(rows[i : i + BATCH])} for i in range(0, ROWS, BATCH)]
    before, start = peak(), time.perf_counter()
    where: dict[str, Any] = {"exclude": "lm_head"}
    if method == "gptq":
        format = Int(bits=4, block_size=BLOCK)
        tree = quantize_in_turn(
            peft_jax.bind(model), params, batches, format, damping=DAMPING, **where
        )
    else:
        tree = prune_in_turn(peft_jax.bind(model), params, batches, 0.5, score="sparsegpt", **where)
    jax.block_until_ready(tree)
    return time.perf_counter() - start, peak() - before


def peer(method: str, depth: int) -> tuple[float, int]:
    """(seconds, bytes of memory beyond the model's) of the transcription in PyTorch."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    model = LlamaForCausalLM(LlamaConfig(**sizes(depth), attn_implementation="sdpa")).eval()
    rows = torch.tensor(tokens())
    before, start = peak(), time.perf_counter()
    states = [model.model.embed_tokens(rows[i : i + BATCH]) for i in range(0, ROWS, BATCH)]
    rotary = model.model.rotary_emb(states[0], torch.arange(LENGTH)[None])
    for layer in model.model.layers:
        linears = {n: m for n, m in layer.named_modules() if isinstance(m, torch.nn.Linear)}
        hessians = {n: torch.zeros(m.in_features, m.in_features) for n, m in linears.items()}

        def see(name: str, hessians: Any = hessians) -> Any:
            def hook(_: Any, inputs: Any, __: Any) -> None:
                x = inputs[0].reshape(-1, inputs[0].shape[-1])
                hessians[name] += x.T @ x

            return hook

        handles = [m.register_forward_hook(see(n)) for n, m in linears.items()]
        for x in states:
            layer(x, position_embeddings=rotary)
        for handle in handles:
            handle.remove()
        for name, linear in linears.items():
            solve(method, linear.weight, hessians[name] / (ROWS * LENGTH))
        states = [_first(layer(x, position_embeddings=rotary)) for x in states]
    return time.perf_counter() - start, peak() - before


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output


def solve(method: str, weight: Any, hessian: Any) -> None:
    """Frantar et al.'s loops over a weight [out, in], in place: inputs one by one, errors passed on
    in blocks.
    """
    import torch

    w, n = weight, weight.shape[1]
    hessian = hessian + DAMPING * hessian.diagonal().mean() * torch.eye(n)
    upper = torch.linalg.cholesky(
        torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True
    )
    size = BLOCK if method == "gptq" else 128
    for start in range(0, n, size):
        stop = min(start + size, n)
        part, factor = w[:, start:stop].clone(), upper[start:stop, start:stop]
        new, errors = torch.zeros_like(part), torch.zeros_like(part)
        if method == "gptq":
            scale = part.abs().amax(1).clamp_min(1e-12) / 7.5
        else:
            score = part.square() / factor.diagonal().square()
            kept = score > score.flatten().sort().values[int(score.numel() * 0.5) - 1]
        for i in range(stop - start):
            column = part[:, i]
            if method == "gptq":
                new[:, i] = scale * (column / scale).round().clamp(-8, 7)
            else:
                new[:, i] = torch.where(kept[:, i], column, 0.0)
            errors[:, i] = (column - new[:, i]) / factor[i, i]
            part[:, i:] -= errors[:, i, None] * factor[i, None, i:]
        w[:, start:stop] = new
        w[:, stop:] -= errors @ upper[start:stop, stop:]


def peak() -> int:
    """The most bytes that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def one(who: str, method: str, depth: int) -> tuple[float, int]:
    """What `who` takes, in a process of its own."""
    command = [sys.executable, __file__, "--one", who, method, str(depth)]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    seconds, memory = json.loads(out.splitlines()[-1])
    print(who, method, depth, f"{seconds:.1f} s, {memory / 2**20:.0f} MiB", flush=True)
    return seconds, memory


def report(depths: list[int], rounds: int) -> str:
    """The table."""
    from measure import heading

    lines = [
        "| | layers | seconds | PyTorch, seconds | ratio | memory beyond the model, MiB | "
        "PyTorch, MiB |",
        "|---|" + "---|" * 6,
    ]
    fits = []
    for method, name in METHODS.items():
        found: dict[str, list[list[tuple[float, int]]]] = {"ours": [], "peer": []}
        for depth in depths:
            runs = [(one("ours", method, depth), one("peer", method, depth)) for _ in range(rounds)]
            for who, of in zip(found, zip(*runs, strict=True), strict=True):
                found[who].append(list(of))
        seconds = {
            who: [statistics.median(s for s, _ in runs) for runs in of] for who, of in found.items()
        }
        memory = {
            who: [max(m for _, m in runs) / 2**20 for runs in of] for who, of in found.items()
        }
        for i, depth in enumerate(depths):
            a, b = seconds["ours"][i], seconds["peer"][i]
            sides = f"{memory['ours'][i]:.0f} | {memory['peer'][i]:.0f}"
            lines.append(f"| {name} | {depth} | {a:.1f} | {b:.1f} | {a / b:.2f} | {sides} |")
        slope, offset = np.polyfit(depths, seconds["ours"], 1)
        off = np.abs(np.polyval([slope, offset], depths) - seconds["ours"]).max() / max(
            seconds["ours"]
        )
        fits.append(
            f"{name}: {offset:.1f} s + {slope:.2f} s a layer, at most {off:.0%} of the longest "
            "away from that line"
        )
    note = (
        f"Llama layers of {HIDDEN} channels and {UNITS} units, {ROWS} rows of {LENGTH} tokens, "
        f"float32, blocks of {BLOCK}; a "
        f"process of its own for each figure, {rounds} of each in turn (medians; the most memory). "
        "Ours compiles within the "
        "time.\n\n" + "\n".join(f"- {fit}" for fit in fits)
    )
    return heading("Compression by depth") + f"\n{note}\n\n" + "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--depths", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--rounds", type=int, default=2, help="processes of each kind")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--out", help="a Markdown file for the table")
    args = parser.parse_args()
    if args.one:
        who, method, depth = args.one
        print(json.dumps({"ours": ours, "peer": peer}[who](method, int(depth))))
        return
    from measure import publish

    publish(report(args.depths, args.rounds), args.out)


if __name__ == "__main__":
    main()
