"""A smaller vocabulary: the tokens that some texts use, and a tokenizer that knows no others."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np


def prune_vocabulary(tokenizer: Any, texts: Iterable[str], keep: int) -> tuple[np.ndarray, Any]:
    """(ids of the tokens that stay, ascending; a tokenizer that numbers them 0, 1, ...), for
    `shrink(tokens=...)`.

    `tokenizer` is a fast one of `transformers` with a byte-pair encoding (Llama 3, Qwen, SmolLM,
    OLMo, ...). Special tokens and the alphabet stay, then the tokens that `texts` use most, each
    with the pieces that it is merged from, up to `keep`. Texts of these tokens alone are tokenized
    as before; others into more tokens.

    Raises ValueError for another kind of tokenizer, one whose post-processor is not understood, and
    a `keep` below what must stay.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = json.loads(backend.to_str()) if backend is not None else {}
    kind = state.get("model", {}).get("type")
    if kind != "BPE":
        raise ValueError(
            "only fast byte-pair tokenizers can lose tokens, and this one is "
            f"{kind or type(tokenizer).__name__}"
        )
    vocabulary: dict[str, int] = state["model"]["vocab"]
    merges = [
        tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in state["model"]["merges"]
    ]
    made = {a + b: (a, b) for a, b in reversed(merges)}  # the first merge that makes a token
    special = {t["content"] for t in state.get("added_tokens", [])}
    chosen = {t for t in vocabulary if t not in made} | special
    if keep < len(chosen):
        raise ValueError(
            f"keep={keep} is below the {len(chosen)} special tokens and letters that must stay"
        )
    names = {i: t for t, i in vocabulary.items()}
    counts = Counter(i for text in texts for i in tokenizer(text)["input_ids"])
    for i, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        needed = _pieces(names[i], made) - chosen if i in names else set()
        if len(chosen) + len(needed) <= keep:
            chosen |= needed
    ids = np.sort([_id(t, vocabulary, state) for t in chosen])
    new = {int(old): n for n, old in enumerate(ids)}
    state["model"]["vocab"] = {t: new[i] for t, i in vocabulary.items() if i in new}
    state["model"]["merges"] = [[a, b] for a, b in merges if {a, b, a + b} <= chosen]
    for token in state.get("added_tokens", []):
        token["id"] = new[token["id"]]
    state["post_processor"] = _renumbered(state.get("post_processor"), new)
    return ids, _rebuilt(tokenizer, state, new)


def _id(token: str, vocabulary: Mapping[str, int], state: Mapping[str, Any]) -> int:
    return (
        vocabulary[token]
        if token in vocabulary
        else next(t["id"] for t in state["added_tokens"] if t["content"] == token)
    )


def _pieces(token: str, made: Mapping[str, tuple[str, str]]) -> set[str]:
    """A token and all that it is merged from."""
    found, todo = set(), [token]
    while todo:
        part = todo.pop()
        if part not in found:
            found.add(part)
            todo += made.get(part, ())
    return found


_AVOIDED = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "sequence_bias")


def renumbered(settings: Mapping[str, Any], new: Mapping[int, int], size: int) -> dict[str, Any]:
    """A model's config or generation config with the ids of its tokens, of `size`, renumbered by
    `new`.

    Numbers that are no token's stay (-1 for none). What is only to be avoided or favoured goes with
    its tokens. Raises ValueError where another token that has a part is gone.
    """

    def lost(ids: Any) -> list[int]:
        if isinstance(ids, list):
            return [i for part in ids for i in lost(part)]
        return [ids] if isinstance(ids, int) and 0 <= ids < size and ids not in new else []

    def moved(ids: Any) -> Any:
        if isinstance(ids, list):
            return [moved(part) for part in ids]
        return new.get(ids, ids) if isinstance(ids, int) else ids

    result = dict(settings)
    for name, ids in settings.items():
        if name == "sequence_bias" and isinstance(ids, list):
            result[name] = [[moved(words), bias] for words, bias in ids if not lost(words)]
        elif name in _AVOIDED and isinstance(ids, list):
            result[name] = [moved(part) for part in ids if not lost(part)]
        elif name.endswith("_token_id") or name == "force_words_ids":
            if gone := lost(ids):
                raise ValueError(f"tokens leave out {gone[0]}, the model's {name}")
            result[name] = moved(ids)
    return result


def _renumbered(processor: Any, new: Mapping[int, int]) -> Any:
    """A post-processor's JSON with new ids. Raises ValueError for a kind whose ids are not
    known.
    """
    if processor is None or processor["type"] == "ByteLevel":
        return processor
    if processor["type"] == "Sequence":
        return {**processor, "processors": [_renumbered(p, new) for p in processor["processors"]]}
    if processor["type"] != "TemplateProcessing":
        raise ValueError(
            f"the tokenizer's post-processor {processor['type']} is not one whose token ids can be "
            "renumbered"
        )
    tokens = {
        n: {**t, "ids": [new[i] for i in t["ids"]]} for n, t in processor["special_tokens"].items()
    }
    return {**processor, "special_tokens": tokens}


def _rebuilt(tokenizer: Any, state: Mapping[str, Any], new: Mapping[int, int]) -> Any:
    """The tokenizer, its settings and templates unchanged, around another state."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        (Path(folder) / "tokenizer.json").write_text(json.dumps(state), encoding="utf-8")
        config = Path(folder) / "tokenizer_config.json"
        settings = json.loads(config.read_text(encoding="utf-8"))
        if added := settings.get("added_tokens_decoder"):
            settings["added_tokens_decoder"] = {str(new[int(i)]): t for i, t in added.items()}
        config.write_text(json.dumps(settings), encoding="utf-8")
        return type(tokenizer).from_pretrained(folder)
