"""Distillation: objectives, teachers of every kind, the student's own texts, memory, meshes, whole
runs.
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import peft_jax
from peft_jax.core import full, places
from peft_jax.core.mesh import make_mesh
from peft_jax.core.sharding import shard
from peft_jax.data import batch_at
from peft_jax.distillation.divergence import log_probabilities, make_divergence, reverse_kl
from peft_jax.distillation.objective import (
    FeatureTerm,
    OnPolicy,
    Teacher,
    base_of,
    beside_teachers,
    distillation,
    of_student,
)
from peft_jax.models import unstack_layers
from peft_jax.objectives.tokens import TOKENS, next_token
from peft_jax.pruning.students import take_layers
from peft_jax.training.config import TrainConfig
from peft_jax.training.loop import initial_state, on_devices, train
from peft_jax.training.step import make_step
from tests.reference import relative_error
from tests.training.test_loop import tiny_rows


@pytest.fixture(scope="module")
def setup(tiny_folder):
    """(model, its tree perturbed as the teacher, a student of one of its layers with all of it
    training, rows).
    """
    model, params = peft_jax.load(tiny_folder)
    rng = np.random.default_rng(0)
    teacher = jax.tree.map(lambda w: w + 0.05 * rng.normal(size=w.shape).astype(w.dtype), params)
    small, student = take_layers(model, params, 1)
    return model, teacher, small, full(student), tiny_rows(16, 16)


def objective_of(setup, **options):
    model = setup[0]
    return distillation(TOKENS, [Teacher(peft_jax.bind(model))], **options)


def both_logits(setup, batch):
    model, teacher, small, student, _ = setup
    inputs = {n: batch[n] for n in ("positions", "segment_ids")}
    return (
        peft_jax.bind(m)(p, batch["tokens"], **inputs)
        for m, p in ((small, student), (model, teacher))
    )


@pytest.mark.parametrize("chunk", [0, 48])
def test_the_loss_is_the_mean_divergence_and_the_datas_own(setup, chunk):
    _, teacher, small, student, rows = setup
    batch = batch_at(rows, 0, 8, seed=0)
    ours, theirs = both_logits(setup, batch)
    divergence = make_divergence("jensen_shannon", beta=0.3)
    objective = objective_of(
        setup, divergence=divergence, temperature=2.0, weight=0.7, data_weight=0.4, chunk=chunk
    )
    tree = beside_teachers(student, [teacher])
    loss, metrics = objective(peft_jax.bind(small), tree, batch, None)
    log = functools.partial(log_probabilities, temperature=2.0)

    def mean(x):
        return (x * batch["weights"]).sum() / batch["weights"].sum()

    expected = mean(divergence(log(ours), log(theirs)))
    data = next_token(peft_jax.bind(small), student, batch, None)[0]
    assert relative_error(metrics["divergence"], expected) < 1e-5
    assert relative_error(loss, 0.7 * 4.0 * expected + 0.4 * data) < 1e-5
    assert relative_error(metrics["data_loss"], data) < 1e-5
    trainable, frozen = peft_jax.partition(tree)
    assert {p.split("/")[0] for p in places(trainable)} == {"student"}

    def whole(t):  # the formula on whole logits
        inputs = {n: batch[n] for n in ("positions", "segment_ids")}
        student = peft_jax.bind(small)(
            peft_jax.combine(t, frozen)["student"], batch["tokens"], **inputs
        )
        nll = optax.softmax_cross_entropy_with_integer_labels(student, batch["targets"])
        return mean(2.8 * divergence(log(student), log(theirs)) + 0.4 * nll)

    grads = jax.grad(
        lambda t: objective(peft_jax.bind(small), peft_jax.combine(t, frozen), batch, None)[0]
    )(trainable)
    for a, b in zip(
        jax.tree.leaves(grads), jax.tree.leaves(jax.grad(whole)(trainable)), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-6)


def test_several_teachers_are_weighed(setup):
    model, teacher, small, student, rows = setup
    batch = batch_at(rows, 0, 8, seed=0)
    other = jax.tree.map(lambda w: 0.9 * w, teacher)

    def run(teachers, trees):
        return distillation(TOKENS, teachers)(
            peft_jax.bind(small), beside_teachers(student, trees), batch, None
        )[0]

    apply = peft_jax.bind(model)
    first, second = (run([Teacher(apply)], [t]) for t in (teacher, other))
    both = run([Teacher(apply, 3.0), Teacher(apply, 1.0)], [teacher, other])
    assert relative_error(both, 0.75 * first + 0.25 * second) < 1e-5


def test_top_k_of_all_tokens_is_everything(setup):
    _, teacher, small, student, rows = setup
    batch, tree = batch_at(rows, 0, 8, seed=0), beside_teachers(student, [teacher])

    def run(**options):
        return float(objective_of(setup, **options)(peft_jax.bind(small), tree, batch, None)[0])

    assert run(keep=4096) == pytest.approx(run(), rel=1e-5)
    assert 0.0 < run(keep=8) < run()


def test_the_base_teaches_its_adapter_without_a_copy(setup):
    """Self-distillation: at the start there is nothing to learn; the compiled step holds one
    base.
    """
    model, params, *_, rows = setup
    batch = batch_at(rows, 0, 8, seed=0)
    lora = peft_jax.lora(params, jax.random.key(0), rank=2)
    tree = beside_teachers(lora, [None])
    assert tree["teachers"] == {}
    for a, b in zip(jax.tree.leaves(base_of(lora)), jax.tree.leaves(params), strict=True):
        assert a is b
    objective = distillation(TOKENS, [Teacher(None)], divergence=reverse_kl)
    assert float(objective(peft_jax.bind(model), tree, batch, None)[0]) == pytest.approx(
        0.0, abs=1e-6
    )
    moved = peft_jax.lora(params, jax.random.key(0), rank=2, init="gaussian")
    moved = jax.tree.map(
        lambda x, t: x if t is None else x + 0.1,
        moved,
        peft_jax.partition(moved)[0],
        is_leaf=lambda x: x is None,
    )
    assert (
        float(objective(peft_jax.bind(model), beside_teachers(moved, [None]), batch, None)[0])
        > 1e-3
    )
    optimizer = optax.sgd(0.1)
    state, frozen = initial_state(tree, optimizer, 0), peft_jax.partition(tree)[1]
    step = jax.jit(make_step(objective, peft_jax.bind(model), optimizer), donate_argnums=0)
    held = step.lower(state, frozen, batch).compile().memory_analysis().argument_size_in_bytes
    base = sum(x.nbytes for x in jax.tree.leaves(params))
    assert base <= held < 1.3 * base
    with pytest.raises(ValueError, match=r"the base cannot be the teacher while .* of it trains"):
        beside_teachers(full(params), [None])


def test_a_teacher_costs_no_activations_of_its_own(setup):
    """The teacher is not differentiated: what a step needs beyond the student's is no more than one
    forward pass.
    """
    model, teacher, small, student, _ = setup
    rows = tiny_rows(16, 64)
    batch = batch_at(rows, 0, 8, seed=0)
    temporary = {}
    for name, tree, objective in (
        ("alone", student, functools.partial(next_token, chunk=64)),
        ("taught", beside_teachers(student, [teacher]), objective_of(setup, chunk=64)),
    ):
        optimizer = optax.sgd(0.1)
        state, frozen = initial_state(tree, optimizer, 0), peft_jax.partition(tree)[1]
        step = jax.jit(make_step(objective, peft_jax.bind(small), optimizer), donate_argnums=0)
        temporary[name] = (
            step.lower(state, frozen, batch).compile().memory_analysis().temp_size_in_bytes
        )
    grad = jax.jit(
        jax.grad(lambda p: next_token(peft_jax.bind(model), p, batch, None, chunk=64)[0])
    )
    differentiated = grad.lower(teacher).compile().memory_analysis().temp_size_in_bytes
    assert temporary["taught"] < temporary["alone"] + differentiated


# --------------------------------------------------------------------------------------------------
# hidden states

TERMS = [
    FeatureTerm("cosine"),
    FeatureTerm("squared", 0.5, ((0, 0), (1, 2))),
    FeatureTerm("attention", 2.0),
    FeatureTerm("minilm"),
    FeatureTerm("minilmv2", 1.0, None, {"relation_heads": 2}),
]


@pytest.mark.parametrize("looped", [False, True])
def test_features_are_terms_of_the_loss(setup, looped):
    model, teacher, small, student, rows = setup
    if looped:
        small, student = small.clone(scan_layers=False), unstack_layers(student)
    batch = batch_at(rows, 0, 8, seed=0)
    apply = peft_jax.bind(small)
    tree = beside_teachers(student, [teacher], TERMS, (32, [32]))
    assert tree["projections"] == {}
    loss, metrics = jax.jit(functools.partial(objective_of(setup, features=TERMS), apply))(
        tree, batch, None
    )
    plain, _ = objective_of(setup)(apply, tree, batch, None)
    assert relative_error(loss, plain + sum(t.weight * metrics[t.name] for t in TERMS)) < 1e-5
    assert all(float(metrics[t.name]) > 0 for t in TERMS)
    itself = beside_teachers(full(teacher), [teacher], TERMS)
    _, none = objective_of(setup, features=[t._replace(layers=None) for t in TERMS])(
        peft_jax.bind(model), itself, batch, None
    )
    for term in TERMS:
        assert float(none[term.name]) == pytest.approx(0.0, abs=1e-5), term.name


def test_projections_make_widths_comparable_and_train(setup, tiny_folder):
    from peft_jax.hub.checkpoint import load_fresh

    model, teacher, *_, rows = setup
    narrow, params = load_fresh(tiny_folder, config={"hidden_size": 16, "num_hidden_layers": 1})
    terms = [FeatureTerm("squared")]
    tree = beside_teachers(full(params), [teacher], terms, (16, [32]))
    trainable, frozen = peft_jax.partition(tree)
    assert places(trainable["projections"])["squared_0"].value.shape == (16, 32)
    objective = objective_of(setup, features=terms)
    batch = batch_at(rows, 0, 8, seed=0)
    grads = jax.grad(
        lambda t: objective(peft_jax.bind(narrow), peft_jax.combine(t, frozen), batch, None)[0]
    )(trainable)
    assert np.abs(grads["projections"]["squared_0"].value).max() > 0


# ------------------------------------------------------------------------------------------------
# the student's own texts


def test_what_the_student_writes_is_what_it_learns_from(setup):
    """Prompts stay, greedy continuations are those of `generate`, only they count."""
    from peft_jax.distillation.objective import _written

    model, teacher, *_ = setup
    batch = {n: x[:4] for n, x in tiny_rows(6, 12)._asdict().items()}
    batch["segment_ids"] = (batch["segment_ids"] == 1).astype(np.int32)
    starts, T = np.asarray([2, 3, 1, 4]), 12
    learnt = (np.arange(T)[None] >= starts[:, None] - 1) & (batch["segment_ids"] > 0)
    batch = {n: np.where(batch["segment_ids"] > 0, x, 0).astype(x.dtype) for n, x in batch.items()}
    batch["weights"] = learnt.astype(np.float32)
    apply, spec = peft_jax.bind(model), OnPolicy(max_tokens=5, temperature=0.0)

    def write(spec):
        return jax.tree.map(np.asarray, _written(spec, apply, teacher, batch, jax.random.key(0)))

    made, prompts = write(spec), [batch["tokens"][i, : starts[i]].tolist() for i in range(4)]
    expected = peft_jax.generate(model, teacher, prompts, max_tokens=5)
    for i, (prompt, text) in enumerate(zip(prompts, expected, strict=True)):
        whole = [*prompt, *text]
        n = len(whole)
        assert made["tokens"][i].tolist() == whole + [0] * (T - n)
        assert made["targets"][i].tolist() == whole[1:] + [0] * (T + 1 - n)
        assert made["weights"][i].tolist() == [0.0] * (len(prompt) - 1) + [1.0] * 5 + [0.0] * (
            T + 1 - n
        )
        assert made["segment_ids"][i].tolist() == [1] * n + [0] * (T - n)
    ended = write(spec._replace(eos=(4095, expected[0][1])))
    assert ended["weights"][0].sum() == 1 + (
        expected[0][0] != expected[0][1]
    )  # to the end token, and with it


def test_minillms_gradient_is_the_papers(setup):
    """Against equations 3 to 7 written out on the log-probabilities of one given sample."""
    from peft_jax.distillation.objective import _policy_loss

    rng = np.random.default_rng(0)
    logits, teacher = (rng.normal(size=(2, 6, 9)).astype(np.float32) for _ in range(2))
    targets, weights = (
        rng.integers(0, 9, (2, 6)),
        np.asarray([[0, 1, 1, 1, 1, 0], [0, 0, 1, 1, 1, 1]], np.float32),
    )

    def pick(x):
        return jnp.take_along_axis(x, jnp.asarray(targets)[..., None], -1)[..., 0]

    p = log_probabilities(teacher)

    def ours(z):
        q = log_probabilities(z)
        parts = {"log_q": pick(q), "log_p": pick(p), "reverse_kl": reverse_kl(q, p)}
        return (
            _policy_loss(OnPolicy(minillm=True, teacher_share=0.2), parts, weights) * weights
        ).sum()

    found = np.asarray(jax.grad(ours)(logits))
    q, p = (np.asarray(log_probabilities(x), np.float64) for x in (logits, teacher))
    expected = np.zeros_like(q)
    for b in range(2):
        at = np.flatnonzero(weights[b])
        ratio = [p[b, t, targets[b, t]] - q[b, t, targets[b, t]] for t in at]
        for n, t in enumerate(at):
            y, Q = targets[b, t], np.exp(q[b, t])
            w = Q[y] / (0.8 * Q[y] + 0.2 * np.exp(p[b, t, y]))
            reward = np.mean(ratio[n + 1 :]) if ratio[n + 1 :] else 0.0
            single = Q * ((q[b, t] - p[b, t]) - (Q * (q[b, t] - p[b, t])).sum())
            score = -Q
            score[y] += 1.0
            expected[b, t] = w * (single - reward * score)
    assert relative_error(found, expected) < 1e-5


@pytest.mark.parametrize(
    "spec",
    [
        pytest.param(OnPolicy(max_tokens=6), marks=pytest.mark.slow, id="gkd"),
        pytest.param(OnPolicy(share=0.5, max_tokens=6), id="mixed"),
        pytest.param(OnPolicy(minillm=True, teacher_share=0.2, max_tokens=6), id="minillm"),
    ],
)
def test_on_policy_training_brings_the_student_nearer(setup, spec, tmp_path):
    """The divergence on the student's own texts goes down; killed and resumed, the run is the same
    bit for bit.
    """
    model, teacher, small, student, _ = setup
    rows = tiny_rows(16, 12)
    rows = rows._replace(segment_ids=(rows.segment_ids == 1).astype(np.int32))
    objective = objective_of(setup, divergence=reverse_kl, on_policy=spec, data_weight=0.1)
    tree, config = (
        beside_teachers(student, [teacher]),
        TrainConfig(log_every=1, batch_size=8, tensorboard=False),
    )

    def fit(steps, folder, **more):
        return train(
            small,
            tree,
            rows,
            optax.adam(0.01),
            config,
            steps=steps,
            objective=objective,
            evaluation=of_student(next_token),
            folder=tmp_path / folder,
            **more,
        )

    whole = fit(8, "a")
    fit(3, "b")
    resumed = fit(8, "b", resume=True)
    for a, b in zip(jax.tree.leaves(whole.params), jax.tree.leaves(resumed.params), strict=True):
        np.testing.assert_array_equal(a, b)
    log = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    found = [r["divergence"] for r in log if r["kind"] == "train"]
    assert np.mean(found[-2:]) < 0.9 * np.mean(found[:2])


@pytest.mark.parametrize("axes", [{"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=str)
def test_eight_devices_equal_one(setup, axes):
    model, teacher, small, student, _ = setup
    rows = tiny_rows(16, 16)
    rows = rows._replace(segment_ids=(rows.segment_ids == 1).astype(np.int32))
    terms = [FeatureTerm("cosine")]
    objective = objective_of(
        setup, features=terms, on_policy=OnPolicy(max_tokens=4, share=0.5), data_weight=0.5
    )
    tree = beside_teachers(student, [teacher], terms)
    found = []
    for mesh in (None, make_mesh(axes)):
        whole = tree if mesh is None else shard(tree, mesh)
        state, frozen = initial_state(whole, optax.sgd(0.1), 0, mesh), peft_jax.partition(whole)[1]
        step = jax.jit(make_step(objective, peft_jax.bind(small), optax.sgd(0.1)), donate_argnums=0)
        losses = []
        for i in range(4):
            state, metrics = step(state, frozen, on_devices(batch_at(rows, i, 8, seed=0), mesh))
            losses.append(float(metrics["loss"]))
        found.append(losses)
    np.testing.assert_allclose(found[1], found[0], rtol=2e-4)
