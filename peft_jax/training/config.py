"""Configuration: frozen dataclasses that are the same in Python, in YAML and on the command line.

Every field's help stands in its metadata; `peft-jax train --help` prints it. Checking is strict: an
unknown key, a wrong type or an impossible value is one sentence that names the key, and the nearest
valid one.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from peft_jax.core.method import REQUIRED, Method, Option
from peft_jax.core.select import nearest
from peft_jax.data.records import Kind
from peft_jax.distillation.divergence import Divergence, make_divergence
from peft_jax.distillation.match import uld
from peft_jax.knowledge.editing import METHODS as EDITING
from peft_jax.knowledge.editing import Search
from peft_jax.methods import METHODS
from peft_jax.models.blocks import Task
from peft_jax.pruning.distribution import check_distribution, check_pattern, check_sparsity
from peft_jax.pruning.prune import check_score
from peft_jax.quantization.formats import Format, make_format
from peft_jax.quantization.rounding import check_rounding
from peft_jax.training.resume import ALTERS

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


@typing.dataclass_transform(frozen_default=True)
def configuration(cls: type) -> Any:
    """A frozen dataclass whose values are checked and which refuses unknown fields."""
    return dataclass(frozen=True, config=ConfigDict(extra="forbid"))(cls)


class ConfigError(ValueError):
    """A configuration that cannot be used, in one sentence."""


def option(default: Any, text: str) -> Any:
    """A field with a default and a line of help."""
    if isinstance(default, list | dict):
        return dataclasses.field(
            default_factory=lambda: type(default)(default), metadata={"help": text}
        )
    return dataclasses.field(default=default, metadata={"help": text})


@configuration
class ModelConfig:
    path: str = option(
        "builtin:base", "Hugging Face folder or repository id, or builtin:base (the embedded model)"
    )
    revision: str | None = option(None, "repository revision")
    dtype: str | None = option(
        None,
        "float32, bfloat16 or (not in training) float16; by default float32 on the CPU, else the "
        "checkpoint's",
    )
    task: Task | None = option(
        None, "what the model is for, as sequence_classification; by default as its checkpoint says"
    )
    adapter: str | None = option(None, "PEFT adapter folder or repository to start from")
    fresh: bool = option(False, "start from random parameters, not from the checkpoint's")
    config: dict[str, Any] = option(
        {}, "of a fresh model: values in place of config.json's, as {num_hidden_layers: 4}"
    )
    scan_layers: bool = option(
        True, "stack and scan the layers, so that compile time does not grow with depth"
    )
    remat: Literal["none", "full", "dots"] = option(
        "none", "rematerialisation: keep all, only layer inputs, or weight products"
    )
    attention: Literal["xla", "cudnn", "splash"] | None = option(
        None, "attention implementation; by default the best"
    )


@configuration
class QuantizeConfig:
    format: str | None = option(
        None, "nf4, fp4, fp8, mxfp4, int8, int4, int3, int2; empty: the weights stay as they are"
    )
    options: dict[str, Any] = option({}, "options of the format, as {block_size: 64, double: true}")
    rounding: str = option("nearest", "nearest, stochastic, gptq, awq, smoothquant or hqq")
    rounding_options: dict[str, Any] = option({}, "options of the rounding, as {damping: 0.01}")
    targets: str | list[str] = option("all-linear", "what to quantize")
    exclude: list[str] = option([], "what to leave in high precision")
    calibration_batches: int = option(
        8, "batches of the training data that a calibrated rounding looks at"
    )
    token_cap: float | None = option(
        4.0,
        "gptq and awq: how many times the median token a token may count for; empty: the few that "
        "are written large rule",
    )


@configuration
class PruneConfig:
    sparsity: float | None = option(
        None, "share of the weights to prune, as 0.5; empty, without a pattern: none"
    )
    pattern: str | None = option(None, "N:M, as 2:4, or blocks of inputs by outputs, as 16x16")
    score: str = option(
        "wanda", "magnitude, random, snip, taylor, movement, wanda, ria or sparsegpt"
    )
    score_options: dict[str, Any] = option(
        {}, "options of the score, as {damping: 0.01}, and compare (output or matrix)"
    )
    distribution: str = option("uniform", "how much of which weight: uniform, erk, global or owl")
    distribution_options: dict[str, Any] = option(
        {}, "options of the distribution, as {spread: 0.08}"
    )
    targets: str | list[str] = option("all-linear", "what to prune")
    exclude: list[str] = option([], "what to leave dense")
    mask_updates: bool = option(
        True, "mask adapters over pruned weights too, so that the merged model keeps its zeros"
    )
    keep: dict[Literal["layers", "heads", "kv_heads", "units", "channels", "experts"], int] = (
        option(
            {},
            "make the model smaller: how many of its layers, heads, ... stay, as {layers: 12, "
            "units: 2048}",
        )
    )
    keep_parameters: float | None = option(
        None, "make the model smaller: the share of its parameters that stays"
    )
    by: Literal["layers", "width"] = option(
        "width", "what keep_parameters takes away: layers, or heads and units"
    )
    importance: Literal["activation", "fluctuation", "magnitude", "spaced"] = option(
        "activation",
        "which layers, heads, ... stay; spaced: layers at even distances, of any family",
    )
    compensate: bool = option(False, "put the mean of what is taken away into biases (llama)")
    calibration_batches: int = option(
        8, "batches of the training data that scores and importance look at"
    )
    sensitivity: list[float] = option(
        [0.25, 0.5, 0.75],
        "shares at which `peft-jax prune` prunes each layer alone (without a pattern)",
    )


@configuration
class FactorizeConfig:
    keep: float | None = option(
        None, "make weights products of low rank: the share of the targets' parameters that stays"
    )
    error: float | None = option(None, "or the largest relative error of a weight")
    activations: bool = option(
        True, "best for outputs on the training data (SVD-LLM), not for the weights themselves"
    )
    targets: str | list[str] = option("all-linear", "what to factorize")
    exclude: list[str] = option([], "what to leave whole")
    calibration_batches: int = option(
        8, "batches of the training data that activations are taken from"
    )


@configuration
class SourceConfig:
    path: str = option(
        "builtin:python-docs",
        "builtin:NAME, a .jsonl/.json/.csv/.parquet/.txt file, or a hub dataset id",
    )
    split: str = option("train", "split of a built-in or hub dataset")
    limit: int | None = option(None, "use at most this many records")
    phrasing: Literal["train", "held_out"] | None = option(
        None,
        "of facts: the templates to train with, or those held out; by default train for "
        "data.train, held_out elsewhere",
    )
    part: Literal["known", "unseen"] | None = option(
        None, "of facts: those of the known or the unseen subjects; by default all"
    )


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


@configuration
class DataConfig:
    train: SourceConfig = option(SourceConfig(), "what to learn from")
    validation: SourceConfig | None = option(
        SourceConfig(split="validation"), "what to evaluate on during training"
    )
    test: SourceConfig | None = option(
        None, "what to evaluate on at the end (by default the validation data)"
    )
    kind: Kind | None = option(
        None, "what a record is, as classification; by default what the model's task takes"
    )
    columns: dict[str, str] = option(
        {}, "names of the record's fields in the source, as {prompt: question}"
    )
    delimiter: str | None = option(None, "what separates the fields on each line of a .txt file")
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
    packing: bool = option(
        True, "several examples in a row, kept apart by segment ids (of a causal language model)"
    )
    too_long: Literal["skip", "truncate", "stop"] = option(
        "skip", "what to do with a completion or chat that does not fit"
    )
    on_error: Literal["skip", "stop"] = option("skip", "what to do with a malformed record")


@configuration
class OptimizerConfig:
    name: Literal["adamw", "adamw8bit", "adam", "sgd", "lion", "adafactor", "galore"] = option(
        "adamw", "the optax optimizer; adamw8bit keeps its moments in 8 bits"
    )
    learning_rate: float = option(1e-3, "peak learning rate")
    schedule: Literal["constant", "linear", "cosine"] = option("cosine", "decay after warm-up")
    warmup_steps: int = option(20, "steps of linear warm-up")
    final_fraction: float = option(0.0, "the last learning rate as a fraction of the peak")
    weight_decay: float = option(0.0, "decoupled weight decay")
    no_decay: list[str] | None = option(
        None,
        "what weight decay spares, as [norm, magnitude]; by default biases and norms, as "
        "transformers' Trainer",
    )
    b1: float = option(0.9, "first moment's decay (momentum for sgd)")
    b2: float = option(0.999, "second moment's decay")
    eps: float = option(1e-8, "Adam's epsilon")
    clip_norm: float = option(1.0, "clip gradients to this global norm; 0 for no clipping")
    lora_plus_ratio: float = option(1.0, "LoRA+: learning rate of LoRA's B as a multiple of A's")
    galore_rank: int = option(128, "GaLore: rank of the gradients' projection")
    galore_every: int = option(200, "GaLore: steps between new projections")


@configuration
class TrainConfig:
    steps: int | None = option(None, "optimizer steps; by default `epochs` passes over the data")
    epochs: float = option(1.0, "passes over the data where `steps` is not given")
    batch_size: int = option(8, "rows in a step, over all devices and micro-batches")
    accumulate: int = option(1, "micro-batches in a step")
    seed: int = option(0, "of initialisation, order and dropout")
    log_every: int = option(10, "steps between log lines")
    eval_every: int = option(0, "steps between evaluations; 0 for at the end only")
    patience: int = option(0, "stop after this many evaluations without improvement; 0 for never")
    checkpoint_every: int = option(0, "steps between checkpoints; 0 for at the end only")
    keep_checkpoints: int = option(2, "how many of the newest checkpoints to keep")
    keep_best: bool = option(True, "end with the weights of the best evaluation")
    nan_limit: int = option(10, "stop after this many steps in a row whose gradient is not finite")
    loss_chunk: int | None = option(
        None, "tokens whose logits are computed at once; 0 for all, by default as memory asks"
    )
    router_loss: float | None = option(
        None, "weight of a mixture's load-balancing loss; by default as its checkpoint says"
    )
    tensorboard: bool = option(True, "also write TensorBoard event files")


@configuration
class TeacherConfig:
    path: str = option(
        "self", "Hugging Face folder or repository id, or self: the model without what trains in it"
    )
    revision: str | None = option(None, "repository revision")
    adapter: str | None = option(None, "PEFT adapter folder or repository over it")
    dtype: str | None = option(None, "float32, bfloat16 or float16; by default as model.dtype")
    quantize: QuantizeConfig = option(QuantizeConfig(), "quantization of the teacher")
    weight: float = option(1.0, "its weight among several")


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


@configuration
class DistillConfig:
    teachers: list[TeacherConfig] = option([], "whom to learn from; empty, without a cache: nobody")
    cache: str | None = option(
        None, "folder of what a teacher predicted, written by `peft-jax teach`, instead of teachers"
    )
    divergence: str = option(
        "forward_kl",
        "forward_kl, reverse_kl, jensen_shannon, skewed_forward_kl, skewed_reverse_kl, "
        "total_variation; uld (other tokenizers)",
    )
    divergence_options: dict[str, float] = option(
        {}, "beta of jensen_shannon, alpha of the skewed ones"
    )
    temperature: float = option(
        1.0, "of both models' predictions; the loss is scaled by its square"
    )
    weight: float = option(1.0, "weight of the divergence")
    data_weight: float = option(0.0, "weight of the data's own loss")
    top_k: int = option(
        0, "compare the teacher's k most likely tokens, and all others together; 0: every token"
    )
    features: dict[
        Literal["cosine", "squared", "attention", "minilm", "minilmv2"], FeatureConfig
    ] = option({}, "losses on hidden states, as {cosine: {weight: 1.0}}")
    on_policy: OnPolicyConfig | None = option(None, "learn from texts that the student writes")
    alignment: Literal["span", "position"] = option(
        "span", "how tokens of different tokenizers are compared"
    )
    context: str = option(
        "", "text that the teacher alone reads before each record: distilled into the weights"
    )


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
class EditConfig:
    edits: str | None = option(
        None,
        "a .json or .jsonl file of facts: prompt with {}, subject, target, true, paraphrases, "
        "neighbours",
    )
    method: Literal["rome", "memit", "alphaedit", "ft", "ft_l", "lora"] = option(
        "memit", "how they are written into the weights"
    )
    layers: list[int] = option(
        [],
        "layers to edit, numbered from 0; by default the middle one, and for memit, alphaedit and "
        "lora the two before it",
    )
    options: dict[str, float] = option(
        {}, "options of the method, as {weight: 15000} of memit, {threshold: 0.02} of alphaedit"
    )
    search: dict[str, float] = option({}, "of the values: steps, learning_rate, kl, decay, clamp")
    prefixes: int = option(4, "texts that the model writes, before which the facts are to hold too")
    limit: int | None = option(None, "use at most this many facts")
    calibration_batches: int = option(
        32, "batches of the training data that say what is known already"
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
    prompts: list[str] = option([], "prompts to continue, before and after training")
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
class RunConfig:
    output: str = option("runs/default", "folder for checkpoints, metrics and the exported adapter")
    model: ModelConfig = option(ModelConfig(), "the model")
    prune: PruneConfig = option(PruneConfig(), "pruning of the base, before anything else")
    factorize: FactorizeConfig = option(
        FactorizeConfig(), "low-rank factorization of the base, after pruning"
    )
    quantize: QuantizeConfig = option(
        QuantizeConfig(), "quantization of the base: with LoRA over it, QLoRA"
    )
    method: dict[str, Any] = option({"name": "lora"}, "the method's name and its options")
    data: DataConfig = option(DataConfig(), "the data")
    optimizer: OptimizerConfig = option(OptimizerConfig(), "the optimizer")
    train: TrainConfig = option(TrainConfig(), "the training loop")
    distill: DistillConfig = option(DistillConfig(), "learning from teachers")
    teach: TeachConfig = option(TeachConfig(), "what `peft-jax teach` writes")
    edit: EditConfig = option(EditConfig(), "facts that `peft-jax edit` writes into the weights")
    inject: InjectConfig = option(InjectConfig(), "what `peft-jax inject` does with facts")
    evaluate: EvaluateConfig = option(EvaluateConfig(), "evaluation")
    generate: GenerateConfig = option(GenerateConfig(), "generation")
    mesh: dict[str, int] = option(
        {}, "sizes of expert, data, fsdp, sequence and tensor; one may be -1; empty: data over all"
    )
    resume: bool = option(True, "continue from the newest checkpoint in `output`")
    resume_with: list[str] = option(
        [],
        "options that a run that is continued may change, as [optimizer.learning_rate]; any other "
        "change is refused",
    )


def load_config(path: str | None, overrides: Iterable[str] = ()) -> RunConfig:
    """The configuration in a YAML file with `key.sub=value` overrides. Raises ConfigError with one
    sentence.
    """
    tree: dict[str, Any] = {}
    if path is not None:
        file = Path(path)
        if not file.is_file():
            raise ConfigError(f"configuration file {path} does not exist{_config_hint(file)}")
        try:
            tree = _yaml(file.read_text(encoding="utf-8")) or {}
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"{path} is not valid YAML: {' '.join(str(error).split())}"
            ) from error
        if not isinstance(tree, dict):
            raise ConfigError(f"{path} should hold a mapping of options")
    for override in overrides:
        _override(tree, override)
    return parse_config(tree)


class _Loader(yaml.SafeLoader):
    """YAML 1.1 without its integers of base 60, so that 2:4 is a pattern and not 124."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {
        first: [(tag, rule) for tag, rule in rules if tag != "tag:yaml.org,2002:int"]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_INTEGER = re.compile(r"[-+]?(0b[01_]+|0x[0-9a-fA-F_]+|0[0-7_]*|[1-9][0-9_]*)$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", _INTEGER, list("-+0123456789"))


def _yaml(text: str) -> Any:
    return yaml.load(text, _Loader)


def _config_hint(file: Path) -> str:
    return (
        nearest(file.name, [p.name for p in file.parent.glob("*.yaml")])
        if file.parent.is_dir()
        else ""
    )


def _override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r} should read key=value")
    try:
        value = _yaml(text) if text else None
    except yaml.YAMLError:
        value = text
    *parents, last = key.split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"override {override!r}: {parent} is no section")
    tree[last] = value


def parse_config(tree: Mapping[str, Any]) -> RunConfig:
    """A checked RunConfig from nested mappings. Raises ConfigError with one sentence."""
    try:
        config = TypeAdapter(RunConfig).validate_python(dict(tree))
    except ValidationError as error:
        raise ConfigError(_sentence(error)) from error
    _check(config)
    return config


def _sentence(error: ValidationError) -> str:
    first = error.errors()[0]
    where = [str(part) for part in first["loc"]]
    key = ".".join(where)
    if first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        section = functools.reduce(_section, where[:-1], RunConfig)
        known = (
            [f.name for f in dataclasses.fields(section)]
            if dataclasses.is_dataclass(section)
            else []
        )
        place = f"in {'.'.join(where[:-1])}" if where[:-1] else "at the top"
        return (
            f"unknown option {key!r}.{nearest(where[-1], known)} Options {place}: "
            f"{', '.join(known)}"
        )
    return f"option {key!r}: {first['msg'][0].lower()}{first['msg'][1:]}, got {first['input']!r}"


def _section(section: Any, name: str) -> Any:
    kind = (
        typing.get_type_hints(section).get(name)
        if dataclasses.is_dataclass(section)
        else _element(section)
    )
    if isinstance(kind, types.UnionType):
        kind = next((k for k in typing.get_args(kind) if k is not type(None)), None)
    return kind


def _element(kind: Any) -> Any:
    """What a list or the values of a mapping are; None for anything else."""
    return typing.get_args(kind)[-1] if typing.get_origin(kind) in (list, dict) else None


def _check(config: RunConfig) -> None:
    positive = {
        "train.batch_size": config.train.batch_size,
        "train.accumulate": config.train.accumulate,
        "data.sequence_length": config.data.sequence_length,
        "train.log_every": config.train.log_every,
        "generate.max_tokens": config.generate.max_tokens,
        "train.keep_checkpoints": config.train.keep_checkpoints,
        "evaluate.batch_size": config.evaluate.batch_size,
        "evaluate.max_tokens": config.evaluate.max_tokens,
    }
    for name, value in positive.items():
        if value < 1:
            raise ConfigError(f"option {name!r} must be at least 1, got {value}")
    if config.train.batch_size % config.train.accumulate:
        raise ConfigError(
            f"train.batch_size={config.train.batch_size} is not a multiple of "
            f"train.accumulate={config.train.accumulate}"
        )
    if config.train.steps is not None and config.train.steps < 0:
        raise ConfigError(f"option 'train.steps' must not be negative, got {config.train.steps}")
    if config.data.validation is None and (config.train.eval_every or config.train.patience):
        raise ConfigError("train.eval_every and train.patience need data.validation")
    if unknown := [name for name in config.resume_with if name not in ALTERS]:
        raise ConfigError(
            f"option 'resume_with': {unknown[0]!r} is no option that alters what is "
            f"trained.{nearest(unknown[0], ALTERS)}"
        )
    check_method(config.method)
    name, early = (
        config.method.get("name", "lora"),
        config.train.patience or (config.train.eval_every and config.train.keep_best),
    )
    ends_otherwise = METHODS[name].ends_otherwise
    if early and ends_otherwise is not None and ends_otherwise(config.method):
        raise ConfigError(
            f"method {name} is done at the last step only: set train.keep_best=false and "
            "train.patience=0, since an earlier "
            "evaluation is one of another model"
        )
    check_quantize(config.quantize)
    check_prune(config.prune)
    if config.factorize.keep is not None and config.factorize.error is not None:
        raise ConfigError("factorize.keep and factorize.error both set the ranks: give one of them")
    if config.quantize.format and (
        config.factorize.keep is not None or config.factorize.error is not None
    ):
        raise ConfigError("factorize and quantize.format cannot both store a weight: choose one")
    check_distill(config)
    _check_edit(config.edit)
    _check_knowledge(config)


def _check_knowledge(config: RunConfig) -> None:
    d, k = config.data, config.data.knowledge
    shares = {
        "data.unseen": d.unseen,
        "data.replay_share": d.replay_share,
        "data.knowledge.oracle_share": k.oracle_share,
    }
    if wrong := [n for n, share in shares.items() if not 0.0 <= share <= 1.0]:
        raise ConfigError(f"option {wrong[0]!r} must lie in [0, 1], got {shares[wrong[0]]}")
    if d.replay is not None and d.replay_share >= 1.0:
        raise ConfigError("data.replay_share=1 leaves nothing of data.train")
    taught = [n for n in ("triples", "entities", "allowed_weight", "lexicon") if getattr(k, n)]
    if taught and (config.distill.teachers or config.distill.cache):
        raise ConfigError(
            f"data.knowledge.{taught[0]} is for a model that trains by itself, not from teachers: "
            "leave one out"
        )
    if k.allowed_weight and d.kind != "facts":
        raise ConfigError(
            "data.knowledge.allowed_weight is about the objects of facts: set data.kind=facts"
        )
    facts = d.kind == "facts"
    sources = {
        **{f"data.{n}": (getattr(d, n), facts, facts) for n in ("train", "validation", "test")},
        "data.replay": (d.replay, False, False),
        "data.knowledge.triples": (k.triples, True, False),
        "data.knowledge.passages": (k.passages, k.passages_kind == "facts", False),
        "inject.retained": (config.inject.retained, False, False),
    }
    for name, (source, parted, phrased) in sources.items():
        if source is not None and source.part and not parted:
            raise ConfigError(f"{name}.part is about facts: leave it out of other data")
        if source is not None and source.phrasing and not phrased:
            raise ConfigError(
                f"{name}.phrasing is about facts that are trained or asked for: leave it out of "
                "other data"
            )


def _check_edit(config: EditConfig) -> None:
    known = EDITING[config.method].options
    for name, options, there in (
        ("options", config.options, known),
        ("search", config.search, Search._fields),
    ):
        if wrong := [k for k in options if k not in there]:
            some = ", ".join(there) or "none"
            raise ConfigError(
                f"unknown option 'edit.{name}.{wrong[0]}'.{nearest(wrong[0], there)} Those of "
                f"{config.method}: {some}"
            )


def check_distill(config: RunConfig) -> Divergence | None:
    """The divergence that students learn by. Raises ConfigError for what cannot be distilled so."""
    d, p = config.distill, config.distill.on_policy
    if config.model.config and not config.model.fresh:
        raise ConfigError(
            "model.config is that of a fresh model: set model.fresh=true, or prune.keep for a "
            "smaller one"
        )
    for teacher in d.teachers:
        check_quantize(teacher.quantize)
    positive = {
        "distill.temperature": d.temperature,
        "teach.k": config.teach.k,
        "teach.shard_rows": config.teach.shard_rows,
    }
    positive |= {f"distill.teachers.{i}.weight": t.weight for i, t in enumerate(d.teachers)}
    positive |= (
        {}
        if p is None
        else {"distill.on_policy.max_tokens": p.max_tokens, "distill.on_policy.top_p": p.top_p}
    )
    if wrong := [name for name, value in positive.items() if value <= 0]:
        raise ConfigError(f"option {wrong[0]!r} must be above 0, got {positive[wrong[0]]}")
    if d.cache is not None and (d.teachers or p or d.features or d.context):
        raise ConfigError(
            "distill.cache holds one teacher's predictions: it takes no teachers, features, "
            "context or on_policy"
        )
    _check_on_policy(config)
    if d.divergence == "uld":
        return uld
    try:
        return make_divergence(d.divergence, **d.divergence_options)
    except ValueError as error:
        raise ConfigError(f"option 'distill': {error}") from error


def _check_on_policy(config: RunConfig) -> None:
    p = config.distill.on_policy
    if p is None:
        return
    if not config.distill.teachers:
        raise ConfigError(
            "distill.on_policy needs distill.teachers, who judge what the student writes"
        )
    if config.data.packing:
        raise ConfigError("distill.on_policy continues one prompt a row: set data.packing=false")
    if not (0.0 <= p.share <= 1.0 and 0.0 <= p.teacher_share < 1.0):
        raise ConfigError(
            "distill.on_policy.share must lie in [0, 1] and its teacher_share in [0, 1)"
        )
    if p.minillm and (p.share < 1.0 or p.temperature != 1.0 or p.top_k or p.top_p < 1.0):
        raise ConfigError(
            "distill.on_policy.minillm samples every batch as it is: share, temperature and top_p "
            "1, top_k 0"
        )
    if len(config.distill.teachers) > 1 and (p.minillm or p.teacher_share):
        raise ConfigError("distill.on_policy with minillm or teacher_share takes one teacher")


def check_prune(config: PruneConfig) -> None:
    """Raise ConfigError for a score, distribution, pattern or size that cannot be."""
    try:
        check_score(config.score, set(config.score_options) - {"compare"})
        if config.pattern is not None or config.sparsity is not None:
            check_pattern(config.pattern, config.sparsity, config.distribution)
        check_distribution(config.distribution, config.distribution_options)
        for share in [*([] if config.sparsity is None else [config.sparsity]), *config.sensitivity]:
            check_sparsity(share)
    except ValueError as error:
        raise ConfigError(f"option 'prune': {error}") from error
    if config.keep_parameters is not None and config.keep:
        raise ConfigError(
            "prune.keep says what stays, and prune.keep_parameters chooses it: give one of them"
        )


def check_quantize(config: QuantizeConfig) -> Format | None:
    """The format that the base is to have. Raises ConfigError for an unknown format, rounding or
    option.
    """
    if config.format is None:
        return None
    try:
        check_rounding(config.rounding, config.rounding_options)
        return make_format(config.format, **config.options)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"option 'quantize': {error}") from error


def check_method(method: Mapping[str, Any]) -> tuple[Method, dict[str, Any]]:
    """(the method, its checked options). Raises ConfigError for an unknown name, option or type."""
    options = dict(method)
    name = options.pop("name", "lora")
    if name not in METHODS:
        raise ConfigError(
            f"unknown method {name!r}.{nearest(str(name), METHODS)} Methods: {', '.join(METHODS)}"
        )
    known = method_options(name)
    for key, value in options.items():
        if key not in known:
            raise ConfigError(
                f"unknown option 'method.{key}' of {name}.{nearest(key, known)} Options of {name}: "
                f"{', '.join(known)}"
            )
        try:
            options[key] = TypeAdapter(known[key].annotation).validate_python(value)
        except ValidationError as error:
            first = error.errors()[0]
            raise ConfigError(
                f"option 'method.{key}': {first['msg'].lower()}, got {value!r}"
            ) from error
    return METHODS[name], options


GIVEN = ("layout", "model", "statistics")  # what a run, or its caller, gives a method


def method_options(name: str) -> dict[str, Option]:
    """A method's options, those left out that a run gives it."""
    return {n: o for n, o in METHODS[name].options.items() if n not in GIVEN}


def describe() -> list[tuple[str, str, str]]:
    """(option, default, help) for every option, methods' included."""
    rows: list[tuple[str, str, str]] = []

    def walk(section: Any, prefix: str) -> None:
        for field in dataclasses.fields(section):
            value = getattr(section, field.name)
            name = prefix + field.name
            if dataclasses.is_dataclass(value):
                walk(value, name + ".")
                continue
            rows.append((name, _shown(value), field.metadata.get("help", "")))
            kind = _section(type(section), field.name)
            inner: Any = _element(kind) or kind
            if dataclasses.is_dataclass(inner):
                walk(
                    typing.cast(type, inner)(),
                    f"{name}." + {list: "N.", dict: "NAME."}.get(typing.get_origin(kind), ""),
                )

    walk(RunConfig(), "")
    for method in METHODS:
        for name, parameter in method_options(method).items():
            default = "required" if parameter.default is REQUIRED else _shown(parameter.default)
            rows.append((f"method.{name}", default, f"option of {method}"))
    return rows


def _shown(value: Any) -> str:
    return (
        ""
        if value is None
        else yaml.safe_dump(value, default_flow_style=True).removesuffix("\n...\n").strip()
    )


def to_dict(config: RunConfig) -> dict[str, Any]:
    """The configuration as plain nested dicts, for YAML."""
    return dataclasses.asdict(config)  # type: ignore[call-overload]
