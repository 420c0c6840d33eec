"""Continuing a run: what alters its trajectory is refused by name, unless it is wanted; nothing is
written before.
"""

import dataclasses
import io
import json
import sys
import typing
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from peft_jax.core.options import ConfigError
from peft_jax.recipes.config import parse_config
from peft_jax.recipes.run_config import ALTERS, LEAVES, RunConfig, settings
from peft_jax.recipes.train import run_training
from peft_jax.training.resume import changed


def fields(section, prefix=""):
    """The dotted names of all options; sections that may be absent, and lists of them, are options
    as a whole.
    """
    for field in dataclasses.fields(section):
        kind = typing.get_type_hints(section)[field.name]
        inner = dataclasses.is_dataclass(kind)
        yield from fields(kind, f"{prefix}{field.name}.") if inner else [prefix + field.name]


def test_every_option_is_classified_once():
    assert sorted((*ALTERS, *LEAVES)) == sorted(fields(RunConfig))
    assert settings(RunConfig())["optimizer.learning_rate"] == 1e-3


def test_what_is_known_of_files_may_change_with_the_options_of_their_section():
    then = {"settings": {"data.train.path": "a", "train.seed": 0}, "data": "one", "base": "x"}
    now = {"settings": {"data.train.path": "b", "train.seed": 0}, "data": "two", "base": "x"}
    assert changed(then, now) == {"data": ("one", "two"), "data.train.path": ("a", "b")}
    assert changed(then, now, ["data.train.path"]) == {}
    assert changed({"base": "x"}, now).keys() == {"settings"}


def test_unknown_names_are_refused():
    with pytest.raises(
        ConfigError,
        match=r"'optimizer.learning_rat' is no option .* Did you mean 'optimizer.learning_rate'",
    ):
        parse_config({"resume_with": ["optimizer.learning_rat"]})
    with pytest.raises(
        ConfigError, match=r"'train.log_every' is no option that alters what is trained"
    ):
        parse_config({"resume_with": ["train.log_every"]})


@pytest.fixture(scope="module")
def run(tiny_folder, tmp_path_factory):
    """A function that continues a run of two steps with changes."""
    base = {
        "output": str(tmp_path_factory.mktemp("run")),
        "model.path": str(tiny_folder),
        "method.rank": 2,
        "train.steps": 2,
        "data.train.path": "builtin:countries",
        "data.train.limit": 8,
        "data.kind": "completion",
        "data.validation": None,
        "data.sequence_length": 32,
        "train.batch_size": 8,
        "train.tensorboard": False,
        "optimizer.warmup_steps": 0,
    }

    def go(console=None, **changes):
        tree = {}
        for name, value in {
            **base,
            **{k.replace("__", "."): v for k, v in changes.items()},
        }.items():
            *sections, last = name.split(".")
            at = tree
            for section in sections:
                at = at.setdefault(section, {})
            at[last] = value
        return run_training(parse_config(tree), console)

    go.folder = Path(base["output"])
    assert go().step == 2
    return go


CHANGED = {
    "optimizer__learning_rate": (1e-2, r"optimizer.learning_rate \(0.001, now 0.01\)"),
    "optimizer__schedule": ("linear", r"optimizer.schedule \('cosine', now 'linear'\)"),
    "optimizer__weight_decay": (0.1, r"optimizer.weight_decay \(0.0, now 0.1\)"),
    "optimizer__name": ("lion", r"optimizer.name \('adamw', now 'lion'\)"),
    "model__dtype": ("bfloat16", r"model.dtype \(None, now 'bfloat16'\)"),
    "train__steps": (4, r"train.steps \(2, now 4\)"),
    "method__rank": (4, r"method \({'name': 'lora', 'rank': 2}, now {'name': 'lora', 'rank': 4}\)"),
}


@pytest.mark.parametrize("name", CHANGED)
def test_what_alters_the_trajectory_is_refused_by_name_and_nothing_is_written(run, name):
    value, message = CHANGED[name]
    before = {p: p.read_bytes() for p in run.folder.rglob("*") if p.is_file()}
    wish = name.replace("__", ".").replace("method.rank", "method")
    with pytest.raises(ValueError, match=rf"made with another {message}; .*resume_with=\[{wish}\]"):
        run(**{name: value})
    assert {p: p.read_bytes() for p in run.folder.rglob("*") if p.is_file()} == before


def test_a_new_run_that_cannot_be_keeps_the_old_ones_checkpoints(run):
    with pytest.raises(ValueError, match="matches nothing"):
        run(resume=False, method__targets=["no_such_module"])
    assert any((run.folder / "checkpoints").iterdir())


def test_another_optimizer_is_one_sentence_even_where_it_is_wanted(run):
    with pytest.raises(
        ValueError, match=r"holds another state, .* of another optimizer, method or model"
    ) as caught:
        run(optimizer__name="sgd", resume_with=["optimizer.name"])
    assert len(str(caught.value)) < 400


def test_what_is_wanted_is_taken_and_what_alters_nothing_needs_no_word(run):
    result = run(
        train__steps=4,
        optimizer__learning_rate=1e-2,
        optimizer__clip_norm=0.0,
        train__log_every=1,
        generate__seed=3,
        resume_with=["train.steps", "optimizer.learning_rate", "optimizer.clip_norm"],
    )
    assert result.step == 4
    assert (
        yaml.safe_load((run.folder / "config.yaml").read_text())["optimizer"]["learning_rate"]
        == 1e-2
    )
    assert json.loads((run.folder / "results.json").read_text())["steps"] == 4


def test_skipped_steps_are_said_in_the_last_line_and_in_the_results(run, monkeypatch):
    console, module = Console(file=io.StringIO(), width=200), sys.modules["peft_jax.training.stage"]
    trained = module.train
    monkeypatch.setattr(module, "train", lambda *a, **k: trained(*a, **k)._replace(skipped=1))
    result = run(
        console, resume_with=["train.steps", "optimizer.learning_rate", "optimizer.clip_norm"]
    )
    last = console.file.getvalue().strip().splitlines()[-1]
    assert last.startswith("written: ")
    assert last.endswith(f"1 of {result.step} steps skipped, whose gradient was not finite")
    assert json.loads((run.folder / "results.json").read_text())["skipped_steps"] == 1
