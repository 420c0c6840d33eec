"""Where a continuation ends: before an end token, or before a stop string in its text.

The end tokens are a set: those of the model's generation config (else of its config, as in
`transformers`), the tokenizer's, and the token after an assistant's turn in the chat template.
"""

from __future__ import annotations

import bisect
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jinja2 import TemplateError

_TURN = [{"role": "user", "content": "Question"}, {"role": "assistant", "content": "Quintessence"}]


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


def ends_of(tokens: int | Sequence[int]) -> np.ndarray:
    """Which tokens end a row [E], as an array that is never empty: -1, which no row has, where
    there are none.
    """
    ends = np.atleast_1d(np.asarray(tokens))
    if ends.ndim > 1 or (ends.size and not np.issubdtype(ends.dtype, np.integer)):
        raise ValueError(
            f"eos_token_id must be a token's number, or a list of such, got {tokens!r}"
        )
    ends = ends[ends >= 0].astype(np.int32)
    return ends if ends.size else np.asarray([-1], np.int32)


def is_end(tokens: Any, ends: Any) -> Any:
    """Whether each of the tokens [...] is one of the ends [E]."""
    return (tokens[..., None] == ends).any(-1)


def until(row: np.ndarray, ends: np.ndarray) -> list[int]:
    """The tokens before the first that is an end."""
    return row[: int(np.append(is_end(row, ends), True).argmax())].tolist()


# Stop strings are looked for in the text as it is given back and in the text with its special
# tokens.


def stopped(tokenizer: Any, stop: Sequence[str], rows: np.ndarray) -> np.ndarray:
    """[B] whether each of the rows of tokens [B, N] has one of the stop strings in its text."""
    texts = zip(
        *(
            tokenizer.batch_decode(np.maximum(rows, 0), skip_special_tokens=skip)
            for skip in (True, False)
        ),
        strict=True,
    )
    return np.asarray([any(s in text for s in stop for text in both) for both in texts])


def before_stop(tokenizer: Any, row: list[int], stop: Sequence[str]) -> tuple[list[int], str]:
    """The tokens that are whole before the first of the stop strings, and the text before it
    without special tokens.
    """
    found = [_before_stop_in(tokenizer, row, stop, skip) for skip in (True, False)]
    return min(found, key=lambda both: len(both[1]))


def _before_stop_in(
    tokenizer: Any, row: list[int], stop: Sequence[str], skip: bool
) -> tuple[list[int], str]:
    """The same for the text with, or (`skip`) without special tokens."""
    decode = functools.partial(tokenizer.decode, skip_special_tokens=skip)
    text = decode(row)
    starts = [text.index(s) for s in stop if s in text]
    if not starts:
        return row, tokenizer.decode(row, skip_special_tokens=True)
    start = min(starts)
    n = bisect.bisect_right(range(len(row)), start, key=lambda n: len(decode(row[:n]))) - 1
    if skip:
        return row[:n], text[:start]
    begun = "" if row[n] in tokenizer.all_special_ids else text[len(decode(row[:n])) : start]
    return row[:n], tokenizer.decode(row[:n], skip_special_tokens=True) + begun
