"""PEFT's MULTITASK_PROMPT_TUNING: a prompt times a matrix of low rank for each task."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from peft_jax.adapters.prompt import TaskTokens, place_prompt
from peft_jax.core.sharding import fetch
from peft_jax.hub.peft.formats import Config, Tensors, WholeFormat
from peft_jax.hub.peft.prompt_tuning import PLACES, prompt_config, prompt_embeddings, prompt_tokens


def _write(params: Any, nodes: Mapping[str, Any], name: str) -> tuple[Tensors, dict[str, Any]]:
    t = prompt_tokens(nodes)
    arrays = {
        "prompt_embeddings": t.embeddings,
        "prefix_task_cols": t.columns,
        "prefix_task_rows": t.rows,
    }
    arrays = {k: fetch(v) for k, v in arrays.items()}
    config = {"num_tasks": t.columns.shape[0], "num_ranks": t.columns.shape[-1]}
    return arrays, prompt_config(arrays["prompt_embeddings"]) | config


def _read(params: Any, tensors: Tensors, config: Config, name: str) -> Any:
    prompt = prompt_embeddings(params, tensors)
    columns, rows = (
        jnp.asarray(tensors[k], jnp.float32) for k in ("prefix_task_cols", "prefix_task_rows")
    )
    n, P, r = columns.shape
    if len(prompt) != P or rows.shape != (n, r, prompt.shape[1]):
        raise ValueError(
            f"prefix_task_cols {columns.shape} and prefix_task_rows {rows.shape} do not fit "
            f"{prompt.shape}"
        )
    return place_prompt(
        params, TaskTokens(embeddings=prompt, columns=columns, rows=rows, name=name), P, None
    )


FORMAT = WholeFormat(
    name="MULTITASK_PROMPT_TUNING", nodes=(TaskTokens, *PLACES), write=_write, read=_read
)
