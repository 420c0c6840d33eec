"""A comparison's page stands for itself, and what it says of gains and costs is in its numbers."""

import csv
import json
import xml.etree.ElementTree as ET

import pytest

from peft_jax.reports.comparison import FILES, Comparison, Recipe, rows_of, write_comparison
from peft_jax.reports.figures import Point, front
from peft_jax.reports.measures import measures, spread_of, summary, verdict
from tests.reports.page import Page, svgs

BASE = {"metrics": {"loss": 7.0}, "bits": 32.0, "prompts": ["a <b>"], "samples": ["& before"]}
ABOUT = {
    "versions": {"jax": "1.2"},
    "python": "3.11",
    "commit": None,
    "device": "a device",
    "devices": 1,
    "cpus": 2,
}


def run(seed, layers=(), **numbers):
    numbers = {m.key: numbers.get(m.key) for m in measures("loss")}
    return {"seed": seed, "numbers": numbers, "layers": list(layers), "samples": ["<i>after</i>"]}


def recipe(name, quality, layers=(), **numbers):
    runs = [run(i, layers, quality=q, **numbers) for i, q in enumerate(quality)]
    curves = {"train": [(1, 3.0), (2, 2.0)], "validation": [(2, None)]}
    return Recipe(name, name.title(), None, None, {}, runs, curves)


def comparison():
    layer = {"weight": "q_proj", "layer": 0, "sparsity": 0.5, "bits": 4.25, "rank": 8}
    full = {"trained": 1000, "memory": 4e6, "disk": 4000, "step_seconds": 1.0}
    return Comparison(
        "a & b",
        "loss",
        "full",
        [0, 1],
        "some text",
        BASE,
        [
            recipe("full", [2.0, 2.2], **full),
            recipe("small", [2.1, 2.3], [layer], **{**full, "trained": 10, "memory": 1e6}),
            recipe("slow", [3.0, 3.1], **{**full, "step_seconds": 2.0}),
        ],
        {"model": {"path": "<x>"}},
        ABOUT,
    )


def test_the_page_is_whole_and_fetches_nothing(tmp_path):
    """Well-formed, no script, no address, all pictures, ids apart, texts escaped."""
    write_comparison(comparison(), tmp_path)
    text = (tmp_path / "report.html").read_text()
    page = Page()
    page.feed(text)
    assert page.open == []
    assert page.fetched == []
    assert page.figures == 4  # no curve without a point
    ids = [e.get("id") for svg in svgs(text) for e in ET.fromstring(svg).iter() if e.get("id")]
    assert len(ids) == len(set(ids)) > 20
    for svg in svgs(text):  # what an element refers to is in its own picture
        inside = {f"#{e.get('id')}" for e in ET.fromstring(svg).iter()}
        assert all(f"#{part.split(')')[0]}" in inside for part in svg.split("url(#")[1:])
    assert "a &amp; b" in text
    assert "&lt;i&gt;after&lt;/i&gt;" in text
    assert "50% zeros, 4.25 bits, rank 8" in text
    assert "were not searched" in text
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(FILES)


def test_gains_costs_and_none_of_either():
    full, small, slow = rows_of(comparison())
    assert not full.verdicts
    assert [v.said for v in small.gains] == [
        "100× fewer trained parameters",
        "4× less memory in a step",
    ]
    assert not small.costs  # 0.1 worse, within both spreads of 0.14
    assert not slow.gains
    assert [v.key for v in slow.costs] == ["quality", "step_seconds"]


def test_a_recipe_without_a_gain_is_said_to_have_none(tmp_path):
    write_comparison(comparison(), tmp_path)
    assert (tmp_path / "report.html").read_text().count("no advantage over Full on this task") == 1
    assert (tmp_path / "report.md").read_text().count("no advantage on this task") == 1
    report = json.loads((tmp_path / "report.json").read_text())
    assert [len(r["gains"]) for r in report["recipes"]] == [0, 2, 0]
    rows = list(csv.DictReader((tmp_path / "report.csv").open()))
    assert [row["quality"] for row in rows[:3]] == ["2.0", "2.2", "2.1"]


@pytest.mark.parametrize(
    ("key", "mine", "other", "sign"),
    [
        ("quality", [1.1, 1.3], [1.25, 1.35], 0),
        ("quality", [1.0, 1.1], [1.25, 1.35], 1),
        ("trained", [99.5], [100.0], 0),
        ("trained", [98.0], [100.0], 1),
        ("step_seconds", [0.92], [1.0], 0),
        ("step_seconds", [1.2], [1.0], -1),
        ("tokens_per_second", [120.0], [100.0], 1),
    ],
)
def test_what_counts_as_other(key, mine, other, sign):
    measure = next(m for m in measures("loss") if m.key == key)
    found = verdict(measure, summary(mine), summary(other))
    assert found is not None
    assert found.sign == sign


def test_higher_accuracy_is_better():
    measure = measures("accuracy")[0]
    found = verdict(measure, summary([0.5, 0.52]), summary([0.3, 0.32]))
    assert found is not None
    assert (found.sign, found.said) == (1, "accuracy better by 0.2")


def test_the_front_is_what_no_other_point_beats():
    points = [Point(n, x, y) for n, x, y in (("a", 1, 3), ("b", 2, 4), ("c", 2, 1), ("d", 5, 1))]
    assert [p.name for p in front(points, lower=True)] == ["a", "c"]
    assert [p.name for p in front(points, lower=False)] == ["a", "b"]


def test_a_run_without_a_number_has_no_mean():
    assert summary([1.0, None]).mean is None
    assert spread_of(summary([1.0, 3.0])) == "2.0 ± 1.4"
