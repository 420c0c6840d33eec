"""What a comparison tells of a tree: parameters to store, and what each layer is made of."""

import jax
import pytest

import peft_jax
from peft_jax.core import full, places
from peft_jax.low_rank import factorize
from peft_jax.quantization.stage import mean_bits
from peft_jax.recipes.assess import device_bytes, layers_of, stored_parameters


@pytest.fixture(scope="module")
def base(tiny_folder):
    return peft_jax.load(tiny_folder)[1]


def kernels(params):
    return [w for path, w in places(params).items() if "_proj/kernel" in path]


def of_factors(params):
    return factorize(params, keep=0.5)[0]


KEY = jax.random.key(0)
TREES = {  # what is made of the base -> (zeros, rank, bits; None: another format's)
    "dense": (lambda p: p, 0.0, None, 32),
    "full": (full, 0.0, None, 32),
    "lora": (lambda p: peft_jax.lora(p, KEY, rank=2), 0.0, 2, 32),
    "pruned": (lambda p: peft_jax.prune(p, pattern="2:4", score="magnitude"), 0.5, None, 32),
    "pruned lora": (
        lambda p: peft_jax.lora(peft_jax.prune(p, 0.5, score="magnitude"), KEY, rank=3),
        0.5,
        3,
        32,
    ),
    "qlora": (lambda p: peft_jax.lora(peft_jax.quantize(p, "int8"), KEY, rank=2), 0.0, 2, None),
    "factors": (of_factors, 0.0, 4, 32),
    "bottleneck": (lambda p: peft_jax.adapters.bottleneck(p, KEY, size=4), 0.0, None, 32),
}


@pytest.mark.parametrize("name", TREES)
def test_layers_are_told_as_they_are(name, base):
    make, zeros, rank, bits = TREES[name]
    tree = make(base)
    layers = layers_of(tree)
    assert len(layers) == 3 * 7
    assert sorted({x["layer"] for x in layers}) == [0, 1, 2]
    assert all(abs(x["sparsity"] - zeros) < 0.06 for x in layers)
    ranks = {x["rank"] for x in layers}
    assert ranks == {rank} if name != "factors" else all(ranks)
    told = [x["bits"] for x in layers]
    if bits is None:  # codes and the scales of blocks, of which narrow weights have more
        assert min(told) <= mean_bits(tree) <= max(told) < 8 + 32 / 16
    else:
        assert set(told) == {bits}


def test_parameters_to_store_are_those_that_are_not_zero(base, tmp_path):
    """Without an adapter's folder all of the model counts, with one the adapter alone."""
    whole = sum(x.size for x in jax.tree.leaves(base))
    many = sum(w.size for w in kernels(base))
    assert stored_parameters(tmp_path, base) == whole
    pruned = peft_jax.prune(base, pattern="2:4", score="magnitude")
    assert stored_parameters(tmp_path, pruned) == whole - many // 2
    factors = of_factors(base)
    sizes = sum(x.size for w in kernels(factors) for x in jax.tree.leaves(w))
    assert stored_parameters(tmp_path, factors) == whole - many + sizes
    coded = peft_jax.quantize(base, "int8")
    assert whole - stored_parameters(tmp_path, coded) < 0.001 * whole  # some codes are 0
    assert device_bytes(coded) < device_bytes(base)
    (tmp_path / "adapter").mkdir()
    tree = peft_jax.lora(coded, KEY, rank=2)
    assert stored_parameters(tmp_path, tree) == peft_jax.core.count(tree)[0]
