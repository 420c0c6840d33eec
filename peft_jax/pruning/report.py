"""What pruning did to a model: a table, curves of sensitivity, a picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from peft_jax.core.bind import bind
from peft_jax.core.coverage import ledger, tokens_in_words
from peft_jax.core.in_turn import output_errors
from peft_jax.core.select import layer_paths
from peft_jax.core.sharding import fetch
from peft_jax.core.stage import Batches
from peft_jax.objectives.reading import Objective
from peft_jax.pruning.prune import densify, sparsity_of
from peft_jax.pruning.scores import of_gradients
from peft_jax.pruning.sensitivity import sensitivity
from peft_jax.pruning.stage import PruneConfig, gradients_of, loss_of, options_of

Curves = Mapping[str, Mapping[float, float]]


def _row(share: np.ndarray, error: np.ndarray, tokens: np.ndarray) -> dict[str, Any]:
    """A weight's numbers, and of stacked experts each one's beside their means; None where no token
    came to tell an error.
    """

    def known(values):
        return [None if np.isnan(v) else float(v) for v in values]

    seen = ~np.isnan(error)
    row = {
        "sparsity": float(share.mean()),
        "error": float(error[seen].mean()) if seen.any() else None,
        "tokens": tokens.astype(int).tolist(),
    }
    return row | (
        {"experts": {"sparsity": share.tolist(), "error": known(error)}} if share.ndim else {}
    )


class Report:
    """What pruning did to each layer: sparsity and output error of each weight, the tokens that
    tell it, and how sensitive each layer is.
    """

    def __init__(
        self,
        section: PruneConfig,
        model: Any,
        before: Any,
        after: Any,
        batches: Batches,
        seed: int,
        objective: Objective,
    ) -> None:
        """`model` with looped layers, its trees before and after. Sensitivity is of the one before,
        in `objective`.
        """
        where: dict[str, Any] = {"targets": section.targets, "exclude": section.exclude}
        with ledger() as book:
            errors = output_errors(bind(model), before, after, batches, **where)
        shares = sparsity_of(after, **where)
        self.tokens = {p: tokens_in_words(book.tokens[p]) for p in shares}
        self.weights = {p: _row(shares[p], fetch(errors[p]), fetch(book.tokens[p])) for p in shares}
        self.curves: Curves = {}
        if section.sensitivity and section.pattern is None:
            options = {**options_of(section, seed), **section.score_options}
            loss = loss_of(objective, model)
            of = (
                gradients_of(section, loss, before, batches)
                if of_gradients(section.score)
                else None
            )
            self.curves = sensitivity(
                bind(model),
                loss,
                densify(before),
                batches,
                section.sensitivity,
                statistics=of,
                **options,
            )

    def to_dict(self) -> dict[str, Any]:
        """All numbers, for JSON."""
        curves = {
            layer: {str(s): loss for s, loss in points.items()}
            for layer, points in self.curves.items()
        }
        return {"weights": self.weights, "sensitivity": curves}

    def show(self, console: Console) -> None:
        """Print a table of the weights and one of the sensitivities."""
        table = Table("weight", "sparsity", "output error", "tokens")
        for path, row in self.weights.items():
            error = "unknown" if row["error"] is None else f"{row['error']:.4f}"
            table.add_row(
                layer_paths(path, None)[0][0], f"{row['sparsity']:.4f}", error, self.tokens[path]
            )
        console.print(table)
        if self.curves:
            shares = list(next(iter(self.curves.values())))
            curves = Table("loss with one layer pruned", *(f"{s:.0%}" for s in shares))
            for layer, points in self.curves.items():
                curves.add_row(layer, *(f"{points[s]:.4f}" for s in shares))
            console.print(curves)

    def plot(self, path: Path) -> Path:
        """A picture of sparsity and error by layer and of the sensitivity curves."""
        from matplotlib.figure import Figure  # takes long to load

        figure = Figure(figsize=(15 if self.curves else 10, 4), layout="constrained")
        axes = figure.subplots(1, 3 if self.curves else 2)
        kinds: dict[str, list[tuple[int, dict[str, Any]]]] = {}
        for place, row in self.weights.items():
            number = layer_paths(place, None)[0][1]
            kinds.setdefault(place.split("/")[-2], []).append(
                (-1 if number is None else number, row)
            )
        for axis, name, label in zip(
            axes, ("sparsity", "error"), ("sparsity", "relative output error"), strict=False
        ):
            for kind, rows in kinds.items():
                values = [np.nan if row[name] is None else row[name] for _, row in rows]
                axis.plot([n for n, _ in rows], values, marker="o", markersize=3, label=kind)
            axis.set(xlabel="layer", ylabel=label, ylim=(0, None))
            axis.grid(alpha=0.3)
        axes[0].legend(fontsize="small")
        if self.curves:
            for layer, points in self.curves.items():
                axes[2].plot(
                    list(points), list(points.values()), marker="o", markersize=3, label=layer
                )
            axes[2].set(xlabel="share of one layer pruned", ylabel="loss, nats per token")
            axes[2].legend(fontsize="small")
            axes[2].grid(alpha=0.3)
        figure.savefig(path, dpi=120)
        return path
