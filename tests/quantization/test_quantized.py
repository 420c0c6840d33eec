"""Quantized weights in trees: products, gradients, look-ups, sharding, bytes, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import peft_jax
from peft_jax.core import matmul
from peft_jax.core.mesh import make_mesh
from peft_jax.core.sharding import shard, shardings
from peft_jax.low_rank import LoRA
from peft_jax.quantization import (
    FP8,
    MXFP4,
    NF4,
    Int,
    Quantized,
    bits_per_weight,
    dequantize,
    qat,
    quantize_weight,
)
from peft_jax.quantization.quantized import _straight, _tiles
from tests.reference import relative_error


def weight(shape=(3, 64, 48), seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize(
    "format", [Int(bits=4, block_size=16), NF4(block_size=16), Int(bits=8)], ids=str
)
@pytest.mark.parametrize(
    ("shape", "in_axes", "out_axes"),
    [
        ((32, 2, 24), (-3,), (-2, -1)),
        ((2, 16, 24), (-3, -2), (-1,)),
        ((24, 32), (-1,), (-2,)),
        ((3, 4, 16, 8), (-2,), (-3, -1)),
    ],
)
def test_other_layouts(format, shape, in_axes, out_axes):
    w = weight(shape)
    q = peft_jax.quantize({"kernel": w}, format, layout={"kernel": (in_axes, out_axes)})["kernel"]
    assert q.shape == shape
    assert float(jnp.abs(q.materialize() - w).mean()) < 0.15
    if len(shape) == 4:
        q = jax.tree.map(lambda a: a[0], q)
    x = jax.random.normal(jax.random.key(1), (2, 5, *(q.shape[a] for a in in_axes)))
    axes = {"in_axes": in_axes, "out_axes": out_axes}
    assert relative_error(matmul(x, q, **axes), matmul(x, q.materialize(), **axes)) < 1e-5


def test_the_order_and_the_smoothing_of_inputs_are_made_up_for():
    w = weight()
    x = jax.random.normal(jax.random.key(1), (100, 64)) * jnp.exp(
        jax.random.normal(jax.random.key(2), (64,))
    )
    statistics = {
        "covariance": {"kernel": jnp.broadcast_to(x.T @ x / 100, (3, 64, 64))},
        "mean_abs": {"kernel": jnp.broadcast_to(jnp.abs(x).mean(0), (3, 64))},
        "max_abs": {"kernel": jnp.broadcast_to(jnp.abs(x).max(0), (3, 64))},
    }
    for rounding, options in (
        ("gptq", {"activation_order": "dynamic"}),
        ("awq", {}),
        ("smoothquant", {}),
    ):
        tree = peft_jax.quantize(
            {"kernel": w}, Int(bits=8), rounding=rounding, statistics=statistics, **options
        )
        q = tree["kernel"]
        assert (q.order is not None) == (rounding == "gptq")
        assert (q.smooth is not None) == (rounding != "gptq")
        assert relative_error(q.materialize(), w) < 0.05
        one = jax.tree.map(lambda a: a[2], q)
        assert relative_error(matmul(x, one), x @ q.materialize()[2]) < 1e-5
        y = jax.random.normal(jax.random.key(3), (5, 48))
        back = matmul(y, one, in_axes=(-1,), out_axes=(-2,))
        assert relative_error(back, y @ q.materialize()[2].T) < 1e-5


@pytest.mark.parametrize("activations", ["dynamic", "static"])
@pytest.mark.parametrize("kind", [Int, FP8])
def test_activations_are_quantized_too(kind, activations):
    w, x = weight((64, 48)), jax.random.normal(jax.random.key(1), (7, 64))
    x = x.at[3].mul(20)
    statistics = {"max_abs": {"kernel": jnp.abs(x).max(0)}}
    format = kind(activations=activations)
    q = peft_jax.quantize({"kernel": w}, format, statistics=statistics)["kernel"]
    top = 127.5 if kind is Int else 448
    size = (
        jnp.abs(x).max(-1, keepdims=True) if activations == "dynamic" else jnp.abs(x).max()
    ) / top
    scaled = x / size
    # The largest negative input lies just between two 8-bit codes and takes the lower one.
    whole = jnp.clip(jnp.round(jnp.where(scaled < -127.499, -128.0, scaled)), -128, 127)
    rounded = whole if kind is Int else scaled.astype(jnp.float8_e4m3fn).astype(jnp.float32)
    expected = (rounded * size) @ q.materialize()
    assert relative_error(matmul(x, q), expected) < 1e-5
    assert 1e-5 < relative_error(matmul(x, q), x @ q.materialize()) < 0.1
    products = [
        e
        for e in jax.make_jaxpr(lambda x, q: _straight(x, q, None))(x, q).eqns
        if e.primitive.name == "dot_general"
    ]
    assert [v.aval.dtype for e in products for v in e.invars] == [
        q.codes.dtype
    ] * 2  # the product itself is one of 8 bits
    grad = jax.grad(lambda x: matmul(x, q).sum())(x)
    assert relative_error(grad, jnp.ones((7, 48)) @ q.materialize().T) < 1e-5


def test_bytes_are_those_of_the_format():
    w = weight((2, 1024, 768))
    size = w.size
    expected = {
        Int(bits=8): 8 + 32 / 1024,
        Int(bits=4, block_size=128): 4 + 32 / 128,
        Int(bits=4, block_size=128, symmetric=False): 4 + 40 / 128,
        Int(bits=3, block_size=128): 3 + 32 / 128,
        Int(bits=2, block_size=64): 2 + 32 / 64,
        NF4(double=False): 4.5,
        NF4(): 4 + 8 / 64 + 32 / (64 * 256) + 2 * 32 / size,  # 4.127
        FP8(): 8 + 32 / 1024,
        FP8(per="tensor"): 8 + 2 * 32 / size,
        MXFP4(): 4 + 8 / 32,
    }
    for format, bits in expected.items():
        q = peft_jax.quantize({"kernel": w}, format)["kernel"]
        assert bits_per_weight(q) == pytest.approx(bits, abs=1e-9), format
    assert expected[NF4()] == pytest.approx(4.127, abs=5e-4)


def test_the_gradient_keeps_no_full_precision_weight():
    w = peft_jax.quantize({"kernel": weight((4, 64, 64))}, NF4())["kernel"]

    def loss(x, w):
        return jax.lax.scan(lambda x, one: (jnp.tanh(matmul(x, one)), None), x, w)[0].sum()

    text = jax.jit(jax.grad(loss)).lower(jnp.ones((3, 64)), w).compile().as_text()
    assert "f32[4,64,64]" not in text
    dense = jax.jit(jax.grad(loss)).lower(jnp.ones((3, 64)), w.materialize()).compile().as_text()
    assert "f32[4,64,64]" in dense


@pytest.mark.parametrize(
    "format", [NF4(), Int(bits=4, block_size=16, symmetric=False), FP8(per="tensor")], ids=str
)
def test_large_matrices_are_decoded_in_parts(format, monkeypatch):
    q = peft_jax.quantize({"embedding": weight((96, 64))}, format, targets="embedding")["embedding"]
    x, y = (
        jax.random.normal(jax.random.key(1), (2, 3, 64)),
        jax.random.normal(jax.random.key(2), (2, 3, 96)),
    )
    axes = {"in_axes": (-1,), "out_axes": (-2,)}
    run = jax.value_and_grad(lambda x: (matmul(x, q, **axes) * y).sum())
    whole = run(x)
    monkeypatch.setattr("peft_jax.quantization.quantized._TILE", 64 * 20)
    assert _tiles(q) == 4
    parts = run(x)
    assert relative_error(parts[0], whole[0]) < 1e-5
    assert relative_error(parts[1], whole[1]) < 1e-5


@pytest.mark.parametrize(
    "axes", [{"fsdp": 8}, {"fsdp": 2, "tensor": 4}, {"fsdp": 4, "tensor": 2}], ids=str
)
def test_blocks_never_straddle_shards(axes):
    mesh = make_mesh(axes)
    tree = {"q_proj": {"kernel": weight((2, 128, 64))}, "o_proj": {"kernel": weight((2, 96, 128))}}
    for format in (
        NF4(block_size=32),
        Int(bits=4, block_size=32, symmetric=False),
        FP8(per="tensor"),
        Int(bits=8),
    ):
        quantized = peft_jax.quantize(tree, format)
        placed = shard(quantized, mesh)
        for name, w in quantized.items():
            node, found = placed[name]["kernel"], shardings(quantized, mesh)[name]["kernel"]
            rows = node.codes.addressable_shards[0].data.shape[1] * 8 // format.bits
            assert format.block_size is None or rows % format.block_size == 0
            assert found.codes.spec[2] is not None  # outputs are always split
            x = jax.random.normal(jax.random.key(1), (4, w["kernel"].shape[1]))
            run = jax.jit(lambda x, w: jax.lax.scan(lambda c, one: (c, matmul(x, one)), 0.0, w)[1])
            with jax.set_mesh(mesh):
                out = run(x, node)
            assert relative_error(np.asarray(out), np.asarray(run(x, w["kernel"]))) < 1e-5


def test_nodes_over_a_base_have_their_base_quantized():
    params = {"kernel": weight((64, 32))}
    with_lora = peft_jax.lora(params, jax.random.key(0), rank=2)
    node = peft_jax.quantize(with_lora, NF4())["kernel"]
    assert isinstance(node, LoRA)
    assert isinstance(node.base, Quantized)
    merged = peft_jax.merge({"kernel": node})["kernel"]
    np.testing.assert_allclose(
        merged, dequantize({"kernel": node})["kernel"].materialize(), rtol=1e-6
    )


def test_quantizing_is_deterministic_and_stochastic_rounding_seeded():
    params = {"kernel": weight((64, 32))}

    def draw(seed):
        return peft_jax.quantize(params, "int4", rounding="stochastic", seed=seed)["kernel"].codes

    np.testing.assert_array_equal(draw(1), draw(1))
    assert (draw(1) != draw(2)).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": NF4(block_size=48)}, "block_size=48 does not divide the 64 inputs of kernel"),
        ({"format": Int(bits=3, block_size=4)}, "3-bit codes are packed by 8"),
        ({"format": "int5"}, "integers of 5 bits"),
        ({"format": {"nothing": "nf4"}}, "format 'nothing' matches nothing"),
        ({"rounding": "gptq"}, "kernel has no statistics 'covariance'"),
        (
            {"rounding": "gptq", "statistics": {"covariance": {"kernel": jnp.ones((3, 3))}}},
            "expected \\(64, 64\\)",
        ),
        ({"rounding": "best"}, "unknown rounding 'best'"),
        ({"rounding": "gptq", "damp": 3}, "rounding 'gptq' has no option 'damp'"),
        ({"format": Int(activations="static")}, "kernel has no statistics 'max_abs'"),
        ({"rounding": "hqq"}, "symmetric=False"),
    ],
)
def test_bad_requests_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        peft_jax.quantize({"kernel": weight((64, 32))}, **options)


def test_some_layers_of_a_stack_are_refused():
    params = {"layers": {"q_proj": {"kernel": weight()}}}
    for make in (
        peft_jax.quantize,
        lambda tree, targets: qat(tree, jax.random.key(0), targets=targets),
    ):
        with pytest.raises(
            ValueError,
            match="stacked at layers/q_proj/kernel are quantized together; unstack_layers",
        ):
            make(params, targets="layers.1.q_proj")


def test_stochastic_rounding_draws_by_seed_and_path():
    params = {name: {"kernel": weight((64, 32))} for name in ("a", "b")}
    both = peft_jax.quantize(params, "int4", rounding="stochastic", seed=3)
    assert (both["a"]["kernel"].codes != both["b"]["kernel"].codes).any()
    alone = quantize_weight(
        "b/kernel", weight((64, 32)), Int(bits=4), rounding="stochastic", seed=3
    )
    np.testing.assert_array_equal(alone.codes, both["b"]["kernel"].codes)


def test_weights_that_are_not_finite_and_twice_quantized_ones_are_refused():
    params = {"kernel": weight((64, 32)).at[3, 3].set(jnp.nan)}
    with pytest.raises(ValueError, match="kernel holds numbers that are not finite"):
        peft_jax.quantize(params)
    once = peft_jax.quantize({"kernel": weight((64, 32))})
    with pytest.raises(ValueError, match="kernel is quantized already"):
        peft_jax.quantize(once)
    with pytest.raises(ValueError, match=r"have shape \[\.\.\., 32, 32\], not \(16, 32\)"):
        once["kernel"].replace(codes=once["kernel"].codes[:16])
