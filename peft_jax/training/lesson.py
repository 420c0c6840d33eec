"""Learning from teachers: what the configuration's `distill` section asks for, as a tree, an
objective and rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from peft_jax.core.bind import bind
from peft_jax.core.options import ConfigError, configuration, option
from peft_jax.core.sharding import shard
from peft_jax.data import fingerprint
from peft_jax.distillation.cache import open_cache
from peft_jax.distillation.divergence import Divergence, make_divergence
from peft_jax.distillation.hidden import FEATURES
from peft_jax.distillation.match import encode_twofold, shared_tokens, tokenizer_hash, uld
from peft_jax.distillation.objective import (
    FeatureTerm,
    OnPolicy,
    Teacher,
    beside_teachers,
    distillation,
)
from peft_jax.distillation.section import FeatureConfig, OnPolicyConfig
from peft_jax.models.generation_config import end_tokens
from peft_jax.models.tables import IDS, check_continued, check_rows, first_position
from peft_jax.objectives.reading import Objective, Reading
from peft_jax.quantization.stage import QuantizeConfig, check_quantize
from peft_jax.training.checkpoint import fingerprint as fingerprint_of_model
from peft_jax.training.data import Subject
from peft_jax.training.report import active_parameters
from peft_jax.training.rows import records_of
from peft_jax.training.tasks import TASKS, kind_of

SELF = "self"


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


class Loaded(NamedTuple):
    """A teacher that has been loaded: its model and tree, its tokenizer and its folder."""

    model: Any
    params: Any
    tokenizer: Any
    folder: Path


Open = Callable[[TeacherConfig, Any], Loaded]


class Lesson(NamedTuple):
    """What a student trains with: the tree with its teachers, the objective, the rows, what
    identifies all this, and how many of the teachers' parameters a token goes through.
    """

    params: Any
    objective: Objective
    rows: Any
    identity: dict[str, Any]
    judged: float = 0.0


class TaughtRows(NamedTuple):
    """`Rows` with a teacher's predictions, read as they are needed: teacher_ids [N, T, k],
    teacher_log_probs [N, T, k + 1].
    """

    tokens: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    positions: np.ndarray
    segment_ids: np.ndarray
    teacher_ids: Any
    teacher_log_probs: Any


def distills(section: DistillConfig) -> bool:
    """Whether there is anybody to learn from."""
    return bool(section.teachers) or section.cache is not None


def check_distill(section: DistillConfig) -> Divergence:
    """The divergence that students learn by. Raises ConfigError for what cannot be distilled so."""
    p, positive = section.on_policy, {"distill.temperature": section.temperature}
    for i, teacher in enumerate(section.teachers):
        check_quantize(teacher.quantize)
        positive[f"distill.teachers.{i}.weight"] = teacher.weight
    if p is not None:
        positive["distill.on_policy.max_tokens"] = p.max_tokens
        positive["distill.on_policy.top_p"] = p.top_p
    if wrong := [name for name, value in positive.items() if value <= 0]:
        raise ConfigError(f"option {wrong[0]!r} must be above 0, got {positive[wrong[0]]}")
    if section.cache is not None and (section.teachers or p or section.features or section.context):
        raise ConfigError(
            "distill.cache holds one teacher's predictions: it takes no teachers, features, "
            "context or on_policy"
        )
    _check_on_policy(section)
    if section.divergence == "uld":
        return uld
    try:
        return make_divergence(section.divergence, **section.divergence_options)
    except ValueError as error:
        raise ConfigError(f"option 'distill': {error}") from error


def _check_on_policy(section: DistillConfig) -> None:
    p = section.on_policy
    if p is None:
        return
    if not section.teachers:
        raise ConfigError(
            "distill.on_policy needs distill.teachers, who judge what the student writes"
        )
    if not (0.0 <= p.share <= 1.0 and 0.0 <= p.teacher_share < 1.0):
        raise ConfigError(
            "distill.on_policy.share must lie in [0, 1] and its teacher_share in [0, 1)"
        )
    if p.minillm and (p.share < 1.0 or p.temperature != 1.0 or p.top_k or p.top_p < 1.0):
        raise ConfigError(
            "distill.on_policy.minillm samples every batch as it is: share, temperature and top_p "
            "1, top_k 0"
        )
    if len(section.teachers) > 1 and (p.minillm or p.teacher_share):
        raise ConfigError("distill.on_policy with minillm or teacher_share takes one teacher")


def lesson(d: DistillConfig, subject: Subject, params: Any, rows: Any, opened: Open) -> Lesson:
    """How the student `params` learns from its teachers, whom `opened` loads. Raises ConfigError
    for what these models or data cannot do.
    """
    task = subject.model.task
    reading = TASKS[task].reading(subject)
    if reading is None:
        raise ConfigError(
            f"distill: a {task} model predicts no distribution here that a student could learn"
        )
    options: dict[str, Any] = {
        "divergence": check_distill(d),
        "temperature": d.temperature,
        "weight": d.weight,
        "data_weight": d.data_weight,
        "chunk": subject.loss_chunk,
        "router_loss": subject.router_loss,
    }
    if d.cache is not None:
        return _from_cache(d, subject, params, rows, reading, options)
    loaded = [None if t.path == SELF else opened(t, subject.model) for t in d.teachers]
    return _from_teachers(d, subject, params, rows, loaded, reading, options)


def _from_cache(
    d: DistillConfig,
    subject: Subject,
    params: Any,
    rows: Any,
    reading: Reading,
    options: dict[str, Any],
) -> Lesson:
    cached = _cached(d, subject, rows)
    taught = TaughtRows(
        **rows._asdict(), teacher_ids=cached.ids, teacher_log_probs=cached.log_probs
    )
    made = distillation(reading, [], vocabulary=cached.header.vocabulary, **options)
    return Lesson(beside_teachers(params, []), made, taught, {"teacher": cached.header.teacher})


def _from_teachers(
    d: DistillConfig,
    subject: Subject,
    params: Any,
    rows: Any,
    loaded: list[Loaded | None],
    reading: Reading,
    options: dict[str, Any],
) -> Lesson:
    rows, teachers, vocabulary = _classroom(d, subject, loaded, rows)
    _check_tables(subject, loaded, rows)
    terms = [
        FeatureTerm(n, f.weight, None if f.layers is None else tuple(f.layers), f.options)
        for n, f in d.features.items()
    ]
    _check_features(terms)
    width = subject.model.config.hidden_size
    tree = beside_teachers(
        params,
        [None if t is None else t.params for t in loaded],
        terms,
        (width, [width if t is None else t.model.config.hidden_size for t in loaded]),
        seed=subject.seed,
    )
    if subject.mesh is not None:
        tree["projections"] = shard(tree["projections"], subject.mesh)
    made = distillation(
        reading,
        teachers,
        features=terms,
        keep=d.top_k,
        vocabulary=vocabulary,
        on_policy=_policy(d, subject, rows),
        **options,
    )
    said = [SELF if t is None else fingerprint_of_model(t.folder) for t in loaded]
    own = subject.model, params
    judged = sum(active_parameters(*(own if t is None else (t.model, t.params)))[0] for t in loaded)
    return Lesson(tree, made, rows, {"teachers": said}, judged)


def _policy(d: DistillConfig, subject: Subject, rows: Any) -> OnPolicy | None:
    """How the student writes what it learns from; None where it does not."""
    if d.on_policy is None:
        return None
    if subject.model.task != "causal_lm":
        raise ConfigError(
            "distill.on_policy is for causal language models, and this one is a "
            f"{subject.model.task}"
        )
    check_continued(subject.model, rows, d.on_policy.prompt_tokens, d.on_policy.max_tokens)
    ends = end_tokens(subject.model, subject.tokenizer)
    return OnPolicy(**dataclasses.asdict(d.on_policy), eos=ends)  # type: ignore[call-overload]


def _check_tables(subject: Subject, loaded: Sequence[Loaded | None], rows: Any) -> None:
    """Raise ValueError for ids or positions of the rows that the student, or a teacher who reads
    them, has no row for.
    """
    check_rows(subject.model, rows, tokenizer=subject.tokenizer)
    read = ("teacher_tokens",) if hasattr(rows, "teacher_tokens") else IDS
    for teacher in loaded:
        if teacher is not None:
            check_rows(
                teacher.model,
                rows,
                tokenizer=teacher.tokenizer,
                before=first_position(teacher.params),
                ids=read,
            )


def _check_features(terms: Sequence[FeatureTerm]) -> None:
    for term in terms:
        known = FEATURES[term.name].options
        if wrong := set(term.options) ^ set(known):
            name = sorted(wrong)[0]
            what = "has no option" if name in term.options else "needs the option"
            raise ConfigError(f"distill.features.{term.name} {what} {name!r}")


def _classroom(
    d: DistillConfig, subject: Subject, loaded: list[Loaded | None], rows: Any
) -> tuple[Any, list[Teacher], int | None]:
    """(rows, teachers, how many of the logits are tokens), by whether the tokenizers and what is
    read are the same.
    """
    task = subject.model.task
    language = task in ("causal_lm", "masked_lm", "seq2seq_lm")
    same = [
        t is None or tokenizer_hash(t.tokenizer) == tokenizer_hash(subject.tokenizer)
        for t in loaded
    ]

    def binding(t):
        return None if t is None else bind(t.model)

    if all(same) and not d.context:
        if d.divergence == "uld":
            raise ConfigError(
                "distill.divergence=uld compares different tokenizers, and here all have the same"
            )
        teachers = [Teacher(binding(t), c.weight) for t, c in zip(loaded, d.teachers, strict=True)]
        return rows, teachers, _vocabulary(subject, loaded) if language else None
    _check_twofold(d, subject, loaded)
    (other,) = loaded
    tokenizer = subject.tokenizer if other is None else other.tokenizer
    records = records_of(subject, subject.data.train)
    made = encode_twofold(
        records,
        subject.tokenizer,
        tokenizer,
        subject.data.sequence_length,
        context=d.context,
        alignment=d.alignment,
    )
    shared = (
        None if same[0] or d.divergence == "uld" else shared_tokens(subject.tokenizer, tokenizer)
    )
    return (
        made,
        [Teacher(binding(other), shared=shared)],
        _vocabulary(subject, loaded) if same[0] else None,
    )


def _check_twofold(d: DistillConfig, subject: Subject, loaded: Sequence[Loaded | None]) -> None:
    """Raise ConfigError where a teacher cannot read other tokens than the student."""
    if subject.model.task != "causal_lm" or len(loaded) > 1:
        raise ConfigError(
            "distill: another tokenizer, or a context, is for one teacher of a causal "
            "language model"
        )
    if d.features or d.top_k or d.on_policy:
        raise ConfigError(
            "distill: features, top_k and on_policy need a teacher that reads the same tokens as "
            "the student"
        )
    if kind_of(subject) == "chat":
        raise ConfigError(
            "distill: another tokenizer, or a context, takes data of kind text or completion"
        )


def _vocabulary(subject: Subject, loaded: Sequence[Loaded | None]) -> int:
    """How many logits stand for tokens in all models; the rest fills embeddings up."""
    sizes = [
        subject.model.config.vocab_size,
        *(t.model.config.vocab_size for t in loaded if t is not None),
    ]
    return min(len(subject.tokenizer), *sizes)


def _cached(d: DistillConfig, subject: Subject, rows: Any) -> Any:
    if subject.model.task != "causal_lm":
        raise ConfigError(
            f"distill.cache is for causal language models, and this one is a {subject.model.task}"
        )
    if d.top_k:
        raise ConfigError("distill.top_k is that of teachers; a cache has its own (teach.k)")
    return open_cache(
        Path(str(d.cache)),
        tokenizer=tokenizer_hash(subject.tokenizer),
        data=fingerprint(rows),
        rows=len(rows.tokens),
        length=rows.tokens.shape[1],
        temperature=d.temperature,
    )
