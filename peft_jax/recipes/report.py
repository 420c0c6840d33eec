"""`peft-jax report`, and the page that a run leaves in its folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import jax

from peft_jax.recipes.export import write_config
from peft_jax.recipes.run_config import RunConfig
from peft_jax.reports.run import REPORT, write_run, write_views


def leave_report(config: RunConfig) -> None:
    """Write the run's configuration and its page into its folder; of several hosts the first one
    does.
    """
    if jax.process_index() == 0:
        out = Path(config.output)
        write_config(config, out)
        write_run(out)


def run_report(folders: Sequence[str], out: str | None) -> Path:
    """The whole of `peft-jax report`: a page of these runs, by default report.html in the folder of
    one run, and in the working directory of several.
    """
    there = [Path(f) for f in folders]
    if missing := [f for f in there if not f.is_dir()]:
        raise FileNotFoundError(f"{missing[0]} is no folder of a run")
    default = there[0] / REPORT if len(there) == 1 else Path(REPORT)
    return write_views(there, Path(out) if out else default)
