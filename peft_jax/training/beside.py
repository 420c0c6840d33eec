"""Knowledge beside the data: triples, entities and rules, in the rows and in the loss."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from peft_jax.core.options import ConfigError
from peft_jax.data import with_fields
from peft_jax.knowledge.constraints import objects_of, read_lexicon
from peft_jax.knowledge.inputs import (
    attach_triples,
    make_lexicon,
    make_triples,
    mark_entities,
    read_entities,
)
from peft_jax.models.tables import check_rows
from peft_jax.training.data import Subject, facts_of, names_of_labels


def with_knowledge(s: Subject, rows: Any) -> Any:
    """Rows with what is known about them beside. Raises ValueError where the model has no row for
    what they hold.
    """
    k = s.data.knowledge
    if k.lexicon is not None:
        if s.model.task != "token_classification":
            raise ConfigError(
                "data.knowledge.lexicon says the labels of words, and this is a "
                f"{s.model.task} model"
            )
        words, _ = read_lexicon(Path(k.lexicon), names_of_labels(s.model) or [])
        marked = mark_entities(rows, make_lexicon(s.tokenizer, words), everywhere=True)
        rows = with_fields(rows, rules=np.where(rows.weights > 0, marked.entities, 0))
    rows = rows if (add := beside(s)) is None else add(rows)
    check_rows(s.model, rows, tokenizer=s.tokenizer)
    return rows


def is_informed(s: Subject) -> bool:
    """Whether triples or entities stand beside the rows."""
    return s.data.knowledge.triples is not None or s.data.knowledge.entities is not None


def beside(s: Subject) -> Callable[[Any], Any] | None:
    """What sets the triples and entities of `data.knowledge` beside rows of tokens; None where
    there are none.

    Raises ConfigError for an encoder-decoder.
    """
    k = s.data.knowledge
    if is_informed(s) and s.model.task == "seq2seq_lm":
        raise ConfigError(
            "data.knowledge: triples and entities are for encoders and decoders, not for "
            "encoder-decoders"
        )
    steps: list[Callable[[Any], Any]] = []
    if k.entities is not None:
        steps.append(
            functools.partial(
                mark_entities, lexicon=make_lexicon(s.tokenizer, read_entities(Path(k.entities))[0])
            )
        )
    if k.triples is not None:
        triples = make_triples(s.tokenizer, facts_of(s.data, k.triples))
        steps.append(
            functools.partial(
                attach_triples, triples=triples, most=k.triples_each, room=k.triples_room
            )
        )
    return (lambda rows: functools.reduce(lambda r, step: step(r), steps, rows)) if steps else None


def rule_tables(s: Subject) -> dict[str, tuple[np.ndarray, float]]:
    """The tables of `constrained`: the objects that relations allow, or the labels that a lexicon
    gives words.
    """
    k = s.data.knowledge
    if k.lexicon is not None:
        return {
            "prior": (
                read_lexicon(Path(k.lexicon), names_of_labels(s.model) or [])[1],
                k.lexicon_weight,
            )
        }
    if k.allowed_weight:
        if s.model.task != "causal_lm":
            raise ConfigError(
                "data.knowledge.allowed_weight is for causal language models, not a "
                f"{s.model.task} model"
            )
        width = s.model.config.vocab_size
        return {
            "allowed": (
                objects_of(facts_of(s.data, s.data.train), s.tokenizer, width)[1],
                k.allowed_weight,
            )
        }
    return {}
