"""The README's example and the notebook are run, and the README's commands are what they are said to be."""

import json
import re
from pathlib import Path

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


def test_the_notebook_runs(tmp_path, monkeypatch, capsys):
    cells = json.loads((ROOT / "notebooks" / "lora_and_full.ipynb").read_text(encoding="utf-8"))["cells"]
    code = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code").replace("STEPS = 60", "STEPS = 2")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "lora_and_full.ipynb", "exec"), {})
    out = capsys.readouterr().out
    assert "full fine-tuning" in out
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
