"""Packages as pip would leave them: a module and a `*.dist-info` on the path."""

import sys
from pathlib import Path

import pytest


def install(
    folder: Path, monkeypatch: pytest.MonkeyPatch, registry, module: str, text: str, attribute: str
) -> None:
    """A package of one module, whose attribute is an entry point of the registry's group; the
    registry is read anew, and as it was afterwards.
    """
    info = folder / f"{module}-1.0.dist-info"
    info.mkdir(parents=True)
    (folder / f"{module}.py").write_text(text)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{registry.group}]\nown = {module}:{attribute}\n")
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setattr(registry, "_records", {})
    monkeypatch.setattr(registry, "_found", False)
