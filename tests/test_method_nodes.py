"""What every method that changes a weight must satisfy, on one small matrix and without a model.

A method's node is multiplied with directly. Each column is a thing that may happen to it: the base
beneath it is pruned or quantized afterwards, the base is bfloat16, layers of a stack are left out,
an option is away from its default, the weight is an embedding, a stack of experts or a convolution.
`tests/test_method_matrix.py` holds the methods to their properties in models.
"""

import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import peft_jax
from peft_jax.core.prepare import distribute
from peft_jax.core.weight import materialize, matmul, ragged_matmul, take
from peft_jax.core.where import options_of
from peft_jax.methods import METHODS
from peft_jax.pruning import mask_updates
from peft_jax.quantization import Int
from tests.reference import perturb, relative_error

IN, OUT, ROWS = 16, 24, 64
KEY = jax.random.key(0)
WEIGHTS = [n for n, m in METHODS.items() if m.at == "matrices"]
ADAPTERS = [n for n in WEIGHTS if not METHODS[n].whole]  # the others train the base itself
# Options that say where a node stands or what trains beside it, or that its training alone reads.
ELSEWHERE = {
    "targets",
    "exclude",
    "layers",
    "layout",
    "adapter",
    "modules_to_save",
    "bias",
    "statistics",
    "dropout",
}
CASES = [(n, options) for n in WEIGHTS for options in ({}, *METHODS[n].variants)]
# What a method took from the base when it was attached and keeps, as a part of the adapter that its
# folder holds.
KEEPS = {
    "delora": "PEFT saves the norms with the adapter (delora_w_norm)",
    "lora pissa": "the factors that it starts with",
    "lora pissa_niter_2": "the factors that it starts with",
    "lora olora": "the factors that it starts with",
    "shira magnitude": "which entries train",
}


def name_of(case):
    method, options = case
    return " ".join([method, *(re.sub(r"\W+", "-", f"{k}={v}") for k, v in options.items())])


def kept(method, options):
    return {method, *(f"{method} {v}" for v in options.values() if isinstance(v, str))} & set(KEEPS)


@functools.cache
def array(*shape, seed=0):
    return (
        jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)
        / shape[-2] ** 0.5
    )


def tree_of(w, leaf="kernel"):
    return {"w": {leaf: w}}


def attached(method, params, options, **more):
    where = {"targets": "kernel"}
    return METHODS[method](params, KEY, **{**METHODS[method].example, **where, **options, **more})


def node_of(params, leaf="kernel"):
    return distribute(params)["w"][leaf]


def test_every_method_names_its_source():
    """A paper or an implementation."""
    source = re.compile(r"arXiv:\d{4}\.\d{5}|PEFT `\w+`|ICLR")
    assert all(source.search(m.follows) for n, m in METHODS.items() if n != "full")


def test_the_tables_of_methods_are_current():
    """Those of docs/methods_sources.md and the README, which scripts/method_tables.py writes."""
    root = Path(__file__).parents[1]
    script = [sys.executable, str(root / "scripts" / "method_tables.py"), "--check"]
    done = subprocess.run(
        script, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(root)}
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", WEIGHTS)
def test_every_option_is_gone_through(name):
    method = METHODS[name]
    named = {k for options in (*method.variants, method.example) for k in options}
    scheduled = {} if method.optimizer is None else options_of(method.optimizer)
    known = set(method.options)
    assert known == named | (known & (ELSEWHERE | set(scheduled)))


@functools.partial(jax.jit, static_argnums=2)
def both_ways(trainable, frozen, leaf, x, weight):
    """Products and their gradients, by the node's own product and by its array."""

    def through(product):
        def loss(t):
            y = product(node_of(peft_jax.combine(t, frozen), leaf))
            return (y * weight).sum(), y

        return jax.value_and_grad(loss, has_aux=True)(trainable)

    (_, y), grads = through(lambda w: matmul(x, w))
    (_, expected), dense = through(lambda w: jnp.matmul(x, w.materialize()))
    return y, expected, grads, dense


def close(found, expected, tolerance=1e-4):
    """Gradients that are not zero, and equal."""
    for (path, a), b in zip(
        jax.tree_util.tree_flatten_with_path(found)[0], jax.tree.leaves(expected), strict=True
    ):
        assert np.abs(a).max() > 0, path
        assert relative_error(a, b) < tolerance, path


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_product_merge_and_gradients_agree(case):
    """The product is that of the array, and of the merge; so are its gradients. At the start all
    are finite.
    """
    method, options = case
    params = attached(method, tree_of(array(IN, OUT)), options)
    x, weight = array(ROWS, IN, seed=1), array(ROWS, OUT, seed=2)
    y, _, grads, _ = both_ways(*peft_jax.partition(params), "kernel", x, weight)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves((y, grads)))
    if METHODS[method].identity and not options.get("orthogonal") and "init" not in options:
        assert relative_error(y, jnp.matmul(x, array(IN, OUT))) < 1e-5
    trainable, frozen = peft_jax.partition(perturb(params))
    y, expected, grads, dense = both_ways(trainable, frozen, "kernel", x, weight)
    assert relative_error(y, expected) < 1e-5
    merged = peft_jax.merge(peft_jax.combine(trainable, frozen))["w"]["kernel"]
    assert relative_error(matmul(x, merged), y) < 1e-5
    close(grads, dense)


CHANGES = {
    "pruned": lambda p: peft_jax.prune(p, 0.5),
    "int2": lambda p: peft_jax.quantize(p, Int(bits=2, block_size=8)),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("case", [c for c in CASES if c[0] in ADAPTERS], ids=name_of)
def test_a_base_that_changes_afterwards(case, change):
    """Product and merge agree over the base as it is now, and it matters not which came first, the
    adapter or the change.
    """
    method, options = case
    base, x = tree_of(array(IN, OUT)), array(ROWS, IN, seed=1)
    moved = perturb(attached(method, base, options))
    after = CHANGES[change](moved)
    y = matmul(x, node_of(after))
    merged = peft_jax.merge(after)["w"]["kernel"]
    if method != "qalora" or change == "pruned":
        merged = materialize(merged)
    assert relative_error(y, matmul(x, merged)) < 2e-5
    if not kept(method, options):
        before = attached(method, CHANGES[change](base), options)
        before = peft_jax.combine(peft_jax.partition(moved)[0], peft_jax.partition(before)[1])
        assert relative_error(matmul(x, node_of(before)), y) < 2e-5


OFF = 1.0039  # bfloat16 would make it one
SCALED = {
    n: {"alpha": OFF * METHODS[n].example.get("rank", 4)}
    for n in ("lora", "dora", "loha", "lokr", "randlora", "gralora", "qalora")
}


def in_half_precision(method, options=()):
    """An adapter over a base of bfloat16, that base in float32, and inputs that both represent."""
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), tree_of(array(IN, OUT)))
    whole = jax.tree.map(lambda a: a.astype(jnp.float32), half)
    x = array(2048, IN, seed=1).astype(jnp.bfloat16)
    return attached(method, half, dict(options)), attached(method, whole, dict(options)), x


def effects(x, start, end):
    """What a change of a node does to the products, float32."""
    return matmul(x, node_of(end)).astype(jnp.float32) - matmul(x, node_of(start)).astype(
        jnp.float32
    )


@pytest.mark.parametrize("method", ADAPTERS)
def test_an_update_over_bfloat16_is_as_large_as_over_float32(method):
    """Products are rounded, and so are factors of a product, but no scale: what they have in common
    would be off.
    """
    half, whole, x = in_half_precision(method, SCALED.get(method, {}))
    found = effects(x, half, perturb(half, scale=0.2))
    expected = effects(x.astype(jnp.float32), whole, perturb(whole, scale=0.2))
    assert float((found * expected).sum() / jnp.square(expected).sum()) == pytest.approx(
        1.0, abs=3e-3
    )


FORMED = [
    (m, k) for k in ("experts", "masked", "transposed") for m in ("dora", "oft", "lora", "hira")
]


@pytest.mark.parametrize(
    ("method", "kind"), [c for c in FORMED if c != ("oft", "transposed")]
)  # turned, halves still cancel
def test_a_small_update_over_bfloat16_where_the_weight_is_formed(method, kind):
    """An update far below what bfloat16 resolves of the weight's entries acts as over float32.

    The base's two halves cancel in each product, so that products resolve it.
    """
    lead, across = (1,) if kind == "experts" else (), -1 if kind == "transposed" else -2
    half, x = array(*lead, IN // 2, OUT), array(256, IN // 2, seed=1)
    if kind == "transposed":
        half, x = array(IN, OUT // 2), array(256, OUT // 2, seed=1)
    base, x = (
        jnp.concatenate([half, -half], across).astype(jnp.bfloat16),
        jnp.tile(x, 2).astype(jnp.bfloat16),
    )
    products = {
        "experts": lambda x, w: ragged_matmul(x, w, jnp.asarray([256])),
        "masked": matmul,
        "transposed": lambda x, w: matmul(x, w, in_axes=(-1,), out_axes=(-2,)),
    }

    def effect(dtype):
        params = tree_of(base.astype(dtype))
        params = attached(method, peft_jax.prune(params, 0.5) if kind == "masked" else params, {})
        params = mask_updates(params) if kind == "masked" else params

        def run(p):
            return products[kind](x.astype(dtype), node_of(p)).astype(jnp.float32)

        return run(perturb(params, scale=3e-4)) - run(params)

    found, expected = effect(jnp.bfloat16), effect(jnp.float32)
    assert float((found * expected).sum() / jnp.square(expected).sum()) == pytest.approx(
        1.0, abs=0.02
    )


FACTORS = {"dora": "magnitude", "ia3": "scale", "boft": "s", "road": "alpha"}


@pytest.mark.parametrize("method", FACTORS)
def test_a_factor_near_one_is_not_rounded_to_bfloat16(method):
    """A change of 0.2% in what scales an output changes that output by 0.2% on average over many
    rows.
    """
    half, whole, x = in_half_precision(method)
    start = perturb(half)

    def more(p):
        return jax.tree_util.tree_map_with_path(
            lambda k, a: a * 1.002 if k[-1].name == FACTORS[method] else a, p
        )

    found = effects(x, start, more(start))
    expected = effects(x.astype(jnp.float32), perturb(whole), more(perturb(whole)))
    share = (found * expected).sum(0) / jnp.square(expected).sum(
        0
    )  # of each output; a rounded factor moves by all or nothing
    assert float(jnp.abs(share - 1).mean()) < 0.4


@pytest.mark.parametrize("method", ADAPTERS)
def test_layers_left_out_are_as_they_were_bit_for_bit(method):
    """Product, array, merge and bias of a stacked layer that `layers` does not name."""
    base, x = {"layers": tree_of(array(2, IN, OUT))}, array(ROWS, IN, seed=1)
    params = perturb(attached(method, base, {}, layers=[0]))
    stack = distribute(params)["layers"]["w"]["kernel"]
    one, two = (jax.tree.map(lambda a, i=i: a[i], stack) for i in (0, 1))
    w, bias = base["layers"]["w"]["kernel"], array(1, OUT)[0]
    np.testing.assert_array_equal(matmul(x, two), matmul(x, w[1]))
    np.testing.assert_array_equal(two.materialize(), w[1])
    np.testing.assert_array_equal(two.bias(bias), bias)
    np.testing.assert_array_equal(peft_jax.merge(params)["layers"]["w"]["kernel"][1], w[1])
    assert relative_error(matmul(x, one), matmul(x, w[0])) > 1e-3


@pytest.mark.parametrize("method", [*ADAPTERS, "trainable_tokens"])
def test_an_embedding(method):
    """Rows that are looked up, and the products of a tied head, are those of the array and of the
    merge.
    """
    more = {
        "trainable_tokens": {"ids": [1, 3], "targets": "embedding"},
        "ia3": {"targets": "embedding"},
    }.get(method, {"targets": "embedding"})
    base = tree_of(array(32, IN), "embedding")
    params = perturb(attached(method, base, {}, **more))
    node, merged = node_of(params, "embedding"), peft_jax.merge(params)["w"]["embedding"]
    ids, x = jnp.arange(32).reshape(4, 8), array(ROWS, IN, seed=1)
    np.testing.assert_allclose(materialize(merged), node.materialize(), rtol=1e-6)
    assert relative_error(take(node, ids), merged[ids]) < 1e-5
    assert (
        relative_error(matmul(x, node, in_axes=(-1,), out_axes=(-2,)), jnp.matmul(x, merged.T))
        < 1e-5
    )


EXPERTS, SIZES = 3, jnp.asarray([20, 0, 44])


@pytest.mark.parametrize("method", WEIGHTS)
def test_stacked_experts(method):
    """Products by groups of rows are those of each expert's own node, and so are gradients."""
    params = perturb(attached(method, tree_of(array(EXPERTS, IN, OUT)), {}))
    node, merged, x = (
        node_of(params),
        peft_jax.merge(params)["w"]["kernel"],
        array(ROWS, IN, seed=1),
    )
    out = ragged_matmul(x, node, SIZES)
    start = 0
    for i, size in enumerate(SIZES.tolist()):
        own = jax.tree.map(lambda a, i=i: a[i], node)
        rows = x[start : start + size]
        if size:
            assert relative_error(out[start : start + size], matmul(rows, own)) < 1e-5
        start += size
    assert relative_error(ragged_matmul(x, materialize(merged), SIZES), out) < 1e-5


@pytest.mark.parametrize("method", WEIGHTS)
def test_a_convolution(method):
    """A kernel [width, in, out], whose inputs are two axes: the product over both is that of the
    array and the merge.
    """
    axes = ((-3, -2), (-1,))
    layout = {"layout": {"w/kernel": axes}} if "layout" in METHODS[method].options else {}
    params = perturb(attached(method, tree_of(array(2, IN // 2, OUT)), {}, **layout))
    node, merged, x = (
        node_of(params),
        materialize(peft_jax.merge(params)["w"]["kernel"]),
        array(ROWS, IN, seed=1),
    )
    x = x.reshape(ROWS, 2, IN // 2)
    expected = jnp.einsum("bwi,wio->bo", x, merged)
    assert relative_error(jnp.einsum("bwi,wio->bo", x, node.materialize()), expected) < 1e-5
    assert relative_error(matmul(x, node, in_axes=axes[0], out_axes=axes[1]), expected) < 1e-5
