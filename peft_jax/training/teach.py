"""What the configuration's `distill` and `teach` sections ask for: teachers, rows to learn from,
and `peft-jax teach`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import track

from peft_jax.core.bind import bind
from peft_jax.core.partition import freeze
from peft_jax.core.sharding import fetch, shard
from peft_jax.data import evaluation_batches, fingerprint
from peft_jax.data.encode import Rows
from peft_jax.distillation.cache import CacheHeader, open_cache, write_cache
from peft_jax.distillation.divergence import top_k
from peft_jax.distillation.hidden import FEATURES
from peft_jax.distillation.match import encode_twofold, shared_tokens, tokenizer_hash
from peft_jax.distillation.objective import (
    FeatureTerm,
    OnPolicy,
    Teacher,
    beside_teachers,
    distillation,
)
from peft_jax.distillation.remote import remote_top_k
from peft_jax.generation.ends import end_tokens
from peft_jax.generation.generate import generate
from peft_jax.hub import load_tokenizer, local_folder
from peft_jax.models.tables import IDS, check_continued, check_rows, first_position
from peft_jax.objectives.reading import Objective, over_positions
from peft_jax.objectives.tokens import TOKENS
from peft_jax.training.checkpoint import fingerprint as fingerprint_of_model
from peft_jax.training.config import (
    ConfigError,
    DistillConfig,
    FactorizeConfig,
    ModelConfig,
    PruneConfig,
    RunConfig,
    TeacherConfig,
    check_distill,
)
from peft_jax.training.loop import on_devices
from peft_jax.training.report import active_parameters
from peft_jax.training.setup import Setup, make_rows, read_source, set_up, subject_of
from peft_jax.training.tasks import TASKS, kind_of

SELF = "self"


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


def distills(config: RunConfig) -> bool:
    """Whether there is anybody to learn from."""
    return bool(config.distill.teachers) or config.distill.cache is not None


def teacher_setup(config: RunConfig, teacher: TeacherConfig, student: Any = None) -> Setup:
    """A teacher, loaded as the configuration has it for the student: onto the same mesh, and, given
    the student's model, for the same task and classes.
    """
    labels: list[str] = []
    if student is not None and TASKS[student.task].labels:
        labels = list((json.loads(student.config.hf_config).get("id2label") or {}).values())
    model = ModelConfig(
        path=teacher.path,
        revision=teacher.revision,
        adapter=teacher.adapter,
        dtype=teacher.dtype or config.model.dtype,
        task=None if student is None else student.task,
        scan_layers=config.model.scan_layers,
        attention=config.model.attention,
    )
    data = dataclasses.replace(config.data, labels=labels)
    plain = dataclasses.replace(
        config, prune=PruneConfig(), factorize=FactorizeConfig(), distill=DistillConfig()
    )
    return set_up(dataclasses.replace(plain, model=model, quantize=teacher.quantize, data=data))


def lesson(config: RunConfig, setup: Setup, params: Any, rows: Any) -> Lesson:
    """How the student `params` learns from its teachers. Raises ConfigError for what these models
    or data cannot do.
    """
    d, task = config.distill, setup.model.task
    subject = subject_of(config, setup)
    reading = TASKS[task].reading(subject)
    if reading is None:
        raise ConfigError(
            f"distill: a {task} model predicts no distribution here that a student could learn"
        )
    divergence = check_distill(config)
    assert divergence is not None
    options: dict[str, Any] = {
        "divergence": divergence,
        "temperature": d.temperature,
        "weight": d.weight,
        "data_weight": d.data_weight,
        "chunk": config.train.loss_chunk,
        "router_loss": config.train.router_loss,
    }
    said: dict[str, Any] = {}
    if d.cache is not None:
        cached = _cached(config, setup, rows)
        taught = TaughtRows(
            **rows._asdict(), teacher_ids=cached.ids, teacher_log_probs=cached.log_probs
        )
        made = distillation(reading, [], vocabulary=cached.header.vocabulary, **options)
        return Lesson(
            beside_teachers(params, []), made, taught, {**said, "teacher": cached.header.teacher}
        )
    loaded = [None if t.path == SELF else teacher_setup(config, t, setup.model) for t in d.teachers]
    rows, teachers, vocabulary = _classroom(config, setup, loaded, rows)
    _check_tables(setup, loaded, rows)
    terms = [
        FeatureTerm(n, f.weight, None if f.layers is None else tuple(f.layers), f.options)
        for n, f in d.features.items()
    ]
    _check_features(d, terms)
    widths = [
        setup.model.config.hidden_size if t is None else t.model.config.hidden_size for t in loaded
    ]
    tree = beside_teachers(
        params,
        [None if t is None else t.params for t in loaded],
        terms,
        (setup.model.config.hidden_size, widths),
        seed=config.train.seed,
    )
    if setup.mesh is not None:
        tree["projections"] = shard(tree["projections"], setup.mesh)
    policy = None
    if d.on_policy is not None:
        if task != "causal_lm":
            raise ConfigError(
                f"distill.on_policy is for causal language models, and this one is a {task}"
            )
        check_continued(setup.model, rows, d.on_policy.prompt_tokens, d.on_policy.max_tokens)
        ends = end_tokens(setup.model, setup.tokenizer)
        policy = OnPolicy(**dataclasses.asdict(d.on_policy), eos=ends)  # type: ignore[call-overload]
    made = distillation(
        reading,
        teachers,
        features=terms,
        keep=d.top_k,
        vocabulary=vocabulary,
        on_policy=policy,
        **options,
    )
    said["teachers"] = [SELF if t is None else fingerprint_of_model(t.folder) for t in loaded]
    judged = sum(
        active_parameters(*((setup.model, params) if t is None else (t.model, t.params)))[0]
        for t in loaded
    )
    return Lesson(tree, made, rows, said, judged)


def _check_tables(setup: Setup, loaded: Sequence[Setup | None], rows: Any) -> None:
    """Raise ValueError for ids or positions of the rows that the student, or a teacher who reads
    them, has no row for.
    """
    check_rows(setup.model, rows, tokenizer=setup.tokenizer)
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


def _check_features(d: DistillConfig, terms: Sequence[FeatureTerm]) -> None:
    for term in terms:
        known = FEATURES[term.name].options
        if wrong := set(term.options) ^ set(known):
            name = sorted(wrong)[0]
            what = "has no option" if name in term.options else "needs the option"
            raise ConfigError(f"distill.features.{term.name} {what} {name!r}")


def _classroom(
    config: RunConfig, setup: Setup, loaded: list[Setup | None], rows: Any
) -> tuple[Any, list[Teacher], int | None]:
    """(rows, teachers, how many of the logits are tokens), by whether the tokenizers and what is
    read are the same.
    """
    d, task = config.distill, setup.model.task
    language = task in ("causal_lm", "masked_lm", "seq2seq_lm")
    same = [
        t is None or tokenizer_hash(t.tokenizer) == tokenizer_hash(setup.tokenizer) for t in loaded
    ]

    def binding(t):
        return None if t is None else bind(t.model)

    if all(same) and not d.context:
        if d.divergence == "uld":
            raise ConfigError(
                "distill.divergence=uld compares different tokenizers, and here all have the same"
            )
        teachers = [Teacher(binding(t), c.weight) for t, c in zip(loaded, d.teachers, strict=True)]
        return rows, teachers, _vocabulary(setup, loaded) if language else None
    if task != "causal_lm" or len(loaded) > 1:
        raise ConfigError(
            "distill: another tokenizer, or a context, is for one teacher of a causal "
            "language model"
        )
    if d.features or d.top_k or d.on_policy:
        raise ConfigError(
            "distill: features, top_k and on_policy need a teacher that reads the same tokens as "
            "the student"
        )
    if kind_of(subject_of(config, setup)) == "chat":
        raise ConfigError(
            "distill: another tokenizer, or a context, takes data of kind text or completion"
        )
    (other,) = loaded
    tokenizer = setup.tokenizer if other is None else other.tokenizer
    records = read_source(config, config.data.train, task)
    made = encode_twofold(
        records,
        setup.tokenizer,
        tokenizer,
        config.data.sequence_length,
        context=d.context,
        alignment=d.alignment,
    )
    shared = None if same[0] or d.divergence == "uld" else shared_tokens(setup.tokenizer, tokenizer)
    return (
        made,
        [Teacher(binding(other), shared=shared)],
        _vocabulary(setup, loaded) if same[0] else None,
    )


def _vocabulary(setup: Setup, loaded: Sequence[Setup | None]) -> int:
    """How many logits stand for tokens in all models; the rest fills embeddings up."""
    sizes = [
        setup.model.config.vocab_size,
        *(t.model.config.vocab_size for t in loaded if t is not None),
    ]
    return min(len(setup.tokenizer), *sizes)


def _cached(config: RunConfig, setup: Setup, rows: Any) -> Any:
    if setup.model.task != "causal_lm":
        raise ConfigError(
            f"distill.cache is for causal language models, and this one is a {setup.model.task}"
        )
    if config.distill.top_k:
        raise ConfigError("distill.top_k is that of teachers; a cache has its own (teach.k)")
    return open_cache(
        Path(str(config.distill.cache)),
        tokenizer=tokenizer_hash(setup.tokenizer),
        data=fingerprint(rows),
        rows=len(rows.tokens),
        length=rows.tokens.shape[1],
        temperature=config.distill.temperature,
    )


# --------------------------------------------------------------------------------------------------
# teach


def run_teaching(config: RunConfig, console: Console | None = None) -> Path:
    """The whole of `peft-jax teach`: what the one teacher of `distill.teachers`, or the endpoint
    `teach.url`, predicts of the training data (a folder for `distill.cache`), or how it completes
    its prompts (a file for `data.train`).
    """
    say = functools.partial(
        (console or Console()).print, highlight=False, markup=False, soft_wrap=True
    )
    t, out = config.teach, Path(config.output)
    if t.url is not None:
        if t.what == "texts" or t.model is None:
            raise ConfigError("teach.url is asked for predictions, and needs teach.model")
        setup, tokenizer = (
            None,
            load_tokenizer(local_folder(config.model.path, config.model.revision)),
        )
    else:
        setup = _only_teacher(config)
        tokenizer = setup.tokenizer
    if t.what == "texts":
        assert setup is not None
        return _write_texts(config, setup, out, say)
    rows = _rows_to_teach(config, setup, tokenizer)
    vocabulary = (
        len(tokenizer) if setup is None else min(len(tokenizer), setup.model.config.vocab_size)
    )
    header = CacheHeader(
        teacher=f"{t.url} {t.model}" if setup is None else _name(config, setup),
        tokenizer=tokenizer_hash(tokenizer),
        data=fingerprint(rows),
        rows=len(rows.tokens),
        length=rows.tokens.shape[1],
        vocabulary=vocabulary,
        k=min(t.k, vocabulary),
        temperature=config.distill.temperature,
        dtype=t.dtype,
        shard_rows=t.shard_rows,
    )
    if setup is None and header.temperature != 1.0:
        raise ConfigError(
            "an endpoint tells its predictions at temperature 1; set distill.temperature=1"
        )
    read = (
        _asked(config, rows, header.k) if setup is None else _predicted(config, setup, rows, header)
    )
    with Console(quiet=console is not None and console.quiet).status("teaching") as status:
        found = write_cache(
            out, header, read, lambda n: status.update(f"{n:,} of {header.rows:,} rows")
        )
    size = sum(f.stat().st_size for f in out.glob("shard-*.safetensors"))
    say(
        f"written: {out}, {header.shards} shards ({found} were there), {size:,} bytes, "
        f"{header.bytes_per_token} a token "
        f"({4 * vocabulary} for all logits in float32)"
    )
    return out


def _only_teacher(config: RunConfig) -> Setup:
    teachers = config.distill.teachers
    if len(teachers) != 1 or teachers[0].path == SELF:
        raise ConfigError(
            "teach needs one teacher, as in 'distill.teachers=[{path: builtin:base}]', or teach.url"
        )
    c = teachers[0]
    setup = teacher_setup(config, c)
    setup = setup._replace(params=freeze(setup.params))
    if setup.model.task != "causal_lm":
        raise ConfigError(
            f"teach asks causal language models, and {c.path} is a {setup.model.task}"
        )
    student = load_tokenizer(local_folder(config.model.path, config.model.revision))
    if config.teach.what == "predictions" and tokenizer_hash(student) != tokenizer_hash(
        setup.tokenizer
    ):
        raise ConfigError(
            f"{c.path} has another tokenizer than {config.model.path}: let it write texts "
            "(teach.what=texts), or name it in "
            "distill.teachers when training"
        )
    return setup


def _name(config: RunConfig, setup: Setup) -> str:
    """A teacher by the hash of its files, with what was made of it."""
    (teacher,) = config.distill.teachers
    parts = [fingerprint_of_model(setup.folder)]
    parts += [fingerprint_of_model(local_folder(teacher.adapter))] if teacher.adapter else []
    return " ".join([*parts, teacher.quantize.format or ""]).strip()


def _rows_to_teach(config: RunConfig, setup: Setup | None, tokenizer: Any) -> Rows:
    if setup is not None:
        return make_rows(config, config.data.train, setup)
    stand_in: Any = SimpleNamespace(
        task="causal_lm"
    )  # the endpoint's model is not here; its rows need but the tokenizer
    return make_rows(config, config.data.train, Setup(stand_in, None, tokenizer, None, Path()))


def _predicted(config: RunConfig, setup: Setup, rows: Rows, header: CacheHeader) -> Any:
    """start, stop -> what the teacher predicts of these rows, computed in batches."""
    apply = bind(setup.model)
    options = {"temperature": header.temperature, "vocabulary": header.vocabulary}

    @jax.jit
    def predict(params: Any, batch: Any) -> Any:
        states, head = TOKENS.states(apply, params, batch, None), TOKENS.head(apply, params, batch)

        def of(s):
            return top_k(head(s), header.k, **options)

        ids, log_probs = over_positions(
            of, (states,), setup.model.config.vocab_size, config.train.loss_chunk
        )
        return ids, log_probs.astype(jnp.dtype(header.dtype))

    def read(start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        part = Rows(*(x[start:stop] for x in rows))
        batches = evaluation_batches(part, config.train.batch_size)
        made = [
            jax.tree.map(fetch, predict(setup.params, on_devices(b, setup.mesh))) for b in batches
        ]
        ids, log_probs = (np.concatenate(x)[: stop - start] for x in zip(*made, strict=True))
        return ids, log_probs

    return read


def _asked(config: RunConfig, rows: Rows, k: int) -> Any:
    """start, stop -> what the endpoint predicts of these rows, segment by segment."""
    t = config.teach
    ask = functools.partial(
        remote_top_k, str(t.url), str(t.model), k=k, key=os.environ.get(t.key_variable)
    )

    def read(start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        shape = (stop - start, rows.tokens.shape[1])
        ids, log_probs = np.zeros((*shape, k), np.int64), np.zeros((*shape, k + 1), np.float32)
        where = [
            (i, np.flatnonzero(rows.segment_ids[start + i] == s))
            for i in range(stop - start)
            for s in range(1, int(rows.segment_ids[start + i].max()) + 1)
        ]
        size = config.train.batch_size
        for at in range(0, len(where), size):
            part = where[at : at + size]
            texts = [
                [*rows.tokens[start + i][p].tolist(), int(rows.targets[start + i][p[-1]])]
                for i, p in part
            ]
            for (i, p), (found, values) in zip(part, ask(rows=texts), strict=True):
                ids[i, p], log_probs[i, p] = found[:-1], values[:-1]
        return ids, log_probs

    return read


def _write_texts(config: RunConfig, setup: Setup, out: Path, say: Any) -> Path:
    """The teacher's completions of the training data's prompts, for sequence-level distillation
    (Kim and Rush 2016, arXiv:1606.07947): completions.jsonl of {"prompt", "completion"}, continued
    where an earlier run ended.
    """
    records = read_source(config, config.data.train, setup.model.task)
    if kind_of(subject_of(config, setup)) != "completion":
        raise ConfigError("teach.what=texts completes prompts: it needs data of kind completion")
    prompts = [r.value["prompt"] for r in records]
    out.mkdir(parents=True, exist_ok=True)
    path, partial = out / "completions.jsonl", out / ".completions.jsonl"
    g, size = config.generate, config.evaluate.batch_size
    lines = partial.read_text(encoding="utf-8").splitlines() if partial.is_file() else []
    lines = lines[: len(lines) // size * size]
    if any(json.loads(line)["prompt"] != p for line, p in zip(lines, prompts, strict=False)):
        raise ConfigError(
            f"{partial} was begun with other prompts; remove it, or give another output"
        )
    with partial.open("w", encoding="utf-8") as file:
        file.write("".join(f"{line}\n" for line in lines))
        for at in track(
            range(len(lines), len(prompts), size),
            description="teaching",
            disable=len(prompts) <= size,
        ):
            part = prompts[at : at + size]
            texts = generate(
                setup.model,
                setup.params,
                part,
                tokenizer=setup.tokenizer,
                max_tokens=g.max_tokens,
                temperature=g.temperature,
                top_k=g.top_k,
                top_p=g.top_p,
                stop=g.stop,
                seed=g.seed + at,
            )
            for prompt, text in zip(part, texts, strict=True):
                file.write(
                    json.dumps({"prompt": prompt, "completion": text}, ensure_ascii=False) + "\n"
                )
            file.flush()
    os.replace(partial, path)
    say(f"written: {path}, {len(prompts):,} completions")
    return path
