"""Many short rows of JSONL, and what it costs to learn from them: the time to tokenize and pack,
to open what was made, to go on from a step, and the memory that each takes.

    python scripts/short_rows.py --rows 10_000_000 --folder runs/short_rows

Each measurement runs in a process of its own, whose largest resident size it prints. Memory that
maps files counts in it.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

WORDS = [
    "the",
    "a",
    "one",
    "two",
    "red",
    "blue",
    "house",
    "river",
    "runs",
    "sings",
    "under",
    "over",
    "near",
    "far",
    "and",
    "or",
    "of",
    "in",
]


def write(path: Path, rows: int) -> None:
    """Questions of a few words with short answers."""
    rng = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for i in range(rows):
            prompt = " ".join(rng.choices(WORDS, k=rng.randint(3, 12)))
            line = {"prompt": f"{i} {prompt}: ", "completion": rng.choice(WORDS)}
            file.write(f"{json.dumps(line)}\n")


def rows_of(file: Path, cache: Path, tokenizer: Any) -> Any:
    """The rows of the file, from the cache where they are there."""
    from peft_jax.training.data import DataConfig, Subject
    from peft_jax.training.rows import make_rows

    class Model:
        task = "causal_lm"

    train = {"path": str(file)}
    data = DataConfig(train=train, sequence_length=512, cache=str(cache))
    return make_rows(Subject(Model(), tokenizer, data, 8, None), data.train)


def measure(what: str, file: Path, cache: Path) -> None:
    """One measurement, printed as a line."""
    import peft_jax
    from peft_jax.data import batch_at
    from peft_jax.hub.checkpoint import BASE

    tokenizer = peft_jax.load_tokenizer(BASE)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    start, work = time.monotonic(), time.process_time()
    rows = rows_of(file, cache, tokenizer)
    opened, work = time.monotonic() - start, time.process_time() - work
    first = 0 if what != "going on" else 10_000
    for step in range(first, first + 20):
        batch_at(rows, step, 8, seed=0)
    read = time.monotonic() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"{what}: rows after {opened:.1f} s ({work:.1f} s of a core), "
        f"20 batches after {read:.1f} s; at most {peak:.2f} GiB "
        f"resident, {before:.2f} of them before; {len(rows.tokens):,} rows, "
        f"{rows.tokens.store.about['filled']:.1%} filled",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--folder", type=Path, default=Path("runs/short_rows"))
    parser.add_argument("--measure", default=None)
    args = parser.parse_args()
    file, cache = args.folder / f"{args.rows}.jsonl", args.folder / "cache"
    if args.measure is not None:
        return measure(args.measure, file, cache)
    args.folder.mkdir(parents=True, exist_ok=True)
    if not file.is_file():
        write(file, args.rows)
    for what in ("making the cache", "beginning", "going on"):
        command = [sys.executable, __file__, "--rows", str(args.rows), "--measure", what]
        subprocess.run([*command, "--folder", str(args.folder)], check=True)


if __name__ == "__main__":
    main()
