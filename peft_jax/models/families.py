"""The families of models: from a Hugging Face `model_type` to a module, its configuration, and how
checkpoints name things.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import flax.linen as nn

from peft_jax.core.attachment import module_at
from peft_jax.core.select import OUTPUT_EMBEDDING, nearest
from peft_jax.models.bert import Bert, Deberta, Roberta, bert_config, deberta_config
from peft_jax.models.blocks import Task
from peft_jax.models.config import DECODERS, decoder_config
from peft_jax.models.decoder import Decoder
from peft_jax.models.distilbert import DistilBert, distilbert_config
from peft_jax.models.gpt2 import GPT2, gpt2_config
from peft_jax.models.modernbert import ModernBert, modernbert_config
from peft_jax.models.t5 import T5, t5_config

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
_ENCODER_TASKS: tuple[Task, ...] = (
    "masked_lm",
    "sequence_classification",
    "token_classification",
    "question_answering",
    "feature_extraction",
)
_DECODER_TASKS: tuple[Task, ...] = (
    "causal_lm",
    "sequence_classification",
    "token_classification",
    "feature_extraction",
)


class Family(NamedTuple):
    """A family: its class of modules, the configuration out of Hugging Face's, Hugging Face's name
    of it, and its tasks.

    `prefix` is the module that holds everything but the head, `embedding` the path of the token
    embedding, and `head` Hugging Face's name of the layer whose weight is the embedding where it is
    tied. `absent` is a pattern of tensors that no checkpoint has, `spare` one of tensors that some
    have and the model does not need (copies of tied weights, buffers). `without_kernel` names, by
    task, the linear module of Hugging Face's class that may have no kernel here (a head that is the
    embedding, an unused pooler), `float32` the ends of names of modules that transformers keeps in
    float32 and treats apart.
    """

    module: type[nn.Module]
    config: Callable[[Any], Any]
    name: str
    tasks: tuple[Task, ...]
    prefix: str
    embedding: str
    head: str
    absent: str = "$^"
    spare: str = r".*\.position_ids"
    look_ups: tuple[
        str, ...
    ] = ()  # Hugging Face's modules that look tokens up, where `embedding` is not the one
    own_head: bool = False  # the head is the embedding unless the checkpoint has one
    without_kernel: Mapping[Task, str] = MappingProxyType({})
    float32: tuple[str, ...] = ()
    disk: tuple[
        tuple[str, str], ...
    ] = ()  # (pattern, replacement): from names of tensors to those in checkpoints


def _decoder(name: str) -> Family:
    spare = r".*\.rotary_emb\.inv_freq"  # buffers of old Llama checkpoints
    return Family(
        Decoder,
        decoder_config,
        name,
        _DECODER_TASKS,
        "model",
        "model/embed_tokens",
        "lm_head",
        spare=spare,
        without_kernel={"causal_lm": "lm_head"},
    )


_ROBERTA = Family(
    Roberta,
    bert_config,
    "Roberta",
    _ENCODER_TASKS,
    "roberta",
    "roberta/embeddings/word_embeddings",
    "lm_head.decoder",
    spare=r".*\.position_ids|lm_head\.decoder\..*|roberta\.pooler\..*",
    without_kernel={"masked_lm": "lm_head.decoder", "feature_extraction": "pooler.dense"},
)
_NAMES = {
    ("gpt2", "causal_lm"): "GPT2LMHeadModel",
    ("gemma3_text", "causal_lm"): "Gemma3ForCausalLM",
}  # else the rule holds
_DECODER_NAMES = {
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "gemma": "Gemma",
    "gemma2": "Gemma2",
    "gemma3_text": "Gemma3Text",
    "phi3": "Phi3",
    "smollm3": "SmolLM3",
    "olmo2": "Olmo2",
    "mixtral": "Mixtral",
    "qwen2_moe": "Qwen2Moe",
    "qwen3_moe": "Qwen3Moe",
}
FAMILIES: dict[str, Family] = {
    **{model_type: _decoder(_DECODER_NAMES[model_type]) for model_type in DECODERS},
    "mixtral": _decoder("Mixtral")._replace(
        disk=(
            (r"\.mlp\.(gate|experts)\.", r".block_sparse_moe.\1."),
            (r"(\.experts\.\d+)\.gate_proj\.", r"\1.w1."),
            (r"(\.experts\.\d+)\.up_proj\.", r"\1.w3."),
            (r"(\.experts\.\d+)\.down_proj\.", r"\1.w2."),
        )
    ),
    "bert": Family(
        Bert,
        bert_config,
        "Bert",
        _ENCODER_TASKS,
        "bert",
        "bert/embeddings/word_embeddings",
        "cls.predictions.decoder",
        spare=r".*\.position_ids|cls\.predictions\.decoder\..*|cls\.seq_relationship\..*|bert\.pooler\..*",
        without_kernel={
            "masked_lm": "cls.predictions.decoder",
            "feature_extraction": "pooler.dense",
        },
    ),
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA._replace(name="XLMRoberta"),
    "camembert": _ROBERTA._replace(name="Camembert"),
    "distilbert": Family(
        DistilBert,
        distilbert_config,
        "DistilBert",
        _ENCODER_TASKS,
        "distilbert",
        "distilbert/embeddings/word_embeddings",
        "vocab_projector",
        spare=r".*\.position_ids|vocab_projector\.weight",
        without_kernel={"masked_lm": "vocab_projector"},
    ),
    "deberta-v2": Family(
        Deberta,
        deberta_config,
        "DebertaV2",
        _ENCODER_TASKS,
        "deberta",
        "deberta/embeddings/word_embeddings",
        "cls.predictions.decoder",
        spare=r".*\.position_ids|deberta\.embeddings\.position_embeddings\..*|cls\.predictions\.decoder\..*|(lm|mask)_predictions\..*",
        without_kernel={"masked_lm": "cls.predictions.decoder"},
    ),
    "modernbert": Family(
        ModernBert,
        modernbert_config,
        "ModernBert",
        _ENCODER_TASKS,
        "model",
        "model/embeddings/tok_embeddings",
        "decoder",
        r"model\.layers\.0\.attn_norm\..*",
        r"decoder\.weight",
        without_kernel={"masked_lm": "decoder"},
    ),
    "gpt2": Family(
        GPT2,
        gpt2_config,
        "GPT2",
        _DECODER_TASKS,
        "transformer",
        "transformer/wte",
        "lm_head",
        spare=r".*\.attn\.(bias|masked_bias)",
        without_kernel={"causal_lm": "lm_head"},
    ),
    "t5": Family(
        T5,
        t5_config,
        "T5",
        ("seq2seq_lm",),
        "",
        "shared",
        "lm_head",
        own_head=True,
        look_ups=("encoder.embed_tokens", "decoder.embed_tokens"),
        spare=r"(encoder|decoder)\.embed_tokens\.weight|decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",
        without_kernel={"seq2seq_lm": "lm_head"},
        float32=("wo",),
    ),
}


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
    return _NAMES.get((model_type, task), family_of(model_type).name + ends[task])


def remade(config: Any, hf: Mapping[str, Any]) -> Any:
    """A model's configuration from another Hugging Face config (plain data), with what that one
    does not say.
    """
    from transformers import AutoConfig

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
