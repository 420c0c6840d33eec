"""`peft-jax`: one thin command per verb. Errors that a user can mend are one sentence and exit
status 2.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import click
from click.shell_completion import CompletionItem
from rich.console import Console
from rich.markup import escape
from rich.table import Table

USER_ERRORS = (ValueError, OSError, FloatingPointError)


Row = tuple[str, str, str]  # an option's dotted name, its default, its help


def _by_section(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """section -> its options; those of none stand under "run"."""
    found: dict[str, list[Row]] = {}
    for name, default, text in rows:
        section = name.partition(".")[0] if "." in name else "run"
        found.setdefault(section, []).append((name, default, text))
    return found


class _Command(click.Command):
    """A command whose help ends with every option and its default, section by section."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        from peft_jax.recipes.config import describe

        formatter.write_paragraph()
        formatter.write_text("Options stand in CONFIG, or after it as key=value:")
        for section, rows in _by_section(describe()).items():
            with formatter.section(section):
                formatter.write_dl([(f"{name}={default}", text) for name, default, text in rows])


def _complete(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Names of options that begin so; files, where a configuration may stand."""
    from peft_jax.recipes.config import describe

    names = {name: text for name, _, text in describe() if name.startswith(incomplete)}
    files = [CompletionItem(incomplete, type="file")] if param.name == "config" else []
    return [*files, *(CompletionItem(f"{name}=", help=text) for name, text in names.items())]


def _config(config: str | None, overrides: tuple[str, ...]) -> Any:
    from peft_jax.recipes.config import load_config

    if config is not None and "=" in config:
        config, overrides = None, (config, *overrides)
    return load_config(config, overrides)


def _command(function: Any) -> Any:
    function = click.argument("overrides", nargs=-1, shell_complete=_complete)(function)
    function = click.argument("config", required=False, shell_complete=_complete)(function)
    return main.command(cls=_Command)(function)


@click.group()
def main() -> None:
    """Parameter-efficient fine-tuning of language models in JAX and Flax.

    Each command takes a YAML file and overrides, as in: peft-jax train configs/quickstart.yaml
    method.rank=8
    """


@_command
def train(config: str | None, overrides: tuple[str, ...]) -> None:
    """Fine-tune: evaluate, train, evaluate again, sample and export."""
    from peft_jax.recipes.setup import start_distributed
    from peft_jax.recipes.train import run_training

    parsed = _config(config, overrides)
    start_distributed()
    run_training(parsed)


@_command
def compare(config: str | None, overrides: tuple[str, ...]) -> None:
    """Run recipes (full fine-tuning, techniques, chains) on one task with several seeds, and write
    a report of them side by side: see `compare`.
    """
    from peft_jax.recipes.compare import run_comparison

    run_comparison(_config(config, overrides))


@_command
def evaluate(config: str | None, overrides: tuple[str, ...]) -> None:
    """Measure the model (with model.adapter, if given) on the held-out data."""
    from peft_jax.recipes.evaluate import run_evaluation
    from peft_jax.recipes.setup import start_distributed

    parsed = _config(config, overrides)
    start_distributed()
    table = Table("metric", "value")
    for name, value in run_evaluation(parsed).items():
        table.add_row(name, f"{value:.6g}")
    Console().print(table)


@_command
def generate(config: str | None, overrides: tuple[str, ...]) -> None:
    """Continue generate.prompts."""
    from peft_jax.recipes.evaluate import run_generation
    from peft_jax.recipes.measure import shown_prompt

    parsed = _config(config, overrides)
    for prompt, text in zip(parsed.generate.prompts, run_generation(parsed), strict=True):
        break_after = "" if isinstance(prompt, str) else "\n"
        click.echo(f"{shown_prompt(prompt)}{break_after}{text}\n")


@_command
def quantize(config: str | None, overrides: tuple[str, ...]) -> None:
    """Quantize the model as `quantize` says: perplexity before and after, and a folder for
    transformers and vLLM.
    """
    from peft_jax.recipes.quantize import run_quantization

    run_quantization(_config(config, overrides))


@_command
def prune(config: str | None, overrides: tuple[str, ...]) -> None:
    """Prune the model as `prune` says: perplexity before and after, a table, a picture, and a
    folder for transformers.
    """
    from peft_jax.recipes.prune import run_pruning

    run_pruning(_config(config, overrides))


@_command
def teach(config: str | None, overrides: tuple[str, ...]) -> None:
    """Write what a teacher predicts of the training data, or completes, for students to learn from:
    see `distill`, `teach`.
    """
    from peft_jax.recipes.teach import run_teaching

    run_teaching(_config(config, overrides))


@_command
def edit(config: str | None, overrides: tuple[str, ...]) -> None:
    """Write facts into the weights as `edit` says: scores before and after, and a PEFT folder that
    can be taken off again.
    """
    from peft_jax.recipes.edit import run_editing

    run_editing(_config(config, overrides))


@_command
def inject(config: str | None, overrides: tuple[str, ...]) -> None:
    """Put facts into the model as `inject` says: what it knows of them, and of other things, before
    and after.
    """
    from peft_jax.recipes.inject import run_injection
    from peft_jax.recipes.setup import start_distributed

    parsed = _config(config, overrides)
    start_distributed()
    run_injection(parsed)


def export(config: str | None, overrides: tuple[str, ...], merged: bool) -> None:
    """Write the newest checkpoint of a run as a PEFT adapter, or merged into a Hugging Face model
    folder.
    """
    from peft_jax.recipes.export import run_export
    from peft_jax.recipes.setup import start_distributed

    parsed = _config(config, overrides)
    start_distributed()
    click.echo(run_export(parsed, merged=merged))


_command(
    click.option("--merged", is_flag=True, help="write the whole model with the adapter merged in")(
        export
    )
)


@_command
def inspect(config: str | None, overrides: tuple[str, ...]) -> None:
    """Print the tree with the method in it: path, kind, shape, dtype, bytes and what trains."""
    from peft_jax.cli.inspect import tree_table
    from peft_jax.recipes.inspect import run_inspection

    parsed = _config(config, overrides)
    Console(width=None if sys.stdout.isatty() else 160).print(tree_table(run_inspection(parsed)))


@main.command()
@click.argument("folders", nargs=-1, required=True, type=click.Path())
@click.option("--out", type=click.Path(), help="the page; by default FOLDER/report.html")
def report(folders: tuple[str, ...], out: str | None) -> None:
    """Write the page of the run in FOLDER again, or of several runs beside each other, in the
    working directory.
    """
    from peft_jax.recipes.report import run_report

    click.echo(run_report(folders, out))


def data(config: str | None, overrides: tuple[str, ...], records: int) -> None:
    """Show what a run would learn: the first records with what of them is learnt, how many there
    are, what is skipped and why, lengths and packing.
    """
    from peft_jax.cli.data import print_data
    from peft_jax.recipes.data import check_shown, run_data

    check_shown(records)
    reports = run_data(_config(config, overrides), records)
    print_data(Console(width=None if sys.stdout.isatty() else 160), reports)


_command(
    click.option("--records", default=3, show_default=True, help="how many examples to show")(data)
)


def _table_of_options(rows: Iterable[Row]) -> Table:
    table = Table("option", "default", "meaning")
    for row in rows:
        table.add_row(*map(escape, row))
    return table


def _table_of_sections(sections: Mapping[str, Sequence[Row]]) -> Table:
    """The sections, how many options they have, and the first of them."""
    table = Table("section", "options", "as")
    for section, rows in sections.items():
        names = [name.removeprefix(f"{section}.") for name, _, _ in rows[:6]]
        table.add_row(section, f"{len(rows)}", ", ".join(names))
    return table


@main.command()
@click.argument("prefix", default="", shell_complete=_complete)
def options(prefix: str) -> None:
    """List the sections of the configuration, or the options whose names begin with PREFIX, as
    'method', 'data.train' or 'train.log'.
    """
    from peft_jax.core.registry import nearest
    from peft_jax.recipes.config import describe

    sections = _by_section(describe())
    chosen = [row for rows in sections.values() for row in rows if row[0].startswith(prefix)]
    chosen = sections["run"] if prefix == "run" else chosen
    if not chosen:
        raise ValueError(f"no option begins with {prefix!r}.{nearest(prefix, sections)}")
    table = _table_of_options(chosen) if prefix else _table_of_sections(sections)
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def run() -> None:
    """The console script: user errors become one sentence on standard error and exit status 2."""
    try:
        main(standalone_mode=False)
    except click.exceptions.Abort:
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except USER_ERRORS as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(2)
