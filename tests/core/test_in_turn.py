"""One layer after the other: a model taken apart gives what the whole model gives."""

import jax
import numpy as np
import pytest

import peft_jax
from peft_jax.adapters import prefix_tuning
from peft_jax.core import select
from peft_jax.core.in_turn import chain_of, in_turn
from peft_jax.core.tree import map_places
from peft_jax.models.decoder import layer_kinds
from tests.reference import family_checkpoint, random_tokens, relative_error


def packed(seed=0):
    """Two rows of two sequences and padding."""
    segments = np.tile(np.repeat([1, 2, 0], [7, 5, 4]), (2, 1)).astype(np.int32)
    positions = np.tile(np.concatenate([np.arange(7), np.arange(5), np.zeros(4)]), (2, 1)).astype(
        np.int32
    )
    return {
        "tokens": random_tokens(2, 16, seed=seed),
        "segment_ids": segments,
        "positions": positions,
    }


@pytest.fixture(scope="module", params=["llama2", "gemma3", "qwen3_moe"])
def base(request, tmp_path_factory):
    """Looped layers: alike, of two kinds, with experts."""
    folder, *_ = family_checkpoint(request.param, tmp_path_factory.mktemp("base"))
    return peft_jax.load(folder, scan_layers=False)


def statistics_in_turn(apply, params, batches, statistics=("covariance",), **options):
    """What each block's statistics are when every weight is halved in its turn."""
    paths = [p for p in select(params, "all-linear") if not p.endswith("down_proj/kernel")]
    found = {}

    def halve(tree, block, of):
        found.update({(name, path): of[name][path] for name in statistics for path in block})
        return map_places(lambda path, w: w / 2 if path in block else w, tree)

    changed = in_turn(apply, params, batches, paths, statistics, halve, **options)
    return found, changed


def test_a_model_taken_apart_sees_what_the_whole_one_sees(base):
    """Statistics along the chain against those of the model run anew up to each block."""
    model, params = base
    apply, batches = peft_jax.bind(model), [packed(0), packed(1)]

    def whole(*args, **kwargs):
        return apply(*args, **kwargs)  # nothing tells what model this is

    assert chain_of(apply, params) is not None
    assert chain_of(whole, params) is None
    options = {"statistics": ("second_moment", "mean_abs"), "token_cap": 2.0}
    ours, changed = statistics_in_turn(apply, params, batches, **options)
    theirs, expected = statistics_in_turn(whole, params, batches, **options)
    assert set(ours) == set(theirs)
    assert len(ours) > 8
    for key, value in theirs.items():
        assert relative_error(ours[key], value) < 1e-5, key
    for a, b in zip(jax.tree.leaves(changed), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


def test_like_layers_share_their_programs(base):
    """A layer's function is that of its kind, whatever the depth."""
    model, params = base
    chain = chain_of(peft_jax.bind(model), params)
    assert list(chain.layers) == [f"model/layers_{i}" for i in range(model.config.num_layers)]
    assert len(set(chain.layers.values())) == len(set(layer_kinds(model.config)))


def test_what_acts_across_layers_keeps_the_model_whole(base):
    model, params = base
    prompted = prefix_tuning(params, jax.random.key(0), num_virtual_tokens=2)
    assert chain_of(peft_jax.bind(model), prompted) is None
    stacked = model.clone(scan_layers=True)
    assert chain_of(peft_jax.bind(stacked), params) is None
