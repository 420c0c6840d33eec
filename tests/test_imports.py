"""Imports point one way: what each package may import, and what a bare import loads."""

import ast
import functools
import graphlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "peft_jax"
FLOORS = {  # package -> what it may import beside itself
    "core": "",
    "models": "core",
    "reports": "core",  # from the files that runs leave
    "data": "core models",
    "objectives": "core models",
    "generation": "core models data",
    "low_rank": "core models",
    "adapters": "core models low_rank",  # of other techniques low_rank's LoRA alone
    "quantization": "core models low_rank",
    "pruning": "core models low_rank objectives",
    "hub": "core models data low_rank adapters quantization pruning",
    "distillation": "core models data objectives generation low_rank hub",
    "knowledge": "core models data objectives generation low_rank hub",
}
BELOW = " ".join(FLOORS)
FLOORS |= {
    "methods": BELOW,
    "training": f"{BELOW} methods",
    "recipes": f"{BELOW} methods training",
    "cli": f"{BELOW} methods training recipes",
}


@functools.cache
def imports():
    """(file, line, importing package, imported package) for each import within peft_jax."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules = (
                [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else [a.name for a in node.names]
                if isinstance(node, ast.Import)
                else []
            )
            for module in modules:
                top, *rest = module.split(".")
                if top == "peft_jax" and rest:
                    found.append((path.relative_to(ROOT), node.lineno, name, rest[0]))
    return found


def test_the_floors_have_no_cycle():
    graphlib.TopologicalSorter({k: v.split() for k, v in FLOORS.items()}).prepare()
    folders = {p.parent.name for p in PACKAGE.glob("*/__init__.py")}
    assert folders <= set(FLOORS)


def test_imports_point_down():
    wrong = [
        f"{path}:{line}: {source} imports {target}"
        for path, line, source, target in imports()
        if source in FLOORS and target not in (source, *FLOORS[source].split())
    ]
    assert not wrong, "\n".join(wrong)


def code_of(path):
    """The Python in a file: a script, a notebook's cells, a page's code blocks."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        cells = [c for c in json.loads(text)["cells"] if c["cell_type"] == "code"]
        return ["".join(c["source"]) for c in cells]
    if path.suffix == ".md":
        return [block.split("```")[0] for block in text.split("```python\n")[1:]]
    return [text]


OUTSIDE = sorted(
    p.relative_to(ROOT)
    for pattern in ("scripts/*.py", "benchmarks/*.py", "notebooks/*.ipynb", "docs/**/*.md", "*.md")
    for p in ROOT.glob(pattern)
)


@pytest.mark.parametrize("path", OUTSIDE, ids=str)
def test_what_is_imported_outside_of_the_package_exists(path):
    for code in code_of(ROOT / path):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("peft_jax"):
                exec(compile(ast.Module([node], []), str(path), "exec"), {})


def test_a_bare_import_is_light():
    heavy = ("transformers", "torch", "datasets", "orbax", "optax", "pydantic")
    code = f"import peft_jax, sys; print([m for m in {heavy} if m in sys.modules])"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert run.stdout.strip() == "[]"
