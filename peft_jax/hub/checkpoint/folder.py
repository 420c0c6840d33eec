"""Folders of Hugging Face checkpoints: where they lie, their configuration and their tokenizer."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from peft_jax.core.devices import program_device
from peft_jax.core.files import read_json
from peft_jax.models.families import introduce

BASE = Path(__file__).parent.parent.parent / "assets" / "base"


_WANTED = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")


def local_folder(folder_or_repo: str | os.PathLike[str], revision: str | None = None) -> Path:
    """The folder itself, the embedded model for "builtin:base", or the local copy of a hub
    repository.

    Raises FileNotFoundError naming what was tried.
    """
    if str(folder_or_repo).startswith("builtin:"):
        if folder_or_repo != "builtin:base":
            raise FileNotFoundError(
                f"there is no built-in model {str(folder_or_repo)!r}; there is builtin:base"
            )
        return BASE
    path = Path(folder_or_repo).expanduser()
    if path.is_dir():
        return path
    name = str(folder_or_repo)
    if path.is_absolute() or name.startswith(".") or name.count("/") > 1:
        raise FileNotFoundError(f"{name} is no folder")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(_WANTED)))
    except Exception as error:
        raise FileNotFoundError(
            f"{name} is neither a folder nor a repository that can be downloaded "
            f"({type(error).__name__})"
        ) from error


def read_config(folder: Path) -> Any:
    """The Hugging Face config of a folder; code in the repository is never run."""
    raw = read_json(folder / "config.json")
    if "model_type" not in raw:
        raise ValueError(f"{folder / 'config.json'} has no model_type")
    from transformers import AutoConfig

    introduce(raw["model_type"])
    return AutoConfig.from_pretrained(folder, trust_remote_code=False)


def default_dtype(hf_config: Any, mesh: Mesh | None = None) -> Any:
    """float32 on CPUs, the checkpoint's dtype on the devices of other meshes and programs."""
    stored = str(getattr(hf_config, "dtype", None) or "float32").removeprefix("torch.")
    stored = "bfloat16" if stored == "float16" else stored  # in which nothing can be trained
    on = program_device().platform if mesh is None else mesh.devices.flat[0].platform
    return jnp.dtype("float32" if on == "cpu" else stored)


def load_tokenizer(folder_or_repo: str | os.PathLike[str], revision: str | None = None) -> Any:
    """The tokenizer of a folder or repository, from `transformers`; code in the repository is never
    run.
    """
    from transformers import AutoTokenizer

    folder = local_folder(folder_or_repo, revision)
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{folder} has no tokenizer that transformers can load: {error}"
        ) from error
