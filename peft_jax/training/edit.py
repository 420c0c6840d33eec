"""`peft-jax edit`: facts written into a model, what it says of them before and after, and the edit
as a PEFT folder.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from peft_jax.core.bind import bind
from peft_jax.core.calibrate import calibrate
from peft_jax.core.files import write_json
from peft_jax.generation.generate import generate
from peft_jax.hub import save_adapter
from peft_jax.knowledge.editing import METHODS, Search, edit
from peft_jax.knowledge.evaluation import edit_scores, fluency
from peft_jax.knowledge.hooks import feed_forward
from peft_jax.knowledge.requests import Edit, edit_rows, read_edits
from peft_jax.models.tables import check_rows
from peft_jax.training.config import ConfigError, RunConfig, to_dict
from peft_jax.training.evaluate import perplexity
from peft_jax.training.report import before_and_after
from peft_jax.training.setup import Setup, first_batches, make_rows, set_up, text_rows

ADAPTER = "edit"


def run_editing(config: RunConfig, console: Console | None = None) -> Path:
    """The whole of `peft-jax edit`: scores of the edits, perplexity of other text, before and
    after, and the edit's folder.
    """
    e, out = config.edit, Path(config.output)
    if e.edits is None:
        raise ConfigError("edit needs edit.edits, a .json or .jsonl file of facts")
    console = console or Console()
    say = functools.partial(console.print, highlight=False, markup=False, soft_wrap=True)
    edits = read_edits(Path(e.edits))[: e.limit]
    setup = set_up(config)
    if setup.model.task != "causal_lm":
        raise ConfigError(
            f"facts are edited in causal language models, and this one is a {setup.model.task}"
        )
    _check_edits(setup, edits)
    before = _measured(config, setup, setup.params, edits)
    edited = write_edits(config, setup, edits, out / ADAPTER)
    after = _measured(config, setup, edited, edits)
    console.print(before_and_after(before, after))
    (out / "config.yaml").write_text(
        yaml.safe_dump(to_dict(config), sort_keys=False), encoding="utf-8"
    )
    write_json(out / "results.json", {"before": before, "after": after, "edits": len(edits)})
    say(f"written: {out / ADAPTER}, {len(edits):,} facts")
    return out / ADAPTER


def _check_edits(setup: Setup, edits: list[Edit]) -> None:
    """Raise ValueError for facts whose tokens or lengths the model has no row for."""
    said = [(e.question, text) for e in edits for text in (e.target, e.true) if text]
    said += [(p, e.target) for e in edits for p in (*e.paraphrases, *e.neighbours)]
    check_rows(
        setup.model,
        edit_rows(setup.tokenizer, *map(list, zip(*said, strict=True))),
        tokenizer=setup.tokenizer,
    )


def write_edits(config: RunConfig, setup: Setup, edits: list[Edit], folder: Path) -> Any:
    """The tree with edits as `edit` says, which are saved as a PEFT folder."""
    e = config.edit
    _check_edits(setup, edits[: e.limit])
    edited = edit(
        setup.model,
        setup.params,
        setup.tokenizer,
        edits[: e.limit],
        method=e.method,
        layers=e.layers,
        prefixes=_prefixes(config, setup),
        covariances=_covariances(config, setup) if METHODS[e.method].reads_covariances else None,
        search=Search(**e.search),
        **e.options,
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    save_adapter(
        folder, edited, name="edit", base=config.model.path, revision=config.model.revision
    )
    return edited


def _covariances(config: RunConfig, setup: Setup) -> dict[str, Any]:
    """Of the keys over the training data's texts; where there is data.replay, over that, which the
    facts are no part of.
    """
    d = config.data
    rows = (
        make_rows(config, d.train, setup)
        if d.replay is None
        else text_rows(config, d.replay, setup)
    )
    batches = first_batches(config, rows, config.edit.calibration_batches)
    return calibrate(
        bind(setup.model), setup.params, batches, targets=[feed_forward(setup.params).weight]
    )


def _prefixes(config: RunConfig, setup: Setup) -> tuple[str, ...]:
    """Beginnings that the model itself writes, and none at all."""
    start = setup.tokenizer.bos_token_id
    if config.edit.prefixes == 0 or start is None:
        return ("",)
    rows = generate(
        setup.model,
        setup.params,
        [[start]] * config.edit.prefixes,
        max_tokens=8,
        temperature=1.0,
        seed=config.train.seed,
    )
    texts = [setup.tokenizer.decode(row, skip_special_tokens=True).strip() for row in rows]
    return ("", *(f"{t}." for t in texts if t))


def _measured(config: RunConfig, setup: Setup, params: Any, edits: list[Edit]) -> dict[str, float]:
    """Scores of the edits, fluency after their prompts, and the perplexity of the held-out data."""
    scores = edit_scores(bind(setup.model), params, setup.tokenizer, edits)
    g = config.generate
    texts = generate(
        setup.model,
        params,
        [e.question for e in edits[:32]],
        tokenizer=setup.tokenizer,
        max_tokens=g.max_tokens,
        temperature=g.temperature,
        top_k=g.top_k,
        top_p=g.top_p,
        seed=g.seed,
    )
    scores["fluency"] = fluency(texts)
    held = config.data.test or config.data.validation
    if held is not None:
        rows = make_rows(config, held, setup)
        found = perplexity(
            setup.model, params, rows, batch_size=config.train.batch_size, mesh=setup.mesh
        )
        scores["perplexity"] = found["perplexity"]
    return scores
