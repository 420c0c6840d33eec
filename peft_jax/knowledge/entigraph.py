"""Synthetic texts about a small corpus (EntiGraph, Yang et al. 2024, arXiv:2409.07431): its
entities, and what a language model says of how they relate, as data for continued pre-training.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence

import numpy as np

from peft_jax.data import Record
from peft_jax.data.spans import find_names, make_names

Write = Callable[[list[str]], list[str]]  # prompts -> what a language model goes on with

EXTRACT = (
    "Read the document and list its entities: people, places, organisations, things and concepts, "
    "one a line, each begun "
    'with "- ".\n\nDocument:\n{document}\n\nEntities:\n- '
)
RELATE = (
    "Read the document and explain how {entities} relate to each other in it. Stay with what the "
    "document says.\n\n"
    "Document:\n{document}\n\nHow {entities} relate:\n"
)


def extract_entities(write: Write, documents: Sequence[str], *, most: int = 30) -> list[list[str]]:
    """The entities of each document, as the model lists them: those that do stand in it, as whole
    words, each once and in its order.
    """
    answers = write([EXTRACT.format(document=d) for d in documents])
    return [
        _listed(f"- {answer}", document)[:most]
        for answer, document in zip(answers, documents, strict=True)
    ]


def _listed(answer: str, document: str) -> list[str]:
    lines = [
        re.sub(r"^\s*(?:[-*•]|\d+[.)])\s*", "", line).strip(" \"'.,;")
        for line in answer.splitlines()
    ]
    folded = document.casefold()
    places = {name: find_names(make_names([(name.casefold(), 0)]), folded) for name in lines}
    return sorted((name for name in places if places[name]), key=lambda name: places[name][0])


def entigraph(
    write: Write,
    documents: Sequence[Record],
    *,
    entities: Sequence[Sequence[str]] | None = None,
    each: int = 8,
    sizes: tuple[int, ...] = (2, 3),
    seed: int = 0,
) -> list[Record]:
    """Texts about how the entities of each document relate: `each` groups of two or three of them
    (section 2.2), drawn anew for each document, or all where there are fewer. `write` asks any
    language model; `entities` are extracted by it too where they are not given. Empty answers are
    left out. Raises ValueError where no document has two entities.
    """
    texts = [d.value["text"] for d in documents]
    found = extract_entities(write, texts) if entities is None else entities
    rng, prompts, origins = np.random.default_rng(seed), [], []
    for document, text, names in zip(documents, texts, found, strict=True):
        groups = [g for size in sizes for g in itertools.combinations(names, size)]
        for i in sorted(rng.permutation(len(groups))[:each]):
            said = " and ".join(filter(None, [", ".join(groups[i][:-1]), groups[i][-1]]))
            prompts.append(RELATE.format(document=text, entities=said))
            origins.append(f"{document.origin} ({said})")
    if not prompts:
        raise ValueError(
            "no document has two entities to be related; give entities, or a model that lists them"
        )
    answers = write(prompts)
    return [
        Record({"text": a.strip()}, o) for a, o in zip(answers, origins, strict=True) if a.strip()
    ]
