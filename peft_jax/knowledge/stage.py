"""Editing as a stage of a run: facts written into the weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from peft_jax.core.bind import bind
from peft_jax.core.calibrate import calibrate
from peft_jax.core.options import ConfigError, configuration, option
from peft_jax.core.select import nearest
from peft_jax.core.stage import Context, Needs, Stage, State
from peft_jax.generation.generate import generate
from peft_jax.knowledge.editing import METHODS, Search, edit
from peft_jax.knowledge.hooks import feed_forward
from peft_jax.knowledge.requests import Edit, edit_rows, read_edits
from peft_jax.models.tables import check_rows


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


def check_edit(section: EditConfig) -> None:
    """Raise ConfigError for options that the method or its search does not have."""
    known = METHODS[section.method].options
    for name, options, there in (
        ("options", section.options, known),
        ("search", section.search, Search._fields),
    ):
        if wrong := [k for k in options if k not in there]:
            some = ", ".join(there) or "none"
            raise ConfigError(
                f"unknown option 'edit.{name}.{wrong[0]}'.{nearest(wrong[0], there)} Those of "
                f"{section.method}: {some}"
            )


def edits_of(section: EditConfig) -> list[Edit]:
    """The facts of the section's file, as many as it wants."""
    return read_edits(Path(str(section.edits)))[: section.limit]


def check_edits(model: Any, tokenizer: Any, edits: Sequence[Edit]) -> None:
    """Raise ConfigError for a model that is not edited, and ValueError for facts whose tokens or
    lengths it has no row for.
    """
    if model.task != "causal_lm":
        raise ConfigError(
            f"facts are edited in causal language models, and this one is a {model.task}"
        )
    said = [(e.question, text) for e in edits for text in (e.target, e.true) if text]
    said += [(p, e.target) for e in edits for p in (*e.paraphrases, *e.neighbours)]
    rows = edit_rows(tokenizer, *map(list, zip(*said, strict=True)))
    check_rows(model, rows, tokenizer=tokenizer)


def write_edits(
    section: EditConfig, state: State, context: Context, edits: Sequence[Edit]
) -> State:
    """The tree with edits as the section says."""
    edits = list(edits[: section.limit])
    check_edits(state.model, context.tokenizer, edits)
    reads = METHODS[section.method].reads_covariances
    options: dict[str, Any] = {**section.options}
    params = edit(
        state.model,
        state.params,
        context.tokenizer,
        edits,
        method=section.method,
        layers=section.layers,
        prefixes=_prefixes(section, state, context),
        covariances=_covariances(state, context) if reads else None,
        search=Search(**section.search),
        **options,
    )
    return state.replace(params=params, numbers={"edits": len(edits)})


def _covariances(state: State, context: Context) -> Mapping[str, Any]:
    """Of the keys over texts that the facts are no part of, where there are some."""
    where = [feed_forward(state.params).weight]
    return calibrate(bind(state.model), state.params, context.batches, targets=where)


def _prefixes(section: EditConfig, state: State, context: Context) -> tuple[str, ...]:
    """Beginnings that the model itself writes, and none at all."""
    start = context.tokenizer.bos_token_id
    if section.prefixes == 0 or start is None:
        return ("",)
    rows = generate(
        state.model,
        state.params,
        [[start]] * section.prefixes,
        max_tokens=8,
        temperature=1.0,
        seed=context.seed,
    )
    texts = [context.tokenizer.decode(row, skip_special_tokens=True).strip() for row in rows]
    return ("", *(f"{t}." for t in texts if t))


def _needs(section: EditConfig) -> Needs:
    if not METHODS[section.method].reads_covariances:
        return Needs()
    return Needs(section.calibration_batches, ("covariance",), texts=True)


def _run(section: EditConfig, state: State, context: Context) -> State:
    return write_edits(section, state, context, edits_of(section))


STAGE = Stage(
    "edit",
    "facts that are written into the weights",
    EditConfig,
    _run,
    needs=_needs,
    check=check_edit,
    asked=lambda section: section.edits is not None,
    wants="edit.edits, a .json or .jsonl file of facts",
)
