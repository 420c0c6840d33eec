"""Makes the notebooks from their sources: `python scripts/make_notebooks.py [--check] [NAME ...]`.

A source, notebooks/sources/NAME.py, is Python with cells that begin with `# %%`, or `# %%
[markdown]` and comments. Each notebook is executed and written with its outputs; one that raises,
as where a figure is not what the text says of it, is an error. With --check nothing is executed: a
notebook whose cells are not those of its source, or that lacks outputs, is an error.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from pathlib import Path
from typing import Any

import nbformat

ROOT = Path(__file__).parents[1]
NOTEBOOKS = ROOT / "notebooks"
SECONDS = 1800  # that a notebook may take on a machine with other work


def sources(names: list[str] | None = None) -> list[Path]:
    """The sources in order, or those whose names begin so."""
    found = sorted((NOTEBOOKS / "sources").glob("*.py"))
    return [p for p in found if not names or any(p.stem.startswith(n) for n in names)]


def cells_of(text: str) -> list[tuple[str, str]]:
    """(kind, text) of the cells of a source."""
    cells = []
    for part in re.split(r"^# %%", text, flags=re.MULTILINE)[1:]:
        head, _, body = part.partition("\n")
        if "[markdown]" in head:
            body = re.sub(r"^# ?", "", body, flags=re.MULTILINE)
        cells.append(("markdown" if "[markdown]" in head else "code", body.strip()))
    return cells


def notebook_of(text: str) -> Any:
    """A notebook without outputs."""
    makers = {
        "markdown": nbformat.v4.new_markdown_cell,
        "code": nbformat.v4.new_code_cell,
    }
    cells = [makers[kind](body, id=f"cell-{i}") for i, (kind, body) in enumerate(cells_of(text))]
    language = {"name": "python"}
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    metadata = {"kernelspec": kernel, "language_info": language}
    return nbformat.v4.new_notebook(cells=cells, metadata=metadata)


def executed(notebook: Any) -> Any:
    """The notebook with its outputs. Raises CellExecutionError where a cell raises."""
    from nbclient import NotebookClient

    where = {"metadata": {"path": str(ROOT)}}
    NotebookClient(notebook, timeout=SECONDS, kernel_name="python3", resources=where).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # the times of day
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
    notebook.metadata["language_info"] = {"name": "python"}
    return notebook


def path_of(source: Path) -> Path:
    return NOTEBOOKS / f"{source.stem}.ipynb"


def problems(source: Path) -> list[str]:
    """What is not current of a source's notebook."""
    path = path_of(source)
    if not path.is_file():
        return [f"{path.name} is not there"]
    notebook: Any = nbformat.read(path, as_version=4)
    said = [(c.cell_type, c.source) for c in notebook.cells]
    found = [] if said == cells_of(source.read_text(encoding="utf-8")) else ["has other cells"]
    code = [c for c in notebook.cells if c.cell_type == "code"]
    outputs = [o for c in code for o in c.outputs]
    if any(c.execution_count is None for c in code):
        found.append("was not executed")
    if any(o.output_type == "error" for o in outputs):
        found.append("has an error")
    if not any("image/png" in o.get("data", {}) for o in outputs):
        found.append("has no picture")
    return [f"{path.name} {what}" for what in found]


def make(source: Path) -> None:
    """Execute a source and write its notebook."""
    start = time.monotonic()
    notebook = executed(notebook_of(source.read_text(encoding="utf-8")))
    nbformat.write(notebook, path_of(source))
    print(f"{source.stem}: {time.monotonic() - start:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("names", nargs="*", help="beginnings of names, as 03; by default all")
    args = parser.parse_args()
    chosen = sources(args.names)
    if not args.check:
        for source in chosen:
            make(source)
        return
    if found := [what for source in chosen for what in problems(source)]:
        sys.exit("; ".join([*found, "run python scripts/make_notebooks.py"]))


if __name__ == "__main__":
    main()
