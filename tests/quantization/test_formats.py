"""Formats against independent references: bitsandbytes for 4-bit codes and dynamic maps, ml_dtypes
for FP8 and MXFP4.
"""

import bitsandbytes.functional as bnb
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch

from peft_jax.core.packing import pack, unpack
from peft_jax.quantization.dynamic_map import (
    dequantize_blocks,
    double_quantize,
    dynamic_map,
    quantize_blocks,
)
from peft_jax.quantization.formats import FP4, FP8, MXFP4, NF4, Int, make_format


def adversarial(rows: int = 16, columns: int = 256) -> np.ndarray:
    """Random weights with zeros, one huge value, subnormal numbers, negative zeros and exact ties
    among them.
    """
    w = np.random.default_rng(0).normal(size=(rows, columns)).astype(np.float32)
    w[0] = 0
    w[1, 3] = 1e30
    w[2] *= 1e-39
    w[3] *= 1e-42
    w[4, :64] = -0.0
    w[5] *= 1e-38
    w[6] *= 3e-37
    w[7] = 1e-45
    w[8] *= 1e-20
    w[9, :32] = [*NF4.bounds(), *NF4.table, 1.0]
    w[10, :32] = [*FP4.table, *FP4.bounds(), 1.0]
    w[11, ::2] = -0.0
    return w


@jax.jit
def _nf4(blocks):
    return _encoded(NF4(), blocks)


@jax.jit
def _fp4(blocks):
    return _encoded(FP4(), blocks)


def _encoded(format, blocks):
    scale, zero = format.fit(blocks)
    return format.encode(blocks, scale, zero), scale[..., 0, :]


@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize(("kind", "encode"), [("nf4", _nf4), ("fp4", _fp4)])
def test_four_bit_codes_and_scales_are_those_of_bitsandbytes(kind, encode, block):
    w = adversarial()
    packed, state = bnb.quantize_4bit(torch.tensor(w), blocksize=block, quant_type=kind)
    flat = packed.numpy().reshape(-1)
    expected = np.stack([flat >> 4, flat & 15], 1).reshape(w.shape)
    codes, scale = encode(jnp.asarray(w.T).reshape(-1, block, w.shape[0]))
    np.testing.assert_array_equal(np.asarray(codes).reshape(w.shape[::-1]).T, expected)
    bits = np.asarray(scale).T.view(
        np.int32
    )  # as bits: a comparison of subnormal numbers could flush them
    np.testing.assert_array_equal(bits.reshape(-1), state.absmax.numpy().view(np.int32))


@pytest.mark.parametrize("signed", [True, False])
def test_dynamic_map_is_that_of_bitsandbytes(signed):
    np.testing.assert_array_equal(
        dynamic_map(signed), bnb.create_dynamic_map(signed=signed).numpy()
    )


def test_blockwise_codes_come_back_as_in_bitsandbytes():
    x = np.random.default_rng(1).normal(size=1000).astype(np.float32)
    codes, state = bnb.quantize_blockwise(torch.tensor(x), blocksize=256)
    ours, absmax = quantize_blocks(jnp.asarray(x))
    # Where two values are about equally near, bitsandbytes 0.50 takes the farther one now and then;
    # ours is the nearest.
    differing = np.nonzero(np.asarray(ours) != codes.numpy())[0]
    assert len(differing) <= 2
    scaled = x[differing] / np.asarray(absmax)[differing // 256]
    far, near = (np.abs(dynamic_map()[np.asarray(c)[differing]] - scaled) for c in (codes, ours))
    assert (near <= far + 1e-7).all()
    assert (far - near < 3e-5).all()
    expected = bnb.dequantize_blockwise(codes, state).numpy()
    np.testing.assert_allclose(
        dequantize_blocks(ours, absmax), expected, atol=2e-2 * np.abs(x).max()
    )
    np.testing.assert_allclose(
        dequantize_blocks(jnp.asarray(codes.numpy()), absmax), expected, rtol=1e-6, atol=1e-7
    )


def test_double_quantization_is_that_of_bitsandbytes():
    w = np.random.default_rng(2).normal(size=(40, 192)).astype(np.float32)
    packed, state = bnb.quantize_4bit(
        torch.tensor(w), blocksize=64, quant_type="nf4", compress_statistics=True
    )
    expected = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
    scale = np.abs(w.reshape(40, 3, 64)).max(-1).T
    found = double_quantize(jnp.asarray(scale)).materialize()
    assert float(np.abs(np.asarray(found).T.reshape(-1) - expected.numpy()).max()) < 1e-6


@pytest.mark.parametrize(
    ("kind", "dtype"), [("e4m3", ml_dtypes.float8_e4m3fn), ("e5m2", ml_dtypes.float8_e5m2)]
)
def test_fp8_is_the_cast_of_ml_dtypes(kind, dtype):
    w = np.random.default_rng(3).normal(size=(64, 8)).astype(np.float32)
    w[0, 0], w[1, 1], w[:, 3] = 1e4, 1e-9, 0
    codes, scale = jax.jit(lambda b: _encoded(FP8(type=kind), b))(jnp.asarray(w))
    top = float(ml_dtypes.finfo(dtype).max)
    expected_scale = np.abs(w).max(0) / np.float32(top)
    expected_scale[3] = 1
    np.testing.assert_allclose(
        scale, expected_scale, rtol=2e-7
    )  # XLA multiplies by the constant's reciprocal
    expected = np.clip(w / np.asarray(scale), -top, top).astype(dtype)
    np.testing.assert_array_equal(np.asarray(codes).view(np.uint8), expected.view(np.uint8))


def test_mxfp4_is_the_cast_of_ml_dtypes_with_the_floor_exponent():
    w = adversarial()
    w[12, :32] = np.tile(
        [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0], 4
    )  # ties go to the even code
    blocks = w.reshape(-1, 32)
    exponent = ((np.abs(blocks).max(1).view(np.int32) >> 23) - 2).clip(0)
    scale = np.maximum(exponent, 1)
    x = (blocks.astype(np.float64) / np.exp2(scale - 127.0)[:, None]).clip(-6, 6).astype(np.float32)
    expected = x.astype(ml_dtypes.float4_e2m1fn).view(np.uint8)

    @jax.jit
    def run(b):
        codes, scale = _encoded(MXFP4(), b)
        return codes, MXFP4().store_scale(scale)

    codes, stored = run(jnp.asarray(blocks.T[None]))
    np.testing.assert_array_equal(np.asarray(codes)[0].T, expected)
    np.testing.assert_array_equal(np.asarray(stored)[0], scale)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_packing_round_trip_is_a_little_endian_bit_stream(bits):
    codes = np.random.default_rng(bits).integers(0, 2**bits, (2, 48, 5)).astype(np.uint8)
    packed = pack(jnp.asarray(codes), bits) if bits < 8 else jnp.asarray(codes)
    assert packed.shape == (2, 48 * bits // 8, 5)
    np.testing.assert_array_equal(unpack(packed, bits), codes)
    stream = np.unpackbits(np.asarray(packed)[0, :, 0], bitorder="little").reshape(48, bits)
    np.testing.assert_array_equal(stream @ (1 << np.arange(bits)), codes[0, :, 0])


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize("symmetric", [True, False])
def test_integers_follow_their_formula(bits, symmetric):
    w = np.random.default_rng(4).normal(size=(32, 6)).astype(np.float32) + 0.3
    w[0] = (
        4.0  # the largest: a symmetric block's largest negative weight lies just between two codes
    )
    format, levels = Int(bits=bits, symmetric=symmetric), 2**bits - 1
    scale, zero = format.fit(jnp.asarray(w))
    codes = format.encode(jnp.asarray(w), scale, zero)
    if symmetric:
        expected_scale = np.abs(w).max(0) / np.float32(levels / 2)
        expected = (
            np.clip(np.round(w / expected_scale), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
            * expected_scale
        )
    else:
        low, high = np.minimum(w.min(0), 0), np.maximum(w.max(0), 0)
        expected_scale = (high - low) / np.float32(levels)
        offset = np.round(-low / expected_scale)
        expected = (
            np.clip(np.round(w / expected_scale) + offset, 0, levels) - offset
        ) * expected_scale
    np.testing.assert_allclose(format.decode(codes, zero) * scale, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "format",
    [
        NF4(),
        FP4(),
        MXFP4(),
        FP8(),
        FP8(type="e5m2"),
        Int(bits=4),
        Int(bits=3, symmetric=False),
        Int(bits=8),
    ],
    ids=str,
)
def test_stochastic_rounding_has_the_weight_as_its_mean(format):
    w = (
        jnp.asarray(np.random.default_rng(5).uniform(-0.7, 0.7, (64, 3)).astype(np.float32))
        .at[0]
        .set(1.0)
    )
    scale, zero = format.fit(w)
    noise = jnp.asarray(np.random.default_rng(6).random((2000, 64, 3)), jnp.float32)

    def one(n):
        return format.decode(format.encode(w, scale, zero, n), zero) * scale

    drawn = jax.lax.map(one, noise)
    spread = float(drawn.std(0).max())
    inside = np.abs(np.asarray(w)) < 1  # the largest may be clipped
    assert float(np.abs(drawn.mean(0) - w)[inside].max()) < 5 * spread / np.sqrt(2000) + 1e-6
    assert spread > 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Int(bits=5), "integers of 5 bits are not supported"),
        (lambda: make_format("nf5"), "unknown format 'nf5'"),
        (
            lambda: make_format("nf4", group=3),
            "has no option 'group'; its options: block_size, double",
        ),
        (lambda: Int(bits=4, activations="dynamic"), "symmetric 8-bit weights"),
        (lambda: MXFP4(block_size=64), "MXFP4 has blocks of 32"),
        (lambda: FP8(block_size=64), "takes no block_size"),
        (lambda: NF4(bits=8), "NF4 has 4 bits"),
    ],
)
def test_impossible_formats_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
