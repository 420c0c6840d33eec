"""Masks that move while training: schedules, SET, RigL, movement and straight-through, inside one
compiled step.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import peft_jax
from peft_jax.core import matmul, places
from peft_jax.models import unstack_layers
from peft_jax.objectives.tokens import next_token
from peft_jax.pruning import Masked
from peft_jax.pruning.sparse_training import Sparse, sparse, sparse_optimizer
from peft_jax.training.config import OptimizerConfig, TrainConfig
from peft_jax.training.loop import initial_state, train
from peft_jax.training.method import check_method
from peft_jax.training.optimizer import make_optimizer
from peft_jax.training.step import make_step
from tests.reference import family_checkpoint, random_tokens

KEY = jax.random.key(0)
STEPS = 24


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    folder, _, _ = family_checkpoint("llama2", tmp_path_factory.mktemp("sparse"))
    return peft_jax.load(folder)


def batch(i):
    tokens = random_tokens(4, 17, seed=i)
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "weights": np.ones((4, 16), np.float32),
    }


def run(decoder, steps=STEPS, optimizer=None, base=None, **method):
    """(the trained tree, share of zeros of each weight after each step [steps, L], the number of
    compilations).
    """
    model, params = decoder
    params = sparse(base or params, KEY, targets=["q_proj", "up_proj"], **method)
    config = OptimizerConfig(name="adam", learning_rate=3e-3, schedule="constant", warmup_steps=0)
    optimizer = make_optimizer(config, steps, {"name": "sparse", **method})
    state, frozen = initial_state(params, optimizer, 0), peft_jax.partition(params)[1]
    step = jax.jit(make_step(next_token, peft_jax.bind(model), optimizer))
    shares, trees = [], []
    for i in range(steps):
        state, metrics = step(state, frozen, batch(i))
        assert np.isfinite(metrics["loss"])
        tree = peft_jax.combine(state.trainable, frozen)
        trees.append(tree)
        shares.append(
            np.concatenate(
                [np.asarray((w.materialize() == 0).mean((1, 2))) for w in nodes(tree).values()]
            )
        )
    return trees, np.stack(shares), step._cache_size()


def nodes(tree):
    return {p: w for p, w in places(tree).items() if isinstance(w, Sparse)}


SHARES = {
    "cubic": lambda t: 0.75 * (1 - (1 - t) ** 3),
    "iterative": lambda t: 0.75 * np.minimum(np.floor(t * 4 + 1) / 4, 1),
    "one-shot": lambda t: 0.75 * np.ones_like(t),
}


@pytest.mark.parametrize("schedule", SHARES)
def test_sparsity_follows_the_schedule_and_nothing_recompiles(decoder, schedule):
    begin, final, every = 4, 3, 2
    trees, shares, compilations = run(
        decoder, sparsity=0.75, schedule=schedule, begin=begin, final=final, every=every
    )
    end = STEPS - 1 - final
    at = np.arange(STEPS)
    last = np.where(at >= end, end, begin + (at - begin) // every * every)
    expected = np.where(at < begin, 0.0, SHARES[schedule]((last - begin) / (end - begin)))
    np.testing.assert_allclose(shares, np.repeat(expected[:, None], shares.shape[1], 1), atol=2e-3)
    assert compilations == 1
    gone = [
        np.concatenate([np.ravel(w.materialize() == 0) for w in nodes(t).values()]) for t in trees
    ]
    assert all(not (a & ~b).any() for a, b in itertools.pairwise(gone))  # what is gone stays gone
    merged = peft_jax.merge(trees[-1])
    assert isinstance(places(merged)["model/layers/mlp/up_proj/kernel"], Masked)


def test_gradual_pruning_takes_the_smallest(decoder):
    """One change at step 0 of a learning rate of zero prunes what one-shot magnitude pruning
    does.
    """
    model, params = decoder
    tree = sparse(params, KEY, sparsity=0.6, targets="up_proj")
    optimizer = sparse_optimizer(optax.sgd(0.0), 1, schedule="one-shot")
    trainable, _ = peft_jax.partition(tree)
    grads = jax.tree.map(jnp.ones_like, trainable)
    updates, _ = optimizer.update(grads, optimizer.init(trainable), trainable, grads=grads)
    found = nodes(optax.apply_updates(trainable, updates))["model/layers/mlp/up_proj/kernel"].base
    expected = places(peft_jax.prune(params, 0.6, targets="up_proj"))[
        "model/layers/mlp/up_proj/kernel"
    ]
    np.testing.assert_array_equal(np.asarray(found) != 0, np.asarray(expected.materialize()) != 0)


@pytest.mark.parametrize("regrow", ["random", "gradient"])
@pytest.mark.parametrize("distribution", ["uniform", "erk"])
def test_entries_grow_back(decoder, regrow, distribution):
    trees, shares, compilations = run(
        decoder,
        sparsity=0.6,
        schedule="one-shot",
        regrow=regrow,
        every=4,
        distribution=distribution,
    )
    zeros = [
        np.concatenate([np.ravel(w.materialize() == 0) for w in nodes(t).values()]) for t in trees
    ]
    sizes = [w.base[0].size for w in nodes(trees[0]).values()]
    assert abs(np.average(shares[-1].reshape(2, -1).mean(1), weights=sizes) - 0.6) < 0.01
    back = [(a & ~b).sum() for a, b in itertools.pairwise(zeros)]
    moved = np.array([n > 0 for n in back])
    assert moved[[4, 8, 12, 16]].all()  # grown at steps 4, 8, ..., they act from the step after
    assert not moved[[2, 6, 10, 14, 18, 22]].any()
    if regrow == "gradient":
        assert back[4] > back[16]  # the cosine
    assert compilations == 1


def test_rigl_grows_where_the_gradient_is_largest(decoder):
    _, params = decoder
    tree = sparse(params, KEY, sparsity=0.5, targets="up_proj")
    trainable, _ = peft_jax.partition(tree)
    optimizer = sparse_optimizer(
        optax.sgd(0.0), 100, schedule="one-shot", regrow="gradient", fraction=0.2, every=1
    )
    grads = jax.tree.map(lambda x: jax.random.normal(KEY, x.shape), trainable)
    updates, state = optimizer.update(grads, optimizer.init(trainable), trainable, grads=grads)
    path = "model/layers/mlp/up_proj/kernel"
    from peft_jax.core.packing import unpack_padded

    w, g = (np.asarray(nodes(t)[path].base) for t in (trainable, grads))
    mask = np.asarray(unpack_padded(state.masks[path], 1, w.shape[1])).astype(bool)
    for layer in range(len(w)):
        size = w[layer].size
        kept, grown = size - int(0.5 * size), int(0.2 * (size - int(0.5 * size)))
        order = np.argsort(-np.abs(w[layer]).ravel())
        expected = np.zeros(size, bool)
        expected[order[: kept - grown]] = True
        expected[np.argsort(np.where(expected, 1.0, -np.abs(g[layer]).ravel()))[:grown]] = True
        np.testing.assert_array_equal(mask[layer].ravel(), expected)


@pytest.mark.parametrize("score", ["random", "snip", "taylor"])
def test_scores_of_gradients(decoder, score):
    _, shares, compilations = run(
        decoder, steps=12, sparsity=0.5, score=score, schedule="cubic", every=3
    )
    np.testing.assert_allclose(shares[-1], 0.5, atol=2e-3)
    assert compilations == 1


def test_movement_pruning_keeps_the_top_scores(decoder):
    trees, shares, compilations = run(
        decoder, sparsity=0.5, score="movement", schedule="cubic", final=4
    )
    np.testing.assert_allclose(shares[-1], 0.5, atol=2e-3)
    assert compilations == 1
    gone = [
        np.concatenate([np.ravel(w.materialize() == 0) for w in nodes(t).values()]) for t in trees
    ]
    assert any((a & ~b).any() for a, b in itertools.pairwise(gone))  # some return
    w = nodes(trees[-1])["model/layers/mlp/up_proj/kernel"]
    assert float(jnp.abs(w.base).min()) > 0  # the weights under the mask are still there
    x = jax.random.normal(KEY, (5, 32))
    node = jax.tree.map(lambda a: a[0], w)

    def loss(n):
        return jnp.sum(jnp.square(matmul(x, n)))

    grads = jax.grad(loss)(node)
    dense = jax.grad(lambda a: jnp.sum(jnp.square(x @ a)))(node.materialize())
    np.testing.assert_allclose(
        grads.scores, dense * node.base, rtol=1e-4, atol=1e-5
    )  # the paper's equation 2
    np.testing.assert_allclose(grads.base, dense * (node.scores > 0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pattern", [None, "2:4", "8x4"])
def test_straight_through(decoder, pattern):
    options = {"pattern": pattern} | ({} if pattern == "2:4" else {"sparsity": 0.5})
    trees, shares, _ = run(decoder, straight_through=True, **options)
    np.testing.assert_allclose(shares, 0.5, atol=1e-6)
    gone = [
        np.concatenate([np.ravel(w.materialize() == 0) for w in nodes(t).values()]) for t in trees
    ]
    assert any((a & ~b).any() for a, b in itertools.pairwise(gone))
    node = jax.tree.map(lambda a: a[0], nodes(trees[-1])["model/layers/mlp/up_proj/kernel"])
    x = jax.random.normal(KEY, (5, 32))
    dense = jax.grad(lambda a: jnp.sum(jnp.square(x @ a)))(node.materialize())
    grads = jax.grad(lambda n: jnp.sum(jnp.square(matmul(x, n))) + n.penalty())(node)
    decay = 2e-4 * np.where(np.asarray(node.materialize()) == 0, np.asarray(node.base), 0)
    np.testing.assert_allclose(
        grads.base, dense + decay, rtol=1e-4, atol=1e-5
    )  # SR-STE's equation 6


def test_one_shot_of_groups_and_going_on_from_a_mask(decoder):
    _, params = decoder
    trees, _, _ = run(decoder, steps=4, pattern="2:4", schedule="one-shot")
    for w in nodes(trees[-1]).values():
        groups = np.asarray(w.materialize() != 0).reshape(3, 8, 4, -1)
        assert (groups.sum(2) <= 2).all()
    base = peft_jax.prune(params, 0.3, targets=["q_proj", "up_proj"])
    trees, shares, _ = run(decoder, steps=6, base=base, sparsity=0.5, every=2)
    np.testing.assert_allclose(shares[0], 0.3, atol=2e-3)
    for path, w in nodes(trees[-1]).items():
        assert not (np.asarray(w.materialize())[~np.asarray(places(base)[path].kept())]).any()


def test_the_loop_trains_and_resumes_it(decoder, tmp_path):
    """The masks are part of the checkpoint: a run in two parts ends as one in one part."""
    from peft_jax.data import Rows

    model, params = decoder
    tokens = random_tokens(32, 17)
    fields = {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "weights": np.ones((32, 16), np.float32),
    }
    rows = Rows(
        **fields,
        positions=np.tile(np.arange(16, dtype=np.int32), (32, 1)),
        segment_ids=np.ones((32, 16), np.int32),
    )
    method = {"name": "sparse", "sparsity": 0.5, "regrow": "random", "every": 2}
    function, options = check_method(method)
    tree = function(params, KEY, **options)
    config = TrainConfig(batch_size=4, log_every=100, tensorboard=False, checkpoint_every=4)
    optimizer = make_optimizer(OptimizerConfig(warmup_steps=0), 8, method)
    run = functools.partial(train, model, tree, rows, optimizer, config)
    whole = run(steps=8)
    run(steps=4, folder=tmp_path)
    parts = run(steps=8, folder=tmp_path, resume=True)
    for a, b in zip(jax.tree.leaves(whole.params), jax.tree.leaves(parts.params), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "sparsity is missing"),
        ({"sparsity": 1.0}, r"must lie in \[0, 1\)"),
        (
            {"sparsity": 0.5, "straight_through": True, "regrow": "random"},
            "leave score and regrow as they are",
        ),
        (
            {"sparsity": 0.5, "score": "movement", "regrow": "random"},
            "it has no regrow and no pattern",
        ),
        ({"pattern": "2:4"}, "goes with schedule=one-shot or straight_through=true"),
        ({"pattern": "8x8", "sparsity": 0.5, "regrow": "gradient"}, "it goes without a pattern"),
        ({"sparsity": 0.5, "fraction": 1.0}, r"must lie in \(0, 1\), got 1.0"),
        ({"sparsity": 0.5, "every": 0}, "every and rounds must be at least 1"),
        (
            {"pattern": "3:7", "schedule": "one-shot"},
            "3:7 does not divide the 48 inputs of model/layers/mlp/down_proj/kernel",
        ),
        (
            {"sparsity": 0.5, "targets": "layers.1.mlp.up_proj"},
            "are pruned together; unstack_layers",
        ),
    ],
    ids=lambda v: str(v)[:40],
)
def test_bad_options_are_refused_by_name(decoder, options, message):
    with pytest.raises(ValueError, match=message):
        sparse(decoder[1], KEY, **options)


def test_other_bases_are_refused_by_name(decoder):
    with pytest.raises(
        ValueError, match="is a Quantized; `sparse` starts from arrays or masked arrays"
    ):
        sparse(peft_jax.quantize(decoder[1], "int8"), KEY, sparsity=0.5)
    tree = unstack_layers(sparse(decoder[1], KEY, sparsity=0.5))
    with pytest.raises(ValueError, match="was unstacked after `sparse`"):
        sparse_optimizer(optax.sgd(0.1), 2).init(peft_jax.partition(tree)[0])
