"""Attention against a plain softmax, with gradients; the TPU kernel in its interpreter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from peft_jax.models.attention import attention, make_mask
from peft_jax.models.splash import splash_attention, splash_supports
from tests.reference import relative_error


def plain(q, k, v, visible, scale, softcap):
    H, K = q.shape[2], k.shape[2]
    k, v = jnp.repeat(k, H // K, axis=2), jnp.repeat(v, H // K, axis=2)
    scores = jnp.einsum("bthd,bshd->bhts", q, k) * scale
    scores = scores if softcap is None else softcap * jnp.tanh(scores / softcap)
    return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), -1), v)


def inputs(T, H=4, K=2, d=8, S=None):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = [(2, T, H, d), (2, S or T, K, d), (2, S or T, K, d)]
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("T", [24, 256])
def test_blocks_equal_plain_softmax_with_gradients(T, packed, window, softcap):
    q, k, v = inputs(T)
    positions = np.arange(T)[None].repeat(2, 0)
    segments = None
    if packed:
        segments = np.stack([np.r_[np.ones(T // 3), np.full(T - T // 3, 2)], np.ones(T)]).astype(np.int32)
        positions = positions - np.where(segments == 2, T // 3, 0)
    mask = make_mask(jnp.asarray(positions), jnp.asarray(positions), segments, segments, window=window, aligned=True)
    visible = mask.local if window else mask.full

    def ours(q, k, v):
        return attention(q, k, v, mask, sliding=window is not None, scale=0.3, softcap=softcap)

    def reference(q, k, v):
        return plain(q, k, v, visible, 0.3, softcap)

    out, pull = jax.vjp(ours, q, k, v)
    expected, pull_expected = jax.vjp(reference, q, k, v)
    assert relative_error(out, expected) < 1e-5
    grad = jax.random.normal(jax.random.key(9), out.shape)
    for a, b in zip(pull(grad), pull_expected(grad), strict=True):
        assert relative_error(a, b) < 1e-5


def test_traced_choice_of_window():
    q, k, v = inputs(24)
    positions = jnp.arange(24)[None]
    mask = make_mask(positions, positions, None, None, window=5, aligned=True)
    for sliding in (False, True):
        traced = jax.jit(lambda s: attention(q, k, v, mask, sliding=s, scale=1.0))(sliding)
        assert relative_error(traced, attention(q, k, v, mask, sliding=sliding, scale=1.0)) < 1e-6


def test_unknown_implementation_is_refused():
    q, k, v = inputs(8)
    positions = jnp.arange(8)[None]
    mask = make_mask(positions, positions, None, None, window=None, aligned=True)
    with pytest.raises(ValueError, match="use xla, cudnn or splash"):
        attention(q, k, v, mask, scale=1.0, implementation="flash")


@pytest.mark.parametrize(("window", "softcap"), [(None, None), (100, None), (None, 5.0)])
def test_splash_kernel_equals_plain_softmax(window, softcap):
    q, k, v = inputs(256, d=128)
    segments = jnp.asarray(np.stack([np.r_[np.ones(100), np.full(156, 2)], np.ones(256)]).astype(np.int32))
    positions = jnp.arange(256)[None].repeat(2, 0)
    mask = make_mask(positions, positions, segments, segments, window=window, aligned=True)
    out = splash_attention(q, k, v, segments, window=window, scale=0.1, softcap=softcap, interpret=True)
    expected = plain(q, k, v, mask.local if window else mask.full, 0.1, softcap)
    assert relative_error(out, expected) < 2e-3
    assert splash_supports(q.shape)
    assert not splash_supports((1, 100, 4, 128))
