"""Writing a folder so that a crash or a full disk leaves what was there before intact."""

from __future__ import annotations

import contextlib
import gzip
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any


@contextlib.contextmanager
def replacing_folder(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary folder beside `folder`; when the block ends well, its files move over `folder`'s,
    else it vanishes.

    Raises OSError naming `folder` where writing fails; nothing in `folder` has changed then.
    """
    target = Path(folder)
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"{target} exists and is not a folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield temporary
        target.mkdir(exist_ok=True)
        for item in sorted(temporary.iterdir()):
            os.replace(item, target / item.name)
    except OSError as error:
        raise OSError(
            error.errno, f"could not write {target}: {error.strerror or error}"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_json(path: Path, value: Any) -> None:
    """`value` as indented JSON with a final newline; numbers that are not finite as null. The file
    is there whole or as it was.
    """
    beside = path.with_name(f".{path.name}")
    beside.write_text(
        json.dumps(finite(value), indent=2, sort_keys=True, allow_nan=False) + "\n",
        encoding="utf-8",
    )
    os.replace(beside, path)


def finite(value: Any) -> Any:
    """A value for JSON, which has no NaN and no infinity: None in their place."""
    if isinstance(value, Mapping):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def open_text(path: Path) -> IO[str]:
    """A text file in UTF-8, a gzipped one unpacked, without the byte-order mark that some programs
    begin with.
    """
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig", newline="")
    return path.open(encoding="utf-8-sig", newline="")


def numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number, line) of the lines of a text file that are not blank, without their end.

    A line ends with a line feed or carriage return, and not, as for `str.splitlines`, with one of
    Unicode's separators.
    """
    with open_text(path) as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield number, line.rstrip("\r\n")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`. Raises FileNotFoundError or ValueError naming the file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} should hold a JSON object, not a {type(value).__name__}")
    return value
