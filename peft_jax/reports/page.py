"""The template engine, and what a page says of where its numbers come from."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jinja2

PACKAGES = ("peft-jax", "jax", "jaxlib", "flax", "optax", "numpy")


@functools.cache
def _engine() -> jinja2.Environment:
    engine = jinja2.Environment(
        loader=jinja2.PackageLoader("peft_jax.reports"),
        autoescape=jinja2.select_autoescape(("html.j2",), default=False),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    engine.filters["number"] = number
    engine.filters["bytes"] = in_bytes
    return engine


def render(template: str, values: Mapping[str, Any]) -> str:
    """A template of this package with values; those of .html.j2 are escaped."""
    return _engine().get_template(template).render(values)


def write(path: Path, text: str) -> None:
    """Write a page whole, or leave what was there."""
    beside = path.with_name(f".{path.name}")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


def number(value: Any) -> str:
    """A number as a table shows it; anything else as it is."""
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) or (float(value).is_integer() and abs(value) >= 1000):
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def in_bytes(value: float | None) -> str:
    """Bytes in the unit that fits, as 11.0 MB."""
    if value is None:
        return "–"
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f} B"


def in_billions(value: float | None) -> str:
    """A count in units of 10^9."""
    return "–" if value is None else f"{value / 1e9:.3g}"


def about() -> dict[str, Any]:
    """Versions, commit and device of this process."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "versions": versions,
        "python": platform.python_version(),
        "commit": _commit(),
        "device": _device(),
        "devices": jax.device_count(),
        "cpus": os.cpu_count(),
    }


def _commit() -> str | None:
    """The commit of the package's own checkout; None where it was installed from elsewhere."""
    home = Path(__file__).parents[2]
    if not (home / ".git").exists():
        return None
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False, cwd=home)
    except OSError:
        return None
    return found.stdout.strip() or None


def _device() -> str:
    if jax.default_backend() != "cpu":
        return jax.devices()[0].device_kind
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if "model name" in line)
    return next(names, platform.machine())
