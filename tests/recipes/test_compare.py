"""Comparisons: killed anywhere and continued, the report is the uninterrupted one's; its numbers
are those of the runs; recipes that cannot be are refused by name.
"""

import csv
import json
import math
import statistics
import subprocess
from pathlib import Path

import jax
import pytest

import peft_jax
from peft_jax.core import places
from peft_jax.core.options import ConfigError
from peft_jax.recipes import compare, spread
from peft_jax.recipes.config import load_config, parse_config
from peft_jax.recipes.contestants import check_comparison, contestant
from peft_jax.recipes.train import run_training
from peft_jax.training import loop
from tests.reports.page import svgs

ROOT = Path(__file__).parents[2]
TECHNIQUES = (
    "adapter modules",
    "knowledge distillation",
    "knowledge injection",
    "low-rank factorization",
    "pruning",
    "quantization",
)
TIMED = ("step_seconds", "train_seconds", "tokens_per_second")
LORA = {"name": "lora", "rank": 2}


class KilledError(BaseException):
    """Stands for the end of the process."""


def configuration(folder, tiny_folder, **changes):
    """Full fine-tuning, and a pruned student of it that learns through LoRA, in small."""
    records = {"path": "builtin:countries", "limit": 16}
    student = [
        {"name": "prune", "prune": {"pattern": "2:4", "score": "magnitude"}},
        {"name": "train", "distill": {"teachers": [{"path": "{full}/model"}]}},
    ]
    recipes = {
        "full": {"run": {"method": {"name": "full"}, "optimizer": {"learning_rate": 1e-2}}},
        "lora": {
            "title": "a student",
            "run": {"method": LORA, "stages": student},
        },
    }
    own = {"seeds": [0, 1], "own_texts": 4, "own_tokens": 24}
    measured = {"generate_rows": 4, "generate_tokens": 24}
    tree = {
        "output": str(folder),
        "model": {"path": str(tiny_folder)},
        "data": {
            "kind": "completion",
            "sequence_length": 32,
            "train": records,
            "validation": {**records, "split": "validation", "limit": 8},
            "test": {**records, "split": "test", "limit": 8},
        },
        "optimizer": {"warmup_steps": 0},
        "train": {
            "steps": 2,
            "batch_size": 8,
            "log_every": 1,
            "checkpoint_every": 1,
            "tensorboard": False,
        },
        "compare": {"recipes": recipes, **own, **measured},
    }
    return parse_config({**tree, **changes})


def untimed(value, folder):
    """A report without times and its own path."""
    if isinstance(value, dict):
        times = (*TIMED, "beside_reference", "gains", "costs", "about")
        return {k: untimed(v, folder) for k, v in value.items() if k not in times}
    if isinstance(value, list):
        return [untimed(v, folder) for v in value]
    return value.replace(str(folder), "") if isinstance(value, str) else value


def report_of(folder):
    return json.loads((folder / "report.json").read_text())


@pytest.fixture(scope="module")
def whole(tiny_folder, tmp_path_factory):
    """The folder of a comparison that ran without interruption."""
    folder = tmp_path_factory.mktemp("whole")
    assert compare.run_comparison(configuration(folder, tiny_folder)) == folder / "report.html"
    return folder


def test_the_numbers_are_those_of_the_runs(whole, tiny_folder):
    report = report_of(whole)
    assert [r["name"] for r in report["recipes"]] == ["full", "lora"]
    assert not report["rates_searched"]
    for recipe in report["recipes"]:
        qualities = [run["metrics"]["loss"] for run in recipe["runs"]]
        assert [run["seed"] for run in recipe["runs"]] == [0, 1]
        assert recipe["numbers"]["quality"]["mean"] == statistics.fmean(qualities)
        assert recipe["numbers"]["quality"]["spread"] == statistics.stdev(qualities)
        for run in recipe["runs"]:
            lost = run["other_loss"] - report["base"]["other_loss"]
            assert run["numbers"]["forgetting"] == lost
    full, lora = (r["runs"][0]["numbers"] for r in report["recipes"])
    _, params = peft_jax.load(tiny_folder)
    everything = sum(x.size for x in jax.tree.leaves(params))
    assert full["trained"] == full["kept"] == report["base"]["parameters"] == everything
    tree = peft_jax.lora(params, jax.random.key(0), rank=2)
    assert lora["trained"] == peft_jax.core.count(tree)[0]
    kernels = sum(w.size for p, w in places(params).items() if "_proj/kernel" in p)
    assert lora["kept"] == everything - kernels // 2  # merged
    assert full["device"] == 4 * everything
    scales, masks = 4 * 3 * 7, kernels // 8  # one of LoRA for each weight, a bit for each entry
    assert lora["device"] == 4 * (everything + lora["trained"]) + scales + masks
    layers = report["recipes"][1]["runs"][0]["layers"]
    assert {x["rank"] for x in layers} == {2}
    assert all(abs(x["sparsity"] - 0.5) < 0.05 for x in layers)
    assert len(layers) == 3 * 7


def test_a_run_is_what_train_makes_of_it(whole, tiny_folder, tmp_path):
    run = contestant(configuration(tmp_path, tiny_folder), "full", 1, None, {})
    run_training(run.config)
    alone = json.loads((run.folder / "results.json").read_text())
    there = json.loads((whole / run.folder.relative_to(tmp_path) / "results.json").read_text())
    assert alone["after"] == there["after"]
    assert not list(whole.glob("runs/**/checkpoints"))


def test_the_files_say_the_same(whole):
    report, text = report_of(whole), (whole / "report.html").read_text()
    for recipe in report["recipes"]:
        assert all(said in text for said in recipe["gains"])
    trained = report["recipes"][1]["numbers"]["trained"]["mean"]
    assert f"<td>{trained:,.0f}</td>" in text
    assert f"| {trained:,.0f} |" in (whole / "report.md").read_text()
    table = list(csv.DictReader((whole / "report.csv").open()))
    assert [row["seed"] for row in table] == ["0", "1", "mean"] * 2
    assert float(table[5]["trained"]) == trained


def killing(monkeypatch):
    """Kill before the first record, after each, before the report, and within a run. Returns what
    is still to come.
    """
    pending = {"base", "within", "after-full", "before-lora", "after-lora", "report"}

    def kill(what):
        if what in pending:
            pending.remove(what)
            raise KilledError(what)

    record, remove = compare._record, compare.remove_states
    advance, write = loop._Run.advance, compare.write_comparison

    def recording(config, run, *rest):
        kill(f"before-{run.recipe}")
        return record(config, run, *rest)

    def removing(folder, names):
        kill(f"after-{folder.parent.name}")
        remove(folder, names)

    def advancing(run, state, number):
        if number == 1:
            kill("within")
        return advance(run, state, number)

    def writing(*arguments):
        kill("report")
        write(*arguments)

    def measuring(*arguments, measure=compare.measure):
        kill("base")
        return measure(*arguments)

    monkeypatch.setattr(compare, "_record", recording)
    monkeypatch.setattr(compare, "remove_states", removing)
    monkeypatch.setattr(compare, "write_comparison", writing)
    monkeypatch.setattr(compare, "measure", measuring)
    monkeypatch.setattr(loop._Run, "advance", advancing)
    return pending


def test_killed_anywhere_it_comes_to_the_same_report(whole, tiny_folder, tmp_path, monkeypatch):
    pending, starts = killing(monkeypatch), 0
    while starts < 12:
        starts += 1
        try:
            compare.run_comparison(configuration(tmp_path, tiny_folder))
            break
        except KilledError:
            assert not (tmp_path / "report.json").exists()
    assert not pending
    assert starts == 7
    found, wanted = untimed(report_of(tmp_path), tmp_path), untimed(report_of(whole), whole)
    assert found == wanted
    ours, theirs = (svgs((f / "report.html").read_text()) for f in (tmp_path, whole))
    assert len(ours) == 5
    assert ours == theirs


def test_the_rate_of_the_lowest_loss_is_kept(tiny_folder, tmp_path, monkeypatch):
    """Tried on the first seed; other seeds, and what builds on the recipe, have the best one."""
    full = {"rates": [0.1, 0.3, 0.2]}
    taught = {"run": {"model": {"adapter": "{full}/adapter"}}, "rates": [1.0, 2.0, 3.0]}
    losses = {0.1: [3.0, None], 0.3: [2.0, 4.0], 0.2: [2.5, 2.5], 1.0: [9.0], 2.0: [], 3.0: [8.0]}
    done = []

    def pretend(config, run, *_, **__):
        done.append((run.recipe, run.seed, run.rate, run.config.model.adapter))
        run.folder.mkdir(parents=True)
        rows = [
            {"kind": "validation", "step": i, "loss": x} for i, x in enumerate(losses[run.rate])
        ]
        (run.folder / "metrics.jsonl").write_text("".join(f"{json.dumps(r)}\n" for r in rows))

    monkeypatch.setattr(compare, "_do", pretend)
    monkeypatch.setattr(compare, "_base", lambda *_: {"metrics": {"loss": 1.0}})
    monkeypatch.setattr(compare, "_comparison", lambda *_: None)
    monkeypatch.setattr(compare, "write_comparison", lambda *_: None)
    tree = {"recipes": {"full": full, "taught": taught}, "seeds": [5, 6]}
    compare.run_comparison(configuration(tmp_path, tiny_folder, compare=tree))
    assert [run[:3] for run in done] == [
        *(("full", 5, rate) for rate in (0.1, 0.3, 0.2)),
        ("full", 6, 0.3),
        *(("taught", 5, rate) for rate in (1.0, 2.0, 3.0)),
        ("taught", 6, 3.0),
    ]
    assert done[-1][3].endswith("runs/full/seed-6-rate-0.3/adapter")
    tree |= {"quality": "exact_match"}
    with pytest.raises(ConfigError, match="'exact_match' is not measured; there are loss"):
        compare.run_comparison(configuration(tmp_path, tiny_folder, compare=tree))


def test_a_finished_comparison_runs_nothing(whole, tiny_folder, monkeypatch):
    monkeypatch.setattr(compare, "run_training", lambda *_: pytest.fail("a run ran again"))
    before = report_of(whole)
    compare.run_comparison(configuration(whole, tiny_folder))
    assert report_of(whole) == before


def test_records_of_other_options_are_refused(whole, tiny_folder):
    changes = {"train": {"steps": 3, "batch_size": 8, "log_every": 1, "tensorboard": False}}
    with pytest.raises(ValueError, match=r"full/seed-0 was made with another train.steps"):
        compare.run_comparison(configuration(whole, tiny_folder, **changes))
    changes = {"evaluate": {"metrics": ["perplexity"], "limit": 3}}
    with pytest.raises(ValueError, match=r"base.json was made with another evaluate \("):
        compare.run_comparison(configuration(whole, tiny_folder, **changes))


def test_only_asked_recipes_run(tiny_folder, tmp_path, monkeypatch):
    """Others' records are used. Where they are missing, the report waits, and so does a recipe that
    builds on them.
    """
    done = []

    def pretend(config, run, *_, asked):
        if run.recipe == "there":
            return
        if not asked:
            raise compare.MissingError(run.recipe)
        done.append(run.recipe)

    monkeypatch.setattr(compare, "_do", pretend)
    monkeypatch.setattr(compare, "_base", lambda *_: {"metrics": {"loss": 1.0}})
    monkeypatch.setattr(compare, "write_comparison", lambda *_: pytest.fail("it is not whole"))

    def over(name):
        return {"run": {"model": {"adapter": f"{{{name}}}/adapter"}}}

    recipes = {"there": {}, "full": {}, "a": over("there"), "b": over("full")}
    tree = {"recipes": recipes, "only": ["a", "b"], "seeds": [0]}
    config = configuration(tmp_path, tiny_folder, compare=tree)
    assert compare.run_comparison(config) is None
    assert done == ["a"]


REFUSED = {
    "no recipes": ({"recipes": {}}, "compare needs compare.recipes"),
    "a reference": ({"reference": "ful"}, "'ful' is no recipe. Did you mean 'full'"),
    "tries": (
        {"recipes": {"full": {"rates": [0.1]}, "b": {"rates": [0.1, 0.2]}}},
        r"different numbers of learning rates to try \(full 1, b 2\)",
    ),
    "a section": (
        {"recipes": {"full": {"run": {"metod": {}}}}},
        r"compare.recipes.full.run: unknown option 'metod'. Did you mean 'method'",
    ),
    "an order": (
        {"recipes": {"full": {"run": {"model": {"adapter": "{later}/a"}}}, "later": {}}},
        "names the recipe later, which does not come before it",
    ),
    "seeds": ({"seeds": [1, 1]}, "each of them once"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused_before_anything_runs(name, tiny_folder, tmp_path):
    changes, message = REFUSED[name]
    base = {"recipes": {"full": {}}, **changes}
    with pytest.raises(ConfigError, match=message):
        compare.run_comparison(configuration(tmp_path / "none", tiny_folder, compare=base))
    assert not (tmp_path / "none").exists()


def test_forgetting_is_the_loss_on_the_bases_own_texts(whole, tiny_folder):
    """By the formula, in NumPy's terms: -log p of each next token, averaged."""
    texts = [json.loads(line)["text"] for line in (whole / "own_texts.jsonl").open()]
    assert len(texts) == 4
    model, params = peft_jax.load(tiny_folder)
    tokenizer = peft_jax.load_tokenizer(tiny_folder)
    apply, total, weight = peft_jax.bind(model), 0.0, 0
    for text in texts:
        ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        for start in range(0, len(ids) - 1, 32):  # cut into rows as texts are packed
            part = ids[start : start + 33]
            logits = jax.nn.log_softmax(apply(params, jax.numpy.asarray([part[:-1]])), -1)
            total -= float(sum(logits[0, i, t] for i, t in enumerate(part[1:])))
            weight += len(part) - 1
    assert math.isclose(total / weight, report_of(whole)["base"]["other_loss"], rel_tol=0.02)


def test_a_recipe_begins_when_what_it_builds_on_is_done(tiny_folder, tmp_path, monkeypatch):
    """A process each, on the device that is free; one that fails is told by name."""
    tree = {"devices": 2, "recipes": {"full": {}, "other": {}, "student": {}, "late": {}}}
    tree["recipes"]["student"] = {"run": {"model": {"adapter": "{full}/adapter"}}}
    tree["recipes"]["late"] = {"run": {"model": {"adapter": "{other}/adapter"}}}
    calls = []

    def process(command, env, **_):
        name = command[-3].removeprefix("compare.only=[")[:-1]
        calls.append((name, env["CUDA_VISIBLE_DEVICES"]))
        return subprocess.CompletedProcess(command, int(name == "other"))

    monkeypatch.setattr(spread.subprocess, "run", process)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    config = configuration(tmp_path, tiny_folder, compare=tree)
    said = []
    with pytest.raises(ConfigError, match=r"the recipes other failed; .*other.log say why"):
        spread.run_on_devices(config, said.append)
    assert {name for name, _ in calls} == {"full", "other", "student"}
    assert [name for name, _ in calls].index("student") > [n for n, _ in calls].index("full")
    assert {device for _, device in calls} <= {"4", "6"}
    assert sorted(said) == ["full: done", "other: failed", "student: done"]


def test_the_shipped_comparisons_are_what_they_say():
    """Three seeds of full fine-tuning, the six techniques and two chains; the hub's has the same
    recipes.
    """
    names = ("quickstart", "hub")
    quick, hub = (load_config(str(ROOT / f"configs/compare/{name}.yaml")) for name in names)
    for config in (quick, hub):
        check_comparison(config)
        assert len(config.compare.seeds) == 3
        of = [r.technique for r in config.compare.recipes.values()]
        assert set(of) == {"full fine-tuning", *TECHNIQUES, "chain"}
        assert of.count("chain") == 2
    assert list(quick.compare.recipes) == list(hub.compare.recipes)
