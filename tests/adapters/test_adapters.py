"""What adapters beside a module have of their own: placement, AdapterDrop, formulas, and what is
refused.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import peft_jax
from peft_jax.adapters import (
    bitfit,
    bottleneck,
    compacter,
    ia3,
    invertible,
    keep_layers,
    ln_tuning,
    reft,
    unipelt,
)
from peft_jax.core import Attachment, places
from peft_jax.models.layers import unstack_layers
from tests.reference import family_checkpoint, perturb, random_tokens, relative_error

KEY = jax.random.key(0)
TOKENS = random_tokens(2, 9)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder, _, _ = family_checkpoint("llama2", tmp_path_factory.mktemp("base"))
    model, params = peft_jax.load(folder)
    return model, params, jax.jit(peft_jax.bind(model))


@pytest.mark.parametrize("placement", ["houlsby", "pfeiffer", "parallel", "parallel_mlp"])
def test_placements_start_as_the_base_and_change_it(base, placement):
    _, params, run = base
    adapted = bottleneck(params, KEY, placement=placement, size=4)
    assert relative_error(run(adapted, TOKENS), run(params, TOKENS)) < 1e-6
    assert relative_error(run(perturb(adapted), TOKENS), run(params, TOKENS)) > 1e-3


def test_layers_are_chosen_by_a_gate_in_a_stack(base):
    model, params, run = base
    adapted = perturb(bottleneck(params, KEY, size=4, layers=[1], init="bert"))
    node = adapted["model"]["layers"]["mlp"]["down_proj"]["bottleneck_default"]
    np.testing.assert_array_equal(node.gate, [0, 1, 0])
    looped = peft_jax.bind(model.clone(scan_layers=False))
    tree = unstack_layers(adapted)
    for i in (0, 2):  # without the closed ones
        del tree["model"][f"layers_{i}"]["mlp"]["down_proj"]["bottleneck_default"]
        del tree["model"][f"layers_{i}"]["self_attn"]["o_proj"]["bottleneck_default"]
    assert relative_error(looped(tree, TOKENS), run(adapted, TOKENS)) < 1e-5


def test_adapter_drop_at_inference(base):
    model, params, run = base
    adapted = perturb(bottleneck(params, KEY, size=4))
    kept = keep_layers(adapted, [1, 2])
    looped = keep_layers(unstack_layers(adapted), [1, 2])
    assert "bottleneck_default" not in looped["model"]["layers_0"]["mlp"]["down_proj"]
    assert (
        relative_error(
            peft_jax.bind(model.clone(scan_layers=False))(looped, TOKENS), run(kept, TOKENS)
        )
        < 1e-5
    )
    assert relative_error(run(kept, TOKENS), run(adapted, TOKENS)) > 1e-3
    with pytest.raises(ValueError, match="no adapter beside modules named 'other'"):
        keep_layers(adapted, [1], adapter="other")


def test_adapter_drop_in_training_drops_the_lowest_layers_together(base):
    _, params, run = base
    adapted = perturb(bottleneck(params, KEY, size=4, drop_layers=2))
    possible = [run(keep_layers(adapted, range(n, 3)), TOKENS) for n in range(3)]
    met = set()
    for seed in range(12):
        out = run(adapted, TOKENS, rng=jax.random.key(seed))
        errors = [relative_error(out, p) for p in possible]
        assert min(errors) < 1e-5
        met.add(int(np.argmin(errors)))
    assert met == {0, 1, 2}


@pytest.mark.parametrize("variant", ["loreft", "noreft", "direft"])
def test_interventions_are_the_papers_formula(base, variant):
    """Equations 2 and 3 in NumPy, on a layer of one kernel."""
    import flax.linen as nn

    model = nn.Dense(6, use_bias=False)
    tree = model.init(KEY, jnp.zeros((1, 6)))["params"]
    adapted = perturb(
        reft({"dense": tree}, KEY, variant=variant, rank=2, targets="dense", init="default")
    )["dense"]
    node = next(x for x in adapted.values() if isinstance(x, Attachment))
    x = np.random.default_rng(0).normal(size=(2, 3, 6)).astype(np.float32)
    h = x @ np.asarray(tree["kernel"])
    w, b, r = (np.asarray(a, np.float64) for a in (node.source, node.source_bias, node.projection))
    if variant == "loreft":
        q, upper = np.linalg.qr(r)
        r = q * np.sign(np.diagonal(upper))
        np.testing.assert_allclose(r.T @ r, np.eye(2), atol=1e-6)
    expected = h + (h @ w + b - (0 if variant == "direft" else h @ r)) @ r.T
    assert relative_error(peft_jax.bind(model)(adapted, x), expected) < 1e-5


def test_bitfit_trains_biases_alone(tmp_path):
    folder, _, _ = family_checkpoint("llama3_tied_biased", tmp_path)
    model, params = peft_jax.load(folder)
    tree = bitfit(params, targets=["q_proj", "down_proj"])
    trained, _ = peft_jax.partition(tree)
    assert {p for p, x in places(trained).items() if jax.tree.leaves(x)} == {
        "model/layers/self_attn/q_proj/bias",
        "model/layers/mlp/down_proj/bias",
    }
    moved = perturb(tree)
    peft_jax.save_adapter(tmp_path / "a", moved)
    back = peft_jax.load_adapter(params, tmp_path / "a")
    run = jax.jit(peft_jax.bind(model))
    np.testing.assert_array_equal(run(back, TOKENS), run(moved, TOKENS))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda p: bottleneck(p, KEY, placement="pfeifer"),
            "unknown placement 'pfeifer'. Did you mean 'pfeiffer'",
        ),
        (
            lambda p: bottleneck(bottleneck(p, KEY), KEY),
            "bottleneck 'default' already; give",
        ),
        (lambda p: bottleneck(p, KEY, targets="atention"), "matches no module"),
        (
            lambda p: bottleneck(p, KEY, layers=[7]),
            "there is no layer 7; layers here: 0 to 2",
        ),
        (
            lambda p: bottleneck(p, KEY, activation="relo"),
            "unknown activation 'relo'. Did you mean 'relu'",
        ),
        (lambda p: bottleneck(p, KEY, scaling="big"), "scaling must be a number"),
        (lambda p: bottleneck(p, KEY, init="ones"), "unknown init 'ones'"),
        (lambda p: bottleneck(p, KEY, dropout=1.0), "dropout must lie in"),
        (
            lambda p: bottleneck(p, KEY, size_pattern={"layers.0.mlp.down_proj": 9}),
            "stacked at .* unstack_layers",
        ),
        (
            lambda p: bottleneck(p, KEY, size_pattern={"nothing": 9}),
            "size_pattern 'nothing' matches nothing",
        ),
        (
            lambda p: compacter(p, KEY, dimension=5),
            "dimension=5 does not divide the 32 features",
        ),
        (lambda p: compacter(p, KEY, placement="x"), "unknown placement 'x'"),
        (lambda p: reft(p, KEY, variant="soreft"), "unknown variant 'soreft'"),
        (lambda p: reft(p, KEY, rank=99), "rank must lie between 1 and the 32 features"),
        (lambda p: reft(p, KEY, first=-1), "first and last count tokens"),
        (lambda p: bitfit(p, KEY), "this model has none"),
        (lambda p: ln_tuning(p, targets="q_proj"), "name no norm; norms here"),
        (
            lambda p: ia3(p, KEY, targets="kproj"),
            "target 'kproj' matches nothing. Did you mean 'k_proj'",
        ),
        (lambda p: unipelt(p, KEY, rank=0), "rank must be at least 1"),
        (lambda p: invertible(p, KEY, embedding="wte"), "no token embedding"),
    ],
)
def test_bad_requests_are_refused_by_name(base, make, message):
    with pytest.raises(ValueError, match=message):
        make(base[1])


def test_an_adapter_of_another_width_is_refused_where_it_acts(base):
    model, params, _ = base
    wrong = bottleneck(params, KEY, targets="mlp", size=4, width=16)
    with pytest.raises(
        ValueError, match="from 16 to 16 features stands beside a module with 32 and 32"
    ):
        peft_jax.bind(model)(wrong, TOKENS)
