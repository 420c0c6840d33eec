"""Adam with moments in 8 bits: against the float32 one, against bitsandbytes, and its bytes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from peft_jax.core import full
from peft_jax.core.mesh import make_mesh
from peft_jax.quantization import adamw8bit, scale_by_adam8bit
from peft_jax.training.loop import initial_state
from tests.reference import relative_error


def steps(optimizer, params, count=30):
    """Parameters after some steps on a quadratic whose curvature differs by four orders of
    magnitude.
    """
    curvature = jnp.logspace(-2, 2, params["w"].size).reshape(params["w"].shape)

    def one(carry, _):
        params, state = carry
        grads = jax.tree.map(lambda p: p * curvature if p.shape == curvature.shape else p, params)
        updates, state = optimizer.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, state), _ = jax.jit(lambda c: jax.lax.scan(one, c, length=count))(
        (params, optimizer.init(params))
    )
    return params, state


def test_it_follows_adam_in_float32():
    params = {"w": jax.random.normal(jax.random.key(0), (64, 100)), "b": jnp.ones((7,))}
    ours, state = steps(adamw8bit(1e-2, weight_decay=0.1), params)
    exact, _ = steps(optax.adamw(1e-2, weight_decay=0.1), params)
    np.testing.assert_allclose(ours["b"], exact["b"], rtol=1e-6)  # small arrays keep float32
    moved = exact["w"] - params["w"]
    assert float(jnp.abs(ours["w"] - exact["w"]).mean() / jnp.abs(moved).mean()) < 0.05
    assert state[0].mu["w"].dtype == jnp.uint8


def test_moments_take_a_quarter_of_the_bytes():
    params = {"w": jnp.zeros((256, 256))}

    def bytes_of(s):
        return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(s))

    n = 256 * 256
    assert bytes_of(scale_by_adam8bit().init(params)) == 2 * (n + 4 * n / 256) + 4
    assert bytes_of(optax.scale_by_adam().init(params)) == 8 * n + 4


def test_a_step_is_that_of_bitsandbytes():
    import bitsandbytes as bnb

    w = np.random.default_rng(0).normal(size=(64, 128)).astype(np.float32)
    grads = np.random.default_rng(1).normal(size=(5, 64, 128)).astype(np.float32)
    parameter = torch.nn.Parameter(torch.tensor(w))
    theirs = bnb.optim.AdamW8bit([parameter], lr=1e-2, weight_decay=0.0)
    ours, optimizer = {"w": jnp.asarray(w)}, adamw8bit(1e-2)
    state = optimizer.init(ours)
    for g in grads:
        parameter.grad = torch.tensor(g)
        try:
            theirs.step()
        except (NotImplementedError, RuntimeError, AttributeError) as error:
            pytest.skip(
                f"bitsandbytes has no 8-bit optimizer on this machine: {type(error).__name__}"
            )
        updates, state = optimizer.update({"w": jnp.asarray(g)}, state, ours)
        ours = optax.apply_updates(ours, updates)
    moved = np.abs(parameter.detach().numpy() - w).mean()
    assert np.abs(np.asarray(ours["w"]) - parameter.detach().numpy()).mean() < 0.02 * moved


def test_no_step_is_divided_by_a_moment_that_was_rounded_away():
    """Gradients of very different sizes in a block, then none: steps stay of Adam's size."""
    rng = np.random.default_rng(0)
    sizes = 10.0 ** -rng.uniform(0, 5, 4096)
    grads = [*(rng.normal(size=(2, 4096)) * sizes), np.zeros(4096)]
    largest = []
    for optimizer in (adamw8bit(1.0), optax.adam(1.0)):
        state, steps = optimizer.init(jnp.zeros(4096)), []
        for g in grads:
            step, state = optimizer.update(jnp.asarray(g, jnp.float32), state, jnp.zeros(4096))
            steps.append(float(jnp.abs(step).max()))
        largest.append(steps)
    assert np.all(np.asarray(largest[0]) < 2.0 * np.asarray(largest[1])), largest


def test_moments_are_sharded_with_their_parameters():
    params = full({"q_proj": {"kernel": jax.random.normal(jax.random.key(0), (64, 128))}})
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    optimizer = adamw8bit(1e-2)
    state = initial_state(params, optimizer, 0, mesh)
    codes = state.opt_state[0].mu["q_proj"]["kernel"].value
    assert codes.addressable_shards[0].data.size == codes.size // 8
    grads = jax.tree.map(lambda x: x * 2, state.trainable)
    spread = jax.jit(optimizer.update)(grads, state.opt_state, state.trainable)[0]
    one = initial_state(params, optimizer, 0)
    alone = jax.jit(optimizer.update)(
        jax.tree.map(lambda x: x * 2, one.trainable), one.opt_state, one.trainable
    )[0]
    assert relative_error(jax.tree.leaves(spread)[0], jax.tree.leaves(alone)[0]) < 1e-6
