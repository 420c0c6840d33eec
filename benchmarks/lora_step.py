"""Seconds and memory of a LoRA training step: ours, Hugging Face PEFT, and Tunix with Qwix, on the
same work in one run.

    python benchmarks/lora_step.py                                # the CPU work of
    docs/architecture.md python benchmarks/lora_step.py --tunix-python ../tunix/bin/python   # with
    Tunix, which needs an environment of its own python benchmarks/lora_step.py --preset llama-1b
    # on a GPU: bfloat16, random weights made on the device

Each contender is a process that takes turns with the others, so all meet the same machine. The
table goes to standard output and, with --out, to a Markdown file with device, versions and commit.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Work:
    """One Llama shape and batch; LoRA on all linear layers."""

    hidden: int = 512
    intermediate: int = 1408
    layers: int = 8
    heads: int = 8
    kv_heads: int = 8
    vocabulary: int = 8192
    rows: int = 4
    length: int = 256
    rank: int = 8
    dtype: str = "float32"
    remat: str = "none"
    tied: bool = False


PRESETS = {
    "cpu": Work(),
    "llama-1b": Work(
        2048,
        8192,
        16,
        32,
        8,
        128256,
        rows=8,
        length=2048,
        rank=16,
        dtype="bfloat16",
        remat="full",
        tied=True,
    ),
    "llama-8b": Work(
        4096, 14336, 32, 32, 8, 128256, rows=4, length=2048, rank=16, dtype="bfloat16", remat="full"
    ),
}


def tokens_of(work: Work):
    import numpy as np

    return (
        np.random.default_rng(0)
        .integers(0, work.vocabulary, (work.rows, work.length + 1))
        .astype(np.int32)
    )


# Workers. Each returns (run(steps) -> seconds a step, memory() -> bytes).


def ours(work: Work, *, scan_layers: bool):
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax
    from transformers import LlamaConfig

    import peft_jax
    from peft_jax.models.config import decoder_config
    from peft_jax.models.decoder import Decoder
    from peft_jax.objectives.tokens import next_token
    from peft_jax.training.loop import initial_state
    from peft_jax.training.report import memory_bytes
    from peft_jax.training.step import make_step

    config = LlamaConfig(**llama_sizes(work))
    dtype = jnp.dtype(work.dtype)
    model = Decoder(
        decoder_config(config),
        dtype=dtype,
        param_dtype=dtype,
        scan_layers=scan_layers,
        remat=work.remat,
    )
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]
    params = peft_jax.lora(params, jax.random.key(1), rank=work.rank, alpha=work.rank)
    optimizer = optax.adamw(1e-4)
    state, frozen = initial_state(params, optimizer, 0), peft_jax.partition(params)[1]
    del params
    step = jax.jit(make_step(next_token, peft_jax.bind(model), optimizer), donate_argnums=0)
    tokens = tokens_of(work)
    batch = {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "weights": np.ones((work.rows, work.length), np.float32),
    }
    batch = jax.device_put(batch)

    def run(steps: int) -> float:
        nonlocal state
        start = time.perf_counter()
        for _ in range(steps):
            state, metrics = step(state, frozen, batch)
        run.loss = float(metrics["loss"])
        return (time.perf_counter() - start) / steps

    return run, memory_bytes


def llama_sizes(work: Work) -> dict:
    return dict(
        vocab_size=work.vocabulary,
        hidden_size=work.hidden,
        intermediate_size=work.intermediate,
        num_hidden_layers=work.layers,
        num_attention_heads=work.heads,
        num_key_value_heads=work.kv_heads,
        max_position_embeddings=work.length,
        tie_word_embeddings=work.tied,
    )


def peft(work: Work):
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, LlamaConfig

    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            LlamaConfig(**llama_sizes(work)),
            attn_implementation="sdpa",
            dtype=getattr(torch, work.dtype),
        )
    if work.remat != "none":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    model = get_peft_model(
        model, LoraConfig(r=work.rank, lora_alpha=work.rank, target_modules="all-linear")
    ).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    tokens = torch.tensor(tokens_of(work), dtype=torch.long, device=device)

    def run(steps: int) -> float:
        start = time.perf_counter()
        for _ in range(steps):
            logits = model(tokens[:, :-1], use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1).float(), tokens[:, 1:].flatten()
            )
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        run.loss = float(loss)
        return (time.perf_counter() - start) / steps

    return run, lambda: torch.cuda.max_memory_allocated() if device == "cuda" else process_memory()


def tunix(work: Work):
    import jax
    import jax.numpy as jnp
    import optax
    import qwix
    from flax import nnx
    from tunix.models.llama3 import model as llama
    from tunix.sft import peft_trainer

    config = llama.ModelConfig(
        num_layers=work.layers,
        vocab_size=work.vocabulary,
        embed_dim=work.hidden,
        hidden_dim=work.intermediate,
        num_heads=work.heads,
        head_dim=work.hidden // work.heads,
        num_kv_heads=work.kv_heads,
        rope_theta=10000,
        norm_eps=1e-6,
        weight_tying=work.tied,
        remat_config=llama.RematConfig.DECODER if work.remat != "none" else llama.RematConfig.NONE,
    )
    model = llama.Llama3(config, rngs=nnx.Rngs(0))
    if work.dtype != "float32":
        graph, state = nnx.split(model)
        model = nnx.merge(graph, jax.tree.map(lambda x: x.astype(work.dtype), state))
    provider = qwix.LoraProvider(
        module_path=".*q_proj|.*k_proj|.*v_proj|.*o_proj|.*gate_proj|.*up_proj|.*down_proj",
        rank=work.rank,
        alpha=work.rank,
    )
    model = qwix.apply_lora_to_model(model, provider, **model.get_model_input())
    trainer = peft_trainer.PeftTrainer(
        model, optax.adamw(1e-4), peft_trainer.TrainingConfig(eval_every_n_steps=10**9, max_steps=1)
    )
    step = nnx.jit(trainer.create_train_step_fn(), donate_argnames=("optimizer",))
    tokens = jnp.asarray(tokens_of(work)[:, : work.length])
    causal = jnp.tril(jnp.ones((work.length, work.length), bool))
    inputs = {
        "input_tokens": tokens,
        "input_mask": jnp.ones_like(tokens, bool),
        "positions": jnp.broadcast_to(jnp.arange(work.length), tokens.shape),
        "attention_mask": jnp.broadcast_to(causal, (work.rows, work.length, work.length)),
    }

    def run(steps: int) -> float:
        start = time.perf_counter()
        for _ in range(steps):
            loss = step(trainer.model, trainer.optimizer, inputs)[0]
        run.loss = float(loss)
        return (time.perf_counter() - start) / steps

    return run, process_memory


def process_memory() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


WORKERS = {
    "peft_jax": lambda work: ours(work, scan_layers=True),
    "peft_jax, looped": lambda work: ours(work, scan_layers=False),
    "HF PEFT": peft,
    "Tunix + Qwix": tunix,
}


def serve(name: str, work: Work) -> None:
    """A worker: prints JSON lines in answer to the numbers of steps on standard input."""
    start = time.perf_counter()
    run, memory = WORKERS[name](work)
    run(1)
    print(json.dumps({"compile": time.perf_counter() - start, "loss": run.loss}), flush=True)
    for line in sys.stdin:
        print(
            json.dumps({"seconds": run(int(line)), "memory": memory(), "loss": run.loss}),
            flush=True,
        )


class Contender:
    def __init__(self, name: str, args: argparse.Namespace, python: str) -> None:
        command = [python, __file__, "--worker", name, "--preset", args.preset]
        self.name, self.seconds, self.memory = name, [], 0
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.start = self._read()

    def _read(self) -> dict:
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError(
            f"{self.name} ended with {self._process.wait()}; run it with --worker to see why"
        )

    def turn(self, steps: int) -> None:
        self._process.stdin.write(f"{steps}\n")
        self._process.stdin.flush()
        answer = self._read()
        self.seconds.append(answer["seconds"])
        self.memory = answer["memory"]

    def stop(self) -> None:
        self._process.stdin.close()
        self._process.wait()


def table(contenders: list[Contender], work: Work) -> str:
    reference = next((c for c in contenders if c.name == "HF PEFT"), contenders[-1])
    base = statistics.median(reference.seconds)
    rows = [
        "| | seconds a step (median, least) | against PEFT | peak memory | start and compile |",
        "|---|---|---|---|---|",
    ]
    for c in contenders:
        median = statistics.median(c.seconds)
        rows.append(
            f"| {c.name} | {median:.3f}, {min(c.seconds):.3f} | {median / base:.2f} | "
            f"{c.memory / 2**30:.2f} GiB | "
            f"{c.start['compile']:.0f} s |"
        )
    return "\n".join(rows)


def flops(work: Work) -> float:
    """Model FLOPs of a step: 4 for each weight and token (forward, input gradient), plus
    attention's.
    """
    head = work.hidden // work.heads
    layer = (
        work.hidden * head * 2 * (work.heads + work.kv_heads) + 3 * work.hidden * work.intermediate
    )
    weights = work.layers * layer + work.vocabulary * work.hidden
    attention = work.layers * 2 * 2 * work.length * work.hidden // 2  # causal: half of the square
    return work.rows * work.length * (4.0 * weights + 3.0 * attention)


def heading(args: argparse.Namespace, work: Work) -> str:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    versions = {
        n: importlib.metadata.version(n) for n in ("jax", "flax", "torch", "peft", "transformers")
    }
    device = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        device = next(
            (line.split(":")[1].strip() for line in lines if "model name" in line), device
        )
    return (
        f"# LoRA step, preset {args.preset}\n\n{dataclasses.asdict(work)}\n\n"
        f"{flops(work) / 1e9:.0f} GFLOP a step by the model's arithmetic. "
        f"{datetime.now(UTC):%Y-%m-%d}, commit {commit}, "
        f"{device}, {os.cpu_count()} CPUs; {', '.join(f'{k} {v}' for k, v in versions.items())}; "
        f"{args.rounds} rounds of {args.steps} steps, taking turns.\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3, help="steps in a turn")
    parser.add_argument("--tunix-python", help="an interpreter that has google-tunix and qwix")
    parser.add_argument("--out", help="a Markdown file for the table")
    parser.add_argument("--worker", choices=WORKERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    work = PRESETS[args.preset]
    if args.worker:
        serve(args.worker, work)
        return
    wanted = [
        ("peft_jax", sys.executable),
        ("peft_jax, looped", sys.executable),
        ("HF PEFT", sys.executable),
    ]
    if args.tunix_python:
        wanted.append(("Tunix + Qwix", args.tunix_python))
    contenders = []
    for name, python in wanted:
        contenders.append(Contender(name, args, python))
        print(f"{name}: first loss {contenders[-1].start['loss']:.3f}", flush=True)
    for _ in range(args.rounds):
        for contender in contenders:
            contender.turn(args.steps)
    for contender in contenders:
        contender.stop()
    text = f"{heading(args, work)}\n{table(contenders, work)}\n"
    print(text)
    if args.out:
        Path(args.out).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
