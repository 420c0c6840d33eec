"""Factorization of base weights, and the statistics that make it activation-aware."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import peft_jax
from peft_jax.core import Weight, calibrate, count, layout_of, places, select
from peft_jax.low_rank import factorize
from peft_jax.models.layers import unstack_layers
from tests.reference import family_checkpoint, random_tokens, relative_error
from tests.third_party import VOCAB, linen_model, nnx_model

TOKENS = random_tokens(4, 16)
Q = "model/layers/self_attn/q_proj/kernel"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder, _, _ = family_checkpoint("llama2", tmp_path_factory.mktemp("base"))
    model, params = peft_jax.load(folder)
    apply = peft_jax.bind(model)
    statistics = calibrate(apply, params, [{"tokens": TOKENS[:2]}, {"tokens": TOKENS[2:]}])
    return model, params, jax.jit(apply), statistics


def inputs_of(model, params, tokens):
    """What goes into each layer's q_proj, by Flax's own means."""
    looped = model.clone(scan_layers=False)
    _, state = looped.apply({"params": unstack_layers(params)}, tokens, capture_intermediates=True)
    layers = state["intermediates"]["model"]
    return jnp.stack([layers[f"layers_{i}"]["input_layernorm"]["__call__"][0] for i in range(3)])


def test_covariances_are_those_of_the_inputs(base):
    model, params, _, statistics = base
    x = np.asarray(inputs_of(model, params, TOKENS), np.float64)  # [L, B, T, D]
    rows = x.reshape(x.shape[0], -1, x.shape[-1])
    expected = np.einsum("lni,lnj->lij", rows, rows) / rows.shape[1]
    np.testing.assert_allclose(statistics[Q], expected, rtol=1e-4, atol=1e-6)
    looped = model.clone(scan_layers=False)
    one = calibrate(
        peft_jax.bind(looped),
        unstack_layers(params),
        [{"tokens": TOKENS}],
        statistic="second_moment",
    )
    diagonal = np.einsum("lii->li", expected)
    np.testing.assert_allclose(
        one["model/layers_1/self_attn/q_proj/kernel"], diagonal[1], rtol=1e-4
    )


@pytest.mark.parametrize("make", [linen_model, nnx_model])
def test_calibration_of_models_that_know_nothing_of_it(make):
    model, params = make()
    tokens = random_tokens(2, 8, vocab=VOCAB)
    layout = layout_of(model, tokens)
    targets = [p for p in select(params) if "conv" not in p]
    found = calibrate(
        peft_jax.bind(model), params, [{"tokens": tokens}], targets=targets, layout=layout
    )
    assert set(found) == set(targets)
    for path, c in found.items():
        assert float(jnp.linalg.eigvalsh(c).min()) > -1e-4, path
        assert float(jnp.trace(c, axis1=-2, axis2=-1).min()) > 0, path
    with pytest.raises(ValueError, match="materialises cannot be calibrated"):
        calibrate(peft_jax.bind(model), params, [{"tokens": tokens}], targets="conv", layout=layout)


def test_plain_truncation_is_numpys(base, caplog):
    _, params, _, statistics = base
    factorize(params, keep=1.0, targets="q_proj")
    factorize(params, keep=0.5, targets="q_proj", statistics=statistics)
    assert not caplog.records
    tree, report = factorize(params, keep=0.5, targets="q_proj")
    assert "plain SVD of whole weights is known to ruin language models" in caplog.text
    assert (
        "SVD-LLM, which heeds their inputs, is factorize(..., statistics=calibrate(...))"
        in caplog.text
    )
    w = np.asarray(places(params)[Q], np.float64)
    u, s, v = np.linalg.svd(w)
    k = int(0.5 * 32 * 32 / 64)
    expected = (u[..., :k] * s[..., None, :k]) @ v[..., :k, :]
    np.testing.assert_allclose(places(tree)[Q].materialize(), expected, atol=1e-5)
    assert report[Q]["rank"] == k
    assert report[Q]["error"] == pytest.approx(
        np.linalg.norm(w - expected) / np.linalg.norm(w), rel=1e-4
    )


def test_whitening_is_best_for_the_outputs(base):
    """On the calibration inputs, no rank-k weight has a smaller output error than the whitened
    one.
    """
    model, params, run, statistics = base
    x = np.asarray(inputs_of(model, params, TOKENS)[0], np.float64).reshape(-1, 32)
    w = np.asarray(places(params)[Q][0], np.float64)
    k = 8
    u, s, v = np.linalg.svd(x @ w, full_matrices=False)
    best = np.linalg.norm(s[k:])
    error = {}
    for name, options in {"plain": {}, "scale": {"whitening": "scale"}, "root": {}}.items():
        given = None if name == "plain" else statistics
        tree, report = factorize(params, keep=0.5, targets="q_proj", statistics=given, **options)
        assert places(tree)[Q].rank == k
        error[name] = np.linalg.norm(x @ (w - np.asarray(places(tree)[Q].materialize()[0])))
    assert error["root"] == pytest.approx(best, rel=1e-3)
    assert error["root"] < error["plain"]
    assert error["root"] < error["scale"]


def test_budget_and_tolerance_are_kept(base):
    _, params, _, statistics = base
    for allocation in ("uniform", "energy"):
        tree, report = factorize(params, keep=0.6, allocation=allocation, statistics=statistics)
        held = sum(x.size for p in report for x in jax.tree.leaves(places(tree)[p]))
        whole = sum(places(params)[p].size for p in report)
        assert 0.5 < held / whole <= 0.601, allocation
    tree, report = factorize(params, error=0.2)
    for path, r in report.items():
        if r["kept"] < 1:
            w, approximation = (
                places(params)[path],
                places(tree)[path].materialize(),
            )
            assert float(jnp.linalg.norm(w - approximation) / jnp.linalg.norm(w)) <= 0.2 + 1e-4
    same, report = factorize(params, keep=1.0)
    assert all(r["kept"] == 1 for r in report.values())
    assert all(not isinstance(w, Weight) for w in places(same).values())


def test_factors_train_and_carry_lora(base):
    model, params, run, _ = base
    tree, _ = factorize(params, keep=0.5, train=True)
    trained, total = count(tree)
    assert 0 < trained < total
    frozen, _ = factorize(params, keep=0.5)
    assert count(frozen)[0] == 0
    with_lora = peft_jax.lora(frozen, jax.random.key(0), rank=2)
    assert relative_error(run(with_lora, TOKENS), run(frozen, TOKENS)) < 1e-6
    assert relative_error(run(peft_jax.merge(frozen), TOKENS), run(frozen, TOKENS)) < 1e-4


def test_factorized_models_are_saved_and_loaded(base, tmp_path):
    model, params, run, _ = base
    tree, _ = factorize(params, keep=0.5, exclude="up_proj")
    peft_jax.save(tmp_path / "small", model, tree)
    again, back = peft_jax.load(tmp_path / "small")
    np.testing.assert_array_equal(run(back, TOKENS), run(tree, TOKENS))
    _, looped = peft_jax.load(tmp_path / "small", scan_layers=False)
    assert (
        relative_error(
            jax.jit(peft_jax.bind(model.clone(scan_layers=False)))(looped, TOKENS),
            run(tree, TOKENS),
        )
        < 1e-5
    )


def test_in_a_model_with_other_layouts():
    model, params = linen_model()
    tokens = random_tokens(2, 8, vocab=VOCAB)
    layout = layout_of(model, tokens)
    tree, report = factorize(params, keep=0.5, layout=layout)
    apply = jax.jit(peft_jax.bind(model))
    assert relative_error(apply(tree, tokens), apply(peft_jax.merge(tree), tokens)) < 1e-5


def test_bad_requests_are_refused_by_name(base):
    _, params, _, statistics = base
    with pytest.raises(ValueError, match="give either keep"):
        factorize(params)
    with pytest.raises(ValueError, match=r"keep must lie in \(0, 1\]"):
        factorize(params, keep=1.5)
    with pytest.raises(
        ValueError, match="there are no statistics of model/layers/mlp/up_proj/kernel"
    ):
        factorize(params, keep=0.5, targets="up_proj", statistics={Q: statistics[Q]})
    with pytest.raises(ValueError, match="expected covariances"):
        factorize(params, keep=0.5, targets="q_proj", statistics={Q: jnp.ones((3, 5))})
    with pytest.raises(ValueError, match="no batch to calibrate on"):
        calibrate(lambda p, t: t, params, [])
