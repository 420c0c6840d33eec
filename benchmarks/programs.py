"""What pods would run: training steps compiled for TPU slices that are not there, and counted.

    python benchmarks/programs.py [--only NAME ...] [--out benchmarks/results/programs_tpu.md]

Each row is the step that `peft-jax train` compiles for the shape of a public model, with random
weights that never exist. Needs `pip install libtpu`, no TPU. Bytes between devices are those of the
collectives' results on one device, and stand beside what the sharding makes necessary: each frozen
array that is split over `fsdp` gathered once forward and once backward, as it is stored; the head
once; what trains gathered and its gradient added up once; with `tensor`, a layer's activations
added up five times; with `expert`, its tokens gathered three times. FLOPs are those of the
products, kernels of attention left out, beside two for each weight and token in the forward pass,
in rematerialisation (which needs no product of `down_proj`) and in the backward pass, twice where
the weight itself trains.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

os.environ.update(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1")

LLAMA = {"model_type": "llama", "vocab_size": 128256, "num_key_value_heads": 8}
GEMMA = {
    "model_type": "gemma3_text",
    "vocab_size": 262208,
    "head_dim": 256,
    "sliding_window": 1024,
    "tie_word_embeddings": True,
}
SHAPES: dict[str, dict[str, Any]] = {
    "Llama-3.2-1B": LLAMA
    | {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "tie_word_embeddings": True,
    },
    "Llama-3.1-8B": LLAMA
    | {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "Llama-3.1-70B": LLAMA
    | {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
    },
    "Gemma-3-4B": GEMMA
    | {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    },
    "Gemma-3-27B": GEMMA
    | {
        "hidden_size": 5376,
        "intermediate_size": 21504,
        "num_hidden_layers": 62,
        "num_attention_heads": 32,
        "num_key_value_heads": 16,
        "head_dim": 128,
    },
    "Qwen3-30B-A3B": {
        "model_type": "qwen3_moe",
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
    },
}
QLORA = {
    "nf4": {"format": "nf4", "options": {"block_size": 64, "double": True}},
    "int8": {"format": "int8"},
    "int4": {"format": "int4", "options": {"block_size": 64}},
}


@dataclasses.dataclass(frozen=True)
class Work:
    """One program: a shape, what trains, a slice and its mesh, the batch."""

    shape: str
    method: str
    topology: str
    mesh: dict[str, int]
    rows: int
    length: int = 4096
    packed: bool = True

    @property
    def name(self) -> str:
        """How a row is called."""
        mesh = " x ".join(f"{k} {v}" for k, v in self.mesh.items())
        rows = f"{self.rows} x {self.length:,}{'' if self.packed else ', not packed'}"
        return f"{self.shape} {self.method}, {self.topology}, {mesh}, {rows}"


WORK = [
    Work("Llama-3.2-1B", "lora", "v5e:2x2", {"fsdp": 4}, 4),
    Work("Llama-3.2-1B", "full", "v5e:2x2", {"fsdp": 4}, 4),
    Work("Llama-3.1-8B", "lora", "v5e:4x4", {"fsdp": 16}, 16),
    Work("Llama-3.1-8B", "lora", "v5e:4x4", {"fsdp": 16}, 16, packed=False),
    Work("Llama-3.1-8B", "nf4", "v5e:2x2", {"fsdp": 4}, 4),
    Work("Llama-3.1-8B", "int8", "v5e:2x2", {"fsdp": 4}, 4),
    Work("Llama-3.1-8B", "int4", "v5e:2x2", {"fsdp": 4}, 4),
    Work("Llama-3.1-8B", "full", "v5p:2x2x2", {"fsdp": 8}, 8),
    Work("Llama-3.1-8B", "lora", "v5p:2x2x2", {"fsdp": 4, "sequence": 2}, 4, 8192),
    Work("Llama-3.1-8B", "lora", "v6e:16x16", {"data": 8, "fsdp": 32}, 256),
    Work("Llama-3.1-8B", "lora", "v5p:4x4x4", {"fsdp": 8, "sequence": 8}, 8, 131072),
    Work("Llama-3.1-70B", "lora", "v5p:4x4x4", {"fsdp": 16, "tensor": 4}, 16),
    Work("Llama-3.1-70B", "nf4", "v5e:4x4", {"fsdp": 16}, 16),
    Work("Gemma-3-4B", "lora", "v5e:4x4", {"fsdp": 16}, 16),
    Work("Gemma-3-27B", "lora", "v5p:4x4x4", {"fsdp": 64}, 64),
    Work("Qwen3-30B-A3B", "lora", "v5e:4x4", {"expert": 4, "fsdp": 4}, 16),
]


# Of commit 226870a: GB that a device moved in a step, of it the head, counted with every repeated
# instruction of an asynchronous collective. The second row, counted as here on commit efca47d, is
# 299.8 GB, of it the head 269: but for the head it moved what it has to.
BEFORE = {0: (50, 34), 2: (391, 269), 8: (224, 134), 7: (288, 202), 13: (762, 687), 4: (184, 67)}
BEFORE |= {15: (1089, 189), 11: (284, 134)}


def overrides(work: Work, folder: Path) -> list[str]:
    """The configuration of a program."""
    method = {"name": "full"}
    if work.method != "full":
        method = {"name": "lora", "rank": 16, "alpha": 16}
    given: dict[str, Any] = {
        "model.path": str(folder),
        "model.dtype": "bfloat16",
        "model.remat": "full",
        "method": method,
        "data.sequence_length": work.length,
        "train.batch_size": work.rows,
        "mesh": work.mesh,
    }
    if work.method in QLORA:
        given["quantize"] = QLORA[work.method]
    return [f"{k}={json.dumps(v)}" for k, v in given.items()]


def measured(work: Work) -> dict[str, Any]:
    """Compile one program and count it."""
    from peft_jax.recipes.config import load_config
    from peft_jax.recipes.program import compiled_for

    with tempfile.TemporaryDirectory() as folder:
        config = {**SHAPES[work.shape], "max_position_embeddings": 131072, "dtype": "bfloat16"}
        (Path(folder) / "config.json").write_text(json.dumps(config))
        start = time.time()
        made = compiled_for(
            load_config(None, overrides(work, Path(folder))), work.topology, segments=work.packed
        )
        seconds = time.time() - start
    program, (bytes_due, flops_due) = made.program, due(work, made.planned)
    heads = [c for c in program.collectives if str(SHAPES[work.shape]["vocab_size"]) in c.type]
    return {
        "arguments": made.arguments / 2**30,
        "temporaries": made.temporaries / 2**30,
        "kernels": sum(program.kernels.values()),
        "flops": program.flops / 1e12,
        "flops_due": flops_due / 1e12,
        "moved": program.moved / 1e9,
        "moved_due": bytes_due / 1e9,
        "head_in_loop": sum(c.bytes for c in heads if c.times > 1) / 1e9,
        "seconds": seconds,
        "most": [
            f"{c.bytes / 1e9:.2f} GB {c.kind} {c.type[:60]} x {c.times}"
            for c in sorted(program.collectives, key=lambda c: -c.bytes)[:3]
        ],
    }


def due(work: Work, planned: Any) -> tuple[float, float]:
    """(bytes between devices, FLOPs of a device) that the sharding and the arithmetic ask for."""
    import jax

    from peft_jax.core.mesh import ROWS
    from peft_jax.core.partition import trainable_mask
    from peft_jax.core.tree import places

    sizes = work.mesh
    ways = {axis: sizes.get(axis, 1) for axis in ("expert", "data", "fsdp", "sequence", "tensor")}
    devices = 1
    for n in ways.values():
        devices *= n
    tokens = work.rows * work.length / devices * ways["tensor"]  # of a device
    model = SHAPES[work.shape]
    moved = flops = 0.0
    trains = places(trainable_mask(planned.params))
    for path, x in places(planned.params).items():
        head = path.startswith("lm_head") or (
            path.startswith("model/embed_tokens") and model.get("tie_word_embeddings", False)
        )
        embedding = path.startswith("model/embed_tokens")
        for y, trained in zip(jax.tree.leaves(x), jax.tree.leaves(trains[path]), strict=True):
            named = [a for a in jax.tree.leaves(tuple(y.sharding.spec)) if a]
            own = y.size * (2 if trained else y.dtype.itemsize)
            for axis in set(named) - {"fsdp"}:
                own /= ways[axis]
            if "fsdp" in named and ways["fsdp"] > 1 and (head or not embedding):
                moved += own * (1 if head and not trained else 2)
            if trained and any(ways[a] > 1 for a in (*ROWS, "sequence")):
                moved += own * (2 if head and work.method == "full" else 1)  # a head's in float32
        if len(x.shape) < 2 or (embedding and not head) or path.endswith(("scale", "bias")):
            continue
        passes = 3 - ("down_proj" in path)  # forward, again, backward
        weights = _active(path, x, model)
        own_gradient = work.method == "full"
        flops += 2 * weights * tokens * (passes + own_gradient) / ways["tensor"]
        if work.method != "full":
            flops += _factors(x) * tokens / ways["tensor"]
    hidden = tokens * model["hidden_size"] * 2
    moved += hidden  # the rows of the embedding, or what is added up of them
    if ways["tensor"] > 1:
        moved += 5 * model["num_hidden_layers"] * hidden
    if ways["expert"] > 1:  # tokens meet the experts of other devices: forward, again, back
        moved += 3 * model["num_hidden_layers"] * ways["expert"] * hidden
    if ways["sequence"] > 1:
        heads = model["num_key_value_heads"] * model.get(
            "head_dim", model["hidden_size"] // model["num_attention_heads"]
        )
        whole = tokens * ways["sequence"] * heads / ways["tensor"] * 2
        moved += model["num_hidden_layers"] * whole * 2 * 3  # keys and values, forward twice, back
    return moved, flops


def _active(path: str, x: Any, model: dict[str, Any]) -> float:
    """The weights that one token meets."""
    size = 1.0
    for n in x.shape:
        size *= n
    if "/experts/" in path:
        return size * model["num_experts_per_tok"] / model["num_experts"]
    return size


def _factors(x: Any) -> float:
    """FLOPs for a token of an adapter's own products: forward, again, and twice backward."""
    a, b = getattr(x, "a", None), getattr(x, "b", None)
    return 0.0 if a is None or b is None else 2 * 4 * (a.size + b.size)


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| program | arguments + temporaries, GiB | kernels | TFLOP (by formula) | GB moved (by"
        " formula) | ratio | of the head, in a loop | compiled in |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, r in rows.items():
        if "error" in r:
            lines.append(f"| {name} | {r['error']} | | | | | | |")
            continue
        lines.append(
            f"| {name} | {r['arguments']:.2f} + {r['temporaries']:.2f} | {r['kernels']} | "
            f"{r['flops']:.1f} ({r['flops_due']:.1f}) | {r['moved']:.2f} ({r['moved_due']:.2f}) | "
            f"{r['moved'] / r['moved_due']:.2f} | {r['head_in_loop']:.2f} | {r['seconds']:.0f} s |"
        )
    return "\n".join(lines)


def compared(rows: dict[str, dict[str, Any]]) -> str:
    """Markdown: what programs moved before the head was gathered once, and now."""
    lines = ["| program | GB moved before | of it the head | GB moved now |", "|---|---|---|---|"]
    for i, (moved, head) in BEFORE.items():
        if "moved" in (now := rows.get(WORK[i].name, {})):
            lines.append(f"| {WORK[i].name} | {moved} | {head} | {now['moved']:.2f} |")
    return "\n".join(lines)


def compiled_row(index: int) -> dict[str, Any]:
    """What `measured` gives of a row, by a process of its own; its error where it has one."""
    command = [sys.executable, __file__, "--row", str(index)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return json.loads(done.stdout.strip().splitlines()[-1])
    return {"error": (done.stderr.strip().splitlines() or ["no output"])[-1][:160]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=[], help="words that a row's name has")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--keep", type=Path, help="a folder of rows, which are compiled once")
    parser.add_argument("--row", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.row is not None:
        print(json.dumps(measured(WORK[arguments.row])))
        return
    rows: dict[str, dict[str, Any]] = {}
    for i, work in enumerate(WORK):
        if not all(word in work.name for word in arguments.only):
            continue
        kept = None if arguments.keep is None else arguments.keep / f"{i}.json"
        if kept is not None and kept.is_file() and kept.stat().st_size:
            rows[work.name] = json.loads(kept.read_text())
        else:
            rows[work.name] = compiled_row(i)
            if kept is not None and "error" not in rows[work.name]:
                kept.parent.mkdir(parents=True, exist_ok=True)
                kept.write_text(json.dumps(rows[work.name]))
        print(table({work.name: rows[work.name]}).splitlines()[-1], flush=True)
        for line in rows[work.name].get("most", ()):
            print("   ", line, flush=True)
    if arguments.out:
        import importlib.metadata as versions

        import jax

        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
        ).stdout.strip()
        about = (
            f"{datetime.now(UTC):%Y-%m-%d}, commit {commit}, jax {jax.__version__}, libtpu "
            f"{versions.version('libtpu')}; compiled on a CPU, nothing was run."
        )
        text = (__doc__ or "").split("\n\n")[2].replace("\n", " ")
        grouped = "Products of a mixture's experts are kernels too, and are not in its FLOPs."
        then = (
            "Before, at commit 226870a, each repetition of an asynchronous collective was "
            "counted; counted as here (Llama-3.1-8B lora on v5e:4x4, commit efca47d) 391 GB are "
            "299.8, of them 269 the head's."
        )
        parts = ["# Programs for TPUs", about, text, table(rows), grouped, then, compared(rows)]
        arguments.out.write_text("\n\n".join(parts) + "\n")


if __name__ == "__main__":
    main()
