"""`peft-jax prune`: measure, prune, measure, save."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from peft_jax.core.files import write_json
from peft_jax.core.partition import count
from peft_jax.core.stage import Context, State
from peft_jax.hub import save
from peft_jax.models.layers import unstack_layers
from peft_jax.pruning.prune import sparsity_of
from peft_jax.pruning.report import Report
from peft_jax.pruning.stage import STAGE, PruneConfig, made_smaller, masked, masks
from peft_jax.quantization.stage import QuantizeConfig
from peft_jax.recipes.export import MODEL
from peft_jax.recipes.measure import held_rows, measure, printer, shown
from peft_jax.recipes.plan import is_asked, without_stages
from peft_jax.recipes.report import leave_report
from peft_jax.recipes.run_config import RunConfig
from peft_jax.recipes.setup import context_of, set_up
from peft_jax.recipes.stages import STAGES


def run_pruning(config: RunConfig, console: Console | None = None) -> Path:
    """The whole of `peft-jax prune`: perplexity before and after, what became of each weight, how
    sensitive each layer is, a picture, and the pruned (and, where asked for, quantized) model's
    folder.
    """
    without_stages(config, "prune")
    section, out = STAGE.section_of(config), Path(config.output)
    STAGE.require(section)
    console = console or Console()
    say = printer(console)
    plain = set_up(dataclasses.replace(config, prune=PruneConfig(), quantize=QuantizeConfig()))
    rows, whole = held_rows(config, plain), count(plain.params)[1]
    before = measure(config, plain, plain.params, rows)
    say(f"before: {shown(before)}, {whole:,} parameters")
    context = context_of(config, plain, console=console, needs=STAGE.needs(section))
    small = made_smaller(section, plain.state, context)
    state = masked(section, small, context)
    out.mkdir(parents=True, exist_ok=True)
    numbers = _reported(section, small, state, context, out) if masks(section) else {}
    setup = plain._replace(state=state)
    if is_asked(config, "quantize"):
        stage = STAGES["quantize"]
        needs = stage.needs(stage.section_of(config))
        context = context_of(config, setup, console=console, needs=needs)
        setup = setup._replace(state=stage.run(stage.section_of(config), state, context))
    shares = sparsity_of(setup.params, targets=section.targets, exclude=section.exclude)
    after, left = measure(config, setup, setup.params, rows), count(setup.params)[1]
    zeros = np.mean([s.mean() for s in shares.values()])
    said = f", {zeros:.2%} zeros a weight" if masks(section) else ""
    say(f"after:  {shown(after)}, {left:,} parameters{said}")
    tool = config.quantize.tool
    save(out / MODEL, setup.model, setup.params, tokenizer=setup.tokenizer, tool=tool)
    counted = {"before": before, "after": after, "parameters_before": whole, "parameters": left}
    write_json(out / "pruning.json", {**numbers, **counted})
    leave_report(config)
    say(f"written: {out / MODEL}")
    return out / MODEL


def _reported(
    section: PruneConfig, small: State, state: State, context: Context, out: Path
) -> dict[str, Any]:
    """What became of each weight, shown, drawn and as numbers."""

    def looped(tree: Any) -> Any:
        return unstack_layers(tree) if small.model.scan_layers else tree

    report = Report(
        section,
        small.model.clone(scan_layers=False),
        looped(small.params),
        looped(state.params),
        context.batches,
        context.seed,
        context.objective(small.model),
    )
    report.show(context.console)
    picture = report.plot(out / "pruning.png")
    context.say(f"picture: {picture}")
    return report.to_dict()
