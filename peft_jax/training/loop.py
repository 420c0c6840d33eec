"""The one loop: batches, steps, evaluation, checkpoints, early stopping, a clean end on SIGTERM."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console

from peft_jax.core.bind import bind
from peft_jax.core.mesh import ROWS, batch_sharding
from peft_jax.core.partition import combine, partition, trainable_mask
from peft_jax.core.sharding import shardings
from peft_jax.data import batch_at, evaluation_batches
from peft_jax.data.batches import parts_at
from peft_jax.models.tables import check_rows
from peft_jax.objectives.reading import Objective
from peft_jax.objectives.tokens import next_token
from peft_jax.training.checkpoint import Checkpoints, weights_of
from peft_jax.training.config import TrainConfig
from peft_jax.training.program import STEP, describe_step
from peft_jax.training.report import Reporter, active_parameters, step_flops_per_token
from peft_jax.training.step import TrainState, init_state, make_evaluation, make_step


class TrainingDivergedError(FloatingPointError):
    """Too many steps in a row whose gradient was not finite."""


class Result(NamedTuple):
    """What training ends with: the tree, the last step, the evaluations by step, whether a signal
    ended it early.
    """

    params: Any
    step: int
    evaluations: dict[int, dict[str, float]]
    interrupted: bool
    skipped: int


def train(
    model: Any,
    params: Any,
    rows: Any,
    optimizer: optax.GradientTransformation,
    config: TrainConfig,
    *,
    steps: int,
    mesh: Mesh | None = None,
    validation: Any = None,
    objective: Objective | None = None,
    evaluation: Objective | None = None,
    folder: Path | None = None,
    resume: bool = False,
    identity: dict[str, Any] | None = None,
    resume_with: Sequence[str] = (),
    flops_per_token: float | None = None,
    console: Console | None = None,
) -> Result:
    """Train what trains in `params` for `steps` optimizer steps and return the whole tree.

    `rows` and `validation` are NamedTuples of arrays [N, ...] with `tokens` among them, as
    `objective` wants them. With a `mesh` the tree must already be placed on it (see `shard`), and
    batches are split over data, fsdp and sequence. With a `folder` it writes metrics and
    checkpoints there; `resume` continues from the newest one, whose `identity` must be the same but
    for what `resume_with` names. `objective` is the next token's cross-entropy unless given;
    `validation` is measured by `evaluation`, by default the same. Reports count `flops_per_token`,
    by default those of a forward and a backward pass through all of `params`. Raises ValueError
    where rows hold what the model has no row for, where nothing trains or the batch does not divide
    over the mesh, and TrainingDivergedError after `config.nan_limit` bad gradients in a row.
    """
    check_batch(config, rows.tokens.shape[1], mesh)
    for part in (rows, validation):
        check_rows(model, part)
    objective = objective or functools.partial(next_token, chunk=config.loss_chunk)
    apply, state = bind(model), initial_state(params, optimizer, config.seed, mesh)
    run = _Run(
        config=config,
        steps=steps,
        mesh=mesh,
        rows=rows,
        validation=validation,
        frozen=partition(params)[1],
        step=jax.jit(
            make_step(objective, apply, optimizer, accumulate=config.accumulate), donate_argnums=0
        ),
        evaluate=jax.jit(make_evaluation(evaluation or objective, apply)),
        console=console or Console(),
        folder=folder,
        identity=identity or {},
        resume_with=resume_with,
    )
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(_stop_signal())
        flops = (
            step_flops_per_token(*active_parameters(model, params))
            if flops_per_token is None
            else flops_per_token
        )
        state = run.open(stack, state, resume=resume, flops_per_token=flops)
        number = int(state.step)
        while number < steps and not stop():
            state, number = run.advance(state, number)
            if config.eval_every and number % config.eval_every == 0:
                run.measure(state, number)
                if _out_of_patience(run.evaluations, config.patience):
                    run.say(
                        f"stopped at step {number}: no improvement in {config.patience} evaluations"
                    )
                    break
            if config.checkpoint_every and number % config.checkpoint_every == 0:
                run.keep(state)
        interrupted = stop()
        if not interrupted:
            run.measure(state, number)
        run.keep(state)
        state = state if interrupted else run.best_of(state, number)
    return Result(
        combine(state.trainable, run.frozen),
        number,
        run.evaluations,
        interrupted,
        int(state.skipped),
    )


@dataclasses.dataclass
class _Run:
    """What the loop works with, and the records that it keeps."""

    config: TrainConfig
    steps: int
    mesh: Mesh | None
    rows: Any
    validation: Any
    frozen: Any
    step: Callable[..., Any]
    evaluate: Callable[..., Any]
    console: Console
    folder: Path | None
    identity: dict[str, Any]
    resume_with: Sequence[str] = ()
    evaluations: dict[int, dict[str, float]] = dataclasses.field(default_factory=dict)
    checkpoints: Checkpoints | None = None
    best: Checkpoints | None = None
    held: TrainState | None = (
        None  # the best where there is no folder, without the optimizer's part
    )
    reporter: Reporter | None = None
    since: float = 0.0  # start of the interval that the next log line is about
    tokens: int = 0  # and the tokens seen in it

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False)

    def open(
        self,
        stack: contextlib.ExitStack,
        state: TrainState,
        *,
        resume: bool,
        flops_per_token: float,
    ) -> TrainState:
        """Open checkpoints and reports under the folder, and continue from the newest checkpoint if
        asked to.
        """
        self.since = time.monotonic()
        if self.folder is None:
            return state
        options: dict[str, Any] = {"identity": self.identity, "resume_with": self.resume_with}
        self.checkpoints = Checkpoints(
            self.folder / "checkpoints", keep=self.config.keep_checkpoints, **options
        )
        self.best = Checkpoints(self.folder / "best", keep=1, identity=self.identity)
        stack.callback(self.checkpoints.close)
        stack.callback(self.best.close)
        if resume and self.checkpoints.newest() is not None:
            self.checkpoints.check()
            state, position = self.checkpoints.restore(state)
            self.evaluations = {int(k): v for k, v in position["evaluations"].items()}
            self.say(f"resumed from step {int(state.step)}")
        self.reporter = Reporter(
            self.folder,
            steps=self.steps,
            start=int(state.step),
            measured=self.evaluations,
            flops_per_token=flops_per_token,
            tensorboard=self.config.tensorboard,
            console=self.console,
        )
        stack.enter_context(self.reporter)
        self._describe(state)
        return state

    def _describe(self, state: TrainState) -> None:
        """Tell what the step takes, once for a run."""
        if self.folder is None or int(state.step) >= self.steps:
            return
        if int(state.step) == 0:  # of a run that is not this one
            (self.folder / STEP).unlink(missing_ok=True)
        tokens = self.rows.tokens.shape[1] * self.config.batch_size
        arguments = (state, self.frozen, self._batch(int(state.step)))
        describe_step(self.step, arguments, tokens, self.folder)
        self.since = time.monotonic()

    def _batch(self, number: int) -> Any:
        read = batch_at if self.mesh is None else parts_at
        made = read(self.rows, number, self.config.batch_size, seed=self.config.seed)
        return on_devices(made, self.mesh)

    def advance(self, state: TrainState, number: int) -> tuple[TrainState, int]:
        """One step, with a log line where one is due."""
        state, metrics = self.step(state, self.frozen, self._batch(number))
        number += 1
        self.tokens += self.rows.tokens.shape[1] * self.config.batch_size
        if self.reporter is not None:
            self.reporter.advance(number)
        if number % self.config.log_every == 0 or number == self.steps:
            values = {k: float(v) for k, v in metrics.items()}
            _check_finite(values, self.config.nan_limit, number)
            if self.reporter is not None:
                self.reporter.training(number, values, self.tokens, time.monotonic() - self.since)
            self.since, self.tokens = time.monotonic(), 0
        return state, number

    def measure(self, state: TrainState, number: int) -> None:
        """Evaluate, remember, and keep the state if it is the best so far."""
        if self.validation is None or number in self.evaluations:
            return
        start = time.monotonic()
        rows, size = self.validation, self.config.batch_size
        result = run_evaluation(self.evaluate, state.trainable, self.frozen, rows, size, self.mesh)
        self.evaluations[number] = result
        if self.reporter is not None:
            self.reporter.evaluation(number, result)
        if self.config.keep_best and result["loss"] <= _lowest(
            e["loss"] for e in self.evaluations.values()
        ):
            if self.best is None:
                self.held = jax.tree.map(jnp.copy, weights_of(state))
            else:
                self.best.save(weights_of(state), {"evaluations": {}})
        self.since += time.monotonic() - start

    def keep(self, state: TrainState) -> None:
        """Save a checkpoint."""
        if self.checkpoints is not None:
            self.checkpoints.save(
                state, {"evaluations": {str(k): v for k, v in self.evaluations.items()}}
            )

    def _stored_best(self, state: TrainState, number: int) -> TrainState | None:
        """The best state that the folder holds, None where that is none or the one of step
        `number`.
        """
        assert self.best is not None
        if not self.config.keep_best or self.best.newest() in (None, number):
            return None
        self.best.wait()
        return self.best.restore(weights_of(state))[0]

    def best_of(self, state: TrainState, number: int) -> TrainState:
        """The state of the best evaluation where that was an earlier one."""
        best = self.held if self.best is None else self._stored_best(state, number)
        if not self.config.keep_best or best is None or int(best.step) == number:
            return state
        state = best._replace(skipped=state.skipped)
        self.say(f"kept the weights of step {int(state.step)}, the best evaluation")
        return state


def run_evaluation(
    evaluate: Callable[..., Any],
    trainable: Any,
    frozen: Any,
    rows: Any,
    batch_size: int,
    mesh: Mesh | None,
) -> dict[str, float]:
    """Metrics over all rows, averaged by weight, with the perplexity exp(loss)."""
    sums: dict[str, float] = {}
    total = 0.0
    for batch in evaluation_batches(rows, batch_size):
        metrics = {
            k: float(v) for k, v in evaluate(trainable, frozen, on_devices(batch, mesh)).items()
        }
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
    ways, sequence = math.prod(mesh.shape[axis] for axis in ROWS), mesh.shape["sequence"]
    micro = config.batch_size // config.accumulate
    if micro % ways:
        raise ValueError(
            f"a micro-batch of {micro} rows (train.batch_size / train.accumulate) does not "
            "divide over "
            f"{' x '.join(ROWS)} = {ways} of the mesh"
        )
    if length % sequence:
        raise ValueError(
            f"data.sequence_length={length} does not divide over sequence={sequence} of the mesh"
        )


def initial_state(
    params: Any, optimizer: optax.GradientTransformation, seed: int, mesh: Mesh | None = None
) -> TrainState:
    """The state before the first step of training `params`, on the mesh: each trained array and its
    optimizer moments lie where its node's specs say. Raises ValueError where nothing trains.
    """
    trainable = partition(params)[0]
    if not jax.tree.leaves(trainable):
        raise ValueError("nothing trains: no node of the tree is trainable")
    start = functools.partial(init_state, optimizer=optimizer, seed=seed)
    if mesh is None:
        return start(trainable)
    return jax.jit(start, out_shardings=state_shardings(params, optimizer, mesh))(trainable)


def state_shardings(params: Any, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Where the state of training `params`, arrays or ShapeDtypeStructs, lies on the mesh."""
    trainable = partition(params)[0]
    where = jax.tree.map(
        lambda m, s: s if m else None, trainable_mask(params), shardings(params, mesh)
    )
    replicated = NamedSharding(mesh, P())
    start = functools.partial(init_state, optimizer=optimizer, seed=0)
    moments = _opt_shardings(
        jax.eval_shape(start, trainable).opt_state, trainable, where, replicated
    )
    return TrainState._make((replicated, where, moments, replicated, replicated, replicated))


def _opt_shardings(opt_state: Any, trainable: Any, where: Any, replicated: NamedSharding) -> Any:
    """Arrays of the optimizer's state that stand for those of the trainable tree, one for one and
    of the same shape, lie where these do (moments; not so an Adafactor's factors).
    """
    structure = jax.tree.structure(trainable)

    def same(x):
        return jax.tree.structure(x) == structure and not hasattr(x, "shape")

    def alike(x, array, spec):
        return spec if x.shape == array.shape else replicated

    def lay(x):
        return jax.tree.map(alike, x, trainable, where) if same(x) else replicated

    return jax.tree.map(lay, opt_state, is_leaf=same)


def on_devices(batch: dict[str, Any], mesh: Mesh | None) -> Any:
    """The batch as arrays; on a mesh, each process puts its own part of it on its devices."""
    if mesh is None:
        return batch
    return {
        name: jax.make_array_from_callback(
            array.shape, batch_sharding(mesh, array), lambda index, array=array: array[index]
        )
        for name, array in batch.items()
    }


def _check_finite(metrics: dict[str, float], limit: int, step: int) -> None:
    bad = int(metrics["skipped_in_a_row"])
    if bad >= limit:
        first = (
            "the first ones: no learning rate was at work yet, so look at the data, the "
            "model and its dtype"
        )
        advice = first if bad == step else "lower optimizer.learning_rate or look at the data"
        raise TrainingDivergedError(
            f"{bad} steps in a row had a gradient that is not finite (train.nan_limit={limit}); "
            f"{advice}"
        )


def _out_of_patience(evaluations: dict[int, dict[str, float]], patience: int) -> bool:
    losses = [evaluations[k]["loss"] for k in sorted(evaluations)]
    return (
        bool(patience)
        and len(losses) > patience
        and _lowest(losses[-patience:]) >= _lowest(losses[:-patience])
    )


def _lowest(losses: Iterable[float]) -> float:
    """The lowest of losses that are finite, infinity where none is."""
    return min(filter(math.isfinite, losses), default=math.inf)


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
