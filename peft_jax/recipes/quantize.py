"""`peft-jax quantize`: measure, quantize, measure, save."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from rich.console import Console

from peft_jax.core.coverage import ledger, tokens_in_words
from peft_jax.core.files import write_json
from peft_jax.core.sharding import fetch
from peft_jax.hub import save
from peft_jax.quantization.stage import STAGE, QuantizeConfig, mean_bits
from peft_jax.recipes.export import MODEL
from peft_jax.recipes.measure import held_rows, measure, printer, shown
from peft_jax.recipes.plan import without_stages
from peft_jax.recipes.report import leave_report
from peft_jax.recipes.run_config import RunConfig
from peft_jax.recipes.setup import set_up


def run_quantization(config: RunConfig, console: Console | None = None) -> Path:
    """The whole of `peft-jax quantize`: perplexity before and after, and the quantized model's
    folder.
    """
    without_stages(config, "quantize")
    STAGE.require(STAGE.section_of(config))
    say = printer(console or Console())
    plain = set_up(dataclasses.replace(config, quantize=QuantizeConfig()))
    rows = held_rows(config, plain)
    before = measure(config, plain, plain.params, rows)
    say(f"before: {shown(before)}")
    del plain
    with ledger() as book:
        setup = set_up(config)
    bits = mean_bits(setup.params)
    after = measure(config, setup, setup.params, rows)
    say(f"after:  {shown(after)} at {bits:.3f} bits a quantized weight")
    for path, tokens in book.tokens.items():
        if tokens.ndim:
            say(f"tokens each expert of {path} saw: {tokens_in_words(tokens)}")
    out = Path(config.output) / MODEL
    tool = config.quantize.tool
    save(out, setup.model, setup.params, tokenizer=setup.tokenizer, tool=tool)
    seen = {path: fetch(tokens).astype(int).tolist() for path, tokens in book.tokens.items()}
    write_json(
        out.parent / "quantization.json",
        {"before": before, "after": after, "bits": bits, "tokens": seen},
    )
    leave_report(config)
    say(f"written: {out}")
    return out
