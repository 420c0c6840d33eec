"""Attention split over a mesh against one device's, with gradients, on 8 virtual devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import peft_jax
from peft_jax.core.mesh import make_mesh
from peft_jax.core.sharding import shard
from peft_jax.models.attention import attention, make_mask
from tests.reference import random_tokens, relative_error


def packed(T, rows=2):
    """Segments and positions of rows of two sequences and some padding, and of one."""
    cut, end = T // 3, T - T // 8
    first = np.r_[np.ones(cut), np.full(end - cut, 2), np.zeros(T - end)]
    segments = np.stack([first, np.ones(T)] * (rows // 2)).astype(np.int32)
    starts = np.r_[np.zeros(cut), np.full(T - cut, cut)]
    positions = np.arange(T) - np.where(segments == 1, 0, starts)
    return jnp.asarray(segments), jnp.asarray(positions.astype(np.int32))


def inputs(T, *, H=4, K=2, d=8, more=0, rows=2):
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(rows, T, H, d), (rows, T + more, K, d), (rows, T + more, K, d), (rows, T, H, d)]
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


def mask_of(T, *, causal=True, window=None, rows=2):
    segments, positions = packed(T, rows)
    return make_mask(
        positions, positions, segments, segments, window=window, aligned=True, causal=causal
    )


def with_gradients(q, k, v, grad, mask, bias=None, *, implementation="xla", **options):
    def run(q, k, v, mask, bias):
        return attention(
            q, k, v, mask, bias=bias, scale=0.3, implementation=implementation, **options
        )

    out, pull = jax.vjp(run, q, k, v, mask, bias)
    dq, dk, dv, d_mask, d_bias = pull(grad)
    return out, dq, dk, dv, d_mask.bias, d_bias


def compare(axes, operands, expected=None, tolerance=1e-5, **options):
    """The outputs on a mesh of these axes are one device's."""
    expected = jax.jit(functools.partial(with_gradients, **(expected or options)))(*operands)
    mesh = make_mesh(axes)
    with jax.set_mesh(mesh):
        traced = jax.jit(functools.partial(with_gradients, **options)).trace(*operands)
        found = traced.lower().compile()(*operands)
    assert "shard_map" in str(traced.jaxpr)
    found, expected = jax.tree.leaves(found), jax.tree.leaves(expected)
    assert len(found) == len(expected) > 3
    for a, b in zip(found, expected, strict=True):
        assert relative_error(a, b) < tolerance
    return str(traced.jaxpr)


@pytest.mark.parametrize(
    ("axes", "options", "mask"),
    [
        ({"sequence": 8}, {}, {}),
        ({"sequence": 2, "fsdp": 2, "expert": 2}, {"softcap": 2.0}, {}),
        ({"sequence": 2, "tensor": 4}, {"sliding": True}, {"window": 10}),
        ({"sequence": 4, "data": 2}, {}, {"causal": False}),
        ({"sequence": 4, "data": 2}, {"sliding": True}, {"causal": False, "window": 10}),
    ],
)
def test_split_sequences_equal_whole_ones(axes, options, mask):
    compare(axes, [*inputs(64), mask_of(64, **mask)], **options)


def test_what_stands_before_or_beside_a_split_sequence():
    """A prefix with a gate, relative positions, and masks given as arrays."""
    *qkv, grad = inputs(64, more=3)
    seen = jnp.arange(64)[None, None, :, None] > jnp.arange(3)
    gate = jax.random.normal(jax.random.key(5), (2, 1, 64, 3))
    mask = mask_of(64).with_prefix(3, seen, gate)
    relative = jax.random.normal(jax.random.key(6), (1, 4, 64, 67))
    compare({"sequence": 4, "fsdp": 2}, [*qkv, grad, mask, relative])
    given = jax.random.bernoulli(jax.random.key(7), 0.5, (2, 1, 64, 64)) | jnp.eye(64, dtype=bool)
    mask = mask_of(64).replace(dense=True, given=(given, given))
    compare({"sequence": 4, "fsdp": 2}, [*inputs(64), mask])


@pytest.mark.parametrize(
    ("axes", "options", "mask", "heads"),
    [
        ({"sequence": 2, "fsdp": 2, "tensor": 2}, {}, {}, {"K": 1}),
        ({"sequence": 4, "expert": 2}, {"sliding": True, "softcap": 2.0}, {"window": 100}, {}),
        ({"data": 2, "tensor": 4}, {}, {"causal": False}, {}),
    ],
)
def test_the_splash_kernel_on_a_mesh(axes, options, mask, heads):
    """In its interpreter, with grouped heads fewer than devices: against XLA's attention. Queries
    are traded where later ones see more keys.
    """
    operands = [*inputs(512, **heads), mask_of(512, **mask)]
    program = compare(
        axes,
        operands,
        expected={**options, "implementation": "xla"},
        tolerance=1e-5,
        implementation="splash",
        **options,
    )
    assert ("all_gather" in program) == ("sequence" in axes)
    assert ("ppermute" in program) == ("sequence" in axes and not mask)


def test_a_model_on_long_packed_rows_equals_one_device(tiny_folder):
    """Loss and gradients, through a bound model: every model's attention is split."""
    model, params = peft_jax.load(tiny_folder)
    apply = peft_jax.bind(model)
    segments, positions = packed(64)
    tokens = random_tokens(2, 64)

    def loss(params, tokens, segments, positions):
        logits = apply(params, tokens, segment_ids=segments, positions=positions)[:, :-1]
        scored = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
        likely = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=-1)
        return -jnp.where(scored, likely[..., 0], 0).sum() / scored.sum()

    expected = jax.jit(jax.value_and_grad(loss))(params, tokens, segments, positions)
    mesh = make_mesh({"fsdp": 2, "sequence": 4})
    rows = NamedSharding(mesh, P("fsdp", "sequence"))
    batch = [jax.device_put(x, rows) for x in (tokens, segments, positions)]
    with jax.set_mesh(mesh):
        traced = jax.jit(jax.value_and_grad(loss)).trace(shard(params, mesh), *batch)
        found = traced.lower().compile()(shard(params, mesh), *batch)
    assert "all_gather" in str(traced.jaxpr)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert relative_error(a, b) < 1e-5
