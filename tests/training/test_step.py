"""The step: exact accumulation, bad gradients, what the compiled program holds, sharding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import peft_jax
from peft_jax.core.mesh import make_mesh
from peft_jax.core.sharding import shard
from peft_jax.data import batch_at, pack
from peft_jax.data.encode import Example
from peft_jax.objectives.tokens import next_token
from peft_jax.training.loop import initial_state, on_devices
from peft_jax.training.step import init_state, make_evaluation, make_step
from tests.reference import relative_error
from tests.training.test_loop import tiny_rows


@pytest.fixture(scope="module")
def setup(tiny_folder):
    model, params = peft_jax.load(tiny_folder)
    return model, peft_jax.lora(params, jax.random.key(0), rank=2, alpha=16), tiny_rows(32, 16)


def run(
    model,
    params,
    rows,
    steps,
    *,
    mesh=None,
    accumulate=1,
    batch_size=8,
    objective=next_token,
    optimizer=None,
):
    optimizer = optimizer or optax.adamw(0.01)
    params = params if mesh is None else shard(params, mesh)
    state, frozen = initial_state(params, optimizer, 0, mesh), peft_jax.partition(params)[1]
    step = jax.jit(
        make_step(objective, peft_jax.bind(model), optimizer, accumulate=accumulate),
        donate_argnums=0,
    )
    losses = []
    for i in range(steps):
        state, metrics = step(
            state, frozen, on_devices(batch_at(rows, i, batch_size, seed=0), mesh)
        )
        losses.append(float(metrics["loss"]))
    return np.asarray(losses), state, metrics


def test_accumulation_equals_one_batch(setup):
    model, params, rows = setup
    whole, state, metrics = run(model, params, rows, 4)
    parts, state_parts, metrics_parts = run(model, params, rows, 4, accumulate=4)
    np.testing.assert_allclose(parts, whole, rtol=1e-5)
    assert float(metrics_parts["weight"]) == float(metrics["weight"])
    np.testing.assert_allclose(metrics_parts["accuracy"], metrics["accuracy"], rtol=1e-4)
    for a, b in zip(
        jax.tree.leaves(state.trainable), jax.tree.leaves(state_parts.trainable), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-2, atol=1e-4)


def test_packed_padded_and_split_rows_have_one_loss(setup):
    """Of uneven lengths, rows without anything learnt among them: what a row stands beside, and in
    which micro-batch, is no matter.
    """
    model, params, _ = setup
    rng = np.random.default_rng(5)
    examples = []
    for n in rng.integers(2, 17, 30):
        learn = rng.random(n) < (0.0 if n % 5 == 0 else 0.6)
        examples.append(Example(rng.integers(3, 4096, n).astype(np.int32), learn))
    losses = {}
    for packing in (True, False):
        rows = pack(examples, 16, packing=packing)
        assert (rows.weights.sum(1) == 0).any() or packing
        whole = {n: np.pad(a, [(0, -len(a) % 8), (0, 0)]) for n, a in rows._asdict().items()}
        for accumulate in (1, 4):
            state = initial_state(params, optax.sgd(0.1), 0)
            step = make_step(
                next_token, peft_jax.bind(model), optax.sgd(0.1), accumulate=accumulate
            )
            _, metrics = jax.jit(step)(state, peft_jax.partition(params)[1], whole)
            losses[packing, accumulate] = float(metrics["loss"]), float(metrics["weight"])
    (first, weight), *others = losses.values()
    assert weight == sum(e.learn[1:].sum() for e in examples)
    for loss, other in others:
        assert loss == pytest.approx(first, rel=1e-6)
        assert other == weight


@pytest.mark.parametrize("chunk", [8, 40, 48])
def test_chunked_loss_and_gradient_equal_whole(setup, chunk):
    model, params, rows = setup
    apply = peft_jax.bind(model)
    batch = batch_at(rows, 0, 8, seed=0)
    trainable, frozen = peft_jax.partition(params)

    def loss(t, chunk):
        return next_token(apply, peft_jax.combine(t, frozen), batch, None, chunk=chunk)[0]

    value, grads = jax.value_and_grad(loss)(trainable, 0)
    value_chunked, grads_chunked = jax.value_and_grad(loss)(trainable, chunk)
    assert abs(float(value - value_chunked)) < 1e-5
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(grads_chunked), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7)


def test_chunks_bound_the_logits(setup):
    model, params, rows = setup
    batch = batch_at(rows, 0, 8, seed=0)
    apply = peft_jax.bind(model)
    text = str(jax.make_jaxpr(functools.partial(next_token, apply, chunk=16))(params, batch, None))
    assert "f32[8,2,4096]" in text
    assert "f32[8,16,4096]" not in text


def test_loss_is_the_mean_over_what_counts(setup):
    model, params, rows = setup
    batch = batch_at(rows, 0, 8, seed=0)
    logits = np.asarray(
        peft_jax.bind(model)(
            params, batch["tokens"], positions=batch["positions"], segment_ids=batch["segment_ids"]
        )
    )
    log = (
        logits
        - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - logits.max(-1, keepdims=True)
    )
    picked = -np.take_along_axis(log, batch["targets"][..., None], -1)[..., 0]
    expected = (picked * batch["weights"]).sum() / batch["weights"].sum()
    loss, metrics = next_token(peft_jax.bind(model), params, batch, None)
    assert abs(float(loss) - expected) < 1e-5
    assert float(metrics["weight"]) == batch["weights"].sum()


def test_third_party_models_without_hidden_states_have_the_same_loss():
    from tests.third_party import linen_model

    model, params = linen_model()
    tokens = np.arange(10, dtype=np.int32).reshape(2, 5)
    batch = {"tokens": tokens, "targets": (tokens + 1) % 13, "weights": np.ones((2, 5), np.float32)}
    loss, _ = next_token(peft_jax.bind(model), params, batch, None)
    logits = model.apply({"params": params}, tokens)
    assert (
        relative_error(
            loss, optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"]).mean()
        )
        < 1e-6
    )


def test_a_gradient_that_is_not_finite_changes_nothing(setup):
    model, params, rows = setup

    def poisoned(apply, params, batch, rng):
        loss, metrics = next_token(apply, params, batch, rng)
        return jnp.where(batch["tokens"][0, 0] == -1, jnp.nan, 1.0) * loss, metrics

    optimizer = optax.adamw(0.01)
    trainable, frozen = peft_jax.partition(params)
    step = jax.jit(make_step(poisoned, peft_jax.bind(model), optimizer))
    state = init_state(trainable, optimizer, 0)
    batch = batch_at(rows, 0, 8, seed=0)
    bad = {**batch, "tokens": batch["tokens"].copy()}
    bad["tokens"][0, 0] = -1
    after, metrics = step(state, frozen, bad)
    assert (int(metrics["skipped"]), int(metrics["skipped_in_a_row"]), int(after.step)) == (1, 1, 1)
    for a, b in zip(
        jax.tree.leaves((state.trainable, state.opt_state)),
        jax.tree.leaves((after.trainable, after.opt_state)),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)
    after, metrics = step(after, frozen, batch)
    assert (int(metrics["skipped"]), int(metrics["skipped_in_a_row"])) == (1, 0)


def test_master_weights_are_float32(setup):
    model, params, _ = setup
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    state = init_state(peft_jax.partition(half)[0], optax.adamw(1e-3), 0)
    assert {x.dtype for x in jax.tree.leaves(state.trainable)} == {jnp.dtype("float32")}


def test_the_frozen_tree_is_an_argument_and_has_no_gradient(setup):
    """Products with a weight's shape as result are gradients of kernels; a LoRA step has none."""
    model, params, rows = setup
    text = _compiled(model, params, rows).as_text()
    dots = [line for line in text.splitlines() if " dot(" in line]
    assert dots
    kernels = {
        "f32[48,32]",
        "f32[32,48]",
        "f32[32,32]",
        "f32[32,16]",
        "f32[16,32]",
        "f32[4096,32]",
        "f32[32,4096]",
    }
    for line in dots:
        assert line.split("=")[1].strip().split("{")[0] not in kernels, line
    assert "constant" not in "".join(
        line for line in text.splitlines() if "f32[4096,32]" in line and "constant(" in line
    )
    # the check itself can fail: full fine-tuning has such products
    full = _compiled(model, peft_jax.core.full(peft_jax.merge(params)), rows).as_text()
    shapes = {
        line.split("=")[1].strip().split("{")[0] for line in full.splitlines() if " dot(" in line
    }
    assert shapes & kernels


def _compiled(model, params, rows, mesh=None):
    optimizer = optax.adamw(0.01)
    params = params if mesh is None else shard(params, mesh)
    state, frozen = initial_state(params, optimizer, 0, mesh), peft_jax.partition(params)[1]
    step = jax.jit(make_step(next_token, peft_jax.bind(model), optimizer), donate_argnums=0)
    return step.lower(state, frozen, on_devices(batch_at(rows, 0, 8, seed=0), mesh)).compile()


MESHES = [{"data": 8}, {"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}, {"sequence": 2, "fsdp": 4}]


@pytest.fixture(scope="module")
def one_device(setup):
    return run(*setup, 20)[0]


@pytest.mark.parametrize("axes", MESHES, ids=str)
def test_twenty_steps_on_eight_devices_equal_one(setup, one_device, axes):
    losses, state, _ = run(*setup, 20, mesh=make_mesh(axes))
    np.testing.assert_allclose(losses, one_device, rtol=1e-5)
    assert one_device[-1] < one_device[0] - 0.05  # it does learn
    moment = state.opt_state[0].mu["model"]["layers"]["self_attn"]["q_proj"]["kernel"].a
    weight = state.trainable["model"]["layers"]["self_attn"]["q_proj"]["kernel"].a
    assert moment.sharding == weight.sharding


def test_no_full_copy_of_a_sharded_stack(setup):
    """Fully sharded: a layer's weight may be gathered for its own use, the stack of all layers
    never.
    """
    import re

    text = _compiled(*setup, mesh=make_mesh({"fsdp": 8})).as_text()
    gathered = re.findall(r"f32\[([\d,]+)\][^=]* all-gather\(", text)
    assert gathered
    assert not [s for s in gathered if s in ("3,32,48", "3,48,32", "3,32,32", "3,32,16")], gathered


def test_evaluation_has_no_dropout(setup):
    model, params, rows = setup
    dropped = peft_jax.lora(peft_jax.merge(params), jax.random.key(0), rank=2, dropout=0.9)
    evaluate = jax.jit(make_evaluation(next_token, peft_jax.bind(model)))
    trainable, frozen = peft_jax.partition(dropped)
    batch = batch_at(rows, 0, 8, seed=0)
    assert float(evaluate(trainable, frozen, batch)["loss"]) == float(
        evaluate(trainable, frozen, batch)["loss"]
    )


def test_float16_is_refused(setup):
    model, _, _ = setup
    with pytest.raises(
        ValueError, match="float16 has too small a range for gradients: train in bfloat16"
    ):
        make_step(next_token, peft_jax.bind(model.clone(dtype=jnp.float16)), optax.sgd(0.1))
