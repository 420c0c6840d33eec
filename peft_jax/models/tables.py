"""Ids and positions against a model's tables, before anything runs: inside a program JAX fills in
NaN, wraps or clamps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from peft_jax.core.attachment import Attachment
from peft_jax.core.tree import places

IDS = ("tokens", "decoder_tokens", "other_tokens")


class Limits(NamedTuple):
    """What a model has rows for, None where it does not say."""

    vocabulary: int | None
    positions: int | None
    token_types: int
    labels: int | None
    task: str | None


def limits_of(model: Any) -> Limits:
    """Those of any model: what it has no `config` for is unknown."""
    config = getattr(model, "config", None)
    return Limits(
        getattr(config, "vocab_size", None),
        getattr(config, "learned_positions", None),
        getattr(config, "type_vocab_size", 0),
        getattr(config, "num_labels", None),
        getattr(model, "task", None),
    )


def check_rows(
    model: Any, rows: Any, *, tokenizer: Any = None, before: int = 0, ids: Sequence[str] = IDS
) -> None:
    """Raise ValueError where rows (a NamedTuple of arrays) hold what the model has no row for.

    `ids` are the fields with token ids; `before` is how many positions come before the first token
    (`first_position`). What a model does not say of itself (one without a `config`, say) is not
    checked.
    """
    types = limits_of(model).token_types
    for name in (*ids, *(["targets"] if "tokens" in ids else [])):
        if (values := getattr(rows, name, None)) is not None:
            check_ids(model, values, tokenizer=tokenizer, where=f"the rows' {name}")
    for name in ids:
        if (values := getattr(rows, name, None)) is not None and name != "decoder_tokens":
            _check_length(model, _length(rows, name), before)
    if types > 1 and hasattr(rows, "token_type_ids"):
        _check_range(
            "the rows' token_type_ids",
            rows.token_type_ids,
            types,
            f"the model has {types} types of tokens",
        )
    _check_labels(model, rows)


def check_ids(model: Any, ids: Any, *, tokenizer: Any = None, where: str = "the prompts") -> None:
    """Raise ValueError for token ids that are no rows of the model's embedding."""
    size = limits_of(model).vocabulary
    known = "" if tokenizer is None else f" and the tokenizer {len(tokenizer)} tokens"
    advice = (
        f"the model's embedding has {size} rows{known}: use the model's own tokenizer, or "
        "a model resized to this one"
    )
    _check_range(where, ids, size, advice)


def check_prompts(model: Any, params: Any, ids: Sequence[Sequence[int]], max_tokens: int) -> None:
    """Raise ValueError where prompts hold unknown ids, or go on beyond the model's learned
    positions.
    """
    check_ids(model, np.concatenate([np.asarray(row) for row in ids]))
    known, longest, before = limits_of(model).positions, max(map(len, ids)), first_position(params)
    needed = before + longest + max_tokens - 1  # the last token is not read
    if known is not None and needed > known:
        said = f" after {before} virtual ones" if before else ""
        raise ValueError(
            f"a prompt of {longest} tokens{said} and max_tokens={max_tokens} need {needed} "
            "positions, "
            f"and the model has learned {known}: shorten the prompt or lower max_tokens"
        )


def check_continued(model: Any, rows: Any, prompt_tokens: int, max_tokens: int) -> None:
    """Raise ValueError where what a student writes after its prompts (on-policy) goes beyond the
    learned positions.
    """
    first = np.maximum(np.argmax(np.asarray(rows.weights) > 0, axis=1) + 1, prompt_tokens)
    longest = int(np.minimum(first, (rows.segment_ids == 1).sum(1)).max())
    known = limits_of(model).positions
    if known is not None and longest + max_tokens - 1 > known:
        raise ValueError(
            f"distill.on_policy writes {max_tokens} tokens after up to {longest}, and the model "
            f"has learned {known} positions: "
            "lower distill.on_policy.max_tokens"
        )


def first_position(params: Any) -> int:
    """The position of a row's first token: prompts and prefixes stand before it."""
    return sum(x.moves("") for x in places(params).values() if isinstance(x, Attachment))


def _length(rows: Any, name: str) -> int:
    """How many positions the rows' tokens called `name` have: packed ones count anew in each
    segment.
    """
    positions = getattr(rows, "positions", None) if name == "tokens" else None
    return (
        getattr(rows, name).shape[1] if positions is None else int(np.max(positions, initial=0)) + 1
    )


def _check_length(model: Any, length: int, before: int = 0) -> None:
    known = limits_of(model).positions
    if known is not None and before + length > known:
        said = f", after {before} virtual ones," if before else ""
        raise ValueError(
            f"the rows have {length} positions{said} and the model has learned {known}: set "
            "data.sequence_length to "
            f"{known - before} or less"
        )


def _check_labels(model: Any, rows: Any) -> None:
    """Labels of texts and words are classes, those of answers are places in the row."""
    labels, limits = getattr(rows, "labels", None), limits_of(model)
    classes = limits.labels
    if labels is None or classes is None or not np.issubdtype(labels.dtype, np.integer):
        return
    if limits.task == "question_answering":
        length = rows.tokens.shape[1]
        _check_range("the rows' labels", labels, length, f"a row has {length} tokens")
    elif classes > 1:
        _check_range(
            "the rows' labels",
            labels,
            classes,
            f"the model's head has {classes} classes: see data.labels",
        )


def _check_range(where: str, values: Any, size: int | None, advice: str) -> None:
    if not np.size(values):
        return
    low, high = int(np.min(values)), int(np.max(values))
    if low < 0:
        raise ValueError(
            f"{where} hold {low}, and nothing is below 0: what does not count has the weight 0, "
            "and the number 0"
        )
    if size is not None and high >= size:
        raise ValueError(f"{where} hold {high}, and {advice}")
