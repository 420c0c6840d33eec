"""Evaluation: perplexity, and exact match, BLEU and ROUGE of generated completions (sacrebleu,
rouge-score).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from peft_jax.core.bind import bind, bound_of
from peft_jax.core.partition import partition
from peft_jax.data import Record, Rows
from peft_jax.data.chat import ASSISTANT, answer_of, chat_prompt, content_text
from peft_jax.data.encode import PLAIN, ChatOptions, template_options
from peft_jax.generation.generate import generate
from peft_jax.models.tables import check_rows, first_position
from peft_jax.objectives.reading import Objective
from peft_jax.objectives.tokens import next_token
from peft_jax.training.loop import run_evaluation
from peft_jax.training.step import make_evaluation

Prompt = str | tuple[int, ...]


def perplexity(
    model: Any,
    params: Any,
    rows: Rows,
    *,
    batch_size: int = 8,
    mesh: Mesh | None = None,
    objective: Objective = next_token,
) -> dict[str, float]:
    """Loss (nats per token), next-token accuracy and perplexity of `rows`."""
    check_rows(model, rows, before=first_position(params))
    trainable, frozen = partition(params)
    evaluate = jax.jit(make_evaluation(objective, bind(model)))
    return run_evaluation(evaluate, trainable, frozen, rows, batch_size, mesh)


def exact_match(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """The share of predictions equal to one of their references, surrounding blanks aside."""
    hits = [
        p.strip() in {r.strip() for r in rs} for p, rs in zip(predictions, references, strict=True)
    ]
    return sum(hits) / len(hits)


def bleu(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus BLEU of sacrebleu, over several references each, not everywhere as many."""
    import sacrebleu

    most = max(map(len, references))
    streams = [[rs[i] if i < len(rs) else None for rs in references] for i in range(most)]
    # None, a reference that is not there, is left out of sacrebleu's annotations
    score = sacrebleu.corpus_bleu(list(predictions), streams)  # pyright: ignore[reportArgumentType]
    return score.score


def rouge(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Mean F1 of ROUGE-L, the best over a prediction's references."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    best = [
        max(scorer.score(r, p)["rougeL"].fmeasure for r in rs)
        for p, rs in zip(predictions, references, strict=True)
    ]
    return sum(best) / len(best)


GENERATED: dict[str, Callable[[Sequence[str], Sequence[Sequence[str]]], float]] = {
    "exact_match": exact_match,
    "bleu": bleu,
    "rouge": rouge,
}


def generated_metrics(
    model: Any,
    params: Any,
    records: Sequence[Record],
    tokenizer: Any,
    metrics: Sequence[str],
    *,
    limit: int = 200,
    max_tokens: int = 64,
    batch_size: int = 16,
    beside: Callable[[Any], Any] | None = None,
    chat: ChatOptions = PLAIN,
) -> dict[str, float]:
    """Metrics of greedy completions of the records' prompts (or last assistant turns, rendered as
    `chat` says), several references per prompt.

    `beside` as in `generate`.
    """
    references: dict[Prompt, list[str]] = defaultdict(list)
    for record in records:
        prompt, answer = prompt_and_answer(record, tokenizer, chat)
        references[prompt].append(answer)
    prompts = list(references)[:limit]
    apply = bound_of(model)
    predictions: list[str] = []
    for start in range(0, len(prompts), batch_size):
        part = prompts[start : start + batch_size]
        full: list[Any] = part + [part[-1]] * (batch_size - len(part))  # one shape, one compilation
        texts = generate(
            apply, params, full, tokenizer=tokenizer, max_tokens=max_tokens, beside=beside
        )
        predictions += as_texts(tokenizer, texts[: len(part)])
    return {
        name: GENERATED[name](predictions, [references[p] for p in prompts]) for name in metrics
    }


def prompt_and_answer(
    record: Record, tokenizer: Any, chat: ChatOptions = PLAIN
) -> tuple[Prompt, str]:
    """What to generate from, and what was expected: of a completion its prompt's text, of a
    conversation the tokens of the prompt for its last assistant turn.
    """
    value = record.value
    if "messages" not in value:
        return value["prompt"], value["completion"]
    messages = value["messages"]
    last = max(i for i, m in enumerate(messages) if m["role"] in ASSISTANT)
    options = {**chat.options, **template_options(value)}
    ids = chat_prompt(tokenizer, messages[:last], value.get("tools"), **options)
    return tuple(ids), content_text(messages[last])


def as_texts(tokenizer: Any, made: Sequence[Any]) -> list[str]:
    """What was generated, as texts: of tokens, which go on from the prompt of a conversation, what
    the turn says.
    """
    return [text if isinstance(text, str) else answer_of(tokenizer, text) for text in made]
