"""What every storage format must satisfy, and formats against independent references: bitsandbytes
for 4-bit codes and dynamic maps, ml_dtypes for FP8 and MXFP4.

A registered format is tested by itself; the one of docs/examples goes through all of it too.
"""

import dataclasses
import importlib.util
from pathlib import Path

import bitsandbytes.functional as bnb
import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch

import peft_jax
from peft_jax.core import matmul, select, take
from peft_jax.core.mesh import make_mesh
from peft_jax.core.packing import pack, unpack
from peft_jax.core.sharding import shard
from peft_jax.core.tree import places
from peft_jax.hub.checkpoint import load_fresh
from peft_jax.low_rank import LoRA
from peft_jax.quantization import dequantize
from peft_jax.quantization.dynamic_map import (
    dequantize_blocks,
    double_quantize,
    dynamic_map,
    quantize_blocks,
)
from peft_jax.quantization.formats import (
    FORMATS,
    FP4,
    FP8,
    MXFP4,
    NF4,
    Int,
    StorageFormat,
    format_names,
    make_format,
)
from peft_jax.quantization.quantized import round_inputs, rounds_inputs, weight_only
from peft_jax.quantization.stage import QuantizeConfig, check_quantize
from tests.installed import install
from tests.quantization.references import REFERENCES
from tests.reference import relative_error
from tests.test_traceable import check as check_traceable

EXAMPLE_FILES = Path(__file__).parents[2] / "docs" / "examples"


def example_of(name: str) -> StorageFormat:
    """The format of a file in docs/examples."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLE_FILES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.FORMAT


STRANGER = example_of("storage_format")
RECORDS = [*FORMATS.values(), STRANGER]
EXAMPLES = [(record, format) for record in RECORDS for format in record.examples]
each_example = pytest.mark.parametrize(
    ("record", "format"), EXAMPLES, ids=[f"{f.name}-{i}" for i, (_, f) in enumerate(EXAMPLES)]
)
each_record = pytest.mark.parametrize("record", RECORDS, ids=[r.name for r in RECORDS])
IN, OUT = 64, 48
X = jax.random.normal(jax.random.key(1), (2, 5, IN))


def weight(shape=(3, IN, OUT)):
    """Normal weights; the largest of each block is above zero, since that of symmetric integers
    would lie between two codes below it.
    """
    w = jax.random.normal(jax.random.key(0), shape)
    return w.at[..., ::16, :].set(3.5 + w[..., ::16, :] ** 2)


def quantized(format, w, **options):
    largest = jnp.broadcast_to(jnp.abs(X).max((0, 1)), (*w.shape[:-2], IN))
    statistics = {"max_abs": {"kernel": largest}} if rounds_inputs(format) else {}
    return peft_jax.quantize({"kernel": w}, format, statistics=statistics, **options)["kernel"]


def reference_of(record: StorageFormat):
    """Whatever a format is compared with. Raises LookupError for a format without."""
    found = record.reference or REFERENCES.get(record.name)
    if found is None:
        raise LookupError(
            f"the format {record.name!r} is compared with nothing: give its record a `reference`"
        )
    return found


def disagreement(record: StorageFormat, format) -> float:
    """The relative error of what comes back of a matrix, against the format's reference."""
    w = np.asarray(weight((IN, OUT)))
    return relative_error(quantized(format, w).materialize(), reference_of(record)(w, format))


@each_example
def test_a_format_agrees_with_its_reference(record, format):
    assert disagreement(record, format) < 1e-6


def test_a_format_without_a_reference_and_one_with_a_wrong_formula_fail():
    with pytest.raises(LookupError, match="give its record a `reference`"):
        disagreement(dataclasses.replace(STRANGER, reference=None), STRANGER.examples[0])

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Wrong(Int):
        def decode(self, codes, zero):
            return jnp.sin(super().decode(codes, zero)) * 3

    assert disagreement(FORMATS["int"], Wrong(bits=4, block_size=16)) > 0.1


@each_example
def test_a_stack_of_matrices_in_every_format(record, format):
    w = jax.random.normal(jax.random.key(0), (3, IN, OUT))
    q = quantized(format, w)
    assert (q.shape, q.dtype, q.ndim) == (w.shape, w.dtype, 3)
    error = float(jnp.sqrt(jnp.square(q.materialize() - w).mean() / jnp.square(w).mean()))
    assert 0 < error < max(0.06, 2.8 / 2**format.bits)
    one = jax.tree.map(lambda a: a[1], q)
    alone = quantized(format, w[1])
    assert jax.tree.structure(one) == jax.tree.structure(alone)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(np.float32(a), np.float32(b), rtol=2e-7)  # a division's last bit
    matrix = np.asarray(q.materialize()[1])
    inputs = round_inputs(X, format, one.input_scale) if rounds_inputs(format) else X
    assert relative_error(matmul(X, one), np.asarray(inputs) @ matrix) < 1e-5
    y = jax.random.normal(jax.random.key(2), (2, 5, OUT))
    stored = one.replace(format=weight_only(format))
    back = matmul(y, stored, in_axes=(-1,), out_axes=(-2,))
    assert relative_error(back, np.asarray(y) @ matrix.T) < 1e-5
    grad = jax.grad(lambda x: (matmul(x, one) * y).sum())(X)
    assert relative_error(grad, back) < 1e-5


@each_example
def test_embeddings_are_looked_up_and_attended(record, format):
    format, w = weight_only(format), jax.random.normal(jax.random.key(0), (40, IN))
    q = peft_jax.quantize({"embed": {"embedding": w}}, format, targets="embed")["embed"][
        "embedding"
    ]
    full = np.asarray(q.materialize())
    ids = jnp.asarray([[3, 0, 39], [7, 7, 1]])
    np.testing.assert_allclose(take(q, ids), full[np.asarray(ids)], rtol=1e-6)
    assert take(q, ids, jnp.bfloat16).dtype == jnp.bfloat16
    x = X[0, :2]
    assert (
        relative_error(matmul(x, q, in_axes=(-1,), out_axes=(-2,)), np.asarray(x) @ full.T) < 1e-5
    )
    layer = nn.Embed(40, IN)  # declares its parameter in `setup`, and Flax compares shapes there
    apply = peft_jax.bind(layer, strict=True)
    np.testing.assert_allclose(apply({"embedding": q}, ids), full[np.asarray(ids)], rtol=1e-6)
    np.testing.assert_allclose(
        apply({"embedding": q}, x, method="attend"), np.asarray(x) @ full.T, rtol=1e-4, atol=1e-4
    )


@each_record
def test_a_format_is_traceable(record):
    """`quantize` and `dequantize` compiled, and of shapes alone; scanned as looped."""

    def run(w):
        trees = [{"kernel": quantized(f, w)} for f in record.examples]
        return trees, [dequantize(tree) for tree in trees]

    check_traceable(run, weight((2, IN, OUT)))


@each_record
def test_lora_over_a_format(record):
    """QLoRA: the update is added to the quantized product, and alone has gradients."""
    base = quantized(weight_only(record.examples[0]), weight((IN, OUT)))
    node = peft_jax.lora({"kernel": base}, jax.random.key(0), rank=2)["kernel"]
    node = node.replace(b=jax.random.normal(jax.random.key(2), node.b.shape))
    expected = np.asarray(X) @ np.asarray(base.materialize() + node.delta())
    assert relative_error(matmul(X, node), expected) < 1e-5
    trainable, frozen = peft_jax.partition({"kernel": node})
    assert jax.tree.structure(frozen["kernel"].base) == jax.tree.structure(base)

    def loss(trainable):
        return jnp.square(matmul(X, peft_jax.combine(trainable, frozen)["kernel"])).sum()

    grads = jax.tree.leaves(jax.grad(loss)(trainable))
    assert len(grads) == 2
    assert all(float(jnp.abs(g).max()) > 0 for g in grads)


@each_record
def test_a_format_on_eight_devices(record):
    """No block straddles devices, and the product is that of one device."""
    mesh = make_mesh({"fsdp": 2, "tensor": 4})
    tree = {
        str(i): {"q_proj": {"kernel": quantized(weight_only(f), weight((2, 2 * IN, 64)))}}
        for i, f in enumerate(record.examples)
    }
    placed = shard(tree, mesh)
    for name, format in zip(tree, record.examples, strict=True):
        codes = placed[name]["q_proj"]["kernel"].codes.addressable_shards[0].data
        rows = codes.shape[1] * 8 // format.bits
        assert format.block_size is None or rows % format.block_size == 0
        assert codes.shape[2] < 64  # outputs are always split
    x = jax.random.normal(jax.random.key(1), (4, 2 * IN))

    @jax.jit
    def run(tree):
        nodes = [tree[name]["q_proj"]["kernel"] for name in tree]
        return [jnp.stack([matmul(x, layer(w, i)) for i in range(2)]) for w in nodes]

    with jax.set_mesh(mesh):
        found = run(placed)
    for a, b in zip(found, run(tree), strict=True):
        assert relative_error(np.asarray(a), np.asarray(b)) < 1e-5


def layer(w, i):
    return jax.tree.map(lambda a: a[i], w)


def know(record, monkeypatch):
    """Register a format for one test."""
    monkeypatch.setattr(FORMATS, "_records", {**FORMATS, record.name: record})


@each_record
def test_configurations_name_a_format(record, monkeypatch):
    know(record, monkeypatch)
    for name in record.names:
        made = check_quantize(QuantizeConfig(format=name))
        assert type(made) is record.made
        assert made.name == name
        assert make_format(name) == made
    with pytest.raises(ValueError, match=f"unknown format .*{record.names[0]}"):
        make_format("fp48")


@pytest.fixture(scope="module")
def small_model():
    """A looped model of 24 linear modules, whose inputs are multiples of 64."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32}
    config = {**sizes, **heads, "vocab_size": 64}
    return load_fresh("builtin:base", config=config, scan_layers=False)


def test_folders_of_this_package_hold_every_format_and_rounding(small_model, tmp_path, monkeypatch):
    know(STRANGER, monkeypatch)
    model, params = small_model
    kernels = select(params)
    assert len(kernels) > len(EXAMPLES) + 2
    covariance = jnp.diag(jnp.arange(1.0, 65))
    statistics = {
        "max_abs": dict.fromkeys(kernels, jnp.ones(64)),
        "mean_abs": dict.fromkeys(kernels, jnp.arange(1.0, 65)),
        "covariance": dict.fromkeys(kernels, covariance),
    }
    places = iter(kernels)
    tree = params
    for _, format in EXAMPLES:
        of = statistics if rounds_inputs(format) else None
        tree = peft_jax.quantize(tree, format, targets=next(places), statistics=of)
    uneven = Int(bits=4, symmetric=False)
    tree = peft_jax.quantize(tree, uneven, targets=next(places), rounding="hqq")
    others = [("awq", {}), ("gptq", {"activation_order": "dynamic"})]
    for rounding, options in others:
        where = {"targets": next(places), "statistics": statistics}
        tree = peft_jax.quantize(tree, Int(bits=8), rounding=rounding, **where, **options)
    peft_jax.save(tmp_path / "q", model, tree, tool="peft_jax")
    _, back = peft_jax.load(tmp_path / "q", scan_layers=False)
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(tree), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_a_format_of_an_installed_package_is_reached_by_its_name(
    small_model, tmp_path, monkeypatch
):
    """YAML, `quantize`, QLoRA and folders, from one file and its entry point."""
    text = Path(EXAMPLE_FILES, "storage_format.py").read_text()
    install(tmp_path / "site", monkeypatch, FORMATS, "storage_format", text, "FORMAT")
    made = check_quantize(QuantizeConfig(format="nf3", options={"block_size": 16}))
    assert type(made) is FORMATS["nf3"].made
    assert "nf3" in format_names()
    assert disagreement(FORMATS["nf3"], made) < 1e-6
    model, params = small_model
    tree = peft_jax.quantize(params, "nf3")
    peft_jax.save(tmp_path / "q", model, tree, tool="peft_jax")
    _, back = peft_jax.load(tmp_path / "q", scan_layers=False)
    jax.tree.map(np.testing.assert_array_equal, back, tree)
    over = peft_jax.lora(back, jax.random.key(0), rank=2)
    nodes = [w for w in places(over).values() if isinstance(w, LoRA)]
    assert {type(n.base.format) for n in nodes} == {type(made)}


def test_a_format_that_no_tool_holds(small_model, tmp_path, monkeypatch):
    """Which tools hold others, and what works, from the registries; nothing is written."""
    model, params = small_model
    nf3 = STRANGER.examples[0]
    tree = peft_jax.quantize(params, nf3)
    held = r"bitsandbytes holds nf4 and fp4, compressed-tensors holds int and fp8 and mxfp4"
    with pytest.raises(ValueError, match=rf"no tool's folders hold nf3: {held}; save with tool="):
        peft_jax.save(tmp_path / "q", model, tree)
    with pytest.raises(ValueError, match=rf"bitsandbytes folders hold no nf3: {held}"):
        peft_jax.save(tmp_path / "q", model, tree, tool="bitsandbytes")
    with pytest.raises(ValueError, match=r"in the format NF3, which the name 'nf3' does not"):
        peft_jax.save(tmp_path / "q", model, tree, tool="peft_jax")
    with pytest.raises(ValueError, match="awq folders are read and not written"):
        peft_jax.save(tmp_path / "q", model, tree, tool="awq")
    with pytest.raises(ValueError, match="unknown checkpoint tool 'bitsandbites'"):
        peft_jax.save(tmp_path / "q", model, tree, tool="bitsandbites")
    assert not (tmp_path / "q").exists()
    know(STRANGER, monkeypatch)
    peft_jax.save(tmp_path / "q", model, tree, tool="peft_jax")
    peft_jax.save(tmp_path / "d", model, dequantize(tree))


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


@pytest.mark.parametrize("bits", range(1, 9))
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


@each_example
def test_stochastic_rounding_has_the_weight_as_its_mean(record, format):
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
    ends = [format.encode(jnp.full_like(w, x), scale, zero) for x in (-1e3, 1e3)]
    low, high = (np.asarray(format.decode(end, zero) * scale) for end in ends)
    inside = (low < w) & (w < high) & (w < 1)  # what lies beyond is clipped
    assert inside.mean() > 0.8
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
