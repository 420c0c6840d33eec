"""What the configuration's `distill.features` and `distill.on_policy` hold."""

from __future__ import annotations

from typing import Any

from peft_jax.core.options import configuration, option


@configuration
class FeatureConfig:
    weight: float = option(1.0, "weight of this loss")
    layers: list[tuple[int, int]] | None = option(
        None,
        "pairs of the student's and the teacher's layers, numbered from 1 (0: embeddings); by "
        "default spread evenly",
    )
    options: dict[str, Any] = option({}, "relation_heads of minilmv2")


@configuration
class OnPolicyConfig:
    share: float = option(1.0, "share of the batches that the student writes itself")
    max_tokens: int = option(64, "tokens that it writes")
    temperature: float = option(1.0, "of its sampling; 0 for greedy")
    top_k: int = option(0, "sample among the k most likely; 0 for all")
    top_p: float = option(1.0, "sample among the most likely that hold this much probability")
    prompt_tokens: int = option(
        1, "least number of a row's tokens that stay as prompt; completions keep their prompts"
    )
    minillm: bool = option(False, "MiniLLM's policy gradient of the reverse divergence")
    teacher_share: float = option(0.0, "share of the teacher in what is sampled (MiniLLM: 0.2)")
