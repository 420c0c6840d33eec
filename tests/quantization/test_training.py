"""Training beside quantization: LoftQ, quantization-aware training, QA-LoRA, mixed bit widths."""

import types

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from peft.tuners.lora.variants import QALoraLinearVariant

import peft_jax
from peft_jax.core import calibrate, matmul, places
from peft_jax.core.weight import ragged_matmul
from peft_jax.low_rank import loftq
from peft_jax.quantization import NF4, Int, Quantized, allocate_bits, bits_per_weight, qalora, qat
from peft_jax.quantization.quantized import round_inputs
from tests.reference import family_checkpoint, perturb, random_tokens, relative_error


def kernel(shape=(64, 48), seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def numpy_loftq(w, rank, steps, format):
    """Li et al. 2023, algorithm 1."""
    a, b = np.zeros((w.shape[0], rank)), np.zeros((rank, w.shape[1]))
    for _ in range(steps):
        q = np.asarray(
            peft_jax.quantize({"kernel": jnp.asarray(w - a @ b, jnp.float32)}, format)[
                "kernel"
            ].materialize()
        )
        u, s, vt = np.linalg.svd(w - q, full_matrices=False)
        a, b = u[:, :rank] * np.sqrt(s[:rank]), np.sqrt(s[:rank])[:, None] * vt[:rank]
    return q + a @ b


@pytest.mark.parametrize("steps", [1, 4])
def test_loftq_is_the_papers_algorithm(steps):
    w, format = np.asarray(kernel()), Int(bits=2, block_size=32, symmetric=False)

    def quantize(tree):
        return peft_jax.quantize(tree, format)

    tree = loftq(
        {"kernel": jnp.asarray(w)},
        jax.random.key(0),
        quantize=quantize,
        rank=8,
        alpha=16,
        steps=steps,
    )
    found = np.asarray(tree["kernel"].materialize())
    assert relative_error(found, numpy_loftq(w, 8, steps, format)) < 1e-4
    assert isinstance(tree["kernel"].base, Quantized)
    plain = np.asarray(quantize({"kernel": jnp.asarray(w)})["kernel"].materialize())
    assert np.linalg.norm(found - w) < 0.9 * np.linalg.norm(plain - w)


def test_loftq_over_stacked_layers_and_what_is_not_quantized():
    params = {"q_proj": {"kernel": kernel((2, 64, 32))}, "o_proj": {"kernel": kernel((2, 32, 64))}}

    def quantize(tree):
        return peft_jax.quantize(tree, NF4(), targets="q_proj")

    tree = loftq(params, jax.random.key(0), quantize=quantize, rank=4)
    assert relative_error(tree["o_proj"]["kernel"].materialize(), params["o_proj"]["kernel"]) < 1e-6

    def error(w):
        return float(jnp.linalg.norm(w - params["q_proj"]["kernel"]))

    assert error(tree["q_proj"]["kernel"].materialize()) < error(
        quantize(params)["q_proj"]["kernel"].materialize()
    )
    with pytest.raises(ValueError, match="steps=0"):
        loftq(params, jax.random.key(0), quantize=quantize, steps=0)


def test_loftq_knows_the_layers_and_their_ranks():
    """A layer of a rank of its own has the paper's factors of that rank; one that is left out is
    plainly rounded.
    """
    w, format = np.asarray(kernel((3, 64, 32))), Int(bits=2, block_size=32, symmetric=False)

    def quantize(tree):
        return peft_jax.quantize(tree, format)

    params = {"layers": {"q_proj": {"kernel": jnp.asarray(w)}}}
    options = {
        "layers": [0, 2],
        "rank_pattern": {"layers.2.q_proj": 8},
        "alpha_pattern": {"layers.0.q_proj": 7.0},
    }
    tree = loftq(params, jax.random.key(0), quantize=quantize, rank=4, steps=3, **options)
    found = np.asarray(tree["layers"]["q_proj"]["kernel"].materialize())
    for i, rank in ((0, 4), (2, 8)):
        assert relative_error(found[i], numpy_loftq(w[i], rank, 3, format)) < 1e-4
    plain = quantize({"kernel": jnp.asarray(w[1])})["kernel"].materialize()
    np.testing.assert_allclose(found[1], plain, atol=1e-6)
    assert int((jnp.abs(tree["layers"]["q_proj"]["kernel"].a[0]).max(0) > 0).sum()) == 4


@pytest.mark.parametrize("format", ["int8", "int4", "nf4", "fp8", "mxfp4"])
def test_qat_trains_what_merging_gives(format):
    options = {"block_size": 32} if format in ("int4", "nf4") else {}
    params = qat({"kernel": kernel((2, 64, 48))}, jax.random.key(0), format=format, options=options)
    node = params["kernel"]
    merged = peft_jax.merge(params)["kernel"]
    assert isinstance(merged, Quantized)
    np.testing.assert_allclose(merged.materialize(), node.materialize(), rtol=1e-5, atol=1e-6)
    x = jax.random.normal(jax.random.key(1), (5, 64))
    one, dense = jax.tree.map(lambda a: a[0], node), kernel((2, 64, 48))[0]
    grad = jax.grad(lambda w: (matmul(x, w) ** 2).sum())(one).base
    straight = jax.grad(lambda w: 2 * (x @ w * jax.lax.stop_gradient(matmul(x, one))).sum())(dense)
    assert relative_error(grad, straight) < 1e-5  # straight through


def test_qat_ends_nearer_than_rounding_afterwards():
    mix = jnp.eye(32) + 0.3 * jax.random.normal(jax.random.key(5), (32, 32))
    x, w = jax.random.normal(jax.random.key(1), (256, 32)) @ mix, kernel((32, 8))

    def loss(node):
        return jnp.square(matmul(x, node) - x @ w).mean()

    options = {"format": "int4", "options": {"block_size": 32}}
    node = qat({"kernel": w}, jax.random.key(0), **options)["kernel"]
    before, optimizer = float(loss(node)), optax.adam(optax.cosine_decay_schedule(1e-3, 400))

    def step(carry, _):
        node, state = carry
        updates, state = optimizer.update(jax.grad(loss)(node), state)
        return (optax.apply_updates(node, updates), state), None

    (node, _), _ = jax.jit(lambda n: jax.lax.scan(step, (n, optimizer.init(n)), length=400))(node)
    after = float(loss(peft_jax.merge({"kernel": node})["kernel"]))
    assert after == pytest.approx(float(loss(node)), rel=1e-4)
    assert after < 0.85 * before


def test_qalora_merges_into_zero_points_and_stays_quantized(tmp_path):
    base = peft_jax.quantize(
        {"q_proj": {"kernel": kernel((2, 64, 48))}}, Int(bits=4, block_size=16, symmetric=False)
    )
    params = perturb(qalora(base, jax.random.key(0), rank=4, alpha=8))
    node = params["q_proj"]["kernel"]
    assert node.a.shape == (2, 4, 4)  # a block of 16 inputs, as the base has
    merged = peft_jax.merge(params)["q_proj"]["kernel"]
    assert isinstance(merged, Quantized)
    np.testing.assert_array_equal(merged.codes, base["q_proj"]["kernel"].codes)
    assert relative_error(merged.materialize(), node.materialize()) < 1e-5
    x = jax.random.normal(jax.random.key(1), (5, 64))
    one = jax.tree.map(lambda a: a[1], node)
    assert relative_error(matmul(x, one), x @ node.materialize()[1]) < 1e-5
    symmetric = peft_jax.quantize({"kernel": kernel()}, Int(bits=4, block_size=16))
    over = perturb(qalora(symmetric, jax.random.key(0)))
    assert (
        relative_error(peft_jax.merge(over)["kernel"].materialize(), over["kernel"].materialize())
        < 1e-5
    )
    with pytest.raises(ValueError, match="kernel has no blocks; give QA-LoRA a block_size"):
        qalora({"kernel": kernel()}, jax.random.key(0))


def test_qaloras_update_is_that_of_peft():
    node = perturb(qalora({"kernel": kernel()}, jax.random.key(0), rank=4, alpha=8, block_size=16))[
        "kernel"
    ]

    module = types.SimpleNamespace(
        lora_A={"d": torch.nn.Linear(4, 4, bias=False)},
        lora_B={"d": torch.nn.Linear(4, 48, bias=False)},
        lora_dropout={"d": torch.nn.Identity()},
        scaling={"d": 2.0},
        qalora_group_size={"d": 16},
        in_features=64,
        training=False,
    )
    module.lora_A["d"].weight.data = torch.tensor(np.asarray(node.a).T)
    module.lora_B["d"].weight.data = torch.tensor(np.asarray(node.b).T)
    x = np.random.default_rng(0).normal(size=(5, 64)).astype(np.float32)
    theirs = (
        QALoraLinearVariant.forward(module, "d", torch.tensor(x), torch.zeros(5, 48))
        .detach()
        .numpy()
    )
    assert relative_error(jnp.asarray(x) @ node.delta(), theirs) < 1e-5


def test_a_qalora_adapter_comes_back_from_its_folder(tmp_path):
    folder, tokens, _ = family_checkpoint("llama2", tmp_path)
    model, params = peft_jax.load(folder)
    base = peft_jax.quantize(params, Int(bits=4, block_size=16))
    with_adapter = perturb(qalora(base, jax.random.key(0), rank=2, alpha=4))
    peft_jax.save_adapter(tmp_path / "a", with_adapter)
    apply = jax.jit(peft_jax.bind(model))
    again = peft_jax.load_adapter(base, tmp_path / "a")
    assert relative_error(apply(again, tokens), apply(with_adapter, tokens)) < 1e-6


def test_bits_go_where_they_help():
    params = {
        "a": {"kernel": kernel()},
        "b": {"kernel": kernel(seed=1)},
        "c": {"kernel": kernel((64, 96), 2)},
    }
    statistics = {
        f"{n}/kernel": jnp.eye(64) * scale for n, scale in (("a", 1.0), ("b", 1.0), ("c", 1.0))
    }
    spike = jnp.zeros(64).at[:4].set(100.0) + 0.01
    statistics["b/kernel"] = jnp.diag(spike)
    formats = [Int(bits=b, block_size=32, symmetric=False) for b in (2, 3, 4, 8)]
    plan = allocate_bits(params, formats, bits=7, statistics=statistics)
    quantized = peft_jax.quantize(params, plan)
    total = sum(bits_per_weight(w) * np.prod(w.shape) for w in places(quantized).values())
    assert total <= 7 * (2 * 64 * 48 + 64 * 96)
    least = allocate_bits(params, formats, bits=3.3)
    assert {f.bits for f in least.values()} == {2}
    most = allocate_bits(params, formats, bits=100)
    assert {f.bits for f in most.values()} == {8}
    assert len({f.bits for f in plan.values()}) > 1
    with pytest.raises(
        ValueError,
        match=r"a budget of 1 bits a weight is too small: the smallest formats take 3\.25",
    ):
        allocate_bits(params, formats, bits=1)


ACTIVE = {
    "int8_dynamic": ("int8", {"activations": "dynamic"}),
    "int8_static": ("int8", {"activations": "static"}),
    "fp8_dynamic": ("fp8", {"activations": "dynamic"}),
    "int4_block": ("int4", {"block_size": 16}),
}
SIZES = jnp.asarray([3, 0, 4])  # of rows; the second of the experts has none


def rounded_rows(x, format, static):
    """NumPy's: the inputs [N, in] as codes of 8 bits stand for them, by a scale of each row or a
    known one.
    """
    top = 127.5 if format == "int8" else 448.0
    size = (
        np.abs(x).max(-1, keepdims=True) / top
        if static is None
        else np.full((len(x), 1), static / top)
    )
    if format == "fp8":
        return (
            np.asarray(np.clip(x / size, -top, top).astype(ml_dtypes.float8_e4m3fn), np.float64)
            * size
        )
    q = x / size
    return np.clip(np.round(np.where(q < -127.499, -128, q)), -128, 127) * size


def product_of(kind):
    """The product of rows [N, in] by a node of this kind, all of its layers or experts."""
    if kind == "experts":
        return lambda node, x: ragged_matmul(x, node, SIZES)
    if kind == "layers":
        return lambda node, x: jax.lax.scan(lambda x, w: (x, matmul(x, w)), x, node)[1]
    return lambda node, x: matmul(x, node)


@pytest.mark.parametrize("kind", ["dense", "layers", "experts"])
@pytest.mark.parametrize("name", ACTIVE)
def test_qat_rounds_inputs_as_the_merged_weight_does(name, kind):
    """The forward pass before merging and after, NumPy's formula, and the gradients of its rounded
    inputs and weights.
    """
    format, options = ACTIVE[name]
    shape = {"dense": (32, 24), "layers": (2, 32, 24), "experts": (3, 32, 24)}[kind]
    x = kernel((7, 32), seed=1).at[3].mul(20)
    largest = jnp.abs(x).max(0) * 0.8  # some inputs are beyond it
    statistics = {"max_abs": {"kernel": jnp.broadcast_to(largest, (*shape[:-2], 32))}}
    params = qat(
        {"kernel": kernel(shape)},
        jax.random.key(0),
        format=format,
        options=options,
        statistics=statistics,
    )
    node, product = params["kernel"], product_of(kind)
    merged = peft_jax.merge(params)["kernel"]
    trained = jax.jit(product)(node, x)
    assert relative_error(jax.jit(product)(merged, x), trained) < 1e-6
    static = float(largest.max()) if name == "int8_static" else None
    inputs = (
        np.asarray(x)
        if name == "int4_block"
        else rounded_rows(np.asarray(x, np.float64), format, static)
    )
    w = np.asarray(merged.materialize(), np.float64)
    expected = (
        np.concatenate([inputs[:3] @ w[0], inputs[3:] @ w[2]]) if kind == "experts" else inputs @ w
    )
    assert relative_error(trained, expected) < 1e-5
    if name != "int4_block":
        assert (
            relative_error(
                trained,
                np.concatenate([x[:3] @ w[0], x[3:] @ w[2]]) if kind == "experts" else x @ w,
            )
            > 1e-3
        )
    dy = np.asarray(kernel(trained.shape, seed=2), np.float64)

    def loss(base, x):
        return (product(node.replace(base=base), x) * dy).sum()

    dw, dx = jax.jit(jax.grad(loss, argnums=(0, 1)))(node.base, x)
    if kind == "experts":
        parts = [(inputs[:3], dy[:3]), (inputs[:0], dy[:0]), (inputs[3:], dy[3:])]
        own_dw, own_dx = (
            np.stack([a.T @ b for a, b in parts]),
            np.concatenate([dy[:3] @ w[0].T, dy[3:] @ w[2].T]),
        )
    else:
        own_dw, own_dx = inputs.T @ dy, dy @ np.swapaxes(w, -1, -2)
        own_dx = own_dx.sum(0) if kind == "layers" else own_dx
    assert relative_error(dw, own_dw) < 1e-5
    assert relative_error(dx, own_dx) < 1e-5


def test_rounded_inputs_are_those_of_compressed_tensors():
    """At scales of 8 bits that end where a row's largest, positive, number lies: a negative one is
    between two codes.
    """
    x = kernel((5, 32), seed=1).at[:, 0].set(4.0)
    args = QuantizationArgs(num_bits=8, type="int", symmetric=True, dynamic=True, strategy="token")
    theirs = torch.tensor(np.asarray(x))
    size = theirs.abs().amax(-1, keepdim=True) / 127.5
    expected = fake_quantize(theirs, size, torch.zeros_like(size), args).numpy()
    found = round_inputs(x, Int(activations="dynamic"), None)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_stacked_experts_smooth_and_order_what_they_round():
    """Each expert's rows are those of its own product, inputs of whatever order and smoothing;
    gradients pass straight.
    """
    w, x = kernel((3, 32, 24)), kernel((7, 32), seed=1)
    statistics = {"max_abs": {"kernel": jnp.abs(kernel((3, 32), seed=3)) + 0.5}}
    format = Int(activations="static")
    node = peft_jax.quantize({"kernel": w}, format, rounding="smoothquant", statistics=statistics)[
        "kernel"
    ]
    order = jnp.stack([jax.random.permutation(jax.random.key(i), 32) for i in range(3)])
    node = node.replace(order=order)

    def one(i):
        return jax.tree.map(lambda a: a[i], node)

    expected = jnp.concatenate([matmul(x[:3], one(0)), matmul(x[3:], one(2))])
    assert relative_error(ragged_matmul(x, node, SIZES), expected) < 1e-6
    dx = jax.grad(lambda x: ragged_matmul(x, node, SIZES).sum())(x)
    full = node.materialize().sum(-1)
    assert (
        relative_error(dx, jnp.concatenate([jnp.tile(full[0], (3, 1)), jnp.tile(full[2], (4, 1))]))
        < 1e-5
    )


def test_qat_over_half_precision_is_the_merged_weight_bit_for_bit():
    node = qat(
        {"kernel": kernel((32, 24))},
        jax.random.key(0),
        format="int8",
        options={"activations": "dynamic"},
    )["kernel"]
    x = kernel((7, 32), seed=1).astype(jnp.bfloat16)
    merged = peft_jax.merge({"kernel": node})["kernel"]
    np.testing.assert_array_equal(matmul(x, node), matmul(x, merged))


def test_static_qat_without_statistics_is_refused():
    tree, static = {"kernel": kernel()}, {"format": "int8", "options": {"activations": "static"}}
    with pytest.raises(ValueError, match="kernel has no statistics 'max_abs'"):
        qat(tree, jax.random.key(0), **static)
    with pytest.raises(
        ValueError, match=r"statistics 'max_abs' of kernel have shape \(3,\), expected \(64,\)"
    ):
        qat(tree, jax.random.key(0), **static, statistics={"max_abs": {"kernel": jnp.ones(3)}})


def test_a_model_of_experts_says_the_same_before_and_after_merging(tmp_path):
    """Rounding comes layer after layer here, so that one code that differs would show."""
    folder, *_ = family_checkpoint("mixtral_sliding", tmp_path)
    model, params = peft_jax.load(folder)
    tokens, apply = random_tokens(3, 8), peft_jax.bind(model)
    statistics = {"max_abs": calibrate(apply, params, [{"tokens": tokens}], statistic="max_abs")}
    options = {"format": "int8", "options": {"activations": "static"}, "statistics": statistics}
    tree = qat(params, jax.random.key(0), **options)
    trained = jax.jit(apply)(tree, tokens)
    assert relative_error(jax.jit(apply)(peft_jax.merge(tree), tokens), trained) < 1e-5
    assert relative_error(jax.jit(apply)(params, tokens), trained) > 1e-3
