"""Adapters against full fine-tuning on a small encoder: parts of speech and genres (UD English
EWT), intents (BANKING77).

    python scripts/pretrain_encoder.py --data ../shared/data --out runs/encoder python
    benchmarks/encoders.py --encoder runs/encoder --data ../shared/data --out
    benchmarks/results/encoders_cpu.md

Learning rates are chosen for each method and task with seed 0 on the development data, among three;
the table has test data. A head is trained in every row; "head" trains nothing else. Prints a
Markdown table with device, versions and commit.
"""

from __future__ import annotations

import argparse
import csv
import functools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from measure import heading, publish

import peft_jax
from peft_jax.adapters import bitfit, bottleneck
from peft_jax.core import Trainable, count, full
from peft_jax.core.tree import is_node, map_places
from peft_jax.data import Record, batch_at, label_names, read_records
from peft_jax.objectives.labels import LABELS
from peft_jax.objectives.reading import cross_entropy
from peft_jax.training.data import DataConfig, Subject
from peft_jax.training.step import init_state, make_step
from peft_jax.training.tasks import TASKS

# method -> (how it changes the tree, learning rates to choose from)
METHODS: dict[str, tuple[Callable[[Any, jax.Array], Any], tuple[float, ...]]] = {
    "full": (lambda p, k: full(p), (3e-4, 1e-3, 3e-3)),
    "lora": (
        lambda p, k: peft_jax.lora(p, k, rank=8, alpha=16, targets=["Wqkv", "Wo", "Wi"]),
        (5e-4, 2e-3, 5e-3),
    ),
    "pfeiffer": (
        lambda p, k: bottleneck(p, k, placement="pfeiffer", size=24),
        (2e-3, 5e-3, 1e-2),
    ),
    "houlsby": (
        lambda p, k: bottleneck(p, k, placement="houlsby", size=12),
        (2e-3, 5e-3, 1e-2),
    ),
    "bitfit": (lambda p, k: bitfit(p), (3e-3, 1e-2, 3e-2)),
    "head": (lambda p, k: p, (3e-3, 1e-2, 3e-2)),
}


class Problem(NamedTuple):
    """A task with its records and the length and number of its rows."""

    task: Any
    train: list[Record]
    dev: list[Record]
    test: list[Record]
    length: int
    rows: int


def problems(data: Path) -> dict[str, Problem]:
    """The three tasks. Of the training data of BANKING77, which has no development data, every
    tenth record is held out.
    """
    tags, genres = {}, {}
    for part in ("train", "dev", "test"):
        file = str(data / "ud_english_ewt" / f"en_ewt-ud-{part}.conllu.gz")
        tags[part] = read_records(file, kind="tagging", columns={"tags": "upos"})
        named = read_records(
            file, kind="classification", columns={"text": "text", "label": "sent_id"}
        )
        genres[part] = [
            Record({**r.value, "label": r.value["label"].partition("-")[0]}, r.origin)
            for r in named
        ]
    intents = {}
    for part in ("train", "test"):
        with (data / "banking77" / f"{part}.csv").open(encoding="utf-8") as file:
            intents[part] = [
                Record({"text": r["text"], "label": r["category"]}, part)
                for r in csv.DictReader(file)
            ]
    held = intents["train"][::10]
    learnt = [r for i, r in enumerate(intents["train"]) if i % 10]
    return {
        "part of speech": Problem(
            "token_classification", tags["train"], tags["dev"], tags["test"], 64, 16
        ),
        "genre": Problem(
            "sequence_classification", genres["train"], genres["dev"], genres["test"], 64, 16
        ),
        "intent": Problem("sequence_classification", learnt, held, intents["test"], 32, 32),
    }


class Bench:
    """One problem's model, rows and compiled step of one method."""

    def __init__(self, args: argparse.Namespace, problem: Problem, method: str) -> None:
        spec = TASKS[problem.task]
        labels = label_names([*problem.train, *problem.test], spec.labels or "label")
        self.model, self.base = peft_jax.load(args.encoder, task=problem.task, labels=labels)
        tokenizer = peft_jax.load_tokenizer(args.encoder)
        self.subject = Subject(
            self.model, tokenizer, DataConfig(sequence_length=problem.length), 64, None
        )
        self.rows, self.problem, self.method, self.spec = (
            spec.rows(self.subject, problem.train),
            problem,
            method,
            spec,
        )
        schedule = optax.inject_hyperparams(
            lambda rate: optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate))
        )
        self.optimizer, self.steps = schedule(rate=0.0), args.steps
        self.step = jax.jit(
            make_step(
                functools.partial(cross_entropy, LABELS), peft_jax.bind(self.model), self.optimizer
            ),
            donate_argnums=0,
        )

    def start(self, seed: int) -> Any:
        """The tree before training: the method's, and a fresh head that trains."""

        def head(path, w):
            return set(path.split("/")) & set(self.model.heads) and not is_node(w)

        key = jax.random.key(seed)
        params = METHODS[self.method][0](self.base, key)

        def fresh(path, w):
            return 0.02 * jax.random.normal(jax.random.fold_in(key, len(path)), w.shape)

        return map_places(
            lambda p, w: Trainable(fresh(p, w), saved_as="module") if head(p, w) else w,
            params,
        )

    def run(self, seed: int, rate: float) -> tuple[Any, float]:
        """(the trained tree, median seconds a step)."""
        trainable, frozen = peft_jax.partition(self.start(seed))
        state, times = init_state(trainable, self.optimizer, seed), []
        schedule = optax.warmup_cosine_decay_schedule(0.0, rate, self.steps // 10, self.steps)
        for i in range(self.steps):
            batch = batch_at(self.rows, i, self.problem.rows, seed=seed)
            state.opt_state.hyperparams["rate"] = jnp.asarray(schedule(i), jnp.float32)
            begin = time.perf_counter()
            state, metrics = self.step(state, frozen, batch)
            jax.block_until_ready(metrics["loss"])
            times.append(time.perf_counter() - begin)
        return peft_jax.combine(state.trainable, frozen), statistics.median(times)

    def accuracy(self, params: Any, records: list[Record]) -> float:
        assert self.spec.scores is not None
        return self.spec.scores(self.subject, params, records, ["accuracy"])["accuracy"]


def bench(
    args: argparse.Namespace, problem: Problem, method: str, say: Callable[[str], None]
) -> dict[str, Any]:
    """The chosen rate, the test accuracy of each seed, sizes and times."""
    b = Bench(args, problem, method)
    tried = {rate: b.run(0, rate) for rate in METHODS[method][1]}
    scores = {rate: b.accuracy(params, problem.dev[:1000]) for rate, (params, _) in tried.items()}
    rate = max(scores, key=lambda r: scores[r])
    say(
        f"  {method}: development accuracy by rate "
        f"{', '.join(f'{r:g} {s:.4f}' for r, s in scores.items())}"
    )
    runs = [tried[rate], *(b.run(seed, rate) for seed in range(1, args.seeds))]
    trunk = {k: w for k, w in b.start(0).items() if k == b.model.prefix}
    return {
        "rate": rate,
        "test": [b.accuracy(params, problem.test) for params, _ in runs],
        "trained": count(trunk)[0],
        "seconds": statistics.median(t for _, t in runs),
    }


def table(found: dict[str, dict[str, dict[str, Any]]], args: argparse.Namespace) -> str:
    names = list(found)
    lines = [
        "| method | trained in the trunk | "
        + " | ".join(f"{n}, % (mean ± sd)" for n in names)
        + " | ms a step |"
    ]
    lines.append("|---" * (len(names) + 3) + "|")
    for method in METHODS:
        if any(method not in found[n] for n in names):
            continue
        cells = []
        for name in names:
            test = [100 * x for x in found[name][method]["test"]]
            spread = statistics.stdev(test) if len(test) > 1 else 0.0
            cells.append(f"{statistics.mean(test):.2f} ± {spread:.2f}")
        one = [found[n][method] for n in names]
        times = " / ".join(f"{r['seconds'] * 1e3:.0f}" for r in one)
        lines.append(f"| {method} | {one[-1]['trained']:,} | {' | '.join(cells)} | {times} |")
    text = (
        f"Test accuracy, {args.seeds} seeds, {args.steps} steps of 1,024 tokens, AdamW, cosine "
        "schedule, on an encoder of 4\n"
        "layers and 192 features trained on novels and plays. Rates were chosen among three on "
        "development data with seed 0.\n"
    )
    return heading("Adapters on a small encoder") + f"\n{text}\n" + "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--encoder", required=True, help="folder of the encoder")
    parser.add_argument("--data", required=True, help="folder with ud_english_ewt/ and banking77/")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--only", nargs="*", choices=METHODS, help="these methods alone")
    parser.add_argument(
        "--found", help="a JSON file of results, from which an interrupted run goes on"
    )
    parser.add_argument("--out", help="a Markdown file for the table")
    args = parser.parse_args()
    say = functools.partial(print, flush=True)
    kept = Path(args.found) if args.found else None
    found: dict[str, dict[str, dict[str, Any]]] = (
        json.loads(kept.read_text()) if kept and kept.is_file() else {}
    )
    for name, problem in problems(Path(args.data)).items():
        say(f"{name}: {len(problem.train):,} training records")
        for method in args.only or METHODS:
            if method in found.setdefault(name, {}):
                continue
            found[name][method] = bench(args, problem, method, say)
            say(f"  {method}: {found[name][method]}")
            if kept:
                kept.write_text(json.dumps(found))
            jax.clear_caches()
        publish(table(found, args), args.out)  # what has been found so far


if __name__ == "__main__":
    main()
