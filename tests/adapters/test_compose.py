"""Adapters composed in one tree: stacked, averaged, fused, routed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import peft_jax
from peft_jax.adapters import (
    average_adapters,
    bottleneck,
    fuse_adapters,
    reft,
    route_adapters,
    stack_adapters,
)
from peft_jax.adapters.compose import Fusion
from peft_jax.core import Attachment, matmul
from peft_jax.models.layers import unstack_layers
from tests.reference import family_checkpoint, perturb, random_tokens, relative_error

KEY = jax.random.key(0)
TOKENS = random_tokens(2, 9)
NAMES = ("first", "second", "third")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder, _, _ = family_checkpoint("llama2", tmp_path_factory.mktemp("base"))
    model, params = peft_jax.load(folder)
    return model, params, jax.jit(peft_jax.bind(model))


@pytest.fixture(scope="module")
def several(base):
    """The base with three bottleneck adapters after each layer, all different."""
    tree = base[1]
    for i, name in enumerate(NAMES):
        tree = bottleneck(
            tree, jax.random.key(i), placement="pfeiffer", size=4, init="bert", adapter=name
        )
    return perturb(tree)


def only(tree, *names):
    """The tree with these of its adapters."""
    if not isinstance(tree, dict):
        return tree
    return {
        k: only(x, *names)
        for k, x in tree.items()
        if not isinstance(x, Attachment) or x.name in names
    }


def test_a_stack_applies_its_adapters_in_order(base, several):
    _, _, run = base
    one, other = (
        stack_adapters(several, order) for order in (["first", "second"], ["second", "first"])
    )
    assert (
        relative_error(run(only(one, "stacked"), TOKENS), run(only(other, "stacked"), TOKENS))
        > 1e-5
    )
    # attachments of one module nest by their names, the first outermost: "first" works on what
    # "second" made
    assert (
        relative_error(
            run(only(other, "stacked"), TOKENS), run(only(several, "first", "second"), TOKENS)
        )
        < 1e-5
    )


def test_averages_of_outputs_and_of_weights(base, several):
    _, _, run = base
    alone = average_adapters(several, {"first": 1.0, "second": 0.0})
    assert (
        relative_error(run(only(alone, "averaged"), TOKENS), run(only(several, "first"), TOKENS))
        < 1e-5
    )
    mean = average_adapters(several, {"first": 0.25, "third": 0.75}, of="weights")

    def get(tree, name):
        return tree["model"]["layers"]["mlp_residual"][f"bottleneck_{name}"]

    expected = 0.25 * get(several, "first").up + 0.75 * get(several, "third").up
    np.testing.assert_allclose(get(mean, "averaged").up, expected, rtol=1e-6)


def test_averages_of_weights_keep_the_layers(base):
    """A gate is a choice of layers, not a number to average."""
    tree = base[1]
    for i, name in enumerate(NAMES):
        layers = [1] if name == "third" else [0, 2]
        tree = bottleneck(
            tree,
            jax.random.key(i),
            size=4,
            init="bert",
            layers=layers,
            adapter=name,
            drop_layers=2,
            targets="mlp",
        )
    mean = average_adapters(tree, {"first": 0.5, "second": 1.5}, of="weights")

    def get(tree, name):
        return tree["model"]["layers"]["mlp"][f"bottleneck_{name}"]

    for field in ("gate", "depth"):
        np.testing.assert_array_equal(
            getattr(get(mean, "averaged"), field), getattr(get(tree, "first"), field)
        )
    np.testing.assert_allclose(
        get(mean, "averaged").up,
        0.5 * get(tree, "first").up + 1.5 * get(tree, "second").up,
        rtol=1e-6,
    )
    with pytest.raises(
        ValueError,
        match="adapt different layers, so that their weights have no average; average "
        "their outputs",
    ):
        average_adapters(tree, {"first": 0.5, "third": 0.5}, of="weights")


def test_a_fusion_is_the_papers_formula_and_starts_as_the_mean(base, several):
    model, _, run = base
    fused = fuse_adapters(several, KEY, list(NAMES))
    trained, _ = peft_jax.partition(fused)
    assert len(jax.tree.leaves(trained)) == 5, "the adapters are frozen"
    mean = average_adapters(several, dict.fromkeys(NAMES, 1 / 3))
    assert relative_error(run(fused, TOKENS), run(mean, TOKENS)) < 1e-2, "queries start small"
    node: Fusion = jax.tree.map(
        lambda a: a[0], perturb(fused)["model"]["layers"]["mlp_residual"]["bottleneck_fused"]
    )
    h = np.random.default_rng(0).normal(size=(2, 5, 32)).astype(np.float32)
    z = np.stack(
        [np.asarray(m.change(jnp.asarray(h), jnp.asarray(h))) - h for m in node.members], axis=2
    )
    query = h @ np.asarray(node.query) + np.asarray(node.query_bias)
    key, value = (
        z @ np.asarray(node.key_weight) + np.asarray(node.key_bias),
        z @ np.asarray(node.value),
    )
    scores = np.einsum("btd,btnd->btn", query, key)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    expected = h + np.einsum("btn,btnd->btd", weights, value)
    assert relative_error(node.combine(jnp.asarray(h), jnp.asarray(h)), expected) < 1e-5
    np.testing.assert_allclose(node.weights(jnp.asarray(h), jnp.asarray(h)), weights, atol=1e-5)


def test_a_router_weighs_adapters_by_token_and_starts_even(base):
    _, params, run = base
    tree = params
    for i, name in enumerate(NAMES[:2]):
        tree = peft_jax.lora(
            tree, jax.random.key(i), rank=2, targets=["q_proj", "down_proj"], adapter=name
        )
    tree = perturb(tree)
    routed = route_adapters(tree, KEY, NAMES[:2])
    trained, _ = peft_jax.partition(routed)
    assert len(jax.tree.leaves(trained)) == 4
    even = jax.tree.map(lambda x: x * 0 if x is not None else None, trained)
    even = peft_jax.combine(even, peft_jax.partition(routed)[1])
    assert relative_error(run(even, TOKENS), run(tree, TOKENS)) < 1e-5, "all adapters whole"
    assert relative_error(run(perturb(routed, scale=1.0), TOKENS), run(tree, TOKENS)) > 1e-4
    with pytest.raises(ValueError, match="depends on its input"):
        peft_jax.merge(routed)
    whole = route_adapters(tree, KEY, NAMES[:2], by="sequence")
    node = jax.tree.map(
        lambda a: a[0],
        perturb(whole, scale=1.0)["model"]["layers"]["self_attn"]["q_proj"]["kernel"],
    )
    x = jax.random.normal(KEY, (2, 5, 32))
    logits = np.asarray(x @ node.routing + node.routing_bias)
    weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    weights = weights.mean(1, keepdims=True)
    deltas = [np.asarray(m.a @ m.b) * float(m.scale) for m in node.members]
    expected = x @ node.base + sum(
        2 * weights[..., i : i + 1] * (np.asarray(x) @ d) for i, d in enumerate(deltas)
    )
    assert relative_error(matmul(x, node), expected) < 1e-5
    with pytest.raises(ValueError, match="by token or by sequence, not 'row'"):
        route_adapters(tree, KEY, NAMES[:2], by="row")


@pytest.mark.parametrize("compose", ["stack", "average", "fuse"])
def test_compositions_in_looped_layers_and_on_disk(base, several, compose, tmp_path):
    model, params, run = base
    made = {
        "stack": lambda: stack_adapters(several, NAMES, into="it"),
        "average": lambda: average_adapters(several, dict.fromkeys(NAMES, 0.5), into="it"),
        "fuse": lambda: perturb(fuse_adapters(several, KEY, NAMES, into="it")),
    }[compose]()
    expected = run(made, TOKENS)
    looped = model.clone(scan_layers=False)
    assert relative_error(peft_jax.bind(looped)(unstack_layers(made), TOKENS), expected) < 1e-5
    peft_jax.save_adapter(tmp_path / "a", made, name="it")
    np.testing.assert_array_equal(
        run(peft_jax.load_adapter(params, tmp_path / "a", name="it"), TOKENS), expected
    )
    back = peft_jax.load_adapter(unstack_layers(params), tmp_path / "a", name="it")
    assert relative_error(peft_jax.bind(looped)(back, TOKENS), expected) < 1e-5


def test_bad_requests_are_refused_by_name(base, several):
    _, params, _ = base
    with pytest.raises(ValueError, match="no adapter beside modules named 'fourth'"):
        stack_adapters(several, ["first", "fourth"])
    with pytest.raises(ValueError, match="two adapters at least"):
        fuse_adapters(several, KEY, ["first"])
    with pytest.raises(ValueError, match="two adapters at least"):
        route_adapters(several, KEY, ["first"])
    with pytest.raises(ValueError, match="no LoRAs named first, second"):
        route_adapters(several, KEY, NAMES[:2])
    with pytest.raises(ValueError, match="of outputs or of weights, not 'things'"):
        average_adapters(several, {"first": 1.0}, of="things")
    elsewhere = bottleneck(several, KEY, size=4, targets="o_proj", adapter="fourth")
    with pytest.raises(ValueError, match="has no adapter"):
        average_adapters(elsewhere, {"first": 0.5, "fourth": 0.5})
    larger = bottleneck(several, KEY, size=5, placement="pfeiffer", adapter="fourth")
    with pytest.raises(ValueError, match="differ in kind, options or shapes"):
        average_adapters(larger, {"first": 0.5, "fourth": 0.5}, of="weights")
    both = reft(reft(params, KEY, adapter="a"), KEY, adapter="b")
    with pytest.raises(ValueError, match="a fusion is of bottleneck adapters"):
        fuse_adapters(both, KEY, ["a", "b"])
