"""The README's example is run, its commands are what they are said to be, and its figures are those
of the result files.
"""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_example_runs(tmp_path, monkeypatch, capsys):
    (example,) = re.findall(r"```python\n(.*?)```", README, re.S)
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "README.md", "exec"), {})
    assert (tmp_path / "my-adapter" / "adapter_config.json").is_file()
    assert (tmp_path / "my-model" / "model.safetensors").is_file()
    assert capsys.readouterr().out.startswith("[")


def test_the_first_two_shell_blocks_are_quickstart_and_tests():
    first, second, *_ = re.findall(r"```sh\n(.*?)```", README, re.S)
    assert "peft-jax train configs/quickstart.yaml" in first
    assert "pytest" in second


def figures():
    sys.path.insert(0, str(ROOT / "scripts"))
    return importlib.import_module("readme_figures")


def test_figures_are_those_of_the_result_files():
    script = [sys.executable, str(ROOT / "scripts" / "readme_figures.py"), "--check"]
    run = subprocess.run(script, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_a_figure_that_is_not_the_files_is_made_so(monkeypatch, tmp_path):
    """The number of a link is that of its cell; a cell that is not there is told by name."""
    script = figures()
    monkeypatch.setattr(script, "ROOT", tmp_path)
    home = tmp_path / "benchmarks/results"
    home.mkdir(parents=True)
    table = "# t\n\n| way | time, s |\n|---|---|\n| ours | **1.25**, 1.3 |\n"
    (home / "a.md").write_text(f"{table}\n| way | bytes |\n|---|---|\n| ours | 7,000 kB |\n")
    link = '[{}](benchmarks/results/a.md "ours: {}")'
    text = "x " + link.format("9", "time, s") + ", " + link.format("?", "bytes")
    wanted = "x " + link.format("1.25", "time, s") + ", " + link.format("7,000", "bytes")
    assert script.current(text) == wanted
    (home / "a.md").write_text("| a | b | t |\n|---|---|---|\n| 4 | x | 1 |\n| 4 | y | 2 |\n")
    assert script.cell(home / "a.md", "4 & y", "t") == "2"
    with pytest.raises(ValueError, match=r"a\.md has no number in the row 'ours', column 'time'"):
        script.current(link.format("1", "time"))


def test_techniques_are_told_with_what_the_comparison_found(monkeypatch, tmp_path):
    script = figures()
    gains = ["3x faster steps", "2x less memory in a step", "4x fewer trained parameters"]
    recipe = {"name": "lora", "technique": "low-rank factorization", "gains": gains}
    recipe["costs"] = ["accuracy worse by 0.1"]
    other = {"name": "qlora", "technique": "quantization", "gains": [], "costs": []}
    (tmp_path / "c.json").write_text(json.dumps({"recipes": [recipe, other]}))
    monkeypatch.setattr(script, "COMPARISON", tmp_path / "c.json")
    text = script.current("<!-- figures: techniques -->\nold\n<!-- end -->")
    told = "4x fewer trained parameters; 2x less memory in a step | accuracy worse by 0.1 |"
    assert f"`peft_jax.lora(params, key, rank=8)` | {told}" in text
    assert "| no advantage on this task | none |" in text
    assert "old" not in text
