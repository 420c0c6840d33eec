"""`peft-jax inject`: facts put into a model, by training or by editing, and what it knows before
and after.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from peft_jax.core.bind import Bound
from peft_jax.core.files import write_json
from peft_jax.core.options import ConfigError
from peft_jax.core.sharding import fetch
from peft_jax.data import Record, evaluation_batches, unpadded
from peft_jax.data.source import SourceConfig
from peft_jax.knowledge.evaluation import all_likeliest
from peft_jax.knowledge.facts import question_of
from peft_jax.knowledge.inputs import reads_knowledge
from peft_jax.knowledge.requests import Edit
from peft_jax.objectives.tokens import TOKENS
from peft_jax.recipes.edit import ADAPTER, edited_tree
from peft_jax.recipes.plan import without_stages
from peft_jax.recipes.report import leave_report
from peft_jax.recipes.run_config import RunConfig
from peft_jax.recipes.setup import Setup, set_up, subject_in
from peft_jax.recipes.train import run_training
from peft_jax.training.data import DataConfig, Subject, facts_of, templates_of
from peft_jax.training.evaluate import perplexity
from peft_jax.training.loop import on_devices
from peft_jax.training.report import before_and_after
from peft_jax.training.rows import read_source, text_rows
from peft_jax.training.tasks import objective_of, rows_of


def run_injection(config: RunConfig, console: Console | None = None) -> dict[str, dict[str, float]]:
    """The whole of `peft-jax inject`: what the model knows, injection (`inject.by`), and what it
    knows then.

    Of the facts it is asked in the words of training (`said`), in words that were held out
    (`recall`) and, with `inject.unseen`, about subjects that it never met (`unseen`); `perplexity`
    is that of `inject.retained`. Returns the numbers before and after, which also stand in
    `output`/injection.json. Raises ConfigError for data of another kind.
    """
    without_stages(config, "inject")
    if config.data.kind != "facts":
        raise ConfigError("inject needs data.kind=facts, and data.templates to say them in words")
    if config.inject.unseen and config.data.train.part != "known":
        raise ConfigError(
            "inject.unseen asks about subjects that are not trained: set data.train.part=known"
        )
    console, out = console or Console(), Path(config.output)
    setup = set_up(config)
    if setup.model.task != "causal_lm":
        raise ConfigError(
            f"facts are injected into causal language models, and this one is a {setup.model.task}"
        )
    before = knowledge_of(config, setup, setup.params)
    if config.inject.by == "training":
        params = run_training(config, console, setup).params
    else:
        edits = facts_as_edits(config.data)
        params = edited_tree(config, setup, edits, console, out / ADAPTER)
    after = knowledge_of(config, setup, params)
    if jax.process_index() == 0:
        console.print(before_and_after(before, after))
        write_json(out / "injection.json", {"before": before, "after": after})
    leave_report(config)
    return {"before": before, "after": after}


def knowledge_of(config: RunConfig, setup: Setup, params: Any) -> dict[str, float]:
    """What a model knows of the configured facts, and the perplexity of what is to be retained."""
    train = config.data.train
    asked = {
        "said": dataclasses.replace(train, phrasing="train"),
        "recall": dataclasses.replace(train, phrasing="held_out"),
    }
    if config.inject.unseen:
        asked["unseen"] = dataclasses.replace(train, phrasing="held_out", part="unseen")
    data, subject = config.data, subject_in(config, setup)

    def known(source: SourceConfig) -> float:
        return recall(subject, params, read_source(data, source, "causal_lm", subject.seed))

    found = {name: known(source) for name, source in asked.items()}
    return found | retained(subject, params, config.inject.retained)


def retained(subject: Subject, params: Any, source: SourceConfig | None) -> dict[str, float]:
    """The perplexity of texts on other things; nothing without any."""
    if source is None:
        return {}
    found = perplexity(
        subject.model,
        params,
        text_rows(subject, source),
        batch_size=subject.batch_size,
        mesh=subject.mesh,
        objective=objective_of(subject),
    )
    return {"perplexity": found["perplexity"]}


def recall(subject: Subject, params: Any, records: Sequence[Record]) -> float:
    """The share of completions of which each token is the likeliest one (the end is not asked for),
    as LAMA's precision at 1 (Petroni et al. 2019), of answers of several tokens too.
    """
    data = dataclasses.replace(subject.data, packing=False)
    rows = rows_of(subject._replace(data=data), records)
    end = subject.tokenizer.eos_token_id
    rows = unpadded(
        rows._replace(weights=np.where(rows.targets == end, 0.0, rows.weights).astype(np.float32))
    )
    apply = reads_knowledge(subject.model)
    said = apply.program(_said)
    found = [
        fetch(said(apply, params, on_devices(b, subject.mesh)))
        for b in evaluation_batches(rows, subject.batch_size)
    ]
    return float(np.concatenate(found)[: len(rows.tokens)].mean())


def _said(apply: Bound, params: Any, batch: Any) -> jax.Array:
    logits = TOKENS.head(apply, params, batch)(TOKENS.states(apply, params, batch, None))
    return all_likeliest(logits, batch["targets"], batch["weights"])


def facts_as_edits(data: DataConfig) -> list[Edit]:
    """Each fact of data.train as an edit, in the words of the first template that ends with the
    object.
    """
    templates = templates_of(data)
    return [
        Edit(*question_of(fact, templates, data.held_out), fact.value["object"])
        for fact in facts_of(data, data.train)
    ]
