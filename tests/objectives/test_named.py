"""What every named objective must satisfy, on a model of one table. A registered one is tested by
itself.
"""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from peft_jax.core.options import ConfigError
from peft_jax.objectives.labels import LABELS
from peft_jax.objectives.objective import OBJECTIVES, make_objective
from peft_jax.objectives.tokens import TOKENS
from peft_jax.training.config import TrainConfig
from peft_jax.training.data import DataConfig, Subject
from peft_jax.training.lesson import DistillConfig, TeacherConfig
from peft_jax.training.stage import Training, check_training
from peft_jax.training.step import init_state, make_step
from peft_jax.training.tasks import objective_of
from tests.installed import install

B, T, V, C = 8, 6, 7, 3
RNG = np.random.default_rng(0)
TABLE = {"table": jnp.asarray(RNG.normal(size=(V, V)), jnp.float32)}
TOKENS_OF_ROWS = {
    "tokens": RNG.integers(0, V, (B, T)),
    "segment_ids": np.ones((B, T), np.int32),
}
BY_TOKEN = {
    **TOKENS_OF_ROWS,
    "targets": RNG.integers(0, V, (B, T)),
    "weights": np.float32(RNG.random((B, T)) < 0.6),
}
BY_ROW = {**TOKENS_OF_ROWS, "weights": np.float32([1, 1, 1, 1, 0, 1, 0, 1])}
PAIRS = {
    "other_tokens": RNG.integers(0, V, (B, T)),
    "other_segment_ids": np.ones((B, T), np.int32),
}
# what a model of a task puts out, how it reads a batch, and a batch
TASKS = {
    "causal_lm": (lambda x: x, TOKENS, BY_TOKEN),
    "sequence_classification": (
        lambda x: x.mean(1)[:, :C],
        LABELS,
        {**BY_ROW, "labels": RNG.integers(0, C, B)},
    ),
    "feature_extraction": (lambda x: x, None, BY_ROW | PAIRS),
    "numbers": (
        lambda x: x.mean(1)[:, :1],
        None,
        {**BY_ROW, "labels": np.float32(RNG.normal(size=B))},
    ),
}


def softmax_nll(logits, targets):
    logits = logits - logits.max(-1, keepdims=True)
    chosen = np.take_along_axis(logits, targets[..., None], -1)[..., 0]
    return np.log(np.exp(logits).sum(-1)) - chosen


def mean(losses, weights):
    return (losses * weights).sum() / weights.sum()


def contrasted(hidden, batch, temperature=0.5):
    """The mean over rows that count of both ways' cross-entropy, by cosine."""
    other = np.asarray(TABLE["table"], np.float64)[batch["other_tokens"]]
    a, b = (x.mean(1) / np.linalg.norm(x.mean(1), axis=-1, keepdims=True) for x in (hidden, other))
    rows = batch["weights"] > 0
    scores, own = a[rows] @ b[rows].T / temperature, np.arange(rows.sum())
    return (softmax_nll(scores, own) + softmax_nll(scores.T, own)).mean() / 2


REFERENCES = {
    "token_cross_entropy": lambda x, b: mean(softmax_nll(x, b["targets"]), b["weights"]),
    "label_cross_entropy": lambda x, b: mean(softmax_nll(x, b["labels"]), b["weights"]),
    "squared_error": lambda x, b: mean((x[:, 0] - b["labels"]) ** 2, b["weights"]),
    "contrast": contrasted,
}


def case_of(record):
    """(apply, objective, batch, reference) of a record. Raises LookupError for one that is compared
    with nothing.
    """
    reference = record.reference or REFERENCES.get(record.name)
    if reference is None:
        raise LookupError(f"the objective {record.name!r} is compared with nothing")
    task = next(task for task in record.tasks if task in TASKS)
    if task == "sequence_classification" and not record.reads:
        task = "numbers"
    out, reading, batch = TASKS[task]

    def apply(params, tokens, rng=None, **inputs):
        return out(params["table"][tokens])

    return apply, record.make(reading, **record.example), batch, reference


@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_an_objective_is_its_formula_and_a_mean_over_what_counts(name):
    check(OBJECTIVES[name])


def check(record):
    apply, objective, batch, reference = case_of(record)
    batch = jax.tree.map(jnp.asarray, batch)
    loss, metrics = objective(apply, TABLE, batch, None)
    outputs = np.asarray(apply(TABLE, batch["tokens"]), np.float64)
    expected = reference(outputs, jax.tree.map(np.asarray, batch))
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    assert float(metrics["weight"]) == float(batch["weights"].sum())
    rows = batch["weights"].reshape(B, -1).sum(1) > 0
    moved = {**batch, "tokens": jnp.where(rows[:, None], batch["tokens"], 0)}
    if "targets" in batch:
        moved["targets"] = jnp.where(batch["weights"] > 0, batch["targets"], 0)
    assert float(objective(apply, TABLE, moved, None)[0]) == pytest.approx(float(loss), rel=1e-6)
    steps = [jax.jit(make_step(objective, apply, optax.sgd(1.0), accumulate=n)) for n in (1, 4)]
    state = init_state(TABLE, optax.sgd(1.0), 0)
    (whole, _), (parts, _) = (step(state, {"table": None}, batch) for step in steps)
    moved = np.asarray(whole.trainable["table"]) - np.asarray(TABLE["table"])
    assert np.abs(moved).max() > 0
    np.testing.assert_allclose(
        np.asarray(parts.trainable["table"]) - np.asarray(TABLE["table"]), moved, atol=1e-6
    )


FOCAL = '''
import jax.numpy as jnp
import numpy as np
from peft_jax.objectives.objective import NamedObjective
from peft_jax.objectives.reading import mean_over, nll_and_hits


def make(reading, power=2.0):
    """Focal loss (Lin et al. 2017, arXiv:1708.02002): what is likely already counts for less."""

    def focal(apply, params, batch, rng):
        batch = reading.view(batch, rng)
        states = reading.states(apply, params, batch, rng)
        nll, _ = nll_and_hits(reading.head(apply, params, batch)(states), batch["targets"])
        weights = batch["weights"].astype(jnp.float32)
        loss = mean_over(batch)((1 - jnp.exp(-nll)) ** power * nll, weights)
        return loss, {"weight": weights.sum()}

    return focal


def reference(logits, batch):
    share = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    p = np.take_along_axis(share, batch["targets"][..., None], -1)[..., 0]
    losses = -((1 - p) ** 2) * np.log(p)
    return (losses * batch["weights"]).sum() / batch["weights"].sum()


FOCAL = NamedObjective(
    name="focal", tasks=("causal_lm",), make=make, follows="arXiv:1708.02002", reference=reference
)
'''


def test_an_installed_objective_is_found_and_tested_as_the_others(tmp_path, monkeypatch):
    install(tmp_path, monkeypatch, OBJECTIVES, "their_objective", FOCAL, "FOCAL")
    assert "focal" in OBJECTIVES
    check(OBJECTIVES["focal"])
    made = make_objective("focal", "causal_lm", TOKENS, {"power": 0.0})
    plain = make_objective("token_cross_entropy", "causal_lm", TOKENS, {})
    batch = jax.tree.map(jnp.asarray, BY_TOKEN)
    found, expected = (
        f(case_of(OBJECTIVES["focal"])[0], TABLE, batch, None)[0] for f in (made, plain)
    )
    assert float(found) == pytest.approx(float(expected), rel=1e-6)
    with pytest.raises(AssertionError):
        check(dataclasses.replace(OBJECTIVES["focal"], example={"power": 1.0}))
    with pytest.raises(LookupError, match="'focal' is compared with nothing"):
        check(dataclasses.replace(OBJECTIVES["focal"], reference=None))


@pytest.mark.parametrize(
    ("name", "task", "reading", "options", "message"),
    [
        ("focul", "causal_lm", TOKENS, {}, "unknown objective 'focul'"),
        ("contrast", "causal_lm", TOKENS, {}, "is for feature_extraction models.*token_cross"),
        ("squared_error", "sequence_classification", LABELS, {}, "gives distributions"),
        ("label_cross_entropy", "sequence_classification", None, {}, "gives numbers"),
        ("contrast", "feature_extraction", None, {"power": 2}, "cannot be made of {'power': 2}"),
    ],
)
def test_wrong_objectives_are_refused_by_name(name, task, reading, options, message):
    with pytest.raises(ValueError, match=message):
        make_objective(name, task, reading, options)


def test_a_configuration_names_an_objective():
    model = SimpleNamespace(task="causal_lm", config=SimpleNamespace(num_experts=0))
    subject = Subject(model, None, DataConfig(), B, None)

    def objective(name, **options):
        return objective_of(subject._replace(objective=name, objective_options=options))

    apply = case_of(OBJECTIVES["token_cross_entropy"])[0]
    batch = jax.tree.map(jnp.asarray, BY_TOKEN)
    named, usual = (
        objective(name)(apply, TABLE, batch, None)[0] for name in ("token_cross_entropy", None)
    )
    assert float(named) == float(usual)
    with pytest.raises(ConfigError, match=r"option 'train\.objective': unknown objective 'focul'"):
        objective("focul")
    with pytest.raises(ConfigError, match=r"cannot be made of {'power': 2}"):
        objective("token_cross_entropy", power=2)
    section = Training(
        train=TrainConfig(objective="token_cross_entropy"),
        distill=DistillConfig(teachers=[TeacherConfig()]),
    )
    with pytest.raises(ConfigError, match="leave one of them out"):
        check_training(section)
