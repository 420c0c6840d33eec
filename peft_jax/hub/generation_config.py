"""A folder's `generation_config.json`."""

from __future__ import annotations

import json
from pathlib import Path

from peft_jax.core.files import read_json

FILE = "generation_config.json"


def read_generation_config(folder: Path) -> str | None:
    """The folder's generation config as JSON, None where there is none. Raises ValueError where it
    is no JSON object.
    """
    path = folder / FILE
    return json.dumps(read_json(path), sort_keys=True) if path.is_file() else None
