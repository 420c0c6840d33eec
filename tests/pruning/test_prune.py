"""Masks and weights against the papers' algorithms in NumPy, distributions, patterns, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import peft_jax
from peft_jax.core import calibrate, layout_of, output_errors, places
from peft_jax.pruning import allocate_sparsity, compress, prune_in_turn
from peft_jax.pruning.masked import Masked
from tests.pruning import reference
from tests.reference import random_tokens, relative_error
from tests.third_party import linen_model, nnx_model

IN, OUT, TOKENS = 192, 24, 400


@pytest.fixture(scope="module")
def layer():
    """(tree of one weight, its inputs): inputs that correlate and differ in size, as a model's
    do.
    """
    rng = np.random.default_rng(0)
    w = rng.normal(size=(IN, OUT)).astype(np.float32)
    mix = rng.normal(size=(IN, IN)) / np.sqrt(IN) + np.diag(rng.gamma(1.0, 1.0, IN))
    x = (rng.normal(size=(TOKENS, IN)) @ mix).astype(np.float32)
    x64 = x.astype(np.float64)
    statistics = {
        "covariance": {"layer/kernel": jnp.asarray(x64.T @ x64 / TOKENS, jnp.float32)},
        "second_moment": {"layer/kernel": jnp.asarray((x64**2).mean(0), jnp.float32)},
    }
    return {"layer": {"kernel": jnp.asarray(w)}}, x64, statistics


def pruned(layer, **options):
    params, x, statistics = layer
    w = peft_jax.prune(params, statistics=statistics, **options)["layer"]["kernel"]
    return (
        np.asarray(params["layer"]["kernel"], np.float64).T,
        x,
        np.asarray(w.materialize()).T,
        np.asarray(w.kept()).T,
    )


PATTERNS = [{"sparsity": 0.5}, {"sparsity": 0.7}, {"pattern": "2:4"}, {"pattern": "4:8"}]


def for_numpy(options):
    if "pattern" in options:
        return dict(zip("nm", map(int, options["pattern"].split(":")), strict=True))
    return options


@pytest.mark.parametrize("options", PATTERNS, ids=str)
def test_sparsegpt_is_the_papers(layer, options):
    w, x, new, kept = pruned(layer, score="sparsegpt", **options)
    expected, mask = reference.sparsegpt(w, x, **for_numpy(options))
    assert (
        kept == mask
    ).mean() > 0.9999  # an entry or two lie within float32's rounding of their threshold
    same = (kept == mask).all(1)
    assert relative_error(new[same], expected[same]) < 1e-5
    assert (new[~kept] == 0).all()


@pytest.mark.parametrize("options", PATTERNS, ids=str)
def test_wanda_is_the_papers(layer, options):
    w, x, new, kept = pruned(layer, score="wanda", **options)
    np.testing.assert_array_equal(kept, reference.wanda(w, x, **for_numpy(options)))
    np.testing.assert_array_equal(new, np.where(kept, w, 0).astype(np.float32))


def test_ria_is_the_papers(layer):
    w, x, _, kept = pruned(layer, score="ria", sparsity=0.6)
    np.testing.assert_array_equal(kept, reference.ria(w, x, 0.6))


def test_sparsegpt_lowers_the_output_error(layer):
    def error(score, **options):
        w, x, new, _ = pruned(layer, score=score, **options)
        return np.linalg.norm(x @ (w - new).T) / np.linalg.norm(x @ w.T)

    for options in PATTERNS:
        assert (
            error("sparsegpt", **options)
            < 0.95 * error("wanda", **options)
            < 0.95 * error("magnitude", **options)
        )


def test_gradient_scores(layer):
    params = layer[0]
    w = np.asarray(params["layer"]["kernel"])
    rng = np.random.default_rng(1)
    g, g2 = (rng.normal(size=w.shape).astype(np.float32) for _ in range(2))
    statistics = {"gradient": {"layer/kernel": g}, "squared_gradient": {"layer/kernel": g2**2}}
    scores = {"snip": np.abs(g * w), "taylor": (g2 * w) ** 2, "movement": -g * w}
    for name, score in scores.items():
        kept = peft_jax.prune(params, 0.5, score=name, statistics=statistics)["layer"][
            "kernel"
        ].kept()
        np.testing.assert_array_equal(kept, score > np.sort(score.ravel())[score.size // 2 - 1])


def test_counts_are_exact_and_ties_break():
    params = {"a": {"kernel": jnp.ones((10, 10))}}
    for sparsity in (0.0, 0.29, 0.5, 0.999):
        for compare, expected in (
            ("matrix", int(sparsity * 100 + 1e-6)),
            ("output", 10 * int(sparsity * 10 + 1e-6)),
        ):
            w = peft_jax.prune(params, sparsity, compare=compare)["a"]["kernel"]
            assert int((w.materialize() == 0).sum()) == expected


def test_pruning_again_keeps_what_is_gone(layer):
    params = layer[0]
    first = peft_jax.prune(params, 0.3, score="random", seed=1)
    second = peft_jax.prune(first, 0.6, score="random", seed=2)
    a, b = (tree["layer"]["kernel"].kept() for tree in (first, second))
    assert not (b & ~a).any()
    assert int((~b).sum()) == int(0.6 * a.size + 1e-6)
    third = peft_jax.prune(second, 0.7, score="sparsegpt", statistics=layer[2])["layer"]["kernel"]
    assert not (third.kept() & ~b).any()


def test_stacked_layers_are_pruned_one_by_one():
    key = jax.random.key(0)
    stacked = {"layers": {"a": {"kernel": jax.random.normal(key, (3, 16, 8))}}}
    w = peft_jax.prune(stacked, {"layers/a/kernel": [0.0, 0.5, 0.75]})["layers"]["a"]["kernel"]
    np.testing.assert_allclose(np.asarray((w.materialize() == 0).mean((1, 2))), [0.0, 0.5, 0.75])
    for i in range(3):
        one = peft_jax.prune(
            {"a": {"kernel": stacked["layers"]["a"]["kernel"][i]}}, [0.0, 0.5, 0.75][i]
        )
        np.testing.assert_array_equal(one["a"]["kernel"].materialize(), w.materialize()[i])
    only = peft_jax.prune(stacked, 0.5, targets="layers.1.a")["layers"]["a"]["kernel"]
    np.testing.assert_allclose(np.asarray((only.materialize() == 0).mean((1, 2))), [0.0, 0.5, 0.0])


# --------------------------------------------------------------------------------------------------
# distributions


@pytest.fixture(scope="module")
def tree():
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = {"a": (2, 64, 32), "b": (2, 64, 64), "c": (32, 16), "d": (64, 256)}
    made = {
        n: {"kernel": (i + 1) * jax.random.normal(k, s)}
        for (i, k), (n, s) in zip(enumerate(keys), shapes.items(), strict=True)
    }
    return {"layers": {n: made[n] for n in "ab"}, "c": made["c"], "d": made["d"]}


@pytest.mark.parametrize("name", ["uniform", "erk", "global", "owl"])
def test_distributions_meet_the_budget(tree, name):
    lead = {
        "layers/a/kernel": (2, 64),
        "layers/b/kernel": (2, 64),
        "c/kernel": (32,),
        "d/kernel": (64,),
    }
    second = {
        p: jnp.exp(2 * jax.random.normal(jax.random.key(i), s))
        for i, (p, s) in enumerate(lead.items())
    }
    found = peft_jax.prune(tree, 0.6, distribution=name, statistics={"second_moment": second})
    zeros = sum(float((w.materialize() == 0).sum()) for w in places(found).values())
    total = sum(w.materialize().size for w in places(found).values())
    assert abs(zeros / total - 0.6) < 0.002
    shares = allocate_sparsity(tree, 0.6, name, statistics={"second_moment": second})
    flat = np.concatenate([np.ravel(s) for s in shares.values()])
    assert (flat >= 0).all()
    assert (name == "uniform") == (np.ptp(flat) < 1e-6)
    if name == "owl":
        assert np.ptp(flat) <= 2 * 0.08 + 1e-6
    if name == "global":
        assert shares["layers/a/kernel"].mean() > shares["d/kernel"]  # smaller weights
    if name == "erk":
        density = {p: 1 - np.mean(s) for p, s in shares.items()}
        sizes = {p: places(tree)[p].shape[-2:] for p in shares}
        free = [p for p in shares if density[p] < 0.999]
        ratio = [density[p] * sizes[p][0] * sizes[p][1] / sum(sizes[p]) for p in free]
        np.testing.assert_allclose(ratio, ratio[0], rtol=1e-5)


def test_owl_is_the_authors_by_block():
    """luuyin/OWL: the scores of all weights of a block are one vector, whose entries above M times
    its mean are outliers.
    """
    rng = np.random.default_rng(0)
    kinds = {"q": 1.0, "up": 30.0}  # an outlier of the block is a large entry of the larger weight
    w = {k: (size * rng.standard_t(2, (4, 24, 16))).astype(np.float32) for k, size in kinds.items()}
    second = {k: rng.random((4, 24)).astype(np.float32) for k in kinds}
    params = {"layers": {k: {"kernel": jnp.asarray(x)} for k, x in w.items()}}
    statistics = {
        "second_moment": {f"layers/{k}/kernel": jnp.asarray(x) for k, x in second.items()}
    }
    ratios = []
    for i in range(4):
        scores = np.concatenate(
            [(np.abs(w[k][i]) * np.sqrt(second[k][i])[:, None]).ravel() for k in kinds]
        )
        ratios.append((scores > 5.0 * scores.mean()).mean())
    ratio = np.asarray(ratios)
    ratio = (ratio - ratio.min()) / (ratio.max() - ratio.min()) * 0.08 * 2
    expected = 1.0 - (ratio - ratio.mean() + 1.0 - 0.6)
    found = allocate_sparsity(params, 0.6, "owl", statistics=statistics)
    for k in kinds:
        np.testing.assert_allclose(found[f"layers/{k}/kernel"], expected, atol=1e-6)


# --------------------------------------------------------------------------------------------------
# in turn


def test_in_turn_sees_what_pruned_blocks_pass_on():
    model, params = peft_jax.load("builtin:base", scan_layers=False)
    batches = [{"tokens": random_tokens(4, 64, seed=i, vocab=4096)} for i in range(2)]
    apply, where = peft_jax.bind(model), {"targets": ["*/layers_0/*/kernel", "*/layers_1/*/kernel"]}
    statistics = {"covariance": calibrate(apply, params, batches, **where)}
    at_once = peft_jax.prune(params, 0.6, score="sparsegpt", statistics=statistics, **where)
    in_turn = prune_in_turn(apply, params, batches, 0.6, score="sparsegpt", **where)
    plain = peft_jax.prune(params, 0.6, **where)
    logits = jax.jit(apply)

    def loss(tree):
        return float(
            np.mean(
                [
                    jnp.square(logits(tree, b["tokens"]) - logits(params, b["tokens"])).mean()
                    for b in batches
                ]
            )
        )

    assert loss(at_once) < 0.8 * loss(plain)
    assert loss(in_turn) < 1.02 * loss(at_once)
    first, second = (f"model/layers_{i}/self_attn/q_proj/kernel" for i in (0, 1))

    def pick(tree, path):
        return np.asarray(places(tree)[path].materialize())

    np.testing.assert_array_equal(pick(at_once, first), pick(in_turn, first))
    assert (pick(at_once, second) != pick(in_turn, second)).any()
    errors = output_errors(apply, params, in_turn, batches, **where)
    assert set(errors) == set(statistics["covariance"])
    assert all(0.01 < float(e) < 1 for e in errors.values())


@pytest.mark.parametrize(
    ("make", "score", "distribution"),
    [(linen_model, "sparsegpt", "owl"), (nnx_model, "magnitude", "global")],
)
def test_third_party_models(make, score, distribution):
    model, params = make()
    tokens = random_tokens(2, 8, vocab=13)
    apply, batches = peft_jax.bind(model), [{"tokens": tokens}]
    where = {"layout": layout_of(model, tokens), "exclude": "conv"}
    tree = prune_in_turn(
        apply, params, batches, 0.5, score=score, distribution=distribution, **where
    )
    masked = [w for w in places(tree).values() if isinstance(w, Masked)]
    share = sum(float((w.materialize() == 0).sum()) for w in masked) / sum(
        w.materialize().size for w in masked
    )
    assert abs(share - 0.5) < 0.05
    assert np.isfinite(apply(tree, tokens)).all()


# --------------------------------------------------------------------------------------------------
# bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.0}, r"must lie in \[0, 1\), got 1.0"),
        ({"sparsity": -0.1}, r"must lie in \[0, 1\), got -0.1"),
        ({}, "sparsity is missing"),
        ({"sparsity": {"layer/kernel": 1.5}}, r"must lie in \[0, 1\], got 1.5"),
        ({"sparsity": {}}, "sparsity has nothing for layer/kernel"),
        ({"pattern": "5:4"}, "5:4 keeps more of a group than it has"),
        ({"pattern": "0:4"}, "n must lie in 1..m"),
        ({"pattern": "2:5"}, "2:5 does not divide the 192 inputs of layer/kernel"),
        (
            {"pattern": "7x8", "sparsity": 0.5},
            "blocks of 7x8 do not divide the 192 inputs or 24 outputs of layer/kernel",
        ),
        ({"pattern": "2/4"}, "neither N:M, as 2:4, nor a block"),
        ({"pattern": "2:4", "sparsity": 0.7}, "2:4 prunes 0.5 of every weight"),
        ({"pattern": "2:4", "distribution": "erk"}, "2:4 prunes 0.5 of every weight"),
        ({"sparsity": 0.5, "score": "weight"}, "unknown score 'weight'"),
        ({"sparsity": 0.5, "score": "ria", "pwer": 1}, "has no option 'pwer'; its options: power"),
        ({"sparsity": 0.5, "distribution": "even"}, "unknown distribution 'even'"),
        (
            {"sparsity": 0.5, "distribution": "owl", "distribution_options": {"spred": 1}},
            "distribution 'owl' has no option 'spred'; its options: outlier, spread",
        ),
        ({"sparsity": 0.5, "compare": "row"}, "compare must be 'output' or 'matrix'"),
        (
            {"sparsity": 0.5, "score": "wanda"},
            "layer/kernel has no statistics 'second_moment', which score 'wanda' needs",
        ),
        (
            {"sparsity": 0.5, "distribution": "owl"},
            "no statistics 'second_moment', which distribution 'owl' needs",
        ),
        (
            {
                "sparsity": 0.5,
                "score": "wanda",
                "statistics": {"second_moment": {"layer/kernel": np.ones(3)}},
            },
            r"shape \(3,\)",
        ),
        (
            {"sparsity": 0.5, "score": "sparsegpt", "distribution": "global"},
            "cannot be compared over all weights",
        ),
        ({"sparsity": 0.5, "targets": "nothing"}, "matches nothing"),
    ],
    ids=lambda v: str(v)[:40],
)
def test_bad_input_is_refused_by_name(layer, options, message):
    with pytest.raises(ValueError, match=message):
        peft_jax.prune(layer[0], **options)


def test_bad_calibration_is_refused_by_name(layer):
    model, params = linen_model()
    with pytest.raises(ValueError, match="no batch to calibrate on"):
        prune_in_turn(peft_jax.bind(model), params, [], 0.5, score="wanda")
    with pytest.raises(ValueError, match="gradients of the whole model"):
        prune_in_turn(peft_jax.bind(model), params, [], 0.5, score="snip")
    bad = {"layer": {"kernel": layer[0]["layer"]["kernel"].at[0, 0].set(jnp.nan)}}
    with pytest.raises(ValueError, match="layer/kernel holds"):
        peft_jax.prune(bad, 0.5)
    quantized = peft_jax.quantize(layer[0], "int8")
    with pytest.raises(
        ValueError, match="layer/kernel is a Quantized, whose weights sparsegpt cannot change"
    ):
        peft_jax.prune(quantized, 0.5, score="sparsegpt", statistics=layer[2])
    with pytest.raises(ValueError, match="prune before compress"):
        peft_jax.prune(compress(peft_jax.prune(layer[0], pattern="2:4")), 0.6)
    with pytest.raises(ValueError, match="sparsegpt prunes entries or N:M groups, not blocks"):
        peft_jax.prune(layer[0], 0.5, score="sparsegpt", pattern="8x8", statistics=layer[2])
