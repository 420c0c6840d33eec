"""What the configuration's `data.knowledge` section holds: knowledge beside the data."""

from __future__ import annotations

from typing import Literal

from peft_jax.core.options import configuration, option
from peft_jax.data.source import SourceConfig


@configuration
class KnowledgeConfig:
    triples: SourceConfig | None = option(
        None, "facts set beside the mentions of their subjects in the input (K-BERT)"
    )
    triples_each: int = option(4, "of them at a mention, at most")
    triples_room: int = option(32, "tokens by which a row grows to hold them")
    entities: str | None = option(
        None, "an .npz file of names and vectors, fused where one of them is mentioned"
    )
    passages: SourceConfig | None = option(
        None, "facts, a passage for each subject, or texts, read before each prompt (RAFT)"
    )
    passages_kind: Literal["facts", "text"] = option("facts", "what the passages are made of")
    passages_each: int = option(3, "passages before a prompt, those that BM25 finds")
    oracle_share: float = option(
        0.8, "share of the training prompts that have the best passage among theirs"
    )
    allowed_weight: float = option(
        0.0, "of facts: weight of the semantic loss, that an object of the relation comes"
    )
    lexicon: str | None = option(
        None, "of tagging: a file of lines word<TAB>label[<TAB>weight], the labels that words have"
    )
    lexicon_weight: float = option(0.1, "weight of the divergence from the lexicon")
