"""Roundings against transcriptions of their papers in NumPy, float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from peft_jax.quantization.formats import NF4, Int
from peft_jax.quantization.rounding import (
    ROUNDINGS,
    awq,
    decode,
    gptq,
    hqq,
    nearest,
    output_error,
    smoothquant,
)


def problem(n_in=64, n_out=24, tokens=400, seed=0):
    """(weights, inputs) where some inputs are much larger than others, and inputs are
    correlated.
    """
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(tokens, n_in)) @ (np.eye(n_in) + rng.normal(size=(n_in, n_in)) / 4)
    x = x * np.exp(rng.normal(size=n_in))
    return rng.normal(size=(n_in, n_out)).astype(np.float32), x.astype(np.float32)


def statistics(x):
    return {
        "covariance": jnp.asarray(x.T @ x / len(x)),
        "mean_abs": jnp.asarray(np.abs(x).mean(0)),
        "max_abs": jnp.asarray(np.abs(x).max(0)),
    }


def numpy_quantizer(block, bits, symmetric):
    """(scale, zero) of a block [g, out] and rounding, as GPTQ's code has them."""
    levels = 2**bits - 1
    low, high = np.minimum(block.min(0), 0), np.maximum(block.max(0), 0)
    if symmetric:
        size = np.maximum(np.abs(low), high)
        scale, zero = size / (levels / 2), np.full_like(size, (levels + 1) // 2)
    else:
        scale = (high - low) / levels
        zero = np.round(-low / scale)
    return lambda w: scale * (np.clip(np.round(w / scale) + zero, 0, levels) - zero)


def numpy_gptq(w, x, *, bits, symmetric, group, act_order, damping=0.01):
    """Frantar et al. 2022, algorithm 1, column by column on W^T, without lazy batches."""
    w, hessian = w.astype(np.float64).T.copy(), 2 * (x.T.astype(np.float64) @ x) / len(x)
    hessian += damping * np.diag(hessian).mean() * np.eye(len(hessian))
    order = (
        np.argsort(-np.diag(x.T.astype(np.float64) @ x), kind="stable")
        if act_order
        else np.arange(len(hessian))
    )
    w, hessian = w[:, order], hessian[order][:, order]
    inverse = np.linalg.cholesky(np.linalg.inv(hessian)).T
    out = np.zeros_like(w)
    blocks = w[:, np.argsort(order)].copy()  # as they were, in the inputs' own order
    for i in range(w.shape[1]):
        if act_order == "static":
            first = order[i] // group * group
            quantizer = numpy_quantizer(blocks[:, first : first + group].T, bits, symmetric)
        elif i % group == 0:
            quantizer = numpy_quantizer(w[:, i : i + group].T, bits, symmetric)
        out[:, i] = quantizer(w[:, i])
        error = (w[:, i] - out[:, i]) / inverse[i, i]
        w[:, i:] -= np.outer(error, inverse[i, i:])
    return out[:, np.argsort(order)].T


@pytest.mark.parametrize("act_order", [False, "dynamic", "static"])
@pytest.mark.parametrize(
    ("bits", "symmetric", "group"), [(4, True, 16), (4, False, 16), (4, True, None), (3, False, 64)]
)
def test_gptq_is_the_papers_algorithm(bits, symmetric, group, act_order):
    w, x = problem()
    format = Int(bits=bits, symmetric=symmetric, block_size=group)
    run = jax.jit(lambda w, s: gptq(w, format, statistics=s, activation_order=act_order))
    expected = numpy_gptq(
        w, x, bits=bits, symmetric=symmetric, group=group or len(w), act_order=act_order
    )

    def back(found):
        q = np.asarray(decode(found, format))
        return q if found.order is None else q[np.argsort(found.order)]

    # Exactly, in float64; uncompiled, since a symmetric block's largest negative weight lies just
    # between two codes.
    with jax.enable_x64(True), jax.disable_jit():
        exact = back(
            functools.partial(gptq, format=format, activation_order=act_order)(
                jnp.asarray(w, jnp.float64), statistics=statistics(x.astype(np.float64))
            )
        )
    np.testing.assert_allclose(exact, expected, rtol=1e-5, atol=1e-6)

    # In float32 a weight on the edge between two codes may fall either way, and those after it then
    # make up for it.
    def loss(q):
        return np.square(x @ (w - q)).mean()

    assert loss(back(run(jnp.asarray(w), statistics(x)))) < 1.02 * loss(expected)


def test_gptqs_static_order_needs_no_order_beside_the_codes():
    w, x = problem()

    def run(**options):
        return gptq(jnp.asarray(w), Int(bits=3, block_size=16), statistics=statistics(x), **options)

    def loss(found):
        return np.square(x @ (w - np.asarray(decode(found, Int(bits=3, block_size=16))))).mean()

    static = run(activation_order="static")
    assert static.order is None
    assert loss(static) < loss(run(activation_order=False))
    np.testing.assert_array_equal(static.codes, run().codes)  # the default
    np.testing.assert_array_equal(
        run(activation_order=True).order, run(activation_order="dynamic").order
    )
    with pytest.raises(
        ValueError, match="activation_order must be 'static', 'dynamic' or false, got 'desc'"
    ):
        run(activation_order="desc")


def numpy_awq(w, x, *, bits, group, grid=20):
    """Lin et al. 2023, section 3.2: the power of the mean magnitude whose scales give the least
    output error.
    """
    w, x = w.astype(np.float64), x.astype(np.float64)
    size, best = np.abs(x).mean(0), (np.inf, None, None)
    for share in np.arange(grid) / grid:
        s = np.maximum(size**share, 1e-4)
        s = s / np.sqrt(s.max() * s.min())
        scaled = w * s[:, None]
        q = (
            np.concatenate(
                [numpy_quantizer(g, bits, False)(g) for g in np.split(scaled, len(w) // group)]
            )
            / s[:, None]
        )
        loss = np.square(x @ (w - q)).sum()
        if loss < best[0]:
            best = (loss, s, q)
    return best[1:]


def test_awq_is_the_papers_search():
    w, x = problem()
    format = Int(bits=4, symmetric=False, block_size=16)
    found = jax.jit(lambda w, s: awq(w, format, statistics=s, clip=False))(
        jnp.asarray(w), statistics(x)
    )
    smooth, expected = numpy_awq(w, x, bits=4, group=16)
    np.testing.assert_allclose(found.smooth, smooth, rtol=1e-4)
    back = np.asarray(decode(found, format)) / np.asarray(found.smooth)[:, None]
    differing = np.abs(back - expected) > 1e-4 * np.abs(expected).max()
    assert differing.mean() < 0.005, differing.mean()


def test_awqs_clipping_is_the_best_of_its_candidates_for_each_block():
    w, x = problem()
    format, s = Int(bits=3, symmetric=False, block_size=16), statistics(x)
    plain = awq(jnp.asarray(w), format, statistics=s, clip=False)
    clipped = awq(jnp.asarray(w), format, statistics=s)
    own = np.asarray(s["covariance"]) / np.outer(plain.smooth, plain.smooth)
    scaled = w * np.asarray(plain.smooth)[:, None]
    for g in range(0, 64, 16):
        block, part = scaled[g : g + 16], own[g : g + 16, g : g + 16]
        losses = []
        for share in 1 - np.arange(10) / 20:
            cut = np.clip(block, -share * np.abs(block).max(0), share * np.abs(block).max(0))
            error = block - numpy_quantizer(cut, 3, False)(cut)
            losses.append(np.einsum("io,ij,jo->o", error, part, error))
        error = block - np.asarray(decode(clipped, format))[g : g + 16]
        found = np.einsum("io,ij,jo->o", error, part, error)
        assert (
            found < 1.02 * np.min(losses, 0)
        ).mean() > 0.9  # the others lie on the edge between two codes
        assert found.sum() < 1.02 * np.min(losses, 0).sum()


def test_smoothquant_is_equation_four():
    w, x = problem()
    found = smoothquant(jnp.asarray(w), Int(bits=8), statistics=statistics(x), strength=0.6)
    expected = np.abs(x).max(0) ** 0.6 / np.abs(w).max(1) ** 0.4
    np.testing.assert_allclose(found.smooth, expected, rtol=1e-5)
    step = np.asarray(found.scale) / np.asarray(found.smooth)[:, None]
    back = np.asarray(decode(found, Int(bits=8))) / np.asarray(found.smooth)[:, None]
    assert (np.abs(back - w) <= 0.51 * step).all()


def numpy_hqq(w, *, bits, group, steps=20, power=0.7, beta=10.0, growth=1.01):
    """Badri and Shaji 2023: half-quadratic splitting on the zero point."""
    levels, out = 2**bits - 1, []
    for block in np.split(w.astype(np.float64), len(w) // group):
        low, high = np.minimum(block.min(0), 0), np.maximum(block.max(0), 0)
        scale = (high - low) / levels
        zero = -low / scale

        def back(z, s=scale, b=block):
            return (np.clip(np.round(b / s + z), 0, levels) - z) * s

        candidates = [zero]
        for i in range(steps):
            codes = np.clip(np.round(block / scale + zero), 0, levels)
            error = block - (codes - zero) * scale
            shrunk = np.sign(error) * np.maximum(
                np.abs(error) - np.abs(error) ** (power - 1) / (beta * growth**i), 0
            )
            zero = (codes - (block - shrunk) / scale).mean(0)
            candidates.append(zero)
        out.append(back(min(candidates, key=lambda z: np.abs(block - back(z)).mean())))
    return np.concatenate(out)


def test_hqq_is_half_quadratic_splitting():
    w, _ = problem(n_in=16)
    w = np.random.default_rng(3).standard_t(3, w.shape).astype(np.float32)
    format = Int(bits=3, symmetric=False, block_size=16)
    found = np.asarray(decode(hqq(jnp.asarray(w), format), format))
    expected = numpy_hqq(w, bits=3, group=16)
    assert np.abs(w - found).mean() < 1.002 * np.abs(w - expected).mean()
    assert (
        np.abs(w - found).mean()
        < np.abs(w - np.asarray(decode(nearest(jnp.asarray(w), format), format))).mean()
    )


@pytest.mark.parametrize(
    "format",
    [Int(bits=4, block_size=16), Int(bits=3, symmetric=False, block_size=16), NF4(block_size=16)],
    ids=str,
)
def test_calibrated_rounding_beats_nearest_on_the_calibration_data(format):
    w, x = problem()
    s = statistics(x)

    def loss(name):
        found = ROUNDINGS[name](
            jnp.asarray(w), format, **({} if name == "nearest" else {"statistics": s})
        )
        back = decode(found, format)
        back = back if found.smooth is None else back / found.smooth[:, None]
        return float(output_error(jnp.asarray(w), back, s["covariance"]))

    assert loss("gptq") < 0.8 * loss("nearest")
    assert loss("awq") < 0.95 * loss("nearest")


def test_inputs_that_never_occur_do_no_harm():
    w, x = problem()
    x[:, :5] = 0
    found = gptq(jnp.asarray(w), Int(bits=4, block_size=16), statistics=statistics(x))
    assert np.isfinite(found.scale).all()
