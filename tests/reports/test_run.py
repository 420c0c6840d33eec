"""The page of a run, and of several beside each other, from files alone."""

import json
import xml.etree.ElementTree as ET

import pytest

from peft_jax.recipes.report import run_report
from peft_jax.reports.folder import numbers
from peft_jax.reports.run import write_run
from tests.reports.page import Page, svgs

CONFIG = "model: {path: <tiny>}\ngenerate:\n  prompts: ['a <b>']\n"


def train_row(step, loss, speed=100.0):
    return {"kind": "train", "step": step, "loss": loss, "tokens_per_second": speed}


def write_metrics(folder, *rows):
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(text + '{"kind": "tra')  # cut, as of a killed run


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "one"
    write_metrics(
        folder,
        train_row(1, 3.0, 50.0),
        train_row(2, 2.0, 200.0),
        train_row(3, 1.5, 100.0),
        {"kind": "validation", "step": 3, "loss": 1.75},
    )
    samples = {"before": ["& then"], "after": ["now"]}
    told = {"before": {"loss": 4.25}, "after": {"loss": 1.875}, "samples": samples}
    write_json(folder / "results.json", {**told, "trained_parameters": 1234, "steps": 3})
    write_json(folder / "step.json", {"tokens": 400, "flops": 8e6, "memory_bytes": 5000})
    weights = {"layers/0/up_proj/kernel": {"sparsity": 0.5, "error": 0.1}}
    write_json(folder / "pruning.json", {"weights": weights, "before": {"loss": 4.0}})
    (folder / "config.yaml").write_text(CONFIG)
    return folder


@pytest.fixture
def chain(tmp_path):
    folder = tmp_path / "two"
    write_metrics(folder / "stages/2-train", train_row(1, 3.0), train_row(2, 2.0))
    write_metrics(folder / "stages/10-train", train_row(1, 1.0))
    for name, memory in (("2-train", 100), ("10-train", 300)):
        step = {"tokens": 200, "flops": 1.0, "memory_bytes": memory}
        write_json(folder / "stages" / name / "step.json", step)
    stages = {"2-train": {"metrics": {"loss": 2.5}, "trained_parameters": 7}}
    told = {"before": {"loss": 3.0}, "after": {"loss": 2.5}, "samples": {}, "stages": stages}
    write_json(folder / "results.json", told)
    return folder


def parsed(path):
    page, text = Page(), path.read_text()
    page.feed(text)
    assert page.open == []
    assert page.fetched == []
    for svg in svgs(text):
        ET.fromstring(svg)
    return page, text


def test_a_run_leaves_its_page(run):
    page, text = parsed(write_run(run))
    assert page.figures == 2
    for said in (
        "4.25",
        "1.875",
        "1,234",
        "a &lt;b&gt;",
        "&amp; then",
        "50% zeros",
        "&lt;tiny&gt;",
    ):
        assert said in text
    assert json.loads((run / "about.json").read_text())["versions"]["jax"]


def test_numbers_are_those_of_the_files(run, chain):
    """The median speed, and of a chain's trainings the largest step and all the time."""
    found = numbers(run)
    assert (found["step_seconds"], found["train_seconds"]) == (4.0, 12.0)
    assert (found["memory"], found["flops"], found["trained"]) == (5000, 8e6, 1234)
    found = numbers(chain)
    assert (found["memory"], found["train_seconds"], found["trained"]) == (300, 6.0, 7)


def test_several_stand_beside_each_other(run, chain, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_report(["one", "two"], None).resolve() == tmp_path / "report.html"
    _, text = parsed(tmp_path / "report.html")
    for said in ("<th>one: before</th>", "<th>two: 2-train</th>", "one loss", "two loss"):
        assert said in text
    assert run_report(["two"], None).name == "report.html"
    assert (chain / "report.html").is_file()
    assert run_report(["one"], "there.html").name == "there.html"


def test_runs_of_one_name_are_told_apart(run, tmp_path):
    other = tmp_path / "other" / "one"
    write_json(other / "evaluation.json", {"after": {"loss": 9.5}})
    _, text = parsed(run_report([str(run), str(other)], str(tmp_path / "both.html")))
    assert "<th>other/one: after</th>" in text
    with pytest.raises(ValueError, match="named twice"):
        run_report([str(run), str(run)], None)


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no run: there is none"):
        run_report([str(tmp_path)], None)
    with pytest.raises(FileNotFoundError, match="nothing is no folder of a run"):
        run_report([str(tmp_path / "nothing")], None)
