"""The loop: checkpoints, killing and resuming, early stopping, divergence, signals."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import transformers

import peft_jax
from peft_jax.core import freeze, full
from peft_jax.core.mesh import make_mesh
from peft_jax.core.partition import partition
from peft_jax.core.sharding import shard
from peft_jax.data import pack
from peft_jax.data.encode import Example
from peft_jax.objectives.tokens import next_token
from peft_jax.recipes.config import load_config
from peft_jax.recipes.setup import calibration_batches
from peft_jax.training.checkpoint import Checkpoints, weights_of
from peft_jax.training.config import OptimizerConfig, TrainConfig
from peft_jax.training.loop import (
    TrainingDivergedError,
    _lowest,
    _out_of_patience,
    initial_state,
    train,
)
from peft_jax.training.optimizer import make_optimizer, make_schedule
from peft_jax.training.report import active_parameters
from peft_jax.training.stage import train_steps
from tests.reference import family_checkpoint

ROOT = Path(__file__).parents[2]


def tiny_rows(count, length, seed=0):
    """Rows of arithmetic sequences, which a model can learn, some of them packed and some
    padded.
    """
    rng = np.random.default_rng(seed)
    sizes = rng.integers(length // 3, length + 1, count)
    examples = []
    for n in sizes:
        ids = (rng.integers(3, 50) + np.arange(n + 1) * rng.integers(1, 3)).astype(np.int32)
        examples.append(Example(ids, np.ones(n + 1, bool)))
    return pack(examples, length)


@pytest.fixture(scope="module")
def setup(tiny_folder):
    model, params = peft_jax.load(tiny_folder)
    return (
        model,
        peft_jax.lora(params, jax.random.key(0), rank=2, alpha=16, dropout=0.1),
        tiny_rows(32, 16),
    )


QUIET = TrainConfig(log_every=1, tensorboard=False)


def fit(setup, steps, folder=None, *, config=QUIET, **options):
    model, params, rows = setup
    return train(
        model, params, rows, optax.adamw(0.01), config, steps=steps, folder=folder, **options
    )


def losses_of(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {r["step"]: r["loss"] for r in rows if r["kind"] == "train"}


def test_resuming_is_bit_for_bit(setup, tmp_path):
    whole = fit(setup, 6, tmp_path / "a")
    fit(setup, 3, tmp_path / "b")
    resumed = fit(setup, 6, tmp_path / "b", resume=True)
    for a, b in zip(jax.tree.leaves(whole.params), jax.tree.leaves(resumed.params), strict=True):
        np.testing.assert_array_equal(a, b)
    assert losses_of(tmp_path / "a") == losses_of(tmp_path / "b")


def test_resuming_on_another_mesh_is_close(setup, tmp_path):
    model, params, rows = setup
    fit(setup, 3, tmp_path / "a")
    whole = fit(setup, 6, None)
    mesh = make_mesh({"data": 2, "fsdp": 4})
    resumed = fit((model, shard(params, mesh), rows), 6, tmp_path / "a", mesh=mesh, resume=True)
    for a, b in zip(jax.tree.leaves(whole.params), jax.tree.leaves(resumed.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-2, atol=2e-3)


def test_a_checkpoint_of_another_run_is_refused(setup, tmp_path):
    fit(setup, 2, tmp_path / "a", identity={"data": "one"})
    with pytest.raises(ValueError, match=r"was made with another data"):
        fit(setup, 4, tmp_path / "a", identity={"data": "two"}, resume=True)


def test_the_checkpoint_holds_no_base(setup, tmp_path):
    fit(setup, 2, tmp_path / "a")
    size = sum(f.stat().st_size for f in (tmp_path / "a" / "checkpoints").rglob("*") if f.is_file())
    model_size = sum(x.nbytes for x in jax.tree.leaves(setup[1]))
    assert size < model_size / 4


def test_retention_and_best(setup, tmp_path):
    config = TrainConfig(
        eval_every=2, checkpoint_every=2, keep_checkpoints=2, tensorboard=True, log_every=2
    )
    result = fit(setup, 8, tmp_path, config=config, validation=tiny_rows(8, 16, seed=5))
    assert sorted(
        int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()
    ) == [6, 8]
    losses = {k: v["loss"] for k, v in result.evaluations.items()}
    assert sorted(losses) == [2, 4, 6, 8]
    best = [int(p.name) for p in (tmp_path / "best").iterdir() if p.name.isdigit()]
    assert best == [min(losses, key=lambda k: losses[k])]
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_only_weights_are_kept_of_the_best_and_read_to_export(setup, tmp_path):
    """A folder that holds an optimizer's state as well, as an older version wrote `best`, is read
    as one that does not.
    """
    config = TrainConfig(eval_every=2, tensorboard=False)
    result = fit(setup, 2, tmp_path, config=config, validation=tiny_rows(8, 16, seed=5))
    state = initial_state(setup[1], optax.adamw(0.01), 0)
    for name in ("best", "checkpoints"):
        kept = Checkpoints(tmp_path / name, keep=1, identity={})
        read, _ = kept.restore(weights_of(state))
        assert read.opt_state is None
        assert int(read.step) == 2
        for a, b in zip(
            jax.tree.leaves(read.trainable),
            jax.tree.leaves(partition(result.params)[0]),
            strict=True,
        ):
            np.testing.assert_array_equal(a, b)
        if name == "best":
            with pytest.raises(ValueError, match="holds another state, as opt_state"):
                kept.restore(state)
        kept.close()


def test_early_stopping_ends_with_the_best_weights(setup, tmp_path):
    model, params, rows = setup
    config = TrainConfig(eval_every=1, patience=2, tensorboard=False)
    result = train(
        model, params, rows, optax.sgd(-0.05), config, steps=50, validation=rows, folder=tmp_path
    )  # climbs
    assert result.step == 3
    best = min(result.evaluations, key=lambda k: result.evaluations[k]["loss"])
    assert best == 1


def test_the_best_weights_are_kept_without_a_folder(setup, tmp_path):
    """As with one; the rate is far too high, so that the last evaluation is not the best."""
    model, params, rows = setup
    config = TrainConfig(log_every=1, tensorboard=False, eval_every=1, keep_best=True)
    options = dict(steps=4, validation=tiny_rows(8, 16, seed=1))
    kept, stored = (
        train(model, params, rows, optax.sgd(30.0), config, folder=folder, **options)
        for folder in (None, tmp_path / "run")
    )
    losses = {step: found["loss"] for step, found in kept.evaluations.items()}
    assert min(losses, key=losses.get) != 4
    for a, b in zip(jax.tree.leaves(kept.params), jax.tree.leaves(stored.params), strict=True):
        np.testing.assert_array_equal(a, b)


def test_an_evaluation_that_is_not_finite_is_no_best():
    def losses(*values):
        return {i: {"loss": v} for i, v in enumerate(values)}

    nan = float("nan")
    assert _lowest([nan, 3.0, 2.0]) == 2.0
    assert not _out_of_patience(losses(nan, 3.0, 2.0), 2)
    assert _out_of_patience(losses(2.0, nan, 3.0), 2)
    assert not _out_of_patience(losses(nan, 3.0), 1)


def test_epochs_see_every_row():
    """23 rows at 16 are two steps; whole epochs are no step longer than they are."""
    rows = tiny_rows(46, 16)._make(x[:23] for x in tiny_rows(200, 16))

    def steps(epochs, batch):
        return train_steps(TrainConfig(epochs=epochs, batch_size=batch, steps=None), rows)

    assert [steps(1, 16), steps(2, 23), steps(3, 23), steps(0.1, 23)] == [2, 2, 3, 1]


def test_mixtures_count_the_experts_that_a_token_meets(tmp_path):
    """FLOPs of a step: the parameters of 2 of 4 experts, against PyTorch's count of the rest and of
    one expert.
    """
    folder, *_ = family_checkpoint("mixtral_sliding", tmp_path)
    model, params = peft_jax.load(folder)
    torch_model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    sizes = {n: p.numel() for n, p in torch_model.named_parameters()}
    experts = sum(n for name, n in sizes.items() if "experts" in name)
    c = torch_model.config
    expected = sum(sizes.values()) - experts * (1 - c.num_experts_per_tok / c.num_local_experts)
    total, trained = active_parameters(model, full(params))
    assert total == trained == expected
    assert active_parameters(model, params) == (expected, 0)


def test_divergence_is_said(setup):
    model, params, rows = setup

    def bad(apply, params, batch, rng):
        return peft_jax.partition(params)[0]["model"]["layers"]["mlp"]["up_proj"][
            "kernel"
        ].a.sum() * jnp.nan, {"weight": jnp.ones(())}

    with pytest.raises(
        TrainingDivergedError,
        match=r"3 steps in a row .* the first ones: no learning rate was at work yet",
    ):
        train(
            model,
            params,
            rows,
            optax.sgd(0.1),
            TrainConfig(nan_limit=3, log_every=1),
            steps=9,
            objective=bad,
        )

    def later(apply, params, batch, rng):
        loss, metrics = next_token(apply, params, batch, rng)
        up = peft_jax.partition(params)[0]["model"]["layers"]["mlp"]["up_proj"]["kernel"]
        return loss + jnp.where(jnp.abs(up.b).max() > 0, jnp.nan, 0.0) * up.b.sum(), metrics

    with pytest.raises(
        TrainingDivergedError, match=r"3 steps in a row .* lower optimizer.learning_rate"
    ):
        train(
            model,
            params,
            rows,
            optax.sgd(0.1),
            TrainConfig(nan_limit=3, log_every=1),
            steps=9,
            objective=later,
        )


def test_what_cannot_be_trained_is_refused(setup):
    model, params, rows = setup
    with pytest.raises(ValueError, match=r"nothing trains"):
        fit((model, freeze(params), rows), 1)
    mesh = make_mesh({"data": 8})
    with pytest.raises(
        ValueError,
        match=r"a micro-batch of 4 rows .* does not divide over expert x data x fsdp = 8",
    ):
        fit((model, shard(params, mesh), rows), 1, config=TrainConfig(batch_size=4), mesh=mesh)
    mesh = make_mesh({"sequence": 8})
    with pytest.raises(ValueError, match=r"sequence_length=12 does not divide over sequence=8"):
        fit((model, shard(params, mesh), tiny_rows(8, 12)), 1, mesh=mesh)


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"data": 3}, "does not divide the 8 devices"),
        ({"data": -1, "tensor": 3}, "does not divide the 8 devices"),
        (
            {"rows": 8},
            "unknown mesh axis 'rows'; the axes are expert, data, fsdp, sequence, tensor",
        ),
        ({"data": -1, "fsdp": -1}, "at most one of them -1"),
        ({"data": 0}, "must be positive"),
    ],
)
def test_bad_meshes(axes, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(axes)


def test_schedules_and_optimizers():
    config = OptimizerConfig(
        learning_rate=1.0, warmup_steps=10, schedule="linear", final_fraction=0.1
    )
    schedule = make_schedule(config, 110)
    np.testing.assert_allclose(
        [schedule(i) for i in (0, 5, 10, 60, 110)], [0, 0.5, 1.0, 0.55, 0.1], rtol=1e-5
    )
    cosine = make_schedule(OptimizerConfig(learning_rate=1.0, warmup_steps=0), 100)
    np.testing.assert_allclose([cosine(0), cosine(50), cosine(100)], [1.0, 0.5, 0.0], atol=1e-6)
    params = {"w": np.ones((2, 2), np.float32), "b": np.ones(2, np.float32)}
    for name in ("adamw", "lion", "adafactor"):
        optimizer = make_optimizer(OptimizerConfig(name=name, weight_decay=0.1, warmup_steps=0), 10)
        zero = jax.tree.map(np.zeros_like, params)
        updates, _ = optimizer.update(zero, optimizer.init(params), params)
        assert float(np.abs(updates["w"]).max()) > 0, name  # decay reaches matrices
    with pytest.raises(ValueError, match=r"'sgd' has no weight decay"):
        make_optimizer(OptimizerConfig(name="sgd", weight_decay=0.1), 10)


def command(folder, tiny_folder, *overrides):
    options = [
        f"output={folder}",
        f"model.path={tiny_folder}",
        "method.rank=2",
        "method.dropout=0.1",
        "data.train.limit=12",
        "data.validation=null",
        "data.sequence_length=32",
        "train.steps=40",
        "train.batch_size=2",
        "train.log_every=1",
        "train.checkpoint_every=5",
        "evaluate.metrics=[]",
        "train.tensorboard=false",
        *overrides,
    ]
    environment = {**os.environ, "XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-m", "peft_jax", "train", *options],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for_checkpoint(folder, process, step):
    deadline = time.monotonic() + 180
    while not (folder / "checkpoints" / str(step)).is_dir():
        assert time.monotonic() < deadline
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.05)


@pytest.fixture(scope="module")
def uninterrupted(tiny_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    process = command(folder, tiny_folder)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return losses_of(folder)


def test_kill_dash_nine_and_resume(tiny_folder, tmp_path, uninterrupted):
    process = command(tmp_path, tiny_folder)
    wait_for_checkpoint(tmp_path, process, 10)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "adapter").exists()
    process = command(tmp_path, tiny_folder)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert "resumed from step" in output
    assert losses_of(tmp_path) == uninterrupted
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_sigterm_saves_and_ends_cleanly(tiny_folder, tmp_path, uninterrupted):
    process = command(tmp_path, tiny_folder, "train.checkpoint_every=0", "train.steps=4000")
    deadline = time.monotonic() + 180
    while not (tmp_path / "metrics.jsonl").is_file() or len(losses_of(tmp_path)) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert "by SIGTERM; the checkpoint is in" in output
    assert [p for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()]


def test_calibration_on_text_that_nobody_chose_is_said(monkeypatch, caplog):
    monkeypatch.setattr("peft_jax.recipes.setup.make_rows", lambda *_: None)
    monkeypatch.setattr("peft_jax.recipes.setup.first_batches", lambda *_: [])

    def run(*overrides):
        return calibration_batches(load_config(None, overrides), None, 1)

    run()
    run("model.path=some/model", "data.train.path=mine.txt")
    assert not caplog.records
    run("model.path=some/model")
    assert "calibrating on builtin:python-docs, which data.train is by default" in caplog.text
