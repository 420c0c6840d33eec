"""The one loop: batches, steps, evaluation, checkpoints, early stopping, a clean end on SIGTERM."""

from __future__ import annotations

import contextlib
import functools
import math
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console

from peft_jax.core.bind import bind
from peft_jax.core.sharding import LOGICAL_RULES, batch_sharding, shardings
from peft_jax.core.tree import combine, count, partition, trainable_mask
from peft_jax.data import Rows, batch_at, evaluation_batches
from peft_jax.training.checkpoint import Checkpoints
from peft_jax.training.config import TrainConfig
from peft_jax.training.objective import Objective, next_token
from peft_jax.training.report import Reporter, step_flops_per_token
from peft_jax.training.step import TrainState, init_state, make_evaluation, make_step


class TrainingDivergedError(RuntimeError):
    """Too many steps in a row whose gradient was not finite."""


class Result(NamedTuple):
    """What training ends with: the tree, the last step, the evaluations by step, whether a signal ended it early."""

    params: Any
    step: int
    evaluations: dict[int, dict[str, float]]
    interrupted: bool
    skipped: int


def train(
    model: Any,
    params: Any,
    rows: Rows,
    optimizer: optax.GradientTransformation,
    config: TrainConfig,
    *,
    steps: int,
    mesh: Mesh | None = None,
    validation: Rows | None = None,
    objective: Objective | None = None,
    folder: Path | None = None,
    resume: bool = False,
    identity: dict[str, Any] | None = None,
    console: Console | None = None,
) -> Result:
    """Train what trains in `params` for `steps` optimizer steps and return the whole tree.

    With a `mesh` the tree must already be placed on it (see `shard`), and batches are split over data, fsdp and sequence.
    With a `folder` it writes metrics and checkpoints there; `resume` continues from the newest one. `objective` is the
    next token's cross-entropy unless given. Raises ValueError where nothing trains or the batch does not divide over the
    mesh, and TrainingDivergedError after `config.nan_limit` bad gradients in a row.
    """
    objective = objective or functools.partial(next_token, chunk=config.loss_chunk)
    console = console or Console()
    apply = bind(model)
    check_batch(config, rows.tokens.shape[1], mesh)
    state = initial_state(params, optimizer, config.seed, mesh)
    frozen = partition(params)[1]
    checkpoints = (
        None if folder is None else Checkpoints(folder / "checkpoints", keep=config.keep_checkpoints, identity=identity or {})
    )
    best = None if folder is None else Checkpoints(folder / "best", keep=1, identity=identity or {})
    evaluations: dict[int, dict[str, float]] = {}
    if resume and checkpoints is not None and checkpoints.newest() is not None:
        state, position = checkpoints.restore(state)
        evaluations = {int(k): v for k, v in position["evaluations"].items()}
        console.print(f"resumed from step {int(state.step)}", highlight=False)
    step = jax.jit(make_step(objective, apply, optimizer, accumulate=config.accumulate), donate_argnums=0)
    evaluate = jax.jit(make_evaluation(objective, apply))
    trained, total = count(params)
    reporter = Reporter(
        folder or Path("."), steps=steps, start=int(state.step), flops_per_token=step_flops_per_token(total, trained),
        tensorboard=config.tensorboard, console=console,
    ) if folder is not None else None  # fmt: skip

    def measure(state: TrainState, number: int) -> None:
        """Evaluate, remember, and keep the state if it is the best so far."""
        if validation is None or number in evaluations:
            return
        evaluations[number] = run_evaluation(evaluate, state.trainable, frozen, validation, config.batch_size, mesh)
        if reporter is not None:
            reporter.evaluation(number, evaluations[number])
        if (
            best is not None
            and config.keep_best
            and evaluations[number]["loss"] <= min(e["loss"] for e in evaluations.values())
        ):
            best.save(state, {"evaluations": {}})

    def keep(state: TrainState) -> None:
        if checkpoints is not None:
            checkpoints.save(state, {"evaluations": {str(k): v for k, v in evaluations.items()}})

    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(_stop_signal())
        if mesh is not None:
            stack.enter_context(jax.set_mesh(mesh))
            stack.enter_context(nn.logical_axis_rules(LOGICAL_RULES))
        if reporter is not None:
            stack.enter_context(reporter)
        number, since, tokens = int(state.step), time.monotonic(), 0
        while number < steps and not stop():
            batch = _on_devices(batch_at(rows, number, config.batch_size, seed=config.seed), mesh)
            state, metrics = step(state, frozen, batch)
            number += 1
            tokens += config.batch_size * rows.tokens.shape[1]
            if reporter is not None:
                reporter.advance(number)
            if number % config.log_every == 0 or number == steps:
                values = {k: float(v) for k, v in metrics.items()}
                _check_finite(values, config.nan_limit)
                if reporter is not None:
                    reporter.training(number, values, tokens, time.monotonic() - since)
                since, tokens = time.monotonic(), 0
            if config.eval_every and number % config.eval_every == 0:
                measure(state, number)
                since = time.monotonic()
                if _out_of_patience(evaluations, config.patience):
                    console.print(f"stopped at step {number}: no improvement in {config.patience} evaluations", highlight=False)
                    break
            if config.checkpoint_every and number % config.checkpoint_every == 0:
                keep(state)
        interrupted = stop()
        if not interrupted:
            measure(state, number)
        keep(state)
        if best is not None and config.keep_best and not interrupted and best.newest() not in (None, number):
            best.wait()
            skipped = state.skipped
            state = best.restore(state)[0]._replace(skipped=skipped)
            console.print(f"kept the weights of step {int(state.step)}, the best evaluation", highlight=False)
    for manager in (checkpoints, best):
        if manager is not None:
            manager.close()
    return Result(combine(state.trainable, frozen), number, evaluations, interrupted, int(state.skipped))


def run_evaluation(
    evaluate: Callable[..., Any], trainable: Any, frozen: Any, rows: Rows, batch_size: int, mesh: Mesh | None
) -> dict[str, float]:
    """Metrics over all rows, averaged by weight, with the perplexity exp(loss)."""
    sums: dict[str, float] = {}
    total = 0.0
    for batch in evaluation_batches(rows, batch_size):
        metrics = {k: float(v) for k, v in evaluate(trainable, frozen, _on_devices(batch, mesh)).items()}
        weight = metrics.pop("weight")
        total += weight
        for name, value in metrics.items():
            sums[name] = sums.get(name, 0.0) + value * weight
    result = {name: value / max(total, 1e-9) for name, value in sums.items()}
    return {**result, "perplexity": math.exp(min(result["loss"], 700.0))}


def check_batch(config: TrainConfig, length: int, mesh: Mesh | None) -> None:
    """Raise ValueError where batches of rows of `length` tokens do not divide over the mesh."""
    if mesh is None:
        return
    ways, sequence = mesh.shape["data"] * mesh.shape["fsdp"], mesh.shape["sequence"]
    micro = config.batch_size // config.accumulate
    if micro % ways:
        raise ValueError(
            f"a micro-batch of {micro} rows (train.batch_size / train.accumulate) does not divide over "
            f"data x fsdp = {ways} of the mesh"
        )
    if length % sequence:
        raise ValueError(f"data.sequence_length={length} does not divide over sequence={sequence} of the mesh")


def initial_state(params: Any, optimizer: optax.GradientTransformation, seed: int, mesh: Mesh | None = None) -> TrainState:
    """The state before the first step of training `params`, on the mesh: each trained array and its optimizer moments
    lie where its node's specs say. Raises ValueError where nothing trains.
    """
    trainable = partition(params)[0]
    if not jax.tree.leaves(trainable):
        raise ValueError("nothing trains: no node of the tree is trainable")
    start = functools.partial(init_state, optimizer=optimizer, seed=seed)
    if mesh is None:
        return start(trainable)
    where = jax.tree.map(lambda m, s: s if m else None, trainable_mask(params), shardings(params, mesh))
    replicated = NamedSharding(mesh, P())
    moments = _opt_shardings(jax.eval_shape(start, trainable).opt_state, trainable, where, replicated)
    spec = TrainState(replicated, where, moments, replicated, replicated, replicated)
    return jax.jit(start, out_shardings=spec)(trainable)


def _opt_shardings(opt_state: Any, trainable: Any, where: Any, replicated: NamedSharding) -> Any:
    """Subtrees of the optimizer state with the trainable tree's structure take its shardings."""
    structure = jax.tree.structure(trainable)
    same = lambda x: jax.tree.structure(x) == structure
    return jax.tree.map(lambda x: where if same(x) and not hasattr(x, "shape") else replicated, opt_state, is_leaf=same)


def _on_devices(batch: dict[str, np.ndarray], mesh: Mesh | None) -> Any:
    """The batch as arrays; on a mesh, each process puts its own part of it on its devices."""
    if mesh is None:
        return batch
    sharding = batch_sharding(mesh)
    return {
        name: jax.make_array_from_callback(array.shape, sharding, lambda index, array=array: array[index])
        for name, array in batch.items()
    }


def _check_finite(metrics: dict[str, float], limit: int) -> None:
    if metrics["skipped_in_a_row"] >= limit:
        raise TrainingDivergedError(
            f"{int(metrics['skipped_in_a_row'])} steps in a row had a gradient that is not finite (train.nan_limit={limit}); "
            "lower optimizer.learning_rate or look at the data"
        )


def _out_of_patience(evaluations: dict[int, dict[str, float]], patience: int) -> bool:
    losses = [evaluations[k]["loss"] for k in sorted(evaluations)]
    return bool(patience) and len(losses) > patience and min(losses[-patience:]) >= min(losses[:-patience])


@contextlib.contextmanager
def _stop_signal() -> Iterator[Callable[[], bool]]:
    """A function that says whether SIGTERM has come; the loop then saves and ends."""
    received: list[int] = []
    try:
        previous = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    except ValueError:  # not the main thread
        yield lambda: False
        return
    try:
        yield lambda: bool(received)
    finally:
        signal.signal(signal.SIGTERM, previous)
