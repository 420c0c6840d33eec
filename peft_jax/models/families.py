"""The families of models: from a Hugging Face `model_type` to a module, its configuration, and how
checkpoints name things.

A family is a record in the file of its modules (`FAMILY`, see `family.py`), or a registered one.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from peft_jax.core.attachment import module_at
from peft_jax.core.registry import nearest
from peft_jax.core.roles import FAMILIES
from peft_jax.core.select import OUTPUT_EMBEDDING
from peft_jax.models.blocks import Task
from peft_jax.models.family import Family

# The ends of Hugging Face's class names.
_CLASSES: dict[str, Task] = {
    "ForCausalLM": "causal_lm",
    "LMHeadModel": "causal_lm",
    "ForMaskedLM": "masked_lm",
    "ForPreTraining": "masked_lm",
    "ForConditionalGeneration": "seq2seq_lm",
    "ForSequenceClassification": "sequence_classification",
    "ForTokenClassification": "token_classification",
    "ForQuestionAnswering": "question_answering",
    "Model": "feature_extraction",
}


def register_family(family: Family) -> Family:
    """Make a family known to `load`, to roles and to the matrix of families. Raises ValueError for
    a `model_type` that another one has.
    """
    return FAMILIES.register(family)


def family_of(model_type: str) -> Family:
    """The family of a `model_type`. Raises ValueError for an unsupported one, naming the supported
    ones.
    """
    if model_type not in FAMILIES:
        raise ValueError(
            f"model_type {model_type!r} is not supported; supported families: "
            f"{', '.join(sorted(FAMILIES))}"
        )
    return FAMILIES[model_type]


def tied_head(params: Any) -> tuple[str, str] | None:
    """(path of the token embedding, Hugging Face's name of the head) of a tree whose head is its
    embedding; None for others.
    """
    if not isinstance(params, Mapping):
        return None
    family = next(
        (f for f in FAMILIES.values() if "embedding" in module_at(params, f.embedding)), None
    )
    if family is None:
        return None
    path = family.head.replace(".", "/")
    encoder = "masked_lm" in family.tasks  # its head has parameters of its own
    other = "kernel" in module_at(params, path) or (path.partition("/")[0] in params) != encoder
    heads: Any = family.module
    return (
        None
        if other or (not encoder and set(heads.heads) & set(params))
        else (family.embedding, family.head)
    )


def untie(params: Any) -> Any:
    """The tree with an embedding of the head's own beside the embedding, equal at first:
    `output_embedding` [V, D].

    What looks up and what makes logits can then be adapted apart, as `embed_tokens/embedding` and
    `embed_tokens/output_embedding`. Raises ValueError for a tree whose head is not its embedding.
    """
    found = tied_head(params)
    if found is None:
        raise ValueError("the tree has no head that is tied to its embedding")

    def put(tree: Any, parts: list[str]) -> Any:
        if parts:
            return {**tree, parts[0]: put(tree[parts[0]], parts[1:])}
        return {OUTPUT_EMBEDDING: tree["embedding"], **tree}

    return put(params, found[0].split("/"))


def task_of(hf_config: Any, task: Task | None = None) -> Task:
    """The task that a model is for: the given one, or the checkpoint's own by its class's name.

    Raises ValueError for a task that the family has no head for.
    """
    tasks = family_of(hf_config.model_type).tasks
    if task is None:
        own = (getattr(hf_config, "architectures", None) or [""])[0]
        found = next((t for end, t in _CLASSES.items() if own.endswith(end)), None)
        return found if found in tasks else tasks[0]
    if task not in tasks:
        close = nearest(task, tasks)
        raise ValueError(
            f"a {hf_config.model_type} model has no head for {task!r}.{close} It has: "
            f"{', '.join(tasks)}"
        )
    return task


def hf_class(model_type: str, task: Task) -> str:
    """The name of Hugging Face's class of such a model."""
    ends = {t: end for end, t in reversed(_CLASSES.items())}
    family = family_of(model_type)
    return family.classes.get(task, family.class_name + ends[task])


def introduce(model_type: str) -> None:
    """Let transformers read the configs of a family that it does not know, by the class of the one
    that the family is like. Raises ValueError for a `model_type` that neither knows.
    """
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if model_type in CONFIG_MAPPING:
        return
    family = family_of(model_type)
    base = CONFIG_MAPPING[family.like]
    made = type(f"{family.class_name}Config", (base,), {"model_type": model_type})
    AutoConfig.register(model_type, made)


def remade(config: Any, hf: Mapping[str, Any]) -> Any:
    """A model's configuration from another Hugging Face config (plain data), with what that one
    does not say.
    """
    from transformers import AutoConfig

    introduce(hf["model_type"])
    rest = {k: v for k, v in hf.items() if k != "model_type"}
    made = family_of(hf["model_type"]).config(AutoConfig.for_model(hf["model_type"], **rest))
    return dataclasses.replace(made, generation_config=config.generation_config)


def hf_config_of(model: Any) -> dict[str, Any]:
    """The Hugging Face config of a model as plain data, its class and labels set."""
    config = json.loads(model.config.hf_config)
    config["architectures"] = [hf_class(model.config.model_type, model.task)]
    count = model.config.num_labels
    if len(config.get("id2label") or {}) != count and model.task.endswith("classification"):
        names = [f"LABEL_{i}" for i in range(count)]
        config["id2label"], config["label2id"] = (
            dict(enumerate(names)),
            {name: i for i, name in enumerate(names)},
        )
    return config
