"""Combining, converting, resizing and subtracting adapters; combinations against Hugging Face
PEFT.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest

import peft_jax
from peft_jax.adapters import ia3, route_adapters
from peft_jax.core import adapter_names, bank, drop_adapters, places, set_adapter
from peft_jax.core.adapters import stack_of
from peft_jax.core.prepare import distribute, with_adapter_ids
from peft_jax.core.reparametrised import Reparametrised
from peft_jax.low_rank import algebra, combine_adapters, rebase, resize, subtract_adapters, to_lora
from peft_jax.methods import METHODS
from tests.reference import (
    FAMILIES,
    perturb,
    random_tokens,
    relative_error,
    torch_logits,
    torch_model,
)

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
        tree = peft_jax.lora(
            tree,
            jax.random.key(seed),
            rank=3,
            alpha=6 + seed,
            targets=["q_proj", "up_proj"],
            adapter=name,
        )
    tree = perturb(tree)
    for name, folder in folders.items():
        peft_jax.save_adapter(folder, tree, name=name)
    return tree, folders


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "method", ["linear", "cat", "svd", "ties", "magnitude_prune", "ties_svd", "magnitude_prune_svd"]
)
def test_combinations_equal_peft(base, two, method):
    _, _, run = base
    tree, folders = two
    theirs = peft.PeftModel.from_pretrained(
        torch_model(FAMILIES["llama2"]()), folders["one"], adapter_name="one"
    )
    theirs.load_adapter(folders["two"], "two")
    options = {} if method in ("linear", "cat", "svd") else {"density": 0.4}
    theirs.add_weighted_adapter(
        ["one", "two"], [0.7, -0.4], "mix", combination_type=method, **options
    )
    theirs.set_adapter("mix")
    ours = combine_adapters(tree, {"one": 0.7, "two": -0.4}, method=method, **options)
    assert adapter_names(ours) == ["combined"]
    assert relative_error(run(ours, TOKENS), torch_logits(theirs.eval(), TOKENS)) < 1e-4


def test_dare_keeps_the_mean(two):
    """Averaged over draws, dropping and rescaling changes nothing; a density of 1 changes nothing
    at all.
    """
    tree, _ = two
    combine = jax.jit(
        lambda key: algebra._dare_linear(nodes, jnp.array([1.0, 0.5]), key, density=0.5),
        static_argnames=(),
    )
    nodes = jnp.stack([n.delta()[0] for n in stack_of(places(tree)[Q])])
    mean = np.mean([combine(jax.random.key(i)) for i in range(400)], axis=0)
    exact = np.asarray(nodes[0] + 0.5 * nodes[1])
    assert np.abs(mean - exact).max() < 0.2 * np.abs(exact).max()
    for method in ("dare_linear", "dare_ties", "dare_linear_svd", "dare_ties_svd"):
        full = combine_adapters(
            tree, {"one": 1.0, "two": 0.5}, method=method, key=jax.random.key(0)
        )
        plain = {
            "dare_linear": "linear",
            "dare_ties": "ties",
            "dare_linear_svd": "svd",
            "dare_ties_svd": "ties_svd",
        }[method]
        same = combine_adapters(tree, {"one": 1.0, "two": 0.5}, method=plain)
        np.testing.assert_allclose(places(full)[Q].delta(), places(same)[Q].delta(), atol=1e-5)
        half = combine_adapters(
            tree, {"one": 1.0, "two": 0.5}, method=method, density=0.5, key=jax.random.key(0)
        )
        assert jnp.isfinite(places(half)[Q].delta()).all()


def test_dare_draws_the_same_in_every_process(two, monkeypatch):
    """Python's hash of a text is another one in each process, and on each host."""
    tree, _ = two

    def draw():
        return combine_adapters(
            tree, {"one": 1.0, "two": 0.5}, method="dare_linear", density=0.5, key=jax.random.key(0)
        )

    first = draw()
    monkeypatch.setattr(algebra, "hash", lambda text: 1 + hash(text), raising=False)
    jax.tree.map(np.testing.assert_array_equal, first, draw())


def test_cat_is_the_sum_and_subtracting_gives_it_back(base, two):
    _, _, run = base
    tree, _ = two
    both = run(tree, TOKENS)
    joined = combine_adapters(tree, {"one": 1.0, "two": 1.0}, method="cat")
    assert relative_error(run(joined, TOKENS), both) < 1e-5
    copy = combine_adapters(tree, {"one": 1.0}, method="cat", into="copy")
    assert set(adapter_names(copy)) == {"two", "copy"}
    assert relative_error(run(copy, TOKENS), both) < 1e-5
    less = subtract_adapters(tree, "one", "two")
    nodes = {n.name: n for n in stack_of(places(tree)[Q])}
    expected = nodes["one"].delta() - nodes["two"].delta()
    np.testing.assert_allclose(places(less)[Q].delta(), expected, rtol=1e-4, atol=1e-6)


def test_dropping_restores_the_base_exactly(base, two):
    _, params, run = base
    tree, _ = two
    np.testing.assert_array_equal(
        run(drop_adapters(tree, ["one", "two"]), TOKENS), run(params, TOKENS)
    )


@pytest.mark.parametrize("method", ["loha", "vera", "oft", "dora", "hira"])
def test_any_method_becomes_lora(base, method):
    """At full rank exactly; at a lower one with an error that falls with the rank and is the one
    reported.
    """
    _, params, run = base
    options = {"vera": {"rank": 4}, "oft": {"block_size": 4}}.get(method, {"rank": 2})
    tree = perturb(
        METHODS[method](params, jax.random.key(0), targets=["q_proj", "v_proj"], **options)
    )
    whole, errors = to_lora(tree, rank=32)
    assert relative_error(run(whole, TOKENS), run(tree, TOKENS)) < 1e-4
    assert max(errors.values()) < 1e-4
    low = [max(to_lora(tree, rank=r)[1].values()) for r in (1, 2, 8)]
    assert low[0] > low[1]
    assert low[1] > low[2] or low[2] < 1e-4
    assert not any(k.startswith("shared_") for k in whole)


def test_resizing_is_the_truncated_svd(base):
    _, params, _ = base
    tree = perturb(peft_jax.lora(params, jax.random.key(0), rank=6, alpha=3, targets="q_proj"))
    small, errors = resize(tree, rank=2)
    delta = np.asarray(places(tree)[Q].delta(), np.float64)
    u, s, vt = np.linalg.svd(delta)
    best = (u[..., :2] * s[..., None, :2]) @ vt[..., :2, :]
    np.testing.assert_allclose(places(small)[Q].delta(), best, atol=1e-5)
    assert errors[Q] == pytest.approx(
        np.linalg.norm(delta - best) / np.linalg.norm(delta), rel=1e-3
    )


def test_bad_requests_are_refused_by_name(base, two):
    tree, _ = two
    with pytest.raises(
        ValueError, match=r"no adapter 'tow'. Did you mean 'two'\? Adapters here: two, one"
    ):
        combine_adapters(tree, {"tow": 1.0})
    with pytest.raises(ValueError, match=r"unknown method 'linaer'. Did you mean 'linear'"):
        combine_adapters(tree, {"one": 1.0}, method="linaer")
    with pytest.raises(ValueError, match="density must lie in"):
        combine_adapters(tree, {"one": 1.0}, method="ties", density=0.0)
    with pytest.raises(ValueError, match="pass key="):
        combine_adapters(tree, {"one": 1.0}, method="dare_ties")
    three = peft_jax.lora(tree, jax.random.key(5), rank=5, targets="q_proj", adapter="three")
    with pytest.raises(ValueError, match="differ in rank; use method 'cat'"):
        combine_adapters(three, {"one": 1.0, "three": 1.0})
    oft = peft_jax.low_rank.oft(base[1], jax.random.key(0), block_size=4, targets="q_proj")
    with pytest.raises(
        ValueError, match="has a OFT named 'default'; convert it with to_lora first"
    ):
        combine_adapters(oft, {"default": 1.0})


def half(seed):
    """A tree of one layer and one embedding in bfloat16."""
    w, e = np.random.default_rng(seed).standard_normal((2, 16, 16)).astype(np.float32)

    def bfloat16(x):
        return jnp.asarray(x, jnp.bfloat16)

    return {"q_proj": {"kernel": bfloat16(w)}, "embed_tokens": {"embedding": bfloat16(e)}}


def adapted(name, seed=0, adapter="default", params=None, **options):
    """A tree with small changes of a method, and the path of its node; None for methods without a
    Weight that is an adapter.
    """
    where = {} if name == "trainable_tokens" else {"targets": "q_proj"}
    given = METHODS[name].example | where | {"adapter": adapter} | options
    known = METHODS[name].options
    if not {"targets", "adapter"} <= set(known):
        return None
    try:
        tree = METHODS[name](half(0) if params is None else params, jax.random.key(seed), **given)
    except ValueError:  # attachments to modules that are not here
        return None
    paths = [p for p, w in places(tree).items() if isinstance(w, Reparametrised)]
    return (perturb(tree, seed=seed, scale=0.05), paths[0]) if paths else None


ADAPTERS = [name for name in METHODS if not METHODS[name].whole and adapted(name) is not None]


def update(tree, path):
    """W' - W of one place in float64, by the node's own `adapt` over its base in float32."""
    node = places(distribute(tree))[path]
    base = np.asarray(node.base.astype(jnp.float32))
    return np.asarray(node.replace(base=jnp.asarray(base)).materialize(), np.float64) - base


@pytest.mark.parametrize("name", ADAPTERS)
def test_operations_between_adapters_are_right_or_refused(name):
    """Over a bfloat16 base, where an update of 1e-3 is below what two rounded weights differ by."""
    (tree, path), (other, _) = adapted(name), adapted(name, seed=1)
    wanted = update(tree, path)

    def error(found):
        return np.linalg.norm(np.asarray(found, np.float64) - wanted) / np.linalg.norm(wanted)

    whole, told = to_lora(tree, rank=16)
    assert error(places(whole)[path].delta()) < 2e-3  # what float32 tells of the change of a weight
    assert told[path] < 1e-4
    low, told = to_lora(tree, rank=1)
    assert told[path] == pytest.approx(error(places(low)[path].delta()), abs=2e-3)

    both, _ = adapted(name, seed=1, adapter="second", params=tree)
    pair = {"default": 1.0, "second": 0.5}
    if name == "lora":
        nodes = {n.name: n for n in stack_of(places(both)[path])}
        sums = sum(
            w * np.asarray(nodes[n].scale * nodes[n].a @ nodes[n].b, np.float64)
            for n, w in pair.items()
        )
        found = places(combine_adapters(both, pair, method="cat"))[path].delta()
        assert np.linalg.norm(found - sums) < 1e-5 * np.linalg.norm(sums)
    else:
        for join in (
            lambda: combine_adapters(both, pair),
            lambda: subtract_adapters(both, "default", "second"),
            lambda: route_adapters(both, jax.random.key(0), list(pair)),
        ):
            with pytest.raises(
                ValueError,
                match=r"has a \w+ named '(default|second)'; convert it with to_lora first",
            ):
                join()

    ids = jnp.asarray([1, 0, -1])
    x = jnp.asarray(np.random.default_rng(2).standard_normal((3, 2, 16)), jnp.float32)
    if places(tree)[path].group:
        with pytest.raises(ValueError, match="shares arrays with other places"):
            bank(tree, 2)
        return
    banked = set_adapter(bank(tree, 2), 1, other)
    node = places(with_adapter_ids(banked, ids))[path]
    base = places(half(0))[path].astype(jnp.float32)
    found = (
        node.replace(base=base).matmul(x, in_axes=node.in_axes, out_axes=node.out_axes) - x @ base
    )
    for row, alone in ((0, other), (1, tree)):
        np.testing.assert_allclose(
            found[row], x[row] @ update(alone, path), rtol=1e-3, atol=5e-6
        )  # of outputs of about 4
    assert not found[2].any()


class OneLayer(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(16, name="q_proj")(x)


@pytest.mark.parametrize("name", ["ia3", "road"])
def test_a_change_of_the_bias_is_not_lost(name):
    """A LoRA has none; a bank adds each row its own."""
    kernel, bias = np.random.default_rng(0).standard_normal((2, 16, 16)).astype(np.float32)
    params = {"q_proj": {"kernel": jnp.asarray(kernel), "bias": jnp.asarray(bias[0])}}
    tree, other = (adapted(name, seed=i, params=params)[0] for i in (0, 1))
    with pytest.raises(
        ValueError, match="at q_proj/kernel changes the bias beside it too, which a LoRA cannot"
    ):
        to_lora(tree, rank=16)
    x = np.random.default_rng(1).standard_normal((3, 2, 16)).astype(np.float32)
    banked = set_adapter(bank(tree, 2), 1, other)
    found = peft_jax.bind(OneLayer())(banked, x, adapter_ids=jnp.asarray([1, 0, -1]))
    for row, one in enumerate((other, tree, params)):
        merged = peft_jax.merge(one)["q_proj"]
        np.testing.assert_allclose(
            found[row], x[row] @ merged["kernel"] + merged["bias"], rtol=1e-4, atol=1e-5
        )
    assert np.abs(found[0] - found[1]).max() > 0.1


def test_what_lies_over_or_between_adapters_stays_where_it_is():
    """An OFT turns what is under it, so its place in the stack counts."""
    params = {"q_proj": {"kernel": jax.random.normal(jax.random.key(0), (16, 16))}}
    inner, path = adapted("lora", adapter="one", params=params)
    turned, _ = adapted("oft", adapter="turn", params=inner)
    whole = peft_jax.merge(turned)["q_proj"]["kernel"]
    for tree in (
        to_lora(turned, rank=16, adapter="one")[0],
        to_lora(turned, rank=16, adapter="turn")[0],
        combine_adapters(turned, {"one": 1.0}, method="cat"),
    ):
        assert relative_error(peft_jax.merge(tree)["q_proj"]["kernel"], whole) < 1e-5
    outer, _ = adapted("lora", adapter="two", params=turned)
    for join in (
        lambda: combine_adapters(outer, {"one": 1.0, "two": 1.0}),
        lambda: route_adapters(outer, jax.random.key(0), ["one", "two"]),
    ):
        with pytest.raises(ValueError, match="has a OFT between the adapters one, two"):
            join()
    routed = route_adapters(
        perturb(adapted("lora", adapter="two", params=inner)[0]), jax.random.key(0), ["two", "one"]
    )
    assert [type(n).__name__ for n in stack_of(places(routed)[path])] == ["Router"]


def test_gated_layers_are_not_changed_by_any_operation():
    params = {"layers": {"q_proj": {"kernel": jax.random.normal(jax.random.key(0), (3, 16, 16))}}}
    tree = perturb(ia3(params, jax.random.key(0), targets="q_proj", layers=[1]))
    whole, _ = to_lora(tree, rank=16)
    assert (
        relative_error(
            peft_jax.merge(whole)["layers"]["q_proj"]["kernel"],
            peft_jax.merge(tree)["layers"]["q_proj"]["kernel"],
        )
        < 1e-5
    )
    some = peft_jax.lora(
        params, jax.random.key(0), rank=2, init="pissa", targets="q_proj", layers=[1]
    )
    np.testing.assert_array_equal(
        rebase(some)["layers"]["q_proj"]["kernel"].base[0],
        params["layers"]["q_proj"]["kernel"][0],
    )
    assert (
        relative_error(
            peft_jax.merge(rebase(some))["layers"]["q_proj"]["kernel"],
            params["layers"]["q_proj"]["kernel"],
        )
        < 1e-5
    )
