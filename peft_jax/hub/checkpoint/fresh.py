"""Models and heads with parameters that are drawn anew."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from peft_jax.core.select import nearest
from peft_jax.core.sharding import Rules, shard
from peft_jax.core.tree import places
from peft_jax.hub.checkpoint.folder import default_dtype, local_folder, read_config
from peft_jax.hub.checkpoint.parts import Parts, listed
from peft_jax.hub.generation_config import read_generation_config
from peft_jax.models.blocks import Task, fresh_params
from peft_jax.models.families import family_of, task_of

logger = logging.getLogger("peft_jax")


def load_fresh(
    folder_or_repo: str | os.PathLike[str],
    *,
    config: Mapping[str, Any] | None = None,
    task: Task | None = None,
    labels: Sequence[str] | int | None = None,
    dtype: Any = None,
    mesh: Mesh | None = None,
    rules: Rules = (),
    revision: str | None = None,
    seed: int = 0,
    **options: Any,
) -> tuple[Any, Any]:
    """(model, params) of a folder's `config.json`, its values replaced by those of `config`, with
    parameters drawn from `seed`.

    The folder needs no weights. `options` are those of `load`: scan_layers, remat,
    attention_implementation. Raises ValueError for a value that the family's config does not have,
    and as `load` does.
    """
    folder = local_folder(folder_or_repo, revision)
    model = fresh_model(folder, config=config, task=task, labels=labels, dtype=dtype, **options)
    params = jax.jit(lambda: fresh_params(model, seed))()
    return model, params if mesh is None else shard(params, mesh, rules)


def fresh_model(
    folder: Path,
    *,
    config: Mapping[str, Any] | None = None,
    task: Task | None = None,
    labels: Sequence[str] | int | None = None,
    dtype: Any = None,
    **options: Any,
) -> Any:
    """The model of a folder's `config.json`, as `load_fresh` has it, without parameters."""
    hf_config = labelled(read_config(folder), labels)
    known = hf_config.to_dict()
    for name in config or {}:
        if name not in known:
            raise ValueError(
                f"a {hf_config.model_type} config has no {name!r}.{nearest(name, known)}"
            )
    changed = {**known, **(config or {})}
    if isinstance(kinds := changed.get("layer_types"), list) and "layer_types" not in (
        config or {}
    ):
        count = changed.get("num_hidden_layers", len(kinds))
        changed["layer_types"] = None if count > len(kinds) else kinds[:count]
    hf_config = type(hf_config)(**{k: v for k, v in changed.items() if k != "model_type"})
    family = family_of(hf_config.model_type)
    dtype = default_dtype(hf_config) if dtype is None else jnp.dtype(dtype)
    architecture = dataclasses.replace(
        family.config(hf_config), generation_config=read_generation_config(folder)
    )
    return family.module(
        architecture, task=task_of(hf_config, task), dtype=dtype, param_dtype=dtype, **options
    )


def labelled(hf_config: Any, labels: Sequence[str] | int | None) -> Any:
    """The config with these classes. Raises ValueError for a checkpoint's own classes where a text
    may have several.
    """
    if labels is None:
        if hf_config.problem_type == "multi_label_classification":
            raise ValueError(
                "the checkpoint's problem_type is multi_label_classification, of which there is no "
                "loss here: give `labels` "
                "(data.labels) for a new head with one label a text"
            )
        return hf_config
    hf_config.problem_type = None  # that of the old classes
    names = [f"LABEL_{i}" for i in range(labels)] if isinstance(labels, int) else list(labels)
    hf_config.id2label, hf_config.label2id = (
        dict(enumerate(names)),
        {name: i for i, name in enumerate(names)},
    )
    return hf_config


def fresh_head(
    missing: list[str], parts: Parts, model: Any, folder: Path, seed: int
) -> dict[str, jax.Array]:
    """path -> new values for the places of the head that the checkpoint lacks."""
    wanted = {
        path for path, (_, tensors) in parts.items() if {t.name for t in tensors} & set(missing)
    }
    if not wanted:
        return {}
    logger.warning(
        f"{folder} has no {listed(missing)}: the {model.task} head starts anew and has to "
        "be trained"
    )
    return jax.jit(
        lambda: {p: w for p, w in places(fresh_params(model, seed)).items() if p in wanted}
    )()
