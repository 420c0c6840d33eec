"""PEFT's PROMPT_TUNING and P_TUNING: rows before a text, written as they are used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from peft_jax.adapters.prompt import (
    EncodedTokens,
    EncoderPrompt,
    Prompt,
    VirtualTokens,
    place_prompt,
)
from peft_jax.core.placing import hidden_size
from peft_jax.core.sharding import fetch
from peft_jax.hub.peft.formats import Config, Tensors, WholeFormat

# what puts a prompt before a text
PLACES = (Prompt, EncoderPrompt)


def prompt_tokens(nodes: Mapping[str, Any]) -> Any:
    return next(n for n in nodes.values() if not isinstance(n, PLACES))


def write_prompt(
    params: Any, nodes: Mapping[str, Any], name: str
) -> tuple[Tensors, dict[str, Any]]:
    prompt = fetch(prompt_tokens(nodes).prompt())
    return {"prompt_embeddings": prompt}, prompt_config(prompt)


def prompt_config(prompt: np.ndarray) -> dict[str, Any]:
    return {
        "num_virtual_tokens": prompt.shape[0],
        "token_dim": prompt.shape[1],
        "num_transformer_submodules": 1,
    }


def prompt_embeddings(params: Any, tensors: Tensors) -> jnp.ndarray:
    prompt, width = tensors["prompt_embeddings"], hidden_size(params)
    if prompt.ndim != 2 or prompt.shape[1] != width:
        raise ValueError(
            f"prompt_embeddings has shape {prompt.shape}, expected (tokens, {width}) for this model"
        )
    return jnp.asarray(prompt, jnp.float32)


def read_prompt(params: Any, tensors: Tensors, config: Config, name: str) -> Any:
    prompt = prompt_embeddings(params, tensors)[
        : config.get("num_virtual_tokens")
    ]  # a decoder's, which PEFT keeps too, is not used
    return place_prompt(params, VirtualTokens(embeddings=prompt, name=name), len(prompt), None)


PROMPT_TUNING = WholeFormat(
    name="PROMPT_TUNING", nodes=(VirtualTokens, *PLACES), write=write_prompt, read=read_prompt
)
P_TUNING = WholeFormat(
    name="P_TUNING", nodes=(EncodedTokens, *PLACES), write=write_prompt, read=read_prompt
)
FORMAT = (PROMPT_TUNING, P_TUNING)
