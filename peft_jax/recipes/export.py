"""`peft-jax export`, and what training writes at its end: an adapter, or a whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import optax
import yaml
from rich.console import Console

from peft_jax.core.merge import merge
from peft_jax.core.options import ConfigError
from peft_jax.core.partition import combine, partition
from peft_jax.core.stage import Past
from peft_jax.core.tree import map_places, places
from peft_jax.core.weight import Weight, materialize
from peft_jax.hub import save, save_adapter
from peft_jax.quantization.quantized import Quantized
from peft_jax.recipes.run_config import ALTERS, RunConfig, is_asked, to_dict
from peft_jax.recipes.setup import Setup, context_of, identity, set_up
from peft_jax.training.checkpoint import Checkpoints, weights_of
from peft_jax.training.loop import initial_state
from peft_jax.training.method import check_method
from peft_jax.training.stage import STAGE, prepare

ADAPTER, MODEL, BASE, CHECKPOINTS = "adapter", "model", "base", "checkpoints"
TASK_TYPES = {  # PEFT's names
    "causal_lm": "CAUSAL_LM",
    "seq2seq_lm": "SEQ_2_SEQ_LM",
    "sequence_classification": "SEQ_CLS",
    "token_classification": "TOKEN_CLS",
    "question_answering": "QUESTION_ANS",
    "feature_extraction": "FEATURE_EXTRACTION",
}


def write_config(config: RunConfig, out: Path) -> None:
    """The configuration of a run in its folder; of several hosts the first one writes it."""
    if jax.process_index() == 0:
        text = yaml.safe_dump(to_dict(config), sort_keys=False)
        (out / "config.yaml").write_text(text, encoding="utf-8")


def export(
    config: RunConfig,
    setup: Setup,
    params: Any,
    out: Path,
    *,
    merged: bool = False,
    changed: bool | None = None,
) -> Path:
    """Write what was trained: a PEFT adapter folder, or (full fine-tuning, or `merged`) a Hugging
    Face model folder. Where the base was `changed` (by default where the configuration prunes or
    factorizes it) it is written beside its adapter.

    On several hosts all of them call this.
    """
    nodes = places(params).values()
    if merged or any(isinstance(w, Weight) and w.whole for w in nodes):
        save_model(setup, params, out)
        return out / MODEL
    options = check_method(config.method)[1]
    base, revision = config.model.path, config.model.revision
    if changed is None:
        changed = is_asked(config, "prune") or is_asked(config, "factorize")
    if changed:  # the adapter is one of the smaller model
        base, revision = str(out / BASE), None
        save(out / BASE, setup.model, setup.params, tokenizer=setup.tokenizer)
    save_adapter(
        out / ADAPTER,
        params,
        name=options.get("adapter", "default"),
        base=base,
        revision=revision,
        task_type=TASK_TYPES.get(setup.model.task),
    )
    return out / ADAPTER


def save_model(setup: Setup, params: Any, out: Path) -> None:
    """Write a tree, merged, as a Hugging Face folder."""
    arrays = map_places(lambda _, w: _cast(w, setup.model.param_dtype), merge(params))
    save(out / MODEL, setup.model, arrays, tokenizer=setup.tokenizer)


def _cast(w: Any, dtype: Any) -> Any:
    """An array, or what a pruned weight stands for, in `dtype`; quantized and factorized weights as
    they are.
    """
    if isinstance(w, Weight) and (not w.pruned or isinstance(getattr(w, "base", None), Quantized)):
        return w
    return materialize(w).astype(dtype)


def run_export(config: RunConfig, *, merged: bool) -> Path:
    """The whole of `peft-jax export`: the newest (or best) checkpoint in `output` as an adapter or
    a merged model.
    """
    out = Path(config.output)
    there = (n for n in ("best", CHECKPOINTS) if (out / n).is_dir() and any((out / n).iterdir()))
    if (chosen := next(there, None)) is None:
        raise ConfigError(f"there is no checkpoint in {out}; run `peft-jax train` first")
    setup = set_up(config)
    trained = _restored(config, setup, out / chosen)
    return export(config, setup, trained, out, merged=merged)


def _restored(config: RunConfig, setup: Setup, folder: Path) -> Any:
    """The tree of a checkpoint."""
    past = Past(identity=identity(config, setup))
    context = context_of(config, setup, console=Console(quiet=True), past=past)
    made = prepare(STAGE.section_of(config), setup.state, context)
    whole = made.params if made.taught is None else made.taught.params
    state = weights_of(initial_state(whole, optax.identity(), config.train.seed, setup.mesh))
    # it was trained: only what it is counts
    how = [name for name in ALTERS if name.startswith(("optimizer.", "train."))]
    checkpoints = Checkpoints(folder, keep=1, identity=made.identity, resume_with=how)
    try:
        checkpoints.check()
        state, _ = checkpoints.restore(state)
    finally:
        checkpoints.close()
    trained = combine(state.trainable, partition(whole)[1])
    return trained if made.taught is None else trained["student"]
