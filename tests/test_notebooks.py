"""Notebooks are what their sources make of them; one is executed, another one for each commit."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))
make_notebooks = pytest.importorskip("make_notebooks")

SOURCES = make_notebooks.sources()


def turn():
    """The number of commits says whose turn it is."""
    run = subprocess.run(
        ["git", "rev-list", "--count", "HEAD"], capture_output=True, text=True, cwd=ROOT
    )
    return int(run.stdout or 0) % len(SOURCES)


def test_there_are_ten():
    assert [s.stem[:2] for s in SOURCES] == [f"{i:02}" for i in range(1, 11)]
    there = sorted(p.stem for p in (ROOT / "notebooks").glob("*.ipynb"))
    assert there == [s.stem for s in SOURCES]


@pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.stem)
def test_a_notebook_is_current_executed_and_drawn(source):
    assert make_notebooks.problems(source) == []


@pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.stem)
def test_a_notebook_has_its_parts(source):
    """A formula, an assertion of its advantage, when to use it, where to read on, and a first cell
    that installs the package where it is absent.
    """
    cells = make_notebooks.cells_of(source.read_text())
    prose = "\n".join(text for kind, text in cells if kind == "markdown")
    code = [text for kind, text in cells if kind == "code"]
    assert "pip" in code[0]
    assert 'find_spec("peft_jax")' in code[0]
    assert "$$" in prose or source.stem.startswith("08")
    assert "\n## When to use" in prose
    assert "Read on:" in prose
    assert any(line.startswith("assert ") for line in "\n".join(code).splitlines())


def test_a_changed_source_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(make_notebooks, "NOTEBOOKS", ROOT / "notebooks")
    source = SOURCES[0]
    changed = tmp_path / source.name
    changed.write_text(source.read_text() + "\n# %%\nprint(1)\n")
    assert f"{source.stem}.ipynb has other cells" in make_notebooks.problems(changed)


def test_the_notebook_whose_turn_it_is_runs(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")  # one device, as a reader has
    notebook = make_notebooks.notebook_of(SOURCES[turn()].read_text())
    done = make_notebooks.executed(notebook)
    assert all(c.execution_count for c in done.cells if c.cell_type == "code")
