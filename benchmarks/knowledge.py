"""Knowledge injection measured on the embedded base: facts by training, by the input and by editing, and edits by their number.

    python benchmarks/knowledge.py facts --data ../shared/data --out benchmarks/results/knowledge_facts_cpu.md
    python benchmarks/knowledge.py edits --data ../shared/data --out benchmarks/results/knowledge_edits_cpu.md

Facts: the embedded table of countries, facts of T-REx in ParaRel's words, WordNet's relations. Each is trained in all its words
but one, and asked in that one; a tenth of the subjects is never trained. What is retained is the perplexity of held-out novels
and plays, on whose like the base was trained. Prints Markdown tables with device, versions and commit.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import yaml
from measure import heading, held_out, publish
from rich.console import Console

import peft_jax
from peft_jax.data import builtin
from peft_jax.training.config import parse_config
from peft_jax.training.inject import run_injection

ROOT = Path(__file__).parents[1]
Facts = list[dict[str, str]]
Templates = dict[str, list[str]]


def countries(data: Path) -> tuple[Facts, Templates]:
    """The embedded table and the templates of configs/."""
    return [f for _, f in builtin.country_facts()], yaml.safe_load((ROOT / "configs/templates/countries.yaml").read_text())


def trex(data: Path, most: int = 400, words: int = 6) -> tuple[Facts, Templates]:
    """Facts of T-REx whose relation ParaRel says in `words` ways that end with the object; a subject has one object."""
    root, facts, templates = data / "pararel_trex", [], {}
    for file in sorted((root / "patterns").glob("*.jsonl")):
        patterns = [json.loads(line)["pattern"].rstrip(" .") for line in file.read_text().splitlines() if line.strip()]
        ways = [p for p in dict.fromkeys(patterns) if p.endswith("[Y]") and p.count("[X]") == p.count("[Y]") == 1]
        if len(ways) < words:
            continue
        turned = [w.replace("[X]", "{{ subject }}").replace("[Y]", "{{ object }}") for w in ways[:words]]
        templates[file.stem] = turned
        with gzip.open(root / "trex" / f"{file.stem}.jsonl.gz", "rt") as lines:
            found = [json.loads(line) for line in lines]
        facts += [{"subject": r["sub_label"], "relation": file.stem, "object": r["obj_label"]} for r in found]
    return _chosen(facts, most), templates


def wordnet(data: Path, most: int = 400) -> tuple[Facts, Templates]:
    """Relations of WN18RR between words of one sense each; a subject has one object."""
    say = {
        "_hypernym": ["is a kind of", "is a sort of", "is of the class", "is a special", "may be called a", "is a type of"],
        "_has_part": ["has the part", "has as a part the", "includes a", "comes with the", "is in part a", "contains a"],
        "_member_meronym": ["has the member", "counts among its members", "as a group holds", "includes", "contains", "unites"],
    }  # fmt: skip
    facts = []
    with gzip.open(data / "wn18rr_text" / "text" / "train.txt.gz", "rt") as lines:
        for line in lines:
            head, relation, tail = line.rstrip("\n").split("\t")
            if relation in say and head.endswith(".01") and tail.endswith(".01"):
                name = lambda synset: synset.rsplit(".", 2)[0].replace("_", " ")
                facts.append({"subject": name(head), "relation": relation, "object": name(tail)})
    templates = {relation: [f"{{{{ subject }}}} {way} {{{{ object }}}}" for way in ways] for relation, ways in say.items()}
    return _chosen(facts, most), templates


def _chosen(facts: Facts, most: int) -> Facts:
    """At most so many of the facts, the same ones always, of subjects with one object for the relation."""
    objects = Counter((f["subject"].lower(), f["relation"]) for f in facts)
    single = [f for f in facts if objects[f["subject"].lower(), f["relation"]] == 1 and f["subject"].isascii()]
    return random.Random(0).sample(single, min(most, len(single)))


DATASETS: dict[str, Callable[[Path], tuple[Facts, Templates]]] = {"countries": countries, "T-REx": trex, "WordNet": wordnet}
LORA = {"method": {"name": "lora", "rank": 32, "alpha": 64}}
# what differs from the common configuration: whole sections, and of `data` what is put over the common ones
WAYS: dict[str, dict[str, Any]] = {
    "adapter (bottleneck)": {"method": {"name": "bottleneck", "size": 128}},
    "LoRA": LORA,
    "LoRA without replay": {**LORA, "data": {"replay": None}},
    "LoRA, allowed objects in the loss": {**LORA, "data": {"knowledge": {"allowed_weight": 0.2}}},
    "triples in the input (K-BERT), LoRA": {**LORA, "epochs": 0.5, "data": {"knowledge": {"triples": {}}}},
    "triples in the input, allowed objects, LoRA": {
        **LORA, "epochs": 0.5, "data": {"knowledge": {"triples": {}, "allowed_weight": 0.2}},
    },
    "passages in the input (RAFT), LoRA": {**LORA, "epochs": 0.25, "data": {"knowledge": {"passages": {}, "passages_each": 2}}},
    "full fine-tuning": {"method": {"name": "full"}, "rate": 1e-3},
    "edited (MEMIT)": {"inject": {"by": "editing"}},
}  # fmt: skip


def configuration(way: str, folder: Path, seed: int, epochs: float) -> Any:
    """The configuration of one way."""
    change = WAYS[way]
    source = {"path": str(folder / "facts.jsonl")}
    knowledge = {n: source if v == {} else v for n, v in change.get("data", {}).get("knowledge", {}).items()}
    data = {
        "kind": "facts", "train": {**source, "part": "known"}, "validation": None, "templates": str(folder / "templates.yaml"),
        "sequence_length": 160 if "passages" in knowledge else 64, "replay": {"path": str(folder / "replay.jsonl")},
        "replay_share": 0.4, **change.get("data", {}), "knowledge": knowledge,
    }  # fmt: skip
    inject = {"unseen": True, "retained": {"path": str(folder / "retained.jsonl")}, **change.get("inject", {})}
    rows = 16 if "passages" in knowledge else 32
    train = {"epochs": epochs * change.get("epochs", 1.0), "batch_size": rows, "seed": seed, "tensorboard": False}
    return parse_config({
        "output": str(folder / "run"), "resume": False, "data": data, "inject": inject, "train": train,
        "method": change.get("method", {"name": "lora"}),
        "optimizer": {"learning_rate": change.get("rate", 5e-3), "warmup_steps": 10},
        "edit": {"method": "memit", "layers": [1, 2, 3], "options": {"weight": 30.0}, "calibration_batches": 16, "prefixes": 0},
    })  # fmt: skip


def write_texts(data: Path, folder: Path) -> None:
    """What is replayed, and what is retained."""
    tokenizer = peft_jax.load_tokenizer("builtin:base")
    train, held = held_out(data, tokenizer)
    for name, rows, count in (("replay", train, 400), ("retained", held, 64)):
        texts = [tokenizer.decode(row, skip_special_tokens=True) for row in rows[:: max(1, len(rows) // count)][:count]]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))


def facts(args: argparse.Namespace) -> str:
    kept = Path(args.found) if args.found else None
    found: dict[str, Any] = json.loads(kept.read_text()) if kept and kept.is_file() else {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_texts(Path(args.data), folder)
        for name in args.datasets:
            some, templates = DATASETS[name](Path(args.data))
            used = {f["relation"] for f in some}
            (folder / "facts.jsonl").write_text("".join(json.dumps(f) + "\n" for f in some))
            (folder / "templates.yaml").write_text(yaml.safe_dump({r: t for r, t in templates.items() if r in used}))
            sizes = found.setdefault(name, {"facts": len(some), "relations": len(used), "ways": {}})
            for seed in range(args.seeds):
                for way in args.ways:
                    rows = sizes["ways"].setdefault(way, [])
                    if len(rows) > seed or (way.startswith("edited") and seed):  # editing draws nothing
                        continue
                    begin = time.perf_counter()
                    result = run_injection(configuration(way, folder, seed, args.epochs), Console(quiet=True))
                    rows.append({**result, "seconds": time.perf_counter() - begin})
                    print(f"{name}, {way}, seed {seed}: {rows[-1]}", flush=True)
                    if kept:
                        kept.write_text(json.dumps(found))
                    publish(_facts_text(found, args), args.out)
                    jax.clear_caches()
    return _facts_text(found, args)


def _facts_text(found: dict[str, Any], args: argparse.Namespace) -> str:
    parts = [heading("Facts put into the embedded base")]
    parts.append(
        f"{args.epochs:g} passes over the facts (half as many with triples, a quarter with passages), AdamW, cosine schedule,\n"
        "novels and plays replayed in 40% of the rows. Mean ± deviation over seeds. Recall is the share of facts whose object\n"
        "is what the model says (each token the likeliest), in words of training, in held-out words, and, in these, of\n"
        "subjects that were never trained; perplexity is that of held-out novels and plays.\n"
    )
    for name, data in found.items():
        before = next(iter(data["ways"].values()))[0]["before"]
        parts.append(f"\n## {name}: {data['facts']:,} facts, {data['relations']} relations\n")
        parts.append(
            "| way | seeds | words of training, % | held-out words, % | unseen subjects, % | perplexity | change | s |"
        )
        parts.append("|---|---|---|---|---|---|---|---|")
        base = " | ".join(f"{100 * before[n]:.1f}" for n in ("said", "recall", "unseen"))
        parts.append(f"| the base | | {base} | {before['perplexity']:.2f} | | |")
        for way, rows in data["ways"].items():
            if not rows:
                continue
            values = {n: [r["after"][n] for r in rows] for n in before}
            cells = [_spread([100 * x for x in values[n]], 1) for n in ("said", "recall", "unseen")]
            change = statistics.mean(values["perplexity"]) / before["perplexity"] - 1
            seconds = statistics.mean(r["seconds"] for r in rows)
            cells += [_spread(values["perplexity"], 2), f"{change:+.1%}", f"{seconds:.0f}"]
            parts.append(f"| {way} | {len(rows)} | {' | '.join(cells)} |")
    return "\n".join(parts) + "\n"


def _spread(values: list[float], digits: int) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} ± {deviation:.{digits}f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["facts"])
    parser.add_argument(
        "--data", required=True, help="folder with gutenberg/, tinyshakespeare/, pararel_trex/ and wn18rr_text/"
    )
    parser.add_argument("--datasets", nargs="*", choices=DATASETS, default=list(DATASETS))
    parser.add_argument("--ways", nargs="*", choices=WAYS, default=list(WAYS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=float, default=12)
    parser.add_argument("--found", help="a JSON file of results, from which an interrupted run goes on")
    parser.add_argument("--out", help="a Markdown file for the table")
    args = parser.parse_args()
    facts(args)


if __name__ == "__main__":
    main()
