"""Combining, converting, resizing and subtracting adapters; combinations against Hugging Face PEFT."""

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest

import peft_jax
from peft_jax.core.adapters import stack_of
from peft_jax.low_rank import algebra
from peft_jax.methods import METHODS
from tests.reference import FAMILIES, perturb, random_tokens, relative_error, torch_logits, torch_model

TOKENS = random_tokens(2, 10)
Q = "model/layers/self_attn/q_proj/kernel"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    torch_model(FAMILIES["llama2"]()).save_pretrained(folder)
    model, params = peft_jax.load(folder)
    return model, params, jax.jit(peft_jax.bind(model))


@pytest.fixture(scope="module")
def two(base, tmp_path_factory):
    """Two LoRA adapters on one tree, and the folders of both."""
    _, tree, _ = base
    folders = {n: tmp_path_factory.mktemp(n) for n in ("one", "two")}
    for seed, name in enumerate(folders):
        tree = peft_jax.lora(tree, jax.random.key(seed), rank=3, alpha=6 + seed, targets=["q_proj", "up_proj"], adapter=name)
    tree = perturb(tree)
    for name, folder in folders.items():
        peft_jax.save_adapter(folder, tree, name=name)
    return tree, folders


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", ["linear", "cat", "svd", "ties", "magnitude_prune", "ties_svd", "magnitude_prune_svd"])
def test_combinations_equal_peft(base, two, method):
    _, _, run = base
    tree, folders = two
    theirs = peft.PeftModel.from_pretrained(torch_model(FAMILIES["llama2"]()), folders["one"], adapter_name="one")
    theirs.load_adapter(folders["two"], "two")
    options = {} if method in ("linear", "cat", "svd") else {"density": 0.4}
    theirs.add_weighted_adapter(["one", "two"], [0.7, -0.4], "mix", combination_type=method, **options)
    theirs.set_adapter("mix")
    ours = peft_jax.combine_adapters(tree, {"one": 0.7, "two": -0.4}, method=method, **options)
    assert peft_jax.adapter_names(ours) == ["combined"]
    assert relative_error(run(ours, TOKENS), torch_logits(theirs.eval(), TOKENS)) < 1e-4


def test_dare_keeps_the_mean(two):
    """Averaged over draws, dropping and rescaling changes nothing; a density of 1 changes nothing at all."""
    tree, _ = two
    combine = jax.jit(lambda key: algebra._dare_linear(nodes, jnp.array([1.0, 0.5]), key, density=0.5), static_argnames=())
    nodes = jnp.stack([n.delta()[0] for n in stack_of(peft_jax.places(tree)[Q])])
    mean = np.mean([combine(jax.random.key(i)) for i in range(400)], axis=0)
    exact = np.asarray(nodes[0] + 0.5 * nodes[1])
    assert np.abs(mean - exact).max() < 0.2 * np.abs(exact).max()
    for method in ("dare_linear", "dare_ties", "dare_linear_svd", "dare_ties_svd"):
        full = peft_jax.combine_adapters(tree, {"one": 1.0, "two": 0.5}, method=method, key=jax.random.key(0))
        plain = {"dare_linear": "linear", "dare_ties": "ties", "dare_linear_svd": "svd", "dare_ties_svd": "ties_svd"}[method]
        same = peft_jax.combine_adapters(tree, {"one": 1.0, "two": 0.5}, method=plain)
        np.testing.assert_allclose(peft_jax.places(full)[Q].delta(), peft_jax.places(same)[Q].delta(), atol=1e-5)
        half = peft_jax.combine_adapters(tree, {"one": 1.0, "two": 0.5}, method=method, density=0.5, key=jax.random.key(0))
        assert jnp.isfinite(peft_jax.places(half)[Q].delta()).all()


def test_cat_is_the_sum_and_subtracting_gives_it_back(base, two):
    _, _, run = base
    tree, _ = two
    both = run(tree, TOKENS)
    joined = peft_jax.combine_adapters(tree, {"one": 1.0, "two": 1.0}, method="cat")
    assert relative_error(run(joined, TOKENS), both) < 1e-5
    copy = peft_jax.combine_adapters(tree, {"one": 1.0}, method="cat", into="copy")
    assert set(peft_jax.adapter_names(copy)) == {"two", "copy"}
    assert relative_error(run(copy, TOKENS), both) < 1e-5
    less = peft_jax.subtract_adapters(tree, "one", "two")
    nodes = {n.name: n for n in stack_of(peft_jax.places(tree)[Q])}
    expected = nodes["one"].delta() - nodes["two"].delta()
    np.testing.assert_allclose(peft_jax.places(less)[Q].delta(), expected, rtol=1e-4, atol=1e-6)


def test_dropping_restores_the_base_exactly(base, two):
    _, params, run = base
    tree, _ = two
    np.testing.assert_array_equal(run(peft_jax.drop_adapters(tree, ["one", "two"]), TOKENS), run(params, TOKENS))


@pytest.mark.parametrize("method", ["loha", "vera", "oft", "dora", "hira"])
def test_any_method_becomes_lora(base, method):
    """At full rank exactly; at a lower one with an error that falls with the rank and is the one reported."""
    _, params, run = base
    options = {"vera": {"rank": 4}, "oft": {"block_size": 4}}.get(method, {"rank": 2})
    tree = perturb(METHODS[method](params, jax.random.key(0), targets=["q_proj", "v_proj"], **options))
    whole, errors = peft_jax.to_lora(tree, rank=32)
    assert relative_error(run(whole, TOKENS), run(tree, TOKENS)) < 1e-4
    assert max(errors.values()) < 1e-4
    low = [max(peft_jax.to_lora(tree, rank=r)[1].values()) for r in (1, 2, 8)]
    assert low[0] > low[1]
    assert low[1] > low[2] or low[2] < 1e-4
    assert not any(k.startswith("shared_") for k in whole)


def test_resizing_is_the_truncated_svd(base):
    _, params, _ = base
    tree = perturb(peft_jax.lora(params, jax.random.key(0), rank=6, alpha=3, targets="q_proj"))
    small, errors = peft_jax.resize(tree, rank=2)
    delta = np.asarray(peft_jax.places(tree)[Q].delta(), np.float64)
    u, s, vt = np.linalg.svd(delta)
    best = (u[..., :2] * s[..., None, :2]) @ vt[..., :2, :]
    np.testing.assert_allclose(peft_jax.places(small)[Q].delta(), best, atol=1e-5)
    assert errors[Q] == pytest.approx(np.linalg.norm(delta - best) / np.linalg.norm(delta), rel=1e-3)


def test_bad_requests_are_refused_by_name(base, two):
    tree, _ = two
    with pytest.raises(ValueError, match=r"no adapter 'tow'. Did you mean 'two'\? Adapters here: two, one"):
        peft_jax.combine_adapters(tree, {"tow": 1.0})
    with pytest.raises(ValueError, match=r"unknown method 'linaer'. Did you mean 'linear'"):
        peft_jax.combine_adapters(tree, {"one": 1.0}, method="linaer")
    with pytest.raises(ValueError, match="density must lie in"):
        peft_jax.combine_adapters(tree, {"one": 1.0}, method="ties", density=0.0)
    with pytest.raises(ValueError, match="pass key="):
        peft_jax.combine_adapters(tree, {"one": 1.0}, method="dare_ties")
    three = peft_jax.lora(tree, jax.random.key(5), rank=5, targets="q_proj", adapter="three")
    with pytest.raises(ValueError, match="differ in rank; use method 'cat'"):
        peft_jax.combine_adapters(three, {"one": 1.0, "three": 1.0})
    oft = peft_jax.oft(base[1], jax.random.key(0), block_size=4, targets="q_proj")
    with pytest.raises(ValueError, match="has a OFT named 'default'; convert it with to_lora first"):
        peft_jax.combine_adapters(oft, {"default": 1.0})
