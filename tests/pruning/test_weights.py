"""Masked, NMSparse and BlockSparse: products, gradients, bytes, merging, saving, sharding, over and
under other nodes.
"""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import peft_jax
from peft_jax.core import Trainable, count, full, materialize, matmul, places, take, unmerge
from peft_jax.core.mesh import make_mesh
from peft_jax.core.packing import pack_padded
from peft_jax.core.sharding import shard
from peft_jax.low_rank import dora
from peft_jax.pruning import compress, densify, mask_from_zeros, mask_updates, sparsity_of
from peft_jax.pruning.block import BlockSparse
from peft_jax.pruning.masked import Masked
from peft_jax.pruning.nm import NMSparse
from peft_jax.quantization import NF4, Int, Quantized, dequantize
from tests.reference import family_checkpoint, perturb, relative_error

KEY = jax.random.key(0)


def dense(shape=(32, 16), dtype=jnp.float32):
    return {"a": {"kernel": jax.random.normal(KEY, shape, dtype)}}


def kernel(tree):
    return tree["a"]["kernel"]


FORMS = {
    "masked": lambda tree: peft_jax.prune(tree, 0.5),
    "masked blocks": lambda tree: peft_jax.prune(tree, 0.5, pattern="8x4"),
    "2:4": lambda tree: compress(peft_jax.prune(tree, pattern="2:4")),
    "4:8": lambda tree: compress(peft_jax.prune(tree, pattern="4:8")),
    "1:16": lambda tree: compress(peft_jax.prune(tree, pattern="1:16")),
    "blocks": lambda tree: compress(peft_jax.prune(tree, 0.5, pattern="8x4", compare="output")),
    "uneven blocks": lambda tree: compress(peft_jax.prune(tree, 0.4, pattern="8x8")),
}


@pytest.mark.parametrize("form", FORMS)
def test_products_and_gradients(form):
    """Products equal the dense ones; trained values have the dense gradient where they are kept and
    none elsewhere.
    """
    w = kernel(FORMS[form](dense()))
    array = w.materialize()
    x = jax.random.normal(jax.random.key(1), (2, 5, 32))
    assert relative_error(matmul(x, w), x @ array) < 1e-6
    y = jax.random.normal(jax.random.key(2), (3, 16))
    back = matmul(y, w, in_axes=(-1,), out_axes=(-2,))
    assert relative_error(back, y @ array.T) < 1e-6
    np.testing.assert_array_equal(take(w, jnp.array([3, 1])), array[jnp.array([3, 1])])

    def loss(w):
        return jnp.sum(jnp.sin(matmul(x, w)))

    trained = w.train()
    trainable, frozen = peft_jax.partition(trained)
    grads = jax.grad(lambda t: loss(peft_jax.combine(t, frozen)))(trainable)
    expected = jax.grad(loss)(array)
    moved = peft_jax.combine(jax.tree.map(lambda p, g: p - 0.1 * g, trainable, grads), frozen)
    step = np.where(np.asarray(array) != 0, np.asarray(array - 0.1 * expected), 0)
    assert relative_error(moved.materialize(), step) < 1e-6
    assert trained.whole
    assert not w.whole
    assert jax.tree.leaves(peft_jax.partition(w)[0]) == []


@pytest.mark.parametrize("form", FORMS)
def test_stacks_of_any_layout(form):
    """Every form keeps leading axes, and serves kernels whose inputs or outputs are several
    axes.
    """
    tree = {"a": {"kernel": jax.random.normal(KEY, (3, 4, 4, 32))}}
    layout = {"a/kernel": ((-1,), (-3, -2))}
    pruned = {
        "masked": {"sparsity": 0.5},
        "masked blocks": {"sparsity": 0.5, "pattern": "8x4"},
        "2:4": {"pattern": "2:4"},
        "4:8": {"pattern": "4:8"},
        "1:16": {"pattern": "1:16"},
        "blocks": {"sparsity": 0.5, "pattern": "8x4", "compare": "output"},
        "uneven blocks": {"sparsity": 0.4, "pattern": "8x8"},
    }[form]
    w = kernel(compress(peft_jax.prune(tree, layout=layout, **pruned)))
    assert w.shape == (3, 4, 4, 32)
    array = w.materialize()
    np.testing.assert_array_equal(
        array, np.where(np.asarray(array) != 0, np.asarray(kernel(tree)), 0)
    )
    x = jax.random.normal(jax.random.key(1), (5, 32))

    def product(w):
        return matmul(x, w, in_axes=(-1,), out_axes=(-3, -2))

    assert relative_error(jax.vmap(product)(w), jax.vmap(product)(array)) < 1e-6


def bytes_of(tree):
    return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(tree))


def test_bytes():
    """A mask costs one bit a weight; 2:4 takes 0.5625 of dense bfloat16, block sparsity its share
    and an index a block.
    """
    tree = dense((512, 256), jnp.bfloat16)
    masked = peft_jax.prune(tree, 0.5)
    assert bytes_of(masked) - bytes_of(tree) == 512 * 256 // 8
    assert bytes_of(compress(peft_jax.prune(tree, pattern="2:4"))) == 0.5625 * bytes_of(tree)
    blocks = compress(peft_jax.prune(tree, 0.75, pattern="64x64", compare="output"))
    assert bytes_of(blocks) == 0.25 * bytes_of(tree) + 4 * 4 * 2


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "1:4"])
def test_groups_lie_along_the_inputs(pattern):
    w = kernel(
        peft_jax.prune({"a": {"kernel": jax.random.normal(KEY, (2, 32, 16))}}, pattern=pattern)
    )
    n, m = map(int, pattern.split(":"))
    np.testing.assert_array_equal((w.materialize() != 0).reshape(2, 32 // m, m, 16).sum(2), n)


def test_a_frozen_mask_costs_no_product():
    w = kernel(peft_jax.prune(dense(), 0.5))
    text = jax.jit(lambda x, w: matmul(x, w)).lower(jnp.ones((4, 32)), w).as_text()
    assert "select" not in text


# ---------------------------------------------------------------------------------------------
# beside other techniques


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    folder, tokens, _ = family_checkpoint("llama2", tmp_path_factory.mktemp("pruned"))
    model, params = peft_jax.load(folder)
    return model, params, tokens, jax.jit(peft_jax.bind(model))


def masks(tree):
    return {p: np.asarray(w.kept()) for p, w in places(tree).items() if isinstance(w, Masked)}


def zeros(tree):
    return {
        p: np.asarray(materialize(w)) == 0
        for p, w in places(tree).items()
        if p.endswith("proj/kernel")
    }


def test_dense_merge_says_so_and_masked_merge_keeps_every_zero(decoder, caplog):
    _, params, tokens, apply = decoder
    pruned = peft_jax.prune(params, 0.5)
    adapted = perturb(peft_jax.lora(pruned, KEY, rank=2))
    with caplog.at_level(logging.WARNING, "peft_jax"):
        merged = peft_jax.merge(adapted)
    assert "fills the zeros of 7 pruned weights" in caplog.text
    assert relative_error(apply(merged, tokens), apply(adapted, tokens)) < 1e-5
    assert not any(z.mean() > 0.01 for z in zeros(merged).values())
    caplog.clear()
    inside = mask_updates(adapted)
    with caplog.at_level(logging.WARNING, "peft_jax"):
        merged = peft_jax.merge(inside)
    assert not caplog.text
    assert relative_error(apply(merged, tokens), apply(inside, tokens)) < 1e-5
    assert relative_error(apply(inside, tokens), apply(adapted, tokens)) > 1e-3
    for path, kept in masks(pruned).items():
        np.testing.assert_array_equal(np.asarray(merged_at(merged, path)) != 0, kept)
    back = unmerge(merged, inside)
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(inside), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def merged_at(tree, path):
    return places(tree)[path].materialize()


def test_masked_updates_train_the_adapter_alone(decoder):
    _, params, tokens, apply = decoder
    inside = mask_updates(dora(peft_jax.prune(params, pattern="2:4"), KEY, rank=2))
    trainable, frozen = peft_jax.partition(perturb(inside))
    grads = jax.grad(lambda t: (apply(peft_jax.combine(t, frozen), tokens) ** 2).mean())(trainable)
    assert all(float(jnp.abs(g).max()) > 0 for g in jax.tree.leaves(grads))
    assert count(inside)[0] == count(dora(params, KEY, rank=2))[0]
    with pytest.raises(ValueError, match="is masked, which PEFT's format cannot say"):
        peft_jax.save_adapter("unused", inside)


@pytest.mark.parametrize("format", ["int8", "nf4", "int4"])
def test_quantized_then_pruned_and_the_other_way_round(decoder, format, tmp_path):
    model, params, tokens, apply = decoder
    format = NF4(block_size=16) if format == "nf4" else Int(bits=int(format[3:]), block_size=16)
    first = peft_jax.prune(peft_jax.quantize(params, format), 0.5)
    second = peft_jax.quantize(peft_jax.prune(params, 0.5), format)
    for tree in (first, second):
        w = places(tree)["model/layers/self_attn/q_proj/kernel"]
        assert isinstance(w, Masked)
        assert isinstance(w.base, Quantized)
        assert (
            abs(float((w.materialize() == 0).mean()) - 0.5) < 0.06
        )  # small weights may round to zero besides
        adapted = perturb(peft_jax.lora(tree, KEY, rank=2))
        arrays = densify(dequantize(tree))
        assert relative_error(apply(tree, tokens), apply(arrays, tokens)) < 1e-5
        assert np.isfinite(apply(adapted, tokens)).all()
    for path, kept in masks(second).items():
        np.testing.assert_array_equal(kept, masks(peft_jax.prune(params, 0.5))[path])
        assert not np.asarray(places(second)[path].materialize())[~kept].any()
    peft_jax.save(tmp_path / "model", model, second)
    loaded = peft_jax.load(tmp_path / "model")[1]
    assert relative_error(apply(loaded, tokens), apply(second, tokens)) < 1e-6
    with pytest.raises(ValueError, match="its quantized weights are not zero there"):
        peft_jax.save(tmp_path / "other", model, first)
    assert not (tmp_path / "other").exists()


def test_gptq_keeps_the_zeros_of_a_pruned_weight():
    tree = dense((64, 16))
    x = np.random.default_rng(0).normal(size=(300, 64)) @ np.random.default_rng(1).normal(
        size=(64, 64)
    )
    statistics = {"covariance": {"a/kernel": jnp.asarray(x.T @ x / 300, jnp.float32)}}
    pruned = peft_jax.prune(tree, 0.5, score="sparsegpt", statistics=statistics)
    given = {"statistics": statistics}
    quantized = peft_jax.quantize(
        pruned,
        Int(bits=4, block_size=32),
        rounding="gptq",
        activation_order=False,
        **given,
    )
    nearest = peft_jax.quantize(pruned, Int(bits=4, block_size=32))
    array = np.asarray(kernel(pruned).materialize())
    raw = np.asarray(kernel(quantized).base.materialize())  # without the mask over it
    assert (raw[array == 0] == 0).all()

    def error(w):
        return np.linalg.norm(x @ (np.asarray(w) - array))

    assert error(kernel(quantized).materialize()) < 0.95 * error(kernel(nearest).materialize())


@pytest.mark.parametrize("form", ["2:4", "16x16", "unstructured"])
def test_saved_with_zeros_and_read_back(decoder, form, tmp_path):
    """A folder that `transformers` loads, whose zeros can be found again."""
    import torch
    from transformers import AutoModelForCausalLM

    model, params, tokens, apply = decoder
    pruned = (
        peft_jax.prune(params, 0.5)
        if form == "unstructured"
        else peft_jax.prune(params, None if ":" in form else 0.5, pattern=form)
    )
    stored = compress(pruned)
    kinds = {"2:4": NMSparse, "16x16": BlockSparse, "unstructured": Masked}
    assert isinstance(places(stored)["model/layers/mlp/up_proj/kernel"], kinds[form])
    peft_jax.save(tmp_path, model, stored)
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(tmp_path)(torch.tensor(tokens)).logits.numpy()
    assert relative_error(apply(stored, tokens), logits) < 1e-5
    again = mask_from_zeros(peft_jax.load(tmp_path)[1])
    for path, kept in masks(pruned).items():
        np.testing.assert_array_equal(masks(again)[path], kept)
    assert sparsity_of(again).keys() == sparsity_of(stored).keys()
    assert abs(np.mean(list(sparsity_of(stored).values())) - 0.5) < 0.01


@pytest.mark.parametrize("form", ["2:4", "8x8", "unstructured"])
def test_eight_devices_equal_one(decoder, form):
    model, params, tokens, apply = decoder
    options = {"sparsity": 0.5} if form == "unstructured" else {"pattern": form, "sparsity": 0.5}
    tree = perturb(full(compress(peft_jax.prune(params, **options))))
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    with jax.set_mesh(mesh):
        placed = shard(tree, mesh)
        spread = jax.device_put(
            np.tile(tokens, (2, 1)), jax.NamedSharding(mesh, jax.P(("data", "fsdp")))
        )
        out = np.asarray(jax.jit(peft_jax.bind(model))(placed, spread))
    assert relative_error(out, apply(tree, np.tile(tokens, (2, 1)))) < 1e-5


def test_full_fine_tuning_trains_what_is_kept(decoder):
    _, params, tokens, apply = decoder
    pruned = full(peft_jax.prune(params, 0.5), targets="all-linear")
    trainable, frozen = peft_jax.partition(pruned)
    grads = jax.grad(lambda t: (apply(peft_jax.combine(t, frozen), tokens) ** 2).mean())(trainable)
    for path, kept in masks(pruned).items():
        g = np.asarray(places(grads)[path].base.value)
        assert (g[~kept] == 0).all()
        assert (g[kept] != 0).mean() > 0.99
    merged = peft_jax.merge(perturb(pruned))
    for path, kept in masks(merged).items():
        np.testing.assert_array_equal(np.asarray(merged_at(merged, path)) != 0, kept)


def test_patterns_that_a_mask_does_not_follow_are_refused():
    from peft_jax.pruning.block import block_sparse
    from peft_jax.pruning.nm import nm_sparse

    w = kernel(peft_jax.prune(dense(), 0.5))
    with pytest.raises(ValueError, match="follows the pattern None, not an N:M one"):
        nm_sparse(w)
    with pytest.raises(ValueError, match="follows the pattern None, not blocks"):
        block_sparse(w)
    assert isinstance(kernel(compress({"a": {"kernel": w}})), Masked)


def test_numpy_arrays_get_their_zeros_too():
    w = kernel(
        peft_jax.prune(
            {"a": {"kernel": np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)}}, 0.5
        )
    )
    np.testing.assert_array_equal(np.asarray(w.base) != 0, w.kept())


def test_masks_of_any_number_of_inputs():
    kept = jax.random.bernoulli(KEY, 0.5, (13, 3))
    w = Masked(base=Trainable(jnp.ones((13, 3))), mask=pack_padded(kept, 1))
    assert w.mask.shape == (2, 3)
    np.testing.assert_array_equal(w.materialize(), kept.astype(jnp.float32))
