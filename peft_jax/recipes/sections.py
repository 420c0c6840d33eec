"""Sections that no stage has: what is measured, sampled, taught, injected and compared."""

from __future__ import annotations

from typing import Any, Literal

from peft_jax.core.options import configuration, option
from peft_jax.data.source import SourceConfig

Metric = Literal[
    "perplexity",
    "exact_match",
    "bleu",
    "rouge",
    "accuracy",
    "f1",
    "matthews",
    "pearson",
    "spearman",
    "seqeval",
    "retrieval",
]


@configuration
class TeachConfig:
    what: Literal["predictions", "texts"] = option(
        "predictions", "log-probabilities of the data, or completions of its prompts"
    )
    k: int = option(64, "tokens kept at each place; all others are kept together")
    dtype: Literal["float16", "float32"] = option("float16", "precision of the log-probabilities")
    shard_rows: int = option(256, "rows in a shard")
    url: str | None = option(
        None, "an OpenAI-compatible endpoint as the teacher, as http://localhost:8000/v1"
    )
    model: str | None = option(None, "the endpoint's name of the model")
    key_variable: str = option(
        "OPENAI_API_KEY", "environment variable with the endpoint's key, if it needs one"
    )


@configuration
class InjectConfig:
    by: Literal["training", "editing"] = option(
        "training", "train `method` on the facts, or write them as `edit` says"
    )
    unseen: bool = option(False, "ask for the facts of the unseen subjects too (data.unseen)")
    retained: SourceConfig | None = option(
        None, "texts on other things, whose perplexity says what was lost"
    )


@configuration
class GenerateConfig:
    prompts: list[str | list[dict[str, Any]]] = option(
        [], "prompts to continue, before and after training: texts, or lists of messages"
    )
    chat: Literal["auto"] | bool = option(
        "auto",
        "whether texts are a user's turn in the chat template; auto where the data is of kind chat",
    )
    max_tokens: int = option(64, "tokens to generate")
    temperature: float = option(0.8, "0 for greedy")
    top_k: int = option(0, "sample among the k most likely; 0 for all")
    top_p: float = option(0.95, "sample among the most likely that hold this much probability")
    stop: list[str] = option([], "strings that end a continuation")
    seed: int = option(0, "of sampling")
    cache: Literal["int8", "fp8"] | None = option(
        None, "precision of the key/value cache; by default the model's"
    )


@configuration
class EvaluateConfig:
    metrics: list[Metric] = option(
        [],
        "what to measure, by default what is usual for the task; exact_match, bleu and rouge "
        "generate completions",
    )
    limit: int = option(200, "records to generate for")
    max_tokens: int = option(64, "tokens to generate for a record")
    batch_size: int = option(16, "records generated for at a time")


@configuration
class RecipeConfig:
    title: str | None = option(None, "how reports call it; by default its name")
    technique: str | None = option(None, "the technique that it stands for, as pruning")
    run: dict[str, Any] = option(
        {},
        "sections of options that differ from the run at the top, as {method: {name: full}}; "
        "{NAME} in a text is the folder of an earlier recipe's run of the same seed",
    )
    rates: list[float] = option(
        [],
        "values of optimizer.learning_rate that are tried on the first seed; the one with the "
        "lowest loss on data.validation is kept. All recipes have as many, or none has any",
    )


@configuration
class CompareConfig:
    recipes: dict[str, RecipeConfig] = option({}, "what is compared, by name, in this order")
    reference: str = option("full", "the recipe that the others are measured against")
    seeds: list[int] = option([0, 1, 2], "values of train.seed, a run each")
    quality: str = option("loss", "the metric that says how good a model is on data.test")
    forgetting: SourceConfig | None = option(
        None,
        "other text, whose loss before and after says what was forgotten; by default texts that "
        "the base itself writes",
    )
    own_texts: int = option(64, "how many texts the base writes")
    own_tokens: int = option(128, "tokens of each of them")
    generate_rows: int = option(8, "rows of the measured generation")
    generate_tokens: int = option(64, "tokens of each of them")
    devices: int = option(1, "runs at a time, each on a device of its own")
    only: list[str] = option(
        [], "recipes whose runs are done now, as [full, lora]; the report waits for the others"
    )
    keep_states: bool = option(False, "keep checkpoints and states of runs that are finished")
