"""Registries: where records are found, and what a wrong one says."""

import dataclasses
import importlib.metadata
import sys

import pytest

from peft_jax.core.registry import Registry


@dataclasses.dataclass(frozen=True)
class Tool:
    name: str


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of two files with records, one without and a private one."""
    home = tmp_path / "toolbox"
    home.mkdir()
    (home / "__init__.py").write_text("")
    start = "from tests.core.test_registry import Tool\n"
    (home / "saw.py").write_text(start + "TOOL = Tool('saw')\n")
    (home / "files.py").write_text(start + "TOOL = (Tool('rasp'), Tool('file'))\n")
    (home / "bench.py").write_text("")
    (home / "_hidden.py").write_text(start + "TOOL = Tool('hidden')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "toolbox"
    for name in [m for m in sys.modules if m.split(".")[0] == "toolbox"]:
        del sys.modules[name]


def registry(package):
    return Registry[Tool]("tool", [package], "TOOL", "peft_jax.test_tools")


def test_records_are_found_in_files(package):
    assert list(registry(package)) == ["rasp", "file", "saw"]
    assert registry(package).find("saw") == Tool("saw")


def test_a_wrong_name_says_the_nearest_and_a_taken_one_is_refused(package):
    tools = registry(package)
    with pytest.raises(ValueError, match=r"unknown tool 'rsap'\. Did you mean 'rasp'\?"):
        tools.find("rsap")
    with pytest.raises(ValueError, match="there is a tool 'saw' already"):
        tools.register(Tool("saw"))
    tools.register(Tool("plane"))
    assert "plane" in tools


def test_installed_packages_offer_records_and_a_broken_one_is_said(package, monkeypatch, caplog):
    points = [
        importlib.metadata.EntryPoint("axe", "tests.core.test_registry:AXE", "peft_jax.test_tools"),
        importlib.metadata.EntryPoint("pen", "no_such_module:PEN", "peft_jax.test_tools"),
    ]
    monkeypatch.setattr("peft_jax.core.registry.entry_points", lambda group: points)
    assert list(registry(package)) == ["rasp", "file", "saw", "axe"]
    assert "the tool 'pen' of the entry point no_such_module:PEN cannot be used" in caplog.text


AXE = Tool("axe")
