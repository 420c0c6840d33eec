"""`peft-jax edit`: facts written into a model, what it says of them before and after, and the edit
as a PEFT folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from peft_jax.core.bind import bind
from peft_jax.core.files import write_json
from peft_jax.core.stage import Context
from peft_jax.generation.generate import generate
from peft_jax.hub import save_adapter
from peft_jax.knowledge.evaluation import edit_scores, fluency
from peft_jax.knowledge.requests import Edit
from peft_jax.knowledge.stage import STAGE, check_edits, edits_of, write_edits
from peft_jax.recipes.measure import held_rows, printer
from peft_jax.recipes.plan import without_stages
from peft_jax.recipes.report import leave_report
from peft_jax.recipes.run_config import RunConfig
from peft_jax.recipes.setup import Setup, context_of, set_up
from peft_jax.training.evaluate import perplexity
from peft_jax.training.report import before_and_after

ADAPTER = "edit"


def run_editing(config: RunConfig, console: Console | None = None) -> Path:
    """The whole of `peft-jax edit`: scores of the edits, perplexity of other text, before and
    after, and the edit's folder.
    """
    without_stages(config, "edit")
    section, out = STAGE.section_of(config), Path(config.output)
    STAGE.require(section)
    console = console or Console()
    edits, setup = edits_of(section), set_up(config)
    check_edits(setup.model, setup.tokenizer, edits)
    before = _measured(config, setup, setup.params, edits)
    edited = edited_tree(config, setup, edits, console, out / ADAPTER)
    after = _measured(config, setup, edited, edits)
    console.print(before_and_after(before, after))
    write_json(out / "results.json", {"before": before, "after": after, "edits": len(edits)})
    leave_report(config)
    printer(console)(f"written: {out / ADAPTER}, {len(edits):,} facts")
    return out / ADAPTER


def edited_tree(
    config: RunConfig, setup: Setup, edits: list[Edit], console: Console, folder: Path
) -> Any:
    """The tree with the edits, which are saved as a PEFT folder."""
    section = STAGE.section_of(config)
    context: Context = context_of(config, setup, console=console, needs=STAGE.needs(section))
    params = write_edits(section, setup.state, context, edits).params
    folder.parent.mkdir(parents=True, exist_ok=True)
    base, revision = config.model.path, config.model.revision
    save_adapter(folder, params, name="edit", base=base, revision=revision)
    return params


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
    rows = held_rows(config, setup)
    if rows is not None:
        size = config.train.batch_size
        found = perplexity(setup.model, params, rows, batch_size=size, mesh=setup.mesh)
        scores["perplexity"] = found["perplexity"]
    return scores
