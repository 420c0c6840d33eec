"""What a step's program takes: its operations against XLA's own count."""

import json

import jax
import jax.numpy as jnp
import pytest

from peft_jax.training.flops import flops_of
from peft_jax.training.program import STEP, describe_step

X, W, V = jnp.ones((5, 16)), jnp.ones((16, 32)), jnp.ones((32, 8))


def plain(x, w, v):
    return (x @ w) @ v


def batched(x, w, v):
    return jnp.einsum("btd,bdf->btf", jnp.stack([x] * 3), jnp.stack([w] * 3)) @ v


def gradient(x, w, v):
    return jax.value_and_grad(lambda w: jnp.square((x @ w) @ v).sum())(w)


def convolved(x, w, v):
    return jax.lax.conv(x[None, None], w[None, None, :3, :4], (1, 1), "VALID")


@pytest.mark.parametrize("program", [plain, batched, gradient, convolved])
def test_operations_are_xlas(program):
    """XLA counts the additions of elements too, which are few."""
    arguments = (X, W, V)
    found = flops_of(jax.make_jaxpr(program)(*arguments))
    counted = jax.jit(program).lower(*arguments).cost_analysis()["flops"]
    assert found == pytest.approx(counted, rel=0.02)


def test_loops_count_as_often_as_they_run():
    """XLA counts the body of a loop once."""

    def looped(x, ws):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, ws)[0]

    found = flops_of(jax.make_jaxpr(looped)(X, jnp.ones((7, 16, 16))))
    assert found == 7 * 2 * 5 * 16 * 16
    branch = jax.make_jaxpr(
        lambda x: jax.lax.cond(x[0, 0] > 0, lambda: x @ W, lambda: x @ W @ V @ V.T)
    )
    assert flops_of(branch(X)) == 2 * 5 * (16 * 32 + 32 * 8 + 8 * 32)


def test_groups_of_a_mixture_count_each_row_once():
    sizes = jnp.asarray([2, 3])
    found = flops_of(jax.make_jaxpr(jax.lax.ragged_dot)(X, jnp.ones((2, 16, 4)), sizes))
    assert found == 2 * 5 * 16 * 4


def test_what_a_step_takes_is_written_once(tmp_path):
    """Donated arguments are not counted twice."""
    step = jax.jit(lambda w, x: (w + 1.0, (x @ w).sum()), donate_argnums=0)
    arguments = (jnp.ones((256, 256)), jnp.ones((4, 256)))
    describe_step(step, arguments, 12, tmp_path)
    told = json.loads((tmp_path / STEP).read_text())
    assert told["tokens"] == 12
    assert told["flops"] == 2 * 4 * 256 * 256
    whole = 4 * 256 * 256
    assert whole < told["memory_bytes"] < 2.2 * whole
    describe_step(step, arguments, 13, tmp_path)
    assert json.loads((tmp_path / STEP).read_text()) == told
