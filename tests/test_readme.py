"""The README's example is run, and its commands are what they are said to be."""

import re
from pathlib import Path

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


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
