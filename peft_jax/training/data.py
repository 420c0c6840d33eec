"""The data of a run: what the configuration says of it, and a model that reads it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from jax.sharding import Mesh

from peft_jax.core.options import ConfigError, configuration, option
from peft_jax.data import Record, read_records
from peft_jax.data.chat import Turns
from peft_jax.data.encode import ChatOptions
from peft_jax.data.formats import Kind
from peft_jax.data.mixture import check_sources
from peft_jax.data.records import told_kind
from peft_jax.data.source import MixedSource, SourceConfig
from peft_jax.knowledge.facts import part_of, read_templates
from peft_jax.knowledge.section import KnowledgeConfig

Model = Any


@configuration
class DataConfig:
    train: SourceConfig = option(SourceConfig(), "what to learn from")
    sources: list[MixedSource] = option(
        [],
        "several sources to learn from in place of data.train, as [{path: a.jsonl, weight: 2}, "
        "{path: b.jsonl, weight: 1}] or with epochs",
    )
    validation: SourceConfig | None = option(
        SourceConfig(split="validation"), "what to evaluate on during training", alters=False
    )
    test: SourceConfig | None = option(
        None, "what to evaluate on at the end (by default the validation data)", alters=False
    )
    kind: Kind | None = option(
        None,
        "what a record is, as chat; by default told from its columns, or what the model's task "
        "takes",
    )
    columns: dict[str, str] = option(
        {}, "names of the record's fields in the source, as {prompt: question}"
    )
    delimiter: str | None = option(None, "what separates the fields on each line of a .txt file")
    template: str | None = option(
        None, "chat template: a name, as chatml, or a file; by default the tokenizer's own"
    )
    template_options: dict[str, Any] = option(
        {}, "variables given to the chat template, as {enable_thinking: false}"
    )
    turns: Turns = option(
        "all",
        "of conversations whose template rewrites earlier turns: all turns, each in a row as the "
        "model will meet it, or last, one row in which what is faithful is learnt",
    )
    labels: list[str] = option(
        [],
        "names of the classes of a new head; by default the checkpoint's, or the training data's",
    )
    label_kind: Literal["names", "numbers"] | None = option(
        None, "what labels are; numbers are regressed; by default told"
    )
    sequence_length: int = option(256, "tokens in a row")
    target_length: int | None = option(
        None, "tokens of an encoder-decoder's target; by default as many as in a row"
    )
    stride: int | None = option(
        None, "tokens by which the rows of a long context overlap; by default a quarter of a row"
    )
    templates: str | None = option(
        None, "of facts: a YAML file of ways to say each relation, in Jinja"
    )
    held_out: int = option(
        1, "of facts: how many of each relation's templates, the last ones, are kept for asking"
    )
    unseen: float = option(
        0.1, "of facts: the share of subjects that are unseen, for sources with a part"
    )
    knowledge: KnowledgeConfig = option(
        KnowledgeConfig(), "knowledge beside the data: in the input and in the loss"
    )
    replay: SourceConfig | None = option(
        None, "texts of another kind to go on with beside the data, against forgetting"
    )
    replay_share: float = option(0.5, "share of the training rows that are replayed")
    mask_share: float = option(
        0.15, "share of the tokens that a masked language model has to guess"
    )
    temperature: float = option(0.05, "of the similarities of pairs")
    same_texts: Literal["excluded", "negatives"] = option(
        "excluded", "what texts of a batch are that equal one of a pair's"
    )
    cache: str | None = option(
        None,
        "folder that keeps the tokenized and packed rows of texts, completions and conversations, "
        "read from there as they are needed; by default they are in memory",
        alters=False,
    )
    workers: int = option(
        0,
        "processes that render and tokenize what data.cache is to hold; 0 for this one alone",
        alters=False,
    )
    packing: bool = option(
        True, "several examples in a row, kept apart by segment ids (of a causal language model)"
    )
    too_long: Literal["skip", "truncate", "stop"] = option(
        "skip", "what to do with a completion or chat that does not fit"
    )
    on_error: Literal["skip", "stop"] = option("skip", "what to do with a malformed record")

    @property
    def chat(self) -> ChatOptions:
        """How conversations are rendered and what of them is learnt."""
        return ChatOptions(self.template_options, self.turns)

    def as_text(self) -> DataConfig:
        """The same for plain text: no facts, no columns, no passages."""
        knowledge = dataclasses.replace(self.knowledge, passages=None)
        return dataclasses.replace(self, kind="text", columns={}, sources=[], knowledge=knowledge)


class Subject(NamedTuple):
    """A model with what it takes to use it on data: its tokenizer, the data's options, the batch
    size and the mesh; the seed of the rows' order, what of the loss is the trainer's choice, and
    how often the training rows are among those that are trained on (see `make_rows`).
    """

    model: Model
    tokenizer: Any
    data: DataConfig
    batch_size: int
    mesh: Mesh | None
    seed: int = 0
    loss_chunk: int | None = None
    router_loss: float | None = None
    passes: int = 1
    objective: str | None = None
    objective_options: Mapping[str, Any] = MappingProxyType({})


def check_data(data: DataConfig) -> None:
    """Raise ConfigError for values that cannot be."""
    k, facts = data.knowledge, data.kind == "facts"
    shares = {
        "data.unseen": data.unseen,
        "data.replay_share": data.replay_share,
        "data.knowledge.oracle_share": k.oracle_share,
    }
    if wrong := [n for n, share in shares.items() if not 0.0 <= share <= 1.0]:
        raise ConfigError(f"option {wrong[0]!r} must lie in [0, 1], got {shares[wrong[0]]}")
    if data.sequence_length < 1:
        raise ConfigError(
            f"option 'data.sequence_length' must be at least 1, got {data.sequence_length}"
        )
    if data.workers < 0:
        raise ConfigError(f"option 'data.workers' must not be negative, got {data.workers}")
    if data.replay is not None and data.replay_share >= 1.0:
        raise ConfigError("data.replay_share=1 leaves nothing of data.train")
    if k.allowed_weight and not facts:
        raise ConfigError(
            "data.knowledge.allowed_weight is about the objects of facts: set data.kind=facts"
        )
    for name in ("train", "validation", "test"):
        check_source(f"data.{name}", getattr(data, name), parted=facts, phrased=facts)
    check_source("data.replay", data.replay)
    check_sources(data.sources)
    for i, source in enumerate(data.sources):
        check_source(f"data.sources.{i}", source, parted=facts, phrased=facts)
    check_source("data.knowledge.triples", k.triples, parted=True)
    check_source("data.knowledge.passages", k.passages, parted=k.passages_kind == "facts")


def check_source(
    name: str, source: SourceConfig | None, *, parted: bool = False, phrased: bool = False
) -> None:
    """Raise ConfigError for options of facts of a source that has none."""
    if source is not None and source.part and not parted:
        raise ConfigError(f"{name}.part is about facts: leave it out of other data")
    if source is not None and source.phrasing and not phrased:
        raise ConfigError(
            f"{name}.phrasing is about facts that are trained or asked for: leave it out of "
            "other data"
        )


def kind_in(data: DataConfig, source: SourceConfig, kinds: Sequence[Kind]) -> Kind:
    """The kind of a source's records: as configured, or told from its columns where a task learns
    from that kind, else the task's usual one. Raises ConfigError for preference pairs.
    """
    if data.kind is not None:
        return data.kind
    if len(kinds) == 1:
        return kinds[0]
    kind = told_kind(
        source.path, split=source.split, columns=data.columns, delimiter=data.delimiter
    )
    if kind == "preference":
        raise ConfigError(
            f"{source.path} holds preference pairs (chosen and rejected), from which nothing here "
            "learns yet: set data.kind and data.columns to train on the chosen answers, as "
            "{completion: chosen}"
        )
    return kind if kind in kinds and kind != "facts" else kinds[0]


def facts_of(data: DataConfig, source: SourceConfig) -> list[Record]:
    """The facts of a source, those of the subjects that it is to have."""
    facts = read_records(
        source.path,
        kind="facts",
        split=source.split,
        columns=data.columns if data.kind == "facts" else None,
        delimiter=data.delimiter,
        on_error=data.on_error,
        limit=source.limit,
    )
    return facts if source.part is None else part_of(facts, source.part, data.unseen)


def templates_of(data: DataConfig) -> dict[str, list[str]]:
    """The ways to say each relation. Raises ConfigError where there are none."""
    if data.templates is None:
        raise ConfigError(
            "data.kind=facts needs data.templates, a YAML file of ways to say each relation"
        )
    return read_templates(Path(data.templates))


def names_of_labels(model: Model) -> list[str] | None:
    """The names of a model's classes; None of a model that regresses."""
    hf = json.loads(model.config.hf_config)
    if model.config.num_labels == 1:
        return None
    names = hf.get("id2label") or {}
    return [names.get(str(i), f"LABEL_{i}") for i in range(model.config.num_labels)]
