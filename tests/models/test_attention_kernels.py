"""What each kernel can do and what it refuses, against a plain softmax.

The splash kernel runs in its interpreter. Where cuDNN cannot run its call is replaced by JAX's own
products, which are given what cuDNN would be.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as stablehlo
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from peft_jax.core.devices import Device, program_device
from peft_jax.models import attention as kernels
from peft_jax.models.attention import attention, cudnn, make_mask
from tests.models.test_attention import plain
from tests.reference import relative_error

T, PREFIX = 128, 4
HOPPER = Device("gpu", "NVIDIA H100 80GB HBM3")
AMPERE = Device("gpu", "NVIDIA A100-SXM4-40GB")
SEGMENTS = np.stack(
    [np.r_[np.zeros(6), np.ones(50), np.full(72, 2)], np.r_[np.ones(100), np.full(28, 3)]]
).astype(np.int32)


def inputs(S=T, queries=T, d=8):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = [(2, queries, 4, d), (2, S, 2, d), (2, S, 2, d)]
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


def mask_of(segments=None, window=None, causal=True):
    positions = jnp.arange(T)[None].repeat(2, 0)
    segments = None if segments is None else jnp.asarray(segments)
    return make_mask(
        positions, positions, segments, segments, window=window, aligned=True, causal=causal
    )


def cached():
    """One query behind 19 keys, in 24 slots of a cache."""
    slots, at = jnp.arange(24)[None].repeat(2, 0), jnp.full((2, 1), 19)
    filled = (slots < 20).astype(jnp.int32)
    return make_mask(at, slots, jnp.ones((2, 1), jnp.int32), filled, window=None, aligned=False)


def with_prefix(**options):
    return mask_of(SEGMENTS).with_prefix(PREFIX, **options)


def given():
    seen = jax.random.bernoulli(jax.random.key(1), 0.5, (2, 1, T, T)) | jnp.eye(T, dtype=bool)
    return mask_of(causal=False).replace(dense=True, given=(seen, seen))


GATE = jax.random.normal(jax.random.key(2), (2, 1, T, PREFIX))
RELATIVE = jax.random.normal(jax.random.key(3), (1, 4, T, T))
LONGER = {"S": T + PREFIX}
# feature: (mask, options of the call, shapes of the inputs, what kernels say that lack it)
FEATURES = {
    "causal": (mask_of, {}, {}, {}),
    "packed": (lambda: mask_of(SEGMENTS), {}, {}, {}),
    "window": (lambda: mask_of(SEGMENTS, 20), {"sliding": True}, {}, {}),
    "both ways": (lambda: mask_of(SEGMENTS, causal=False), {}, {}, {}),
    "window both ways": (lambda: mask_of(None, 20, False), {"sliding": True}, {}, {}),
    "full layer of a model with windows": (lambda: mask_of(None, 20), {"sliding": False}, {}, {}),
    "window known at run time": (
        lambda: mask_of(SEGMENTS, 20),
        {"sliding": jnp.asarray(True)},
        {},
        {"splash": "no layers whose window is only known at run time"},
    ),
    "soft cap": (lambda: mask_of(SEGMENTS), {"softcap": 2.0}, {}, {"cudnn": "no soft caps"}),
    "mask as an array": (given, {}, {}, {"splash": "no masks given as arrays"}),
    "prefix": (with_prefix, {}, LONGER, {"splash": "no keys of a prefix"}),
    "gated prefix": (
        lambda: with_prefix(bias=GATE),
        {},
        LONGER,
        {"splash": "nor other biases of scores", "cudnn": "nor other biases of scores"},
    ),
    "relative positions": (
        mask_of,
        {"bias": RELATIVE},
        {},
        {"splash": "no relative positions", "cudnn": "no relative positions"},
    ),
    "cache": (cached, {}, {"S": 24, "queries": 1}, {"splash": "no caches"}),
    "heads of 12 features": (mask_of, {}, {"d": 12}, {"cudnn": "no heads of 12 features"}),
    "heads of 256 features": (mask_of, {}, {"d": 256}, {}),
}


def by_offsets(q, k, v, *, q_seqlen, kv_seqlen, q_offsets, kv_offsets, scale, mask_type, **options):
    """What cuDNN makes of offsets: each run of a row by itself."""
    assert q_seqlen is kv_seqlen
    assert q_offsets is kv_offsets
    assert q_offsets.shape[1] == q_seqlen.shape[1] + 1
    assert k.shape == q.shape  # JAX counts the keys' offsets by the queries' heads
    causal = mask_type == stablehlo.MaskType.PADDING_CAUSAL
    at = jnp.arange(q.shape[1])
    inside = (at >= q_offsets[:, :-1, None]) & (at < (q_offsets[:, :-1] + q_seqlen)[..., None])
    inside &= q_seqlen[..., None] > 0
    k = jnp.where(inside.sum(1) == 1, 1.0, jnp.nan)[..., None, None] * k  # of one run each
    seen = jnp.einsum("brt,brs->bts", inside, inside) > 0
    distance = at[:, None] - at
    if causal:
        seen &= distance >= 0
    if options["sliding_window_length"] is not None:
        seen &= distance < options["sliding_window_length"]
    return jax.nn.dot_product_attention(q, k, v, mask=seen[:, None], scale=scale)


@pytest.fixture
def replaced(monkeypatch):
    """cuDNN's calls, done by JAX's own products in float32, and which there were."""
    kernel, calls = jax.nn.dot_product_attention, []

    def products(*args, implementation=None, **options):
        if implementation == "cudnn":
            calls.append("masked" if "mask" in options else "whole")
        return kernel(*args, implementation="xla", **options)

    def offsets(*args, **options):
        calls.append("offsets")
        return by_offsets(*args, **options)

    monkeypatch.setattr(cudnn, "DTYPES", (jnp.float32,))
    monkeypatch.setattr(jax.nn, "dot_product_attention", products)
    monkeypatch.setattr(stablehlo, "dot_product_attention", offsets)
    return calls


def on(device, monkeypatch):
    monkeypatch.setattr(kernels, "program_device", lambda arrays: device)


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("kernel", ["xla", "splash", "cudnn"])
def test_a_forced_kernel_is_right_or_refuses(kernel, feature, replaced, monkeypatch):
    mask, options, shapes, refusals = FEATURES[feature]
    mask, (q, k, v) = mask(), inputs(**shapes)
    if kernel == "cudnn":
        on(HOPPER, monkeypatch)

    def run():
        return attention(q, k, v, mask, scale=0.3, implementation=kernel, **options)

    if kernel in refusals:
        with pytest.raises(ValueError, match=f"the {kernel} kernel .*{refusals[kernel]}"):
            run()
        return
    seen = mask.visible(options.get("sliding", False))
    bias = options.get("bias", 0.0)
    if mask.bias is not None:
        bias = jnp.pad(mask.bias, [(0, 0)] * 3 + [(0, k.shape[1] - PREFIX)])
    expected = plain(q, k, v, seen, 0.3, options.get("softcap"), bias)
    assert relative_error(run(), expected) < 1e-5


def test_packed_rows_go_to_cudnn_by_offsets(replaced, monkeypatch):
    """With gradients; on older GPUs, and for more segments than it makes room for, as masks."""
    q, k, v = inputs()
    rows = {"packed": SEGMENTS, "many": np.arange(2 * T).reshape(2, T) // 3}

    def run(segments, device):
        on(device, monkeypatch)
        replaced.clear()
        mask = mask_of(segments, 20)

        def call(*qkv):
            return attention(*qkv, mask, sliding=True, scale=0.3, implementation="cudnn")

        out, pull = jax.vjp(call, q, k, v)
        expected, pull_expected = jax.vjp(
            lambda *qkv: plain(*qkv, mask.visible(True), 0.3, None), q, k, v
        )
        for a, b in zip((out, *pull(out)), (expected, *pull_expected(out)), strict=True):
            assert relative_error(a, b) < 1e-5
        return set(replaced)

    assert run(rows["packed"], HOPPER) == {"offsets", "masked"}  # both are traced, one is run
    assert run(rows["many"], HOPPER) == {"offsets", "masked"}
    assert run(rows["packed"], AMPERE) == {"masked"}


def test_masks_of_long_rows_are_made_block_by_block(replaced, monkeypatch):
    """No mask of all queries and keys is made, nor kept for the backward pass."""
    monkeypatch.setattr(cudnn, "_BLOCK", T // 2)
    on(AMPERE, monkeypatch)
    q, k, v = inputs()
    mask = mask_of(SEGMENTS)

    def call(q, k, v):
        return attention(q, k, v, mask, scale=0.3, implementation="cudnn")

    kept = jax.eval_shape(lambda *qkv: jax.vjp(call, *qkv)[1], q, k, v)
    assert [x.shape for x in jax.tree.leaves(kept) if x.ndim == 4 and x.shape[1] == 1] == []
    replaced.clear()
    out = call(q, k, v)
    assert relative_error(out, plain(q, k, v, mask.visible(False), 0.3, None)) < 1e-5
    assert replaced == ["masked"] * 2


def test_what_is_lowered_for_gpus(monkeypatch):
    """The calls of cuDNN in a program for CUDA, forward and backward, of heads of 256 features."""
    monkeypatch.setattr(stablehlo, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(stablehlo, "check_compute_capability", lambda capability: True)
    monkeypatch.setattr(stablehlo, "is_cuda_compute_capability_equal", lambda capability: False)
    on(HOPPER, monkeypatch)

    def call(q, k, v, segments):
        positions = jnp.arange(T)[None]
        mask = make_mask(positions, positions, segments, segments, window=20, aligned=True)
        return attention(q, k, v, mask, sliding=True, scale=1.0)

    def step(q, k, v, segments):
        out, pull = jax.vjp(lambda *qkv: call(*qkv, segments), q, k, v)
        return pull(out)

    qkv = [x.astype(jnp.bfloat16) for x in inputs(d=256)]
    text = jax.jit(step).trace(*qkv, SEGMENTS).lower(lowering_platforms=("cuda",)).as_text()
    packed = [line for line in text.splitlines() if "PADDING_CAUSAL" in line]
    assert [re.search(r"@__cudnn\$(\w+)", line)[1] for line in packed] == [
        "fmhaSoftmax",
        "fmhaSoftmaxBackward",
    ]
    for line in packed:
        said = line.replace("\\22", "")
        assert "sliding_window_length: 20" in said
        assert "max_seg_per_batch: 8" in said


@pytest.mark.parametrize(
    ("platform", "kind", "features", "chosen"),
    [
        ("cpu", "cpu", {}, "xla"),
        ("tpu", "TPU v5 lite", {}, "splash"),
        ("tpu", "TPU v5 lite", {"d": 64}, "splash"),
        ("tpu", "TPU v5 lite", {"S": 24, "queries": 24}, "xla"),
        ("gpu", "NVIDIA H100 80GB HBM3", {"d": 256}, "cudnn"),
        ("gpu", "NVIDIA A100-SXM4-40GB", {"d": 256}, "xla"),
        ("gpu", "NVIDIA A100-SXM4-40GB", {"d": 128}, "cudnn"),
    ],
)
def test_the_devices_of_a_program_choose(platform, kind, features, chosen, monkeypatch):
    """The mesh's, wherever it is traced."""
    q, k, v = (x.astype(jnp.bfloat16) for x in inputs(**features))
    positions = jnp.arange(q.shape[1])[None]
    mask = make_mask(positions, positions, None, None, window=None, aligned=True)
    run = []
    records = [r._replace(run=lambda call, name=r.name: run.append(name)) for r in kernels.KERNELS]
    monkeypatch.setattr(kernels, "KERNELS", records)
    monkeypatch.setattr(kernels, "run_on_mesh", lambda kernel, call, *_: kernel.run(call))
    device = AbstractDevice(device_kind=kind, num_cores=None, platform=platform)
    mesh = AbstractMesh((2,), ("fsdp",), (AxisType.Auto,), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        assert program_device() == Device(platform, kind)
        attention(q, k, v, mask, scale=1.0)
    assert run == [chosen]
    assert program_device() == Device("cpu", "cpu")
