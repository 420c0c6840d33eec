"""The README's example and the notebooks are run, and the README's commands are what they are said
to be.
"""

import json
import re
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


@pytest.mark.parametrize(
    ("name", "said", "written"),
    [
        ("lora_and_full", "full fine-tuning", "adapter/adapter_model.safetensors"),
        pytest.param("six_techniques", "restored: True", None, marks=pytest.mark.slow),
    ],
)
def test_notebooks_run(name, said, written, tmp_path, monkeypatch, capsys):
    cells = json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    code = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")
    for long, short in (("STEPS = 60", "STEPS = 2"), ("LENGTH = 256", "LENGTH = 32")):
        assert long in code
        code = code.replace(long, short)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, f"{name}.ipynb", "exec"), {})
    assert said in capsys.readouterr().out
    assert written is None or (tmp_path / written).is_file()
