"""Knowledge injection measured on the embedded base: facts by training, by the input and by
editing, and edits by their number.

    python benchmarks/knowledge.py facts --data ../shared/data --out
    benchmarks/results/knowledge_facts_cpu.md python benchmarks/knowledge.py edits --data
    ../shared/data --out benchmarks/results/knowledge_edits_cpu.md python benchmarks/knowledge.py
    edits --data ../shared/data --units 4096 --out benchmarks/results/knowledge_edits_wide_cpu.md
    python benchmarks/knowledge.py linguistic --data ../shared/data --model runs/encoder --out ...

Facts: the embedded table of countries, facts of T-REx in ParaRel's words, WordNet's relations. Each
is trained in all its words but one, and asked in that one; a tenth of the subjects is never
trained. What is retained is the perplexity of held-out novels and plays, on whose like the base was
trained. Prints Markdown tables with device, versions and commit.
"""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import json
import random
import statistics
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import yaml
from measure import heading, held_out, perplexity_of, publish
from rich.console import Console

import peft_jax
from peft_jax.core import calibrate
from peft_jax.core.partition import freeze
from peft_jax.core.tree import map_places
from peft_jax.data import builtin, read_records
from peft_jax.knowledge.editing import Search, edit
from peft_jax.knowledge.evaluation import answers_said, edit_scores
from peft_jax.knowledge.requests import Edit
from peft_jax.models.families import remade
from peft_jax.recipes.config import parse_config
from peft_jax.recipes.inject import run_injection
from peft_jax.recipes.train import run_training

ROOT = Path(__file__).parents[1]
Facts = list[dict[str, str]]
Templates = dict[str, list[str]]


def countries(data: Path) -> tuple[Facts, Templates]:
    """The embedded table and the templates of configs/."""
    return [f for _, f in builtin.country_facts()], yaml.safe_load(
        (ROOT / "configs/templates/countries.yaml").read_text()
    )


def trex(data: Path, most: int = 300, words: int = 10) -> tuple[Facts, Templates]:
    """Facts of T-REx whose relation ParaRel says in `words` ways that end with the object, the ways
    in an order drawn once (the last is held out); a subject has one object.
    """
    root, facts, templates = data / "pararel_trex", [], {}
    for file in sorted((root / "patterns").glob("*.jsonl")):
        patterns = [
            json.loads(line)["pattern"].rstrip(" .")
            for line in file.read_text().splitlines()
            if line.strip()
        ]
        ways = [
            p
            for p in dict.fromkeys(patterns)
            if p.endswith("[Y]") and p.count("[X]") == p.count("[Y]") == 1
        ]
        if len(ways) < words:
            continue
        turned = [
            w.replace("[X]", "{{ subject }}").replace("[Y]", "{{ object }}") for w in ways[:words]
        ]
        random.Random(file.stem).shuffle(turned)
        templates[file.stem] = turned
        with gzip.open(root / "trex" / f"{file.stem}.jsonl.gz", "rt") as lines:
            found = [json.loads(line) for line in lines]
        facts += [
            {"subject": r["sub_label"], "relation": file.stem, "object": r["obj_label"]}
            for r in found
        ]
    return _chosen(facts, most), templates


def wordnet(data: Path, most: int = 300) -> tuple[Facts, Templates]:
    """Relations of WN18RR between words of one sense each; a subject has one object."""
    templates = yaml.safe_load((ROOT / "configs/templates/wordnet.yaml").read_text())
    facts = []
    with gzip.open(data / "wn18rr_text" / "text" / "train.txt.gz", "rt") as lines:
        for line in lines:
            head, relation, tail = line.rstrip("\n").split("\t")
            if relation in templates and head.endswith(".01") and tail.endswith(".01"):

                def name(synset):
                    return synset.rsplit(".", 2)[0].replace("_", " ")

                facts.append({"subject": name(head), "relation": relation, "object": name(tail)})
    return _chosen(facts, most), templates


def _chosen(facts: Facts, most: int) -> Facts:
    """At most so many of the facts, the same ones always, of subjects with one object for the
    relation.
    """
    objects = Counter((f["subject"].lower(), f["relation"]) for f in facts)
    single = [
        f
        for f in facts
        if objects[f["subject"].lower(), f["relation"]] == 1 and f["subject"].isascii()
    ]
    return random.Random(0).sample(single, min(most, len(single)))


DATASETS: dict[str, Callable[[Path], tuple[Facts, Templates]]] = {
    "countries": countries,
    "T-REx": trex,
    "WordNet": wordnet,
}
LORA = {"method": {"name": "lora", "rank": 32, "alpha": 64}}
# what differs from the common configuration: whole sections, and of `data` what is put over the
# common ones
WAYS: dict[str, dict[str, Any]] = {
    "adapter (bottleneck)": {"method": {"name": "bottleneck", "size": 128}, "rate": 1e-2},
    "LoRA": LORA,
    "LoRA without replay": {**LORA, "data": {"replay": None}},
    "LoRA, allowed objects in the loss": {**LORA, "data": {"knowledge": {"allowed_weight": 0.2}}},
    "triples in the input (K-BERT), LoRA": {**LORA, "data": {"knowledge": {"triples": {}}}},
    "triples in the input, allowed objects, LoRA": {
        **LORA,
        "data": {"knowledge": {"triples": {}, "allowed_weight": 0.2}},
    },
    "passages in the input (RAFT), LoRA": {
        **LORA,
        "epochs": 0.5,
        "data": {"knowledge": {"passages": {}, "passages_each": 2}},
    },
    "full fine-tuning": {"method": {"name": "full"}, "rate": 1e-3},
    "edited (MEMIT)": {"inject": {"by": "editing"}},
}


def configuration(way: str, folder: Path, seed: int, epochs: float) -> Any:
    """The configuration of one way."""
    change = WAYS[way]
    source = {"path": str(folder / "facts.jsonl")}
    knowledge = {
        n: source if v == {} else v for n, v in change.get("data", {}).get("knowledge", {}).items()
    }
    data = {
        "kind": "facts",
        "train": {**source, "part": "known"},
        "validation": None,
        "templates": str(folder / "templates.yaml"),
        "sequence_length": 160 if "passages" in knowledge else 64,
        "replay": {"path": str(folder / "replay.jsonl")},
        "replay_share": 0.33,
        **change.get("data", {}),
        "knowledge": knowledge,
    }
    inject = {
        "unseen": True,
        "retained": {"path": str(folder / "retained.jsonl")},
        **change.get("inject", {}),
    }
    rows = 8 if "passages" in knowledge else 16
    train = {
        "epochs": epochs * change.get("epochs", 1.0),
        "batch_size": rows,
        "seed": seed,
        "tensorboard": False,
    }
    return parse_config(
        {
            "output": str(folder / "run"),
            "resume": False,
            "data": data,
            "inject": inject,
            "train": train,
            "method": change.get("method", {"name": "lora"}),
            "optimizer": {"learning_rate": change.get("rate", 3e-3), "warmup_steps": 10},
            "edit": {
                "method": "memit",
                "layers": [0, 1],
                "options": {"weight": 30.0},
                "search": {"decay": 0.02, "clamp": 20.0},
                "calibration_batches": 32,
                "prefixes": 0,
            },
        }
    )


def write_texts(data: Path, folder: Path) -> None:
    """What is replayed, and what is retained."""
    tokenizer = peft_jax.load_tokenizer("builtin:base")
    train, held = held_out(data, tokenizer)
    for name, rows, count in (("replay", train, 5000), ("retained", held, 64)):
        texts = [
            tokenizer.decode(row, skip_special_tokens=True)
            for row in rows[:: max(1, len(rows) // count)][:count]
        ]
        (folder / f"{name}.jsonl").write_text(
            "".join(json.dumps({"text": t}) + "\n" for t in texts)
        )


def facts(args: argparse.Namespace) -> None:
    kept = Path(args.found) if args.found else None
    found: dict[str, Any] = json.loads(kept.read_text()) if kept and kept.is_file() else {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_texts(Path(args.data), folder)
        for name in args.datasets:
            some, templates = DATASETS[name](Path(args.data))
            used = {f["relation"] for f in some}
            epochs = round(args.exposures / (len(templates[some[0]["relation"]]) - 1))
            (folder / "facts.jsonl").write_text("".join(json.dumps(f) + "\n" for f in some))
            (folder / "templates.yaml").write_text(
                yaml.safe_dump({r: t for r, t in templates.items() if r in used})
            )
            sizes = found.setdefault(name, {"facts": len(some), "relations": len(used), "ways": {}})
            for seed in range(args.seeds):
                for way in args.ways or WAYS:
                    rows = sizes["ways"].setdefault(way, [])
                    if len(rows) > seed or (
                        WAYS[way].get("inject") and seed
                    ):  # editing draws nothing
                        continue
                    rows.append(
                        run_injection(configuration(way, folder, seed, epochs), Console(quiet=True))
                    )
                    print(f"{name}, {way}, seed {seed}: {rows[-1]}", flush=True)
                    if kept:
                        kept.write_text(json.dumps(found))
                    publish(_facts_text(found, args), args.out)
                    jax.clear_caches()
    publish(_facts_text(found, args), args.out)


def _facts_text(found: dict[str, Any], args: argparse.Namespace) -> str:
    parts = [heading("Facts put into the embedded base")]
    parts.append(
        f"Each fact is said about {args.exposures} times (half as often with passages, which say "
        "facts too), AdamW, cosine\n"
        "schedule, novels and plays replayed in a third of the rows. Mean ± deviation over seeds. "
        "Recall is the share of\n"
        "facts whose object is what the model says (each token the likeliest), in words of "
        "training, in held-out words, and,\n"
        "in these, of subjects that were never trained; perplexity is that of held-out novels and "
        "plays, before and\n"
        "after, in rows of 64 tokens (160 with passages).\n"
    )
    for name, data in found.items():
        known = next(iter(data["ways"].values()))[0]["before"]
        parts.append(f"\n## {name}: {data['facts']:,} facts, {data['relations']} relations\n")
        parts.append(
            "| way | seeds | words of training, % | held-out words, % | unseen subjects, % | "
            "perplexity | after | change |"
        )
        parts.append("|---|---|---|---|---|---|---|---|")
        base = " | ".join(f"{100 * known[n]:.1f}" for n in ("said", "recall", "unseen"))
        parts.append(f"| the base | | {base} | {known['perplexity']:.2f} | | |")
        for way, rows in data["ways"].items():
            if not rows:
                continue
            cells = [
                _spread([100 * r["after"][n] for r in rows], 1)
                for n in ("said", "recall", "unseen")
            ]
            before, after = (
                rows[0]["before"]["perplexity"],
                [r["after"]["perplexity"] for r in rows],
            )
            cells += [
                f"{before:.2f}",
                _spread(after, 2),
                f"{statistics.mean(after) / before - 1:+.1%}",
            ]
            parts.append(f"| {way} | {len(rows)} | {' | '.join(cells)} |")
    return "\n".join(parts) + "\n"


def _spread(values: list[float], digits: int) -> str:
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


# --------------------------------------------------------------------------------------------------
# edits

# of the facts that the model knows; the values below were chosen on 30 to 400 of the others
DRAWN = 1000
SEARCH = Search(steps=25, decay=0.02, clamp=20.0)
EDITING: dict[str, dict[str, Any]] = {
    "ROME": {"method": "rome", "layers": [1], "search": SEARCH},
    "MEMIT": {"method": "memit", "layers": [0, 1], "weight": 100.0, "search": SEARCH},
    "AlphaEdit": {"method": "alphaedit", "layers": [0, 1], "threshold": 0.2, "search": SEARCH},
    "FT": {"method": "ft", "layers": [2], "learning_rate": 2e-3},
    "FT-L": {"method": "ft_l", "layers": [2], "learning_rate": 1e-2, "limit": 3e-2},
    "LoRA of these layers": {"method": "lora", "layers": [0, 1, 2], "learning_rate": 5e-3},
}
# What differs with more units (chosen with 4,096): larger changes of values, which disturb less
# there.
LARGER = SEARCH._replace(learning_rate=1.5)
WIDE: dict[str, dict[str, Any]] = {
    "ROME": {"search": LARGER},
    "MEMIT": {"search": LARGER, "weight": 5000.0},
    "AlphaEdit": {"search": LARGER},
}


def widened(folder: Path, units: int) -> Path:
    """A folder with the base with more units in each feed-forward, which write nothing at first:
    what a layer can hold grows with its units, and published models have several for each fact that
    is edited.
    """
    model, params = peft_jax.load("builtin:base")
    more, rng = units - model.config.intermediate_size, np.random.default_rng(0)

    def wide(path: str, w: Any) -> Any:
        L, *sizes = w.shape
        if path.endswith("down_proj/kernel"):
            return np.concatenate([w, np.zeros((L, more, sizes[1]), w.dtype)], 1)
        if path.endswith(("gate_proj/kernel", "up_proj/kernel")):
            return np.concatenate(
                [w, rng.normal(0, np.std(w), (L, sizes[0], more)).astype(w.dtype)], 2
            )
        return w

    config = remade(model.config, json.loads(model.config.hf_config) | {"intermediate_size": units})
    tokenizer = peft_jax.load_tokenizer("builtin:base")
    peft_jax.save(folder, model.clone(config=config), map_places(wide, params), tokenizer=tokenizer)
    return folder


def learnt(args: argparse.Namespace, folder: Path) -> tuple[Any, Any, Any]:
    """(model, parameters, tokenizer) of the base after it has learnt T-REx's facts in all their
    words, fine-tuned whole; the folder is taken as it is where it is there already.
    """
    if not (folder / "model").is_dir():
        write_texts(Path(args.data), folder)
        some, templates = trex(Path(args.data), most=args.facts)
        used = {f["relation"] for f in some}
        (folder / "facts.jsonl").write_text("".join(json.dumps(f) + "\n" for f in some))
        (folder / "templates.yaml").write_text(
            yaml.safe_dump({r: t for r, t in templates.items() if r in used})
        )
        config = configuration("full fine-tuning", folder, 0, args.epochs)
        whole = {"train": dataclasses.replace(config.data.train, part=None), "held_out": 0}
        data = dataclasses.replace(config.data, **whole)
        base = (
            dataclasses.replace(config.model, path=str(widened(folder / "wide", args.units)))
            if args.units
            else config.model
        )
        config = dataclasses.replace(config, output=str(folder), data=data, model=base)
        run_training(config)
    return *peft_jax.load(folder / "model"), peft_jax.load_tokenizer(folder / "model")


def counterfacts(
    some: Facts, templates: Templates, apply: Any, params: Any, tokenizer: Any
) -> list[Edit]:
    """Edits of the facts that the model knows, each to another object of its relation with as many
    tokens (scores are means over tokens): the first words are edited, the others are paraphrases,
    and neighbours are other subjects with the object.
    """

    def ask(f, i):
        return (
            templates[f["relation"]][i]
            .replace("{{ subject }}", f["subject"])
            .replace(" {{ object }}", "")
        )

    known = answers_said(
        apply, params, tokenizer, [ask(f, 0) for f in some], [f["object"] for f in some]
    )
    facts = [f for f, k in zip(some, known, strict=True) if k]
    objects, same, rng = defaultdict(set), defaultdict(list), random.Random(0)
    for f in facts:
        objects[f["relation"]].add(f["object"])
        same[f["relation"], f["object"]].append(f)
    made, length = (
        [],
        lambda text: len(tokenizer(f" {text}", add_special_tokens=False)["input_ids"]),
    )
    for f in facts:
        others = [
            o
            for o in sorted(objects[f["relation"]] - {f["object"]})
            if length(o) == length(f["object"])
        ]
        near = [n for n in same[f["relation"], f["object"]] if n is not f][:5]
        if others:
            prompt = (
                templates[f["relation"]][0]
                .replace("{{ subject }}", "{}")
                .replace(" {{ object }}", "")
            )
            rest = tuple(ask(f, i) for i in range(1, len(templates[f["relation"]])))
            made.append(
                Edit(
                    prompt,
                    f["subject"],
                    rng.choice(others),
                    f["object"],
                    rest,
                    tuple(ask(n, 0) for n in near),
                )
            )
    rng.shuffle(made)
    return made


def said(some: Facts, templates: Templates, tokenizer: Any) -> np.ndarray:
    """[N, 64] rows of the facts in all their words: with novels, what the model knows."""
    texts = [
        w.replace("{{ subject }}", f["subject"]).replace("{{ object }}", f["object"])
        for f in some
        for w in templates[f["relation"]]
    ]
    random.Random(0).shuffle(texts)
    ids = [i for text in texts for i in tokenizer(text)["input_ids"]]
    return np.asarray(ids[: len(ids) // 64 * 64], np.int32).reshape(-1, 64)


def edits(args: argparse.Namespace) -> None:
    folder = Path(args.model or tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    model, params, tokenizer = learnt(args, folder)
    apply = peft_jax.bind(model)
    some, templates = trex(Path(args.data), most=args.facts)
    wanted = counterfacts(some, templates, apply, params, tokenizer)
    train, held = held_out(Path(args.data), tokenizer)
    batches = [
        {"tokens": rows[16 * i : 16 * (i + 1), :64]}
        for rows in (train, said(some, templates, tokenizer))
        for i in range(64)
    ]
    covariances = calibrate(apply, params, batches, targets=["down_proj"])
    kept = Path(args.found) if args.found else None
    found: dict[str, Any] = json.loads(kept.read_text()) if kept and kept.is_file() else {}
    about = {
        "facts": len(some),
        "known": len(wanted),
        "perplexity": perplexity_of(model, params, held[:64]),
        "units": model.config.intermediate_size,
    }
    for count in args.counts:
        for way in args.ways or EDITING:
            rows = found.setdefault(f"{count}", {}).setdefault(way, [])
            for draw in range(len(rows), max(1, min(args.draws, DRAWN // count))):
                chosen = wanted[draw * count : (draw + 1) * count]
                options = EDITING[way] | (WIDE.get(way, {}) if args.units else {})
                edited = edit(model, params, tokenizer, chosen, covariances=covariances, **options)
                scores = edit_scores(apply, edited, tokenizer, chosen)
                scores["perplexity"] = perplexity_of(model, edited, held[:64])
                rows.append({**scores, "edits": len(chosen)})
                print(f"{count} edits, {way}, draw {draw}: {rows[-1]}", flush=True)
                if kept:
                    kept.write_text(json.dumps(found))
                publish(_edits_text(found, about), args.out)
    publish(_edits_text(found, about), args.out)


def _edits_text(found: dict[str, Any], about: dict[str, Any]) -> str:
    names = ("efficacy", "paraphrase", "neighbourhood", "score")
    parts = [heading("Edits of facts that a model has learnt")]
    parts.append(
        f"The embedded base ({about['units']:,} units in each feed-forward) after full "
        "fine-tuning on\n"
        f"{about['facts']:,} facts of T-REx in ten ways to say each. Edits are of\n"
        f"the {about['known']:,} facts that it then says, to another object of the same relation "
        "with as many tokens.\n"
        "CounterFact's scores in %, mean ± deviation over draws that share no edit. Covariances "
        "are those of novels and\n"
        "of the facts' sentences. Layers, searches, weights and rates were chosen on 30 to 400 "
        "other facts; FT, FT-L and\n"
        "LoRA take 25 steps, however many facts. Perplexity of held-out novels and plays before: "
        f"{about['perplexity']:.2f}.\n"
    )
    parts.append(
        f"| edits | way | draws | {' | '.join(names)} | perplexity "
        "|\n|---|---|---|---|---|---|---|---|"
    )
    for ways in found.values():
        for way, rows in ways.items():
            if rows:
                cells = [
                    _spread([100 * r[n] for r in rows if n in r] or [float("nan")], 1)
                    for n in names
                ]
                cells += [_spread([r["perplexity"] for r in rows], 2)]
                parts.append(
                    f"| {rows[0]['edits']:,} | {way} | {len(rows)} | {' | '.join(cells)} |"
                )
    parts.append(
        "\nMEMIT less another way on the same draws: score in points and perplexity, mean ± "
        "standard error, where there are\n"
        "several draws.\n\n| edits | other way | draws | score | perplexity "
        "|\n|---|---|---|---|---|"
    )
    for count, ways in found.items():
        for way, rows in ways.items():
            pairs = list(zip(ways.get("MEMIT", []), rows, strict=False))
            if way != "MEMIT" and len(pairs) > 1:

                def less(name, unit, pairs=pairs):
                    return _standard_error([unit * (m[name] - r[name]) for m, r in pairs])

                parts.append(
                    f"| {int(count):,} | {way} | {len(pairs)} | {less('score', 100)} | "
                    f"{less('perplexity', 1)} |"
                )
    return "\n".join(parts) + "\n"


def _standard_error(values: list[float]) -> str:
    return f"{statistics.mean(values):+.2f} ± {statistics.stdev(values) / len(values) ** 0.5:.2f}"


# --------------------------------------------------------------------------------------------------
# linguistic adapters

PROBES = (
    "head_offset",
    "xpos",
    "feats",
)  # columns of the treebank, of which the adapter has seen none


def linguistic(args: argparse.Namespace) -> None:
    """An adapter that learnt dependency relations, frozen in an encoder, under linear probes of
    what it has not learnt.
    """
    import encoders

    def read(part, column):
        return read_records(
            str(Path(args.data) / "ud_english_ewt" / f"en_ewt-ud-{part}.conllu.gz"),
            kind="tagging",
            columns={"tags": column},
        )

    def problem(column):
        return encoders.Problem(
            "token_classification",
            *(read(p, column) for p in ("train", "dev", "test")),
            length=64,
            rows=16,
        )

    args.encoder, names, accuracies = (
        args.model,
        ("the base alone", "with the linguistic adapter"),
        defaultdict(list),
    )
    probes = {column: problem(column) for column in PROBES}
    for seed in range(args.seeds):
        teacher = encoders.Bench(args, problem("deprel"), "pfeiffer")
        params, _ = teacher.run(seed, 1e-2)
        accuracies["deprel"].append(teacher.accuracy(params, teacher.problem.test))
        trunk = teacher.model.prefix
        informed = {trunk: freeze(params)[trunk]}
        for column, probe in probes.items():
            for name, more in zip(names, ({}, informed), strict=True):
                bench = encoders.Bench(args, probe, "head")
                bench.base = {**bench.base, **more}
                tuned, _ = bench.run(seed, 1e-2)
                accuracies[column, name].append(bench.accuracy(tuned, probe.test))
                print(
                    f"seed {seed}, {column}, {name}: {accuracies[column, name][-1]:.4f}", flush=True
                )
                jax.clear_caches()
    lines = [heading("A linguistic adapter under probes")]
    lines.append(
        "Test accuracy in % of linear heads over a frozen encoder (4 layers, 192 features, "
        "trained on novels and plays), UD\n"
        f"English EWT, {args.steps} steps of 1,024 tokens, {args.seeds} seeds. The adapter "
        "(Pfeiffer, 24) has learnt\n"
        f"dependency relations ({_spread([100 * a for a in accuracies['deprel']], 2)} of these), "
        "and is frozen too.\n"
    )
    lines.append("| probe | " + " | ".join(names) + " |\n|---|---|---|")
    for column in PROBES:
        lines.append(
            f"| {column} | "
            + " | ".join(_spread([100 * a for a in accuracies[column, n]], 2) for n in names)
            + " |"
        )
    publish("\n".join(lines) + "\n", args.out)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["facts", "edits", "linguistic"])
    parser.add_argument(
        "--data",
        required=True,
        help="folder with gutenberg/, tinyshakespeare/, pararel_trex/ and wn18rr_text/",
    )
    parser.add_argument("--datasets", nargs="*", choices=DATASETS, default=list(DATASETS))
    parser.add_argument(
        "--ways",
        nargs="*",
        choices=[*WAYS, *EDITING],
        help="by default all that there are of facts or of edits",
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--exposures", type=int, default=42, help="facts: how often each fact is said, about"
    )
    parser.add_argument(
        "--epochs", type=int, default=4, help="edits: passes over the facts in all their words"
    )
    parser.add_argument(
        "--facts", type=int, default=1500, help="edits: how many facts the model learns first"
    )
    parser.add_argument(
        "--units",
        type=int,
        help="edits: units of each feed-forward, where it is to have more than the base's",
    )
    parser.add_argument(
        "--counts", type=int, nargs="*", default=[1, 10, 100, 1000], help="edits: how many at once"
    )
    parser.add_argument(
        "--draws", type=int, default=3, help="edits: how many draws of edits at the most"
    )
    parser.add_argument(
        "--model",
        help="edits: a folder for the model that has learnt them; linguistic: the encoder's folder",
    )
    parser.add_argument(
        "--steps", type=int, default=200, help="linguistic: steps of an adapter and of a head"
    )
    parser.add_argument(
        "--found", help="a JSON file of results, from which an interrupted run goes on"
    )
    parser.add_argument("--out", help="a Markdown file for the table")
    args = parser.parse_args()
    {"facts": facts, "edits": edits, "linguistic": linguistic}[args.what](args)


if __name__ == "__main__":
    main()
