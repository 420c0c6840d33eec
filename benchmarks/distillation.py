"""Distillation measured: students of the embedded base against the same ones trained on the data
alone, and what it costs.

    python benchmarks/distillation.py table --data ../shared/data   # quality, three seeds python
    benchmarks/distillation.py cost                          # memory of a step, self-distillation,
    stored predictions

Prints Markdown tables with device, versions and commit; `--out` writes them to a file.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from measure import heading, held_out, perplexity_of, publish

import peft_jax
from peft_jax.core import count, full
from peft_jax.data import batch_at
from peft_jax.data.encode import Rows
from peft_jax.distillation.cache import CacheHeader, open_cache, write_cache
from peft_jax.distillation.divergence import forward_kl, log_probabilities, reverse_kl, top_k
from peft_jax.distillation.objective import OnPolicy, Teacher, beside_teachers, distillation
from peft_jax.generation.programs import continuations
from peft_jax.models.blocks import fresh_params
from peft_jax.objectives.tokens import TOKENS, next_token
from peft_jax.pruning import prune_structured
from peft_jax.training.step import init_state, make_step

SIZES = {"layers": 5, "kv_heads": 4, "units": 352, "channels": 160}  # 39% of the base's parameters
LENGTH, ROWS = 128, 8


def as_rows(tokens: np.ndarray) -> Rows:
    """Rows of LENGTH predictions of rows of tokens, each one a text of its own."""
    cut = np.concatenate(
        [tokens[:, i : i + LENGTH + 1] for i in range(0, tokens.shape[1] - LENGTH, LENGTH)]
    )
    ones = np.ones((len(cut), LENGTH))
    where = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), ones.shape)
    return Rows(cut[:, :-1], cut[:, 1:], ones.astype(np.float32), where, ones.astype(np.int32))


class Bench:
    """The base, its pruned student, and the same student fresh."""

    def __init__(self, data: Path) -> None:
        self.teacher, self.theirs = peft_jax.load("builtin:base")
        self.tokenizer = peft_jax.load_tokenizer("builtin:base")
        train, self.held = held_out(data, self.tokenizer)
        self.rows = as_rows(train)
        calibration = [{"tokens": jnp.asarray(train[16 * i : 16 * (i + 1)])} for i in range(4)]
        self.student, self.pruned = prune_structured(
            self.teacher, self.theirs, calibration, **SIZES
        )
        self.prompts = self.held[:256, :32]
        self.programs: dict[Any, Any] = {}

    def run(
        self,
        start: Any,
        objective: Any,
        steps: int,
        rate: float,
        seed: int,
        *,
        teach: bool,
        rows: Rows | None = None,
    ) -> Any:
        """The student's tree after `steps` steps from the tree `start`."""
        tree = full(start)
        tree = beside_teachers(tree, [self.theirs]) if teach else tree
        schedule = optax.warmup_cosine_decay_schedule(0.0, rate, steps // 10, steps)
        optimizer = optax.chain(
            optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.01)
        )
        trainable, frozen = peft_jax.partition(tree)
        state = init_state(trainable, optimizer, seed)
        step = self.programs.setdefault(  # compiled once for all seeds
            (objective, steps, rate),
            jax.jit(make_step(objective, peft_jax.bind(self.student), optimizer), donate_argnums=0),
        )
        for i in range(steps):
            state, _ = step(
                state, frozen, batch_at(self.rows if rows is None else rows, i, ROWS, seed=seed)
            )
        tree = peft_jax.combine(state.trainable, frozen)
        return peft_jax.merge(tree["student"] if teach else tree)

    def perplexity(self, params: Any) -> float:
        return perplexity_of(self.student, params, self.held)

    def of_own_texts(self, params: Any, seed: int) -> dict[str, float]:
        """Of texts that the student samples after held-out prompts: nats per token that the teacher
        gives them, the divergence of the student from the teacher, and of greedy ones the teacher's
        nats.
        """
        apply, judge = peft_jax.bind(self.student), peft_jax.bind(self.teacher)

        def of(params: Any, theirs: Any, prompts: jax.Array, key: Any, temperature: float) -> Any:
            ones = jnp.ones(prompts.shape, jnp.int32)
            new = continuations(
                apply, params, prompts, ones, key, max_tokens=64, eos=-1, temperature=temperature
            )
            whole = jnp.concatenate([prompts, new], axis=1)
            q, p = (
                log_probabilities(f(t, whole)[:, prompts.shape[1] - 1 : -1])
                for f, t in ((apply, params), (judge, theirs))
            )
            nll = -jnp.take_along_axis(p, new[..., None], -1).mean()
            return nll, reverse_kl(q, p).mean()

        measure = self.programs.setdefault("own texts", jax.jit(of, static_argnames="temperature"))
        sampled = measure(params, self.theirs, self.prompts, jax.random.key(seed), temperature=1.0)
        greedy = measure(params, self.theirs, self.prompts, jax.random.key(seed), temperature=0.0)
        return {
            "sampled": float(sampled[0]),
            "divergence": float(sampled[1]),
            "greedy": float(greedy[0]),
        }


def table(args: argparse.Namespace) -> str:
    b = Bench(Path(args.data))
    teachers = [Teacher(peft_jax.bind(b.teacher))]
    taught = distillation(TOKENS, teachers, divergence=forward_kl)
    policy = OnPolicy(
        max_tokens=LENGTH - 32, prompt_tokens=32
    )  # as many tokens count as of the data's rows
    further = {
        "then reverse_kl on the data": distillation(TOKENS, teachers, divergence=reverse_kl),
        "then reverse_kl on its own texts": distillation(
            TOKENS, teachers, divergence=reverse_kl, on_policy=policy
        ),
    }
    kept = Path(args.found) if args.found else None
    found: dict[str, list[dict[str, float]]] = (
        json.loads(kept.read_text()) if kept and kept.is_file() else {}
    )

    def note(name: str, seed: int, make: Callable[[], Any]) -> Any:
        """What `make` gives, measured; nothing where the numbers of this seed are there already."""
        rows = found.setdefault(name, [])
        if len(rows) > seed:
            return None
        params = make()
        rows.append({"perplexity": b.perplexity(params), **b.of_own_texts(params, seed)})
        print(f"{name}, seed {seed}: {rows[-1]}", flush=True)
        if kept:
            kept.write_text(json.dumps(found))
        return params

    for seed in range(args.seeds):
        fresh = fresh_params(b.student, seed)
        run = functools.partial(b.run, steps=args.steps, seed=seed)
        scratch = functools.partial(run, fresh, rate=args.fresh_rate)
        pruned = functools.partial(run, b.pruned, rate=args.rate)
        counted = b.rows._replace(
            weights=b.rows.weights * (np.arange(LENGTH) >= 31)
        )  # as of its own texts
        for kind, learn, rate in (
            ("from scratch", scratch, args.fresh_rate),
            ("pruned", pruned, args.rate),
        ):
            note(f"data alone, {kind}", seed, functools.partial(learn, next_token, teach=False))
            distil = functools.partial(learn, taught, teach=True)
            best = note(f"distilled, {kind}", seed, distil)
            if all(len(found.get(f"{kind}: {name}", [])) > seed for name in further):
                continue
            best = distil() if best is None else best
            for name, objective in further.items():
                more = functools.partial(
                    b.run,
                    best,
                    objective,
                    args.more,
                    rate / 4,
                    seed + 100,
                    teach=True,
                    rows=counted,
                )
                note(f"{kind}: {name}", seed, more)
        publish(_text(b, found, args), args.out)  # what has been found so far
    return _text(b, found, args)


def _text(b: Bench, found: dict[str, list[dict[str, float]]], args: argparse.Namespace) -> str:
    sizes = [count(p)[1] for p in (b.pruned, b.theirs)]
    heads = {
        "perplexity": "held-out perplexity",
        "sampled": "teacher's nats, sampled",
        "divergence": "KL from teacher, sampled",
        "greedy": "teacher's nats, greedy",
    }
    lines = [
        "| student | seeds | " + " | ".join(heads.values()) + " |",
        "|---" * (2 + len(heads)) + "|",
    ]
    for name, rows in found.items():
        cells = []
        for n in heads:
            values, digits = [r[n] for r in rows], 2 if n == "perplexity" else 3
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{statistics.mean(values):.{digits}f} ± {spread:.{digits}f}")
        lines.append(f"| {name} | {len(rows)} | {' | '.join(cells)} |")
    teacher = perplexity_of(b.teacher, b.theirs, b.held)
    text = (
        f"Teacher: the embedded base, {sizes[1]:,} parameters, held-out perplexity {teacher:.2f}. "
        f"Student: {sizes[0]:,} "
        f"parameters\n({sizes[0] / sizes[1]:.1%}), pruned from it (perplexity "
        f"{b.perplexity(b.pruned):.0f} "
        f"before any step), or of the same shape\nfrom random parameters. {args.steps} steps of "
        f"{ROWS} x {LENGTH} tokens, "
        f'AdamW, cosine schedule (mean ± deviation).\n"then" continues the distilled student for '
        f"{args.more} steps. Texts are 64 tokens after 256 held-out\nprompts of 32: what the "
        "teacher thinks of samples "
        "(temperature 1), how far the student is from it on them, and what it\nthinks of greedy "
        "texts.\n"
    )
    return heading("Distillation of the embedded base") + f"\n{text}\n" + "\n".join(lines) + "\n"


# --------------------------------------------------------------------------------------------------
# cost


def _mib(n: float) -> str:
    return f"{n / 2**20:.1f} MiB"


def _memory(objective: Any, model: Any, tree: Any, batch: Any) -> tuple[int, int]:
    """(bytes of arguments, of temporaries) of a compiled step with AdamW."""
    optimizer = optax.adamw(1e-3)
    trainable, frozen = peft_jax.partition(tree)
    state = jax.eval_shape(lambda t: init_state(t, optimizer, 0), trainable)
    step = jax.jit(make_step(objective, peft_jax.bind(model), optimizer), donate_argnums=0)
    found = step.lower(state, frozen, batch).compile().memory_analysis()
    return found.argument_size_in_bytes, found.temp_size_in_bytes


def cost(args: argparse.Namespace) -> str:
    teacher, theirs = peft_jax.load("builtin:base")
    some = [{"tokens": np.zeros((1, 8), np.int32)}]
    student, ours = prune_structured(teacher, theirs, some, score="magnitude", **SIZES)
    tokens = held_out(Path(args.data), peft_jax.load_tokenizer("builtin:base"))[1][:16]
    batch = {
        "tokens": tokens,
        "targets": np.roll(tokens, -1, 1),
        "weights": np.ones((16, 256), np.float32),
    }
    chunk = 512
    learn = functools.partial(next_token, chunk=chunk)
    taught = distillation(TOKENS, [Teacher(peft_jax.bind(teacher))], chunk=chunk)
    own = distillation(TOKENS, [Teacher(None)], chunk=chunk)
    lora = peft_jax.lora(theirs, jax.random.key(0), rank=8)
    rows = {
        "student alone": (learn, student, full(ours)),
        "student and teacher": (taught, student, beside_teachers(full(ours), [theirs])),
        "teacher alone, trained": (learn, teacher, full(theirs)),
        "LoRA alone": (learn, teacher, lora),
        "LoRA, its base the teacher": (own, teacher, beside_teachers(lora, [None])),
        "LoRA, a copy of its base the teacher": (
            taught,
            teacher,
            beside_teachers(lora, [jax.tree.map(jnp.copy, theirs)]),
        ),
    }
    lines = ["| step | arguments | temporaries |", "|---|---|---|"]
    for name, (objective, model, tree) in rows.items():
        held, temporary = _memory(objective, model, tree, batch)
        lines.append(f"| {name} | {_mib(held)} | {_mib(temporary)} |")
    text = (
        f"Bytes of a compiled step, AdamW, batch 16 x 256, vocabulary 4,096, logits {chunk} tokens "
        "at a time (all of them\n"
        f"in float32 would be {_mib(16 * 256 * 4096 * 4)} a model). Teacher "
        f"{_mib(4 * count(theirs)[1])}, student "
        f"{_mib(4 * count(ours)[1])} of parameters.\n"
    )
    return (
        heading("What distillation costs")
        + f"\n{text}\n"
        + "\n".join(lines)
        + "\n\n"
        + _stored(teacher, theirs, batch)
    )


def _stored(teacher: Any, theirs: Any, batch: Any) -> str:
    """A table of what is stored of a token by k, how fast it is read, and how much of the
    divergence it keeps.
    """
    apply, copies = peft_jax.bind(teacher), 32
    logits = np.asarray(jax.jit(apply)(theirs, batch["tokens"]))
    lines = [
        "| k | bytes a token | of float32 logits | tokens read a second | mass outside |",
        "|---|---|---|---|---|",
    ]
    for k in (8, 32, 64, 128, 4096):
        ids, log_probs = jax.tree.map(np.asarray, top_k(jnp.asarray(logits), k))
        header = CacheHeader("t", "t", "d", 16 * copies, 256, 4096, k, 1.0, shard_rows=64)
        with tempfile.TemporaryDirectory() as folder:

            def read(start, stop, made=(ids, log_probs)):
                return tuple(np.tile(x, (copies, 1, 1))[start:stop] for x in made)

            write_cache(Path(folder), header, read)
            cached = open_cache(Path(folder))
            order = np.random.default_rng(0).permutation(16 * copies).reshape(-1, 16)
            start = time.perf_counter()
            for chosen in order:
                _ = cached.ids[chosen], cached.log_probs[chosen]
            rate = header.rows * header.length / (time.perf_counter() - start)
        outside = float(np.exp(log_probs[..., -1]).mean())
        share = header.bytes_per_token / (4 * 4096)
        lines.append(
            f"| {k} | {header.bytes_per_token} | {share:.2%} | {rate:,.0f} | {outside:.1%} |"
        )
    return (
        "Stored predictions (float16, ids of 16 bits), rows read in random order:\n\n"
        + "\n".join(lines)
        + "\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("table", "cost"))
    parser.add_argument(
        "--data", default="../shared/data", help="folder with gutenberg/ and tinyshakespeare/"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--more", type=int, default=100, help="steps after distillation")
    parser.add_argument(
        "--rate", type=float, default=2e-3, help="learning rate of the pruned student"
    )
    parser.add_argument(
        "--fresh-rate", type=float, default=4e-3, help="and of the one from scratch"
    )
    parser.add_argument(
        "--found", help="a JSON file of results, from which an interrupted run goes on"
    )
    parser.add_argument("--out", help="a Markdown file for the tables")
    args = parser.parse_args()
    publish({"table": table, "cost": cost}[args.what](args), args.out)


if __name__ == "__main__":
    main()
