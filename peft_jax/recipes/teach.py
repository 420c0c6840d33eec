"""`peft-jax teach`: what a teacher predicts of the training data, or writes, for students to learn
from.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import track

from peft_jax.core.bind import bind
from peft_jax.core.files import write_json
from peft_jax.core.options import ConfigError
from peft_jax.core.partition import freeze
from peft_jax.core.sharding import fetch
from peft_jax.data import evaluation_batches, fingerprint
from peft_jax.data.encode import Rows
from peft_jax.distillation.cache import CacheHeader, write_cache
from peft_jax.distillation.divergence import top_k
from peft_jax.distillation.match import tokenizer_hash
from peft_jax.distillation.remote import remote_top_k
from peft_jax.generation.generate import generate
from peft_jax.hub import load_tokenizer, local_folder
from peft_jax.objectives.reading import over_positions, with_head
from peft_jax.objectives.tokens import TOKENS
from peft_jax.recipes.measure import printer
from peft_jax.recipes.plan import without_stages
from peft_jax.recipes.report import leave_report
from peft_jax.recipes.run_config import RunConfig
from peft_jax.recipes.setup import mesh_of, subject_of, teacher_of
from peft_jax.training.checkpoint import fingerprint as fingerprint_of_model
from peft_jax.training.data import Subject
from peft_jax.training.lesson import SELF, Loaded
from peft_jax.training.loop import on_devices
from peft_jax.training.rows import make_rows, records_of
from peft_jax.training.tasks import kind_of


def run_teaching(config: RunConfig, console: Console | None = None) -> Path:
    """The whole of `peft-jax teach`: what the one teacher of `distill.teachers`, or the endpoint
    `teach.url`, predicts of the training data (a folder for `distill.cache`), or how it completes
    its prompts (a file for `data.train`).
    """
    without_stages(config, "teach")
    say, t, out = printer(console or Console()), config.teach, Path(config.output)
    setup, tokenizer = _asked_one(config)
    if t.what == "texts":
        assert setup is not None
        return _write_texts(config, setup, out, say)
    rows = make_rows(_reader(config, setup, tokenizer), config.data.train)
    header = _header(config, setup, tokenizer, rows)
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
    told = {"shards": header.shards, "rows": header.rows, "bytes": size, "kept tokens": header.k}
    write_json(out / "teaching.json", {**told, "bytes a token": header.bytes_per_token})
    leave_report(config)
    say(
        f"written: {out}, {header.shards} shards ({found} were there), {size:,} bytes, "
        f"{header.bytes_per_token} a token "
        f"({4 * header.vocabulary} for all logits in float32)"
    )
    return out


def _asked_one(config: RunConfig) -> tuple[Loaded | None, Any]:
    """(the teacher, None where an endpoint is asked, and the tokenizer)."""
    t = config.teach
    if t.url is None:
        teacher = _only_teacher(config)
        return teacher, teacher.tokenizer
    if t.what == "texts" or t.model is None:
        raise ConfigError("teach.url is asked for predictions, and needs teach.model")
    return None, load_tokenizer(local_folder(config.model.path, config.model.revision))


def _header(config: RunConfig, setup: Loaded | None, tokenizer: Any, rows: Rows) -> CacheHeader:
    """What a cache of the teacher's predictions says of itself."""
    t, known = config.teach, len(tokenizer)
    vocabulary = known if setup is None else min(known, setup.model.config.vocab_size)
    return CacheHeader(
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


def _only_teacher(config: RunConfig) -> Loaded:
    teachers = config.distill.teachers
    if len(teachers) != 1 or teachers[0].path == SELF:
        raise ConfigError(
            "teach needs one teacher, as in 'distill.teachers=[{path: builtin:base}]', or teach.url"
        )
    c = teachers[0]
    setup = teacher_of(config, c)
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


def _name(config: RunConfig, setup: Loaded) -> str:
    """A teacher by the hash of its files, with what was made of it."""
    (teacher,) = config.distill.teachers
    parts = [fingerprint_of_model(setup.folder)]
    parts += [fingerprint_of_model(local_folder(teacher.adapter))] if teacher.adapter else []
    return " ".join([*parts, teacher.quantize.format or ""]).strip()


def _reader(config: RunConfig, setup: Loaded | None, tokenizer: Any) -> Subject:
    """Who reads the rows; the endpoint's model is not here, and its rows need but the tokenizer."""
    if setup is not None:
        return subject_of(config, setup.model, tokenizer, mesh_of(config))
    return subject_of(config, SimpleNamespace(task="causal_lm"), tokenizer, None)


def _predicted(config: RunConfig, setup: Loaded, rows: Rows, header: CacheHeader) -> Any:
    """start, stop -> what the teacher predicts of these rows, computed in batches."""
    apply, mesh = bind(setup.model), mesh_of(config)
    options = {"temperature": header.temperature, "vocabulary": header.vocabulary}

    @jax.jit
    def predict(params: Any, batch: Any) -> Any:
        states, head = TOKENS.states(apply, params, batch, None), TOKENS.head(apply, params, batch)

        likely = with_head(functools.partial(_likely, header.k, tuple(options.items())), head)
        ids, log_probs = over_positions(
            likely, (states,), setup.model.config.vocab_size, config.train.loss_chunk
        )
        return ids, log_probs.astype(jnp.dtype(header.dtype))

    def read(start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        part = Rows(*(x[start:stop] for x in rows))
        batches = evaluation_batches(part, config.train.batch_size)
        made = [jax.tree.map(fetch, predict(setup.params, on_devices(b, mesh))) for b in batches]
        ids, log_probs = (np.concatenate(x)[: stop - start] for x in zip(*made, strict=True))
        return ids, log_probs

    return read


def _likely(k: int, options: Sequence[tuple[str, Any]], head: Any, states: jax.Array) -> Any:
    return top_k(head(states), k, **dict(options))


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


def _write_texts(config: RunConfig, setup: Loaded, out: Path, say: Any) -> Path:
    """The teacher's completions of the training data's prompts, for sequence-level distillation
    (Kim and Rush 2016, arXiv:1606.07947): completions.jsonl of {"prompt", "completion"}, continued
    where an earlier run ended.
    """
    subject = subject_of(config, setup.model, setup.tokenizer, mesh_of(config))
    records = records_of(subject, config.data.train)
    if kind_of(subject) != "completion":
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
    write_json(out / "teaching.json", {"completions": len(prompts)})
    leave_report(config)
    say(f"written: {path}, {len(prompts):,} completions")
    return path
