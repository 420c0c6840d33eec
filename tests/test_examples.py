"""The examples of docs/examples, by which strangers add to the package."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MATRICES = ("test_method_references.py", "test_method_nodes.py", "test_method_matrix.py")


@pytest.mark.slow
def test_method():
    """One file is a method, and the matrices run over it by themselves. (Its folder's format is one
    of the hub's matters.)
    """
    tests = [f"tests/{name}" for name in MATRICES]
    command = [sys.executable, "-m", "pytest", "-n", "0", "-q", "-p", "docs.examples.method"]
    chosen = "input_scaling and not export_round_trip"
    done = subprocess.run(
        [*command, *tests, "-k", chosen],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert " failed" not in done.stdout
