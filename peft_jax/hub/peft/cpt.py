"""PEFT's CPT: the tokens of examples as a prompt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft_jax.adapters.prompt import ContextTokens, place_prompt
from peft_jax.hub.peft.formats import Config, Tensors, WholeFormat
from peft_jax.hub.peft.prompt_tuning import PLACES, prompt_embeddings, prompt_tokens, write_prompt


def _write(params: Any, nodes: Mapping[str, Any], name: str) -> tuple[Tensors, dict[str, Any]]:
    tensors, config = write_prompt(params, nodes, name)
    tokens = prompt_tokens(nodes)
    return tensors, config | {
        "cpt_token_ids": list(tokens.token_ids),
        "cpt_mask": [1] * len(tokens.token_ids),
        "cpt_tokens_type_mask": list(tokens.token_types),
        "opt_projection_epsilon": tokens.epsilon,
        "opt_projection_format_epsilon": tokens.format_epsilon,
    }


def _read(params: Any, tensors: Tensors, config: Config, name: str) -> Any:
    from peft_jax.adapters.prompt import context_tokens

    rows = prompt_embeddings(params, tensors)
    ids, types = config.get("cpt_token_ids") or [], config.get("cpt_tokens_type_mask") or []
    if not len(ids) == len(types) == len(rows):
        raise ValueError(
            f"prompt_embeddings has {len(rows)} tokens, cpt_token_ids {len(ids)} and "
            f"cpt_tokens_type_mask {len(types)}"
        )
    epsilon, format_epsilon = (
        float(config.get(f"opt_projection_{k}") or 0.0) for k in ("epsilon", "format_epsilon")
    )
    return place_prompt(
        params, context_tokens(rows, ids, types, epsilon, format_epsilon, name), len(rows), None
    )


FORMAT = WholeFormat(name="CPT", nodes=(ContextTokens, *PLACES), write=_write, read=_read)
