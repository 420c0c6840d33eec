"""Retrieval-augmented fine-tuning (RAFT, Zhang et al. 2024, arXiv:2403.10131): passages before
questions, some without the one that answers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from peft_jax.data import Record
from peft_jax.knowledge.facts import verbalise


def passages_of(facts: Sequence[Record], templates: Mapping[str, Sequence[str]]) -> list[str]:
    """A passage for each subject: its facts, each said by its relation's first template."""
    of: dict[str, list[str]] = {}
    for fact in facts:
        one = {fact.value["relation"]: templates.get(fact.value["relation"], ())[:1]}
        plain = fact._replace(value={n: v for n, v in fact.value.items() if n != "aliases"})
        said = verbalise([plain], one, held_out=0)[0].value
        of.setdefault(fact.value["subject"], []).append(f"{said['prompt']}{said['completion']}.")
    return [" ".join(sentences) for sentences in of.values()]


def with_passages(
    records: Sequence[Record],
    passages: Sequence[str],
    *,
    each: int = 3,
    oracle_share: float = 1.0,
    seed: int | None = None,
) -> list[Record]:
    """Completions whose prompts begin with `each` passages, those that BM25 finds for the prompt.

    In training (with a `seed`) the passages come in random order, and the best one, RAFT's oracle,
    stands among them with the probability `oracle_share`; else the next best takes its place
    (section 3). Without a seed: the best ones, the very best nearest to the question. Raises
    ValueError where there are not more passages than are asked for, ImportError without bm25s.
    """
    try:
        import bm25s
    except ImportError as error:
        raise ImportError("retrieval needs bm25s: pip install peft-jax[retrieval]") from error
    if not 0 < each < len(passages):
        raise ValueError(
            f"{each} passages before each question: there are {len(passages)}, and one more than "
            "that is needed"
        )
    if not 0.0 <= oracle_share <= 1.0:
        raise ValueError(f"oracle_share must lie in [0, 1], got {oracle_share}")
    index = bm25s.BM25()
    quiet: dict[str, Any] = {"show_progress": False}
    whole: dict[str, Any] = {"stopwords": None, **quiet}
    index.index(bm25s.tokenize(list(passages), **whole), **quiet)
    asked = bm25s.tokenize([r.value["prompt"] for r in records], **whole)
    found = np.asarray(index.retrieve(asked, k=each + 1, **quiet)[0])
    rng = None if seed is None else np.random.default_rng(seed)
    made = []
    for record, best in zip(records, found, strict=True):
        oracle = rng is None or rng.random() < oracle_share
        near = (best[:each] if oracle else best[1:])[::-1]
        order = near if rng is None else rng.permutation(near)
        read = "\n".join(passages[int(i)] for i in order)
        made.append(
            record._replace(value={**record.value, "prompt": f"{read}\n\n{record.value['prompt']}"})
        )
    return made
