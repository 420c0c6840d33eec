"""Every transform of a tree under `jax.jit`, `jax.eval_shape` and on a mesh gives what it gives
outside of them. Storage formats are gone through in tests/quantization/test_formats.py.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import peft_jax
from peft_jax.low_rank import dora, factorize
from peft_jax.pruning import compress, densify, mask_from_zeros, mask_updates
from peft_jax.pruning.distribution import DISTRIBUTIONS
from peft_jax.pruning.prune import PROCEDURES
from peft_jax.pruning.scores import SCORES
from peft_jax.quantization import NF4, Int
from peft_jax.quantization.rounding import ROUNDINGS

SHAPES = {"layers/q_proj/kernel": (2, 32, 16), "lm_head/kernel": (16, 32)}


def tree_of(arrays):
    tree = {}
    for path, array in arrays.items():
        *parts, leaf = path.split("/")
        functools.reduce(lambda t, part: t.setdefault(part, {}), parts, tree)[leaf] = array
    return tree


@pytest.fixture(scope="module")
def base():
    """(a tree of a stacked and a single matrix, statistics of all kinds)."""
    rng = np.random.default_rng(0)

    def normal(shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    inputs = {path: normal((*shape[:-2], 64, shape[-2])) for path, shape in SHAPES.items()}
    statistics = {
        "covariance": {p: x.mT @ x / 64 for p, x in inputs.items()},
        "second_moment": {p: jnp.square(x).mean(-2) for p, x in inputs.items()},
        "mean_abs": {p: jnp.abs(x).mean(-2) for p, x in inputs.items()},
        "max_abs": {p: jnp.abs(x).max(-2) for p, x in inputs.items()},
        "gradient": {p: normal(shape) for p, shape in SHAPES.items()},
        "squared_gradient": {p: jnp.square(normal(shape)) for p, shape in SHAPES.items()},
    }
    return tree_of({p: normal(shape) for p, shape in SHAPES.items()}), statistics


def check(transform, *args):
    """`transform` as it is, compiled, and of shapes alone. Codes may fall either way at an edge
    between two of them.
    """
    plain, compiled, shapes = (
        transform(*args),
        jax.jit(transform)(*args),
        jax.eval_shape(transform, *args),
    )
    assert jax.tree.structure(plain) == jax.tree.structure(compiled) == jax.tree.structure(shapes)
    for a, b, c in zip(*(jax.tree.leaves(t) for t in (plain, compiled, shapes)), strict=True):
        assert (jnp.shape(a), jnp.result_type(a)) == (b.shape, b.dtype) == (c.shape, c.dtype)
        off = np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64)) > 1e-4 * max(
            1.0, float(np.abs(a).max())
        )
        assert off.mean() < 0.02


BLOCKS = NF4(block_size=16)


def test_roundings(base):
    params, statistics = base

    def format(name):
        return Int(bits=4, block_size=16, symmetric=name not in ("hqq", "gptq"))

    check(
        lambda tree, of: {
            n: peft_jax.quantize(tree, format(n), rounding=n, statistics=of) for n in ROUNDINGS
        },
        params,
        statistics,
    )


def kinds_of(score):
    """(pattern, distribution) that a score goes with."""
    yield "2:4", "uniform"
    for distribution in DISTRIBUTIONS:
        if distribution != "global" or score not in PROCEDURES:
            yield None, distribution
    if score not in PROCEDURES:
        yield "8x8", "uniform"


@pytest.mark.parametrize("score", [*SCORES, *PROCEDURES])
def test_scores_patterns_and_distributions(base, score):
    params, statistics = base

    def transform(tree, of):
        return {
            f"{pattern}, {distribution}": peft_jax.prune(
                tree,
                None if pattern == "2:4" else 0.5,
                score=score,
                pattern=pattern,
                distribution=distribution,
                statistics=of,
            )
            for pattern, distribution in kinds_of(score)
        }

    check(transform, params, statistics)


def test_what_pruned_weights_become(base):
    params, _ = base
    groups, blocks = (
        peft_jax.prune(params, pattern="2:4"),
        peft_jax.prune(params, 0.5, pattern="8x8"),
    )
    check(lambda tree: (densify(tree), compress(tree)), groups)
    dense = jax.jit(lambda tree: densify(compress(tree)))(blocks)  # with room for all blocks
    jax.tree.map(np.testing.assert_array_equal, dense, densify(blocks))


def test_low_rank(base):
    params, statistics = base
    check(
        lambda tree, of: factorize(tree, keep=0.5, statistics=of["covariance"])[0],
        params,
        statistics,
    )


CHAINS = {
    "prune, adapt, merge": lambda tree, of, key: peft_jax.merge(
        mask_updates(
            peft_jax.lora(peft_jax.prune(tree, 0.5, score="sparsegpt", statistics=of), key, rank=2)
        )
    ),
    "prune, quantize, adapt": lambda tree, of, key: dora(
        peft_jax.quantize(peft_jax.prune(tree, pattern="2:4"), BLOCKS), key, rank=2
    ),
    "factorize, adapt, into LoRA": lambda tree, of, key: peft_jax.lora(
        factorize(densify(peft_jax.prune(tree, 0.5)), keep=0.5)[0], key, rank=2
    ),
}


@pytest.mark.parametrize("chain", CHAINS)
def test_chains_of_three(base, chain):
    params, statistics = base
    transform = CHAINS[chain]
    plain = transform(params, statistics, jax.random.key(0))
    shapes = jax.eval_shape(transform, params, statistics, jax.random.key(0))
    assert jax.tree.structure(plain) == jax.tree.structure(shapes)
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(shapes), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)


def test_what_needs_values_says_so(base):
    params, _ = base
    with pytest.raises(ValueError, match="factorize runs with keep alone under"):
        jax.eval_shape(lambda tree: factorize(tree, error=0.1)[0], params)
    with pytest.raises(ValueError, match="mask_from_zeros does not run under"):
        jax.jit(mask_from_zeros)(params)


def keyed(chain):
    def transform(tree, of):
        return CHAINS[chain](tree, of, jax.random.key(0))

    return transform


TRANSFORMS = {
    "nf4": lambda tree, of: peft_jax.quantize(tree, BLOCKS),
    "gptq": lambda tree, of: peft_jax.quantize(
        tree, Int(bits=4, block_size=16), rounding="gptq", statistics=of
    ),
    "wanda": lambda tree, of: peft_jax.prune(
        tree, 0.5, score="wanda", distribution="owl", statistics=of
    ),
    **{chain: keyed(chain) for chain in CHAINS},
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_sharded_arrays_stay_where_they_lie(base, name):
    """Compiled on eight devices, without a transfer to the host, against one device."""
    (params, statistics), transform = base, TRANSFORMS[name]
    mesh = peft_jax.make_mesh({"fsdp": 8})

    def spread(x):
        return jax.device_put(
            x, jax.sharding.NamedSharding(mesh, P(*[None] * (x.ndim - 1), "fsdp"))
        )

    there = jax.tree.map(spread, (params, statistics))
    with jax.transfer_guard("disallow"):
        found = jax.jit(transform)(*there)
    expected = jax.jit(transform)(params, statistics)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        off = np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64))
        assert (off > 1e-5 * max(1.0, np.abs(np.asarray(b, np.float64)).max())).mean() < 0.02
