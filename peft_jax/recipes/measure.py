"""What a run measures and shows: metrics on the held-out data, samples."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console

from peft_jax.core.options import ConfigError
from peft_jax.data.chat import chat_prompt, content_text
from peft_jax.generation.generate import generate
from peft_jax.knowledge.inputs import reads_knowledge
from peft_jax.recipes.run_config import RunConfig
from peft_jax.recipes.setup import Setup, subject_in
from peft_jax.training.beside import beside
from peft_jax.training.evaluate import as_texts, generated_metrics, perplexity
from peft_jax.training.predictions import classify
from peft_jax.training.rows import make_rows, records_of
from peft_jax.training.tasks import TASKS, kind_of, objective_of, usual_metrics


def printer(console: Console) -> Callable[[str], None]:
    """What prints lines as they are."""
    return functools.partial(console.print, highlight=False, markup=False, soft_wrap=True)


def held_out(config: RunConfig) -> Any:
    """The source that is measured on; None where there is none."""
    return config.data.test or config.data.validation


def held_rows(config: RunConfig, setup: Setup) -> Any:
    """The rows that are measured on; None where there are none."""
    held = held_out(config)
    return None if held is None else make_rows(subject_in(config, setup), held)


def wanted_metrics(config: RunConfig, setup: Setup) -> list[str]:
    """The names of what is measured. Raises ConfigError for a metric that the task does not
    have.
    """
    task = TASKS[setup.model.task]
    names = [*(config.evaluate.metrics or usual_metrics(subject_in(config, setup)))]
    there = (*task.metrics, *task.others)
    if unknown := [n for n in names if n not in there]:
        raise ConfigError(
            f"evaluate.metrics: a {setup.model.task} model has no {unknown[0]!r}; it has "
            f"{', '.join(there)}"
        )
    return names


def measure(config: RunConfig, setup: Setup, params: Any, rows: Any) -> dict[str, float]:
    """The loss and the wanted metrics on the held-out data."""
    held, task = held_out(config), TASKS[setup.model.task]
    if held is None or rows is None:
        return {}
    e, subject = config.evaluate, subject_in(config, setup)
    names, language = wanted_metrics(config, setup), "perplexity" in task.metrics
    metrics: dict[str, float] = {}
    if not language or "perplexity" in names:
        metrics = perplexity(
            setup.model,
            params,
            rows,
            batch_size=config.train.batch_size,
            mesh=setup.mesh,
            objective=objective_of(subject),
        )
    wanted = [n for n in names if n != "perplexity"]
    if not wanted:
        return metrics
    records = records_of(subject, held)
    if task.scores is not None:
        return {"loss": metrics["loss"], **task.scores(subject, params, records, wanted)}
    if kind_of(subject) == "text":
        raise ConfigError(f"evaluate.metrics {wanted[0]!r} needs data of kind completion or chat")
    return metrics | generated_metrics(
        reads_knowledge(setup.model),
        params,
        records,
        setup.tokenizer,
        wanted,
        limit=e.limit,
        max_tokens=e.max_tokens,
        batch_size=e.batch_size,
        beside=beside(subject),
        chat=config.data.chat,
    )


def samples_of(config: RunConfig, setup: Setup, params: Any) -> list[str]:
    """What the model makes of the configured prompts."""
    g, task, subject = config.generate, setup.model.task, subject_in(config, setup)
    if not g.prompts:
        return []
    if task == "sequence_classification":
        texts = [shown_prompt(p) for p in g.prompts]
        return [f" -> {label}" for label in classify(subject, params, texts)]
    if task not in ("causal_lm", "seq2seq_lm"):
        raise ConfigError(f"generate.prompts are of no use to a {task} model")
    made = generate(
        reads_knowledge(setup.model),
        params,
        _prompts(config, setup),
        tokenizer=setup.tokenizer,
        max_tokens=g.max_tokens,
        temperature=g.temperature,
        top_k=g.top_k,
        top_p=g.top_p,
        stop=g.stop,
        seed=g.seed,
        cache_dtype=g.cache,
        beside=beside(subject),
    )
    return as_texts(setup.tokenizer, made)


def _prompts(config: RunConfig, setup: Setup) -> list[Any]:
    """The configured prompts: texts as they are, or, where some go through the chat template, the
    tokens of all.
    """
    g, tokenizer = config.generate, setup.tokenizer
    chat = g.chat if isinstance(g.chat, bool) else kind_of(subject_in(config, setup)) == "chat"
    if not chat and all(isinstance(p, str) for p in g.prompts):
        return list(g.prompts)
    options = config.data.template_options
    made = []
    for prompt in g.prompts:
        if isinstance(prompt, str) and not chat:
            made.append(tokenizer(prompt, verbose=False)["input_ids"])
            continue
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        made.append(chat_prompt(tokenizer, messages, **options))
    return made


def shown_prompt(prompt: str | list[dict[str, Any]]) -> str:
    """A prompt as text: of messages the last one's."""
    return prompt if isinstance(prompt, str) else content_text(prompt[-1])


def show_samples(
    say: Callable[[str], None], config: RunConfig, samples: Mapping[str, list[str]]
) -> None:
    """Print each prompt with what became of it, before and after."""
    for i, prompt in enumerate(config.generate.prompts):
        say(f"\nprompt: {shown_prompt(prompt)}")
        for when, texts in samples.items():
            say(f"{when}: {' '.join(texts[i].split())}")


def shown(metrics: Mapping[str, float]) -> str:
    """Metrics as a line."""
    return ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
