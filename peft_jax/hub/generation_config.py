"""A folder's `generation_config.json`, and the tokens at which a model's text ends.

The ends are a set: those of the generation config (else of the config, as in `transformers`), the
tokenizer's, and the token after an assistant's turn in the chat template.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from peft_jax.core.files import read_json

FILE = "generation_config.json"
_TURN = [{"role": "user", "content": "Question"}, {"role": "assistant", "content": "Quintessence"}]


def read_generation_config(folder: Path) -> str | None:
    """The folder's generation config as JSON, None where there is none. Raises ValueError where it
    is no JSON object.
    """
    path = folder / FILE
    return json.dumps(read_json(path), sort_keys=True) if path.is_file() else None


def end_tokens(model: Any, tokenizer: Any = None) -> tuple[int, ...]:
    """The ids of all tokens that end what the model writes, those of its own configuration first;
    none for an unknown model.
    """
    found = _listed(_settings(model).get("eos_token_id"))
    if tokenizer is not None:
        found += _listed(tokenizer.eos_token_id) + _listed(end_of_turn(tokenizer))
    return tuple(dict.fromkeys(i for i in found if i >= 0))


def _settings(model: Any) -> Mapping[str, Any]:
    """The generation config, or the model's config where it has none."""
    config = getattr(model, "config", None)
    own = getattr(config, "generation_config", None) or getattr(config, "hf_config", None)
    return json.loads(own) if isinstance(own, str) else {}


def _listed(ids: Any) -> list[int]:
    if ids is None:
        return []
    return [int(i) for i in ids] if isinstance(ids, list | tuple) else [int(ids)]


def end_of_turn(tokenizer: Any) -> int | None:
    """The first of the tokenizer's added tokens after an assistant's text, as its chat template
    writes it; None without.
    """
    if not getattr(tokenizer, "chat_template", None):
        return None
    try:
        text = tokenizer.apply_chat_template(_TURN, tokenize=False)
    except (TemplateError, ValueError):  # a template for other conversations
        return None
    after = text.rpartition(_TURN[-1]["content"])[2]
    known = {
        i for i, token in tokenizer.added_tokens_decoder.items() if not token.content.isspace()
    }
    ids = tokenizer(after, add_special_tokens=False)["input_ids"]
    return next((i for i in ids if i in known), None)
