"""Chains of stages: killed anywhere and continued, a run comes to the same end bit for bit; another
option of a finished stage is refused by name.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import peft_jax
from peft_jax.core import places
from peft_jax.core.options import ConfigError
from peft_jax.low_rank import LoRA
from peft_jax.pruning import sparsity_of
from peft_jax.pruning.masked import Masked
from peft_jax.quantization.quantized import Quantized
from peft_jax.recipes import chain
from peft_jax.recipes.config import parse_config
from peft_jax.recipes.evaluate import run_evaluation
from peft_jax.recipes.train import run_training
from peft_jax.training import loop

ROOT = Path(__file__).parents[2]
LABELS = ("1-prune", "2-train", "3-merge", "4-quantize", "5-train")


class KilledError(BaseException):
    """Stands for the end of the process."""


def configuration(folder, tiny_folder, **changes):
    """prune 2:4 -> LoRA with masks -> merge -> GPTQ int4 -> QLoRA from a teacher, in small."""
    teachers = [{"path": str(tiny_folder)}]
    last = {
        "name": "train",
        "method": {"name": "lora", "rank": 3},
        "optimizer": {"name": "sgd", "warmup_steps": 0},
        "train": {"steps": 2, "mask_updates": False},
        "distill": {"teachers": teachers},
    }
    records = {"path": "builtin:countries", "limit": 16}
    tree = {
        "output": str(folder),
        "model": {"path": str(tiny_folder)},
        "stages": ["prune", "train", "merge", "quantize", last],
        "prune": {"pattern": "2:4", "calibration_batches": 1},
        "method": {"name": "lora", "rank": 2},
        "quantize": {
            "format": "int4",
            "options": {"block_size": 16},
            "rounding": "gptq",
            "calibration_batches": 1,
        },
        "data": {
            "kind": "completion",
            "sequence_length": 32,
            "train": records,
            "validation": {**records, "limit": 8},
        },
        "optimizer": {"warmup_steps": 0},
        "train": {
            "steps": 3,
            "batch_size": 8,
            "log_every": 1,
            "checkpoint_every": 1,
            "tensorboard": False,
        },
        "evaluate": {"metrics": ["perplexity"]},
    }
    return parse_config({**tree, **changes})


def results(folder):
    """name -> bytes of what a run leaves, but for its own path, times, what it ran on, and
    checkpoints.
    """
    found, apart = {}, ("config.yaml", "report.html", "about.json")
    for path in sorted(p for p in Path(folder).rglob("*") if p.is_file()):
        name = path.relative_to(folder)
        if {"checkpoints", "best", "tensorboard"} & set(name.parts) or name.name in apart:
            continue
        data = path.read_bytes().replace(str(folder).encode(), b"")
        if name.name == "metrics.jsonl":
            data = [without_times(json.loads(line)) for line in data.decode().splitlines()]
        found[str(name)] = data
    return found


def without_times(row):
    times = ("time", "tokens_per_second", "memory_bytes", "mfu")
    return {k: v for k, v in row.items() if k not in times}


@pytest.fixture(scope="module")
def whole(tiny_folder, tmp_path_factory):
    """The folder of a chain that ran without interruption."""
    folder = tmp_path_factory.mktemp("whole")
    run_training(configuration(folder, tiny_folder))
    return folder


def test_a_chain_is_what_its_stages_are(whole):
    """2:4 zeros from the first stage to the last, int4 from the fourth on; an adapter over it."""
    told = json.loads((whole / "results.json").read_text())
    assert tuple(told["stages"]) == ("0-base", *LABELS)
    assert told["after"] == told["stages"]["5-train"]["metrics"] != told["before"]
    assert told["stages"]["2-train"]["steps"] == 3
    assert told["stages"]["5-train"]["steps"] == 2
    merged, trained = (told["stages"][n]["metrics"]["loss"] for n in ("3-merge", "2-train"))
    assert abs(merged - trained) < 1e-5
    model, base = peft_jax.load(whole / "base")
    shares = sparsity_of(base)
    assert all(abs(s.mean() - 0.5) < 0.02 for s in shares.values())
    kernels = [w for p, w in places(base).items() if "_proj/kernel" in p]
    assert all(isinstance(w, Quantized) and w.format.bits == 4 for w in kernels)
    adapted = peft_jax.load_adapter(base, whole / "adapter")
    loras = [w for w in places(adapted).values() if isinstance(w, LoRA)]
    assert len(loras) == len(kernels)
    assert {w.a.shape[-1] for w in loras} == {3}
    assert model.config.num_layers == 3


def killing(monkeypatch):
    """Kill the run after each stage's result is written, before those that took longest are, and
    in the middle of the first training; stop the second one by a signal. Returns the set of what
    is still to come.
    """
    pending = {f"after {label}" for label in LABELS}
    pending |= {"before 2-train", "before 4-quantize", "before 5-train"}
    pending |= {"within 2-train", "signal 5-train"}
    signals = []

    def kill(what):
        if what in pending:
            pending.remove(what)
            raise KilledError(what)

    write, advance = chain.write_state, loop._Run.advance

    def writing(folder, state, identity):
        kill(f"before {folder.parent.name}")
        write(folder, state, identity)
        kill(f"after {folder.parent.name}")

    def advancing(run, state, number):
        if number == 1:
            kill(f"within {run.folder.name}")
            if (what := f"signal {run.folder.name}") in pending:
                pending.remove(what)
                signals.append(what)
        return advance(run, state, number)

    @contextlib.contextmanager
    def stop_signal():
        signals.clear()
        yield lambda: bool(signals)

    monkeypatch.setattr(chain, "write_state", writing)
    monkeypatch.setattr(loop._Run, "advance", advancing)
    monkeypatch.setattr(loop, "_stop_signal", stop_signal)
    return pending


def test_killed_at_each_stage_and_within_it_comes_to_the_same_end(
    whole, tiny_folder, tmp_path, monkeypatch
):
    pending, starts = killing(monkeypatch), 0
    while starts < 20:
        starts += 1
        try:
            if not run_training(configuration(tmp_path, tiny_folder)).interrupted:
                break
        except KilledError:
            continue
    assert not pending
    assert starts == 11  # each kill is one more start
    found, wanted = results(tmp_path), results(whole)
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if found[name] != wanted[name]] == []


def test_what_was_kept_is_used(whole, tiny_folder, monkeypatch):
    """A finished chain runs no stage again; evaluate takes what the last one left."""
    monkeypatch.setattr(chain.Chain, "run", lambda *_: pytest.fail("a stage ran again"))
    before = results(whole)
    run_training(configuration(whole, tiny_folder))
    assert results(whole) == before
    loss = run_evaluation(configuration(whole, tiny_folder))["loss"]
    assert loss == json.loads((whole / "results.json").read_text())["after"]["loss"]


CHANGES = {
    "an option": (
        {"prune": {"pattern": "1:4", "calibration_batches": 1}},
        r"1-prune was made with another prune.pattern \('2:4', now '1:4'\); set it back, or "
        r"resume_with=\[prune.pattern\]",
    ),
    "an optimizer": (
        {"optimizer": {"warmup_steps": 0, "learning_rate": 0.5}},
        r"2-train was made with another optimizer.learning_rate \(0.001, now 0.5\)",
    ),
    "the order": (
        {"stages": ["train", "merge"]},
        r"holds the stage 1-prune, and stages.0 is train now",
    ),
    "the data": (
        {"data": {"kind": "completion", "sequence_length": 24}},
        r"1-prune was made with another .*data.sequence_length \(32, now 24\)",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_another_option_of_a_finished_stage_is_refused_by_name(whole, tiny_folder, name):
    changes, message = CHANGES[name]
    before = results(whole)
    with pytest.raises(ValueError, match=message):
        run_training(configuration(whole, tiny_folder, **changes))
    assert results(whole) == before


def test_a_finished_stage_after_one_that_is_not_is_refused(whole, tiny_folder, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "stages" / "3-merge" / "state")
    with pytest.raises(ValueError, match="4-quantize is finished, and the stage 3-merge before"):
        run_training(configuration(tmp_path / "run", tiny_folder))
    config = configuration(tmp_path / "none", tiny_folder)
    with pytest.raises(ConfigError, match=r"the stage 5-train in .* is not finished"):
        run_evaluation(config)


def command(folder, *options):
    """`peft-jax train configs/chain.yaml` in small, as a process."""
    small = [
        "train.steps=4",
        "stages.4.train.steps=4",
        "train.log_every=1",
        "train.checkpoint_every=1",
        "train.batch_size=4",
        "train.tensorboard=false",
        "data.sequence_length=32",
        "data.train.limit=64",
        "data.validation.limit=8",
        "data.test.limit=8",
        "prune.calibration_batches=1",
        "quantize.calibration_batches=1",
        "generate.max_tokens=4",
    ]
    arguments = ["-m", "peft_jax", "train", "configs/chain.yaml", f"output={folder}", *small]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    return subprocess.Popen(
        [sys.executable, *arguments, *options],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process):
    output, _ = process.communicate(timeout=1200)
    assert process.returncode == 0, output
    return output


@pytest.mark.slow
def test_the_embedded_base_killed_at_each_stage_by_sigkill(tmp_path):
    """The shipped chain on the embedded base: killed as soon as each stage's result, and each
    training's second checkpoint, is there.
    """
    finish(command(tmp_path / "whole"))
    folder = tmp_path / "killed"
    marks = [folder / "stages" / label / "state" for label in LABELS]
    for number in (1, 4):
        marks.append(folder / "stages" / LABELS[number] / "checkpoints" / "2")
    for mark in sorted(marks, key=lambda p: (p.parts[len(folder.parts) + 1], p.name != "2")):
        process = command(folder)
        while not mark.is_dir():
            assert process.poll() is None, process.stdout.read()
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (folder / "results.json").exists()
    finish(command(folder))
    found, wanted = results(folder), results(tmp_path / "whole")
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if found[name] != wanted[name]] == []
    nodes = places(peft_jax.load(folder / "base")[1]).values()
    assert not any(isinstance(w, Masked) for w in nodes)
