"""Binding on models of others: rules, fallback, strictness, dtypes, attachments."""

import dataclasses
import logging

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import peft_jax
from peft_jax.adapters import bottleneck
from peft_jax.core import (
    Attachment,
    MissingRuleError,
    count,
    drop_adapters,
    layout_of,
    matmul,
    nnx_params,
    places,
    register_rule,
)
from peft_jax.core.capture import capture, output_of
from peft_jax.core.tree import is_node
from peft_jax.core.weight import Weight, static
from peft_jax.methods import METHODS
from tests.reference import perturb, relative_error
from tests.third_party import Gate, LinenNormed, ListedModel, VisionModel, linen_model, nnx_model

TOKENS = jnp.arange(10).reshape(2, 5)


def small(tree_or_params, **options):
    return perturb(peft_jax.lora(tree_or_params, jax.random.key(1), rank=2, targets="*", **options))


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("bias", [False, True])
def test_dense_computes_as_flax_does(dtype, bias):
    layer = nn.Dense(5, use_bias=bias, dtype=dtype, precision="highest")
    x = jax.random.normal(jax.random.key(0), (2, 3, 4))
    params = layer.init(jax.random.key(1), x)["params"]
    lora = peft_jax.lora(params, jax.random.key(2), rank=2, targets="kernel")
    out = peft_jax.bind(layer)(lora, x)
    expected = layer.apply({"params": params}, x)
    assert out.dtype == expected.dtype
    np.testing.assert_array_equal(out, expected)  # B is zero: the very same product
    text = jax.make_jaxpr(lambda p: peft_jax.bind(layer)(p, x))(lora).pretty_print()
    assert text.count("HIGHEST") == 2 * text.count("dot_general")


def test_precision_of_nnx_is_honoured():
    layer = nnx.Linear(4, 5, precision="highest", dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    x = jnp.ones((2, 4))
    lora = peft_jax.lora(nnx_params(layer), jax.random.key(2), rank=2, targets="kernel")
    assert peft_jax.bind(layer)(lora, x).dtype == jnp.bfloat16
    text = jax.make_jaxpr(lambda p: peft_jax.bind(layer)(p, x))(lora).pretty_print()
    assert text.count("HIGHEST") == 2 * text.count("dot_general")


def test_bound_equals_vanilla_without_nodes():
    for model, params in (linen_model(), nnx_model()):
        expected = (
            model.apply({"params": params}, TOKENS)
            if isinstance(model, nn.Module)
            else model(TOKENS)
        )
        np.testing.assert_array_equal(peft_jax.bind(model)(params, TOKENS), expected)


def test_every_layer_of_a_linen_model_through_its_rule(caplog):
    model, params = linen_model()
    layout = layout_of(model, TOKENS)
    lora = small(params, layout=layout)
    apply = peft_jax.bind(model)
    with caplog.at_level(logging.WARNING, "peft_jax"):
        out = apply(lora, TOKENS)
        apply(lora, TOKENS)
    assert relative_error(out, model.apply({"params": peft_jax.merge(lora)}, TOKENS)) < 1e-5
    unruled = [r.message for r in caplog.records]
    assert len([m for m in unruled if "Gate" in m]) == 1  # said once
    assert "blocks/gate" in " ".join(unruled)
    assert "register_rule(Gate" in " ".join(unruled)
    assert not [m for m in unruled if "Gate" not in m]


def test_every_layer_of_an_nnx_model_through_its_rule(caplog):
    model, params = nnx_model()
    lora = small(params, layout=layout_of(model))
    apply = peft_jax.bind(model, strict=True)
    out = apply(lora, TOKENS)
    assert relative_error(out, apply(peft_jax.merge(lora), TOKENS)) < 1e-5
    assert not caplog.records


def test_strict_makes_the_fallback_an_error_and_a_rule_mends_it(monkeypatch):
    from peft_jax.core.bind import linen as rules

    monkeypatch.setattr(rules, "RULES", dict(rules.RULES))
    model, params = linen_model()
    lora = small(params, layout=layout_of(model, TOKENS))
    with pytest.raises(
        MissingRuleError, match=r"no rule for Gate.__call__ at blocks/gate: the weights w"
    ):
        peft_jax.bind(model, strict=True)(lora, TOKENS)

    def gate(module, params, x):
        return x * nn.sigmoid(matmul(x, params["w"]))

    register_rule(Gate, gate)
    out = peft_jax.bind(model, strict=True)(lora, TOKENS)
    assert relative_error(out, model.apply({"params": peft_jax.merge(lora)}, TOKENS)) < 1e-5


def test_a_subclass_that_overrides_call_has_no_rule():
    class Scaled(nn.Dense):
        @nn.compact
        def __call__(self, x):
            return 2 * super().__call__(x)

    layer, x = Scaled(3), jnp.ones((2, 4))
    lora = small(layer.init(jax.random.key(0), x)["params"])
    out = peft_jax.bind(layer)(lora, x)
    assert relative_error(out, layer.apply({"params": peft_jax.merge(lora)}, x)) < 1e-6


def test_a_module_that_declares_its_weight_in_setup():
    class Declared(nn.Module):
        def setup(self):
            self.w = self.param("w", nn.initializers.normal(1.0), (4, 4))

        def __call__(self, x):
            return x @ self.w

    layer, x = Declared(), jnp.ones((2, 4))
    lora = small(layer.init(jax.random.key(0), x)["params"])
    assert (
        relative_error(
            peft_jax.bind(layer)(lora, x), layer.apply({"params": peft_jax.merge(lora)}, x)
        )
        < 1e-6
    )


def test_custom_dot_general_is_left_to_the_module():
    calls = []

    def dot_general(*args, **kwargs):
        calls.append(1)
        return jax.lax.dot_general(*args, **kwargs)

    layer, x = nn.Dense(3, dot_general=dot_general), jnp.ones((2, 4))
    lora = small(layer.init(jax.random.key(0), x)["params"])
    calls.clear()
    out = peft_jax.bind(layer)(lora, x)
    assert calls
    assert relative_error(out, layer.apply({"params": peft_jax.merge(lora)}, x)) < 1e-6


def test_vmapped_modules_map_over_the_node():
    layer = nn.vmap(
        nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=0, out_axes=0
    )(5)
    x = jax.random.normal(jax.random.key(0), (3, 2, 4))
    lora = small(layer.init(jax.random.key(0), x)["params"])
    assert (
        relative_error(
            peft_jax.bind(layer)(lora, x), layer.apply({"params": peft_jax.merge(lora)}, x)
        )
        < 1e-5
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Halve(Attachment):
    """Multiplies what comes out by `factor`, after adding `shift` to what goes in."""

    trainable = ("factor",)
    factor: jax.Array
    shift: float = static(default=0.0)
    frozen: bool = static(default=False)

    def around(self, call, x, *args, **kwargs):
        return call(x + self.shift, *args, **kwargs) * self.factor


@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_attachments_act_around_the_call(kind):
    x = jnp.ones((2, 4))
    if kind == "linen":
        layer = nn.Dense(3)
        params = layer.init(jax.random.key(0), x)["params"]
    else:
        layer = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
        params = nnx_params(layer)
    plain = peft_jax.bind(layer)(params, x + 1)
    tree = {**params, "a_halve": Halve(jnp.asarray(0.5), shift=1.0)}
    assert relative_error(peft_jax.bind(layer)(tree, x), plain / 2) < 1e-6
    # together with a Weight, and two of them nested in the order of their keys
    tree = peft_jax.lora(
        {**tree, "b_halve": Halve(jnp.asarray(0.25))}, jax.random.key(0), rank=2, targets="kernel"
    )
    assert relative_error(peft_jax.bind(layer)(tree, x), plain / 8) < 1e-6
    assert len(jax.tree.leaves(peft_jax.partition(tree)[0])) == 4
    grads = jax.grad(lambda t: peft_jax.bind(layer)(t, x).sum())(tree)
    assert float(jnp.abs(grads["a_halve"].factor)) > 0


def test_dropout_is_off_without_rng_and_differs_by_layer_with_it():
    model, params = linen_model()
    lora = perturb(
        peft_jax.lora(params, jax.random.key(1), rank=2, targets="re:out/kernel", dropout=0.5)
    )
    apply = jax.jit(peft_jax.bind(model))
    still = apply(lora, TOKENS)
    np.testing.assert_array_equal(still, apply(lora, TOKENS))
    one, two = (
        apply(lora, TOKENS, rng=jax.random.key(0)),
        apply(lora, TOKENS, rng=jax.random.key(1)),
    )
    assert relative_error(one, still) > 1e-3
    assert relative_error(one, two) > 1e-3
    np.testing.assert_array_equal(one, apply(lora, TOKENS, rng=jax.random.key(0)))
    mean = np.mean([apply(lora, TOKENS, rng=jax.random.key(i)) for i in range(300)], axis=0)
    assert relative_error(mean, still) < 0.1  # inverted dropout keeps the mean


def test_dropout_masks_differ_between_stacked_layers():
    x = jnp.ones((4, 8))
    layers = {"kernel": jnp.stack([jnp.eye(8)] * 2)}
    node = places(peft_jax.lora(layers, jax.random.key(0), rank=2, targets="kernel", dropout=0.5))[
        "kernel"
    ]
    node = node.replace(b=jnp.ones_like(node.b), a=jnp.ones_like(node.a))
    from peft_jax.core.prepare import with_rng

    keyed = with_rng({"kernel": node}, jax.random.key(3))["kernel"]
    a, b = (
        jax.tree.map(lambda leaf, i=i: leaf[i], keyed).matmul(x, in_axes=(-2,), out_axes=(-1,))
        for i in (0, 1)
    )
    assert relative_error(a, b) > 1e-2


def test_what_is_no_module_is_refused():
    with pytest.raises(TypeError, match="needs a Flax Linen or NNX module"):
        peft_jax.bind(lambda x: x)
    with pytest.raises(TypeError, match="needs a Flax Linen or NNX module class"):
        register_rule(int, lambda: None)


def test_weights_have_defaults_for_all_but_materialize():
    @jax.tree_util.register_dataclass
    @dataclasses.dataclass(frozen=True)
    class Doubled(Weight):
        base: jax.Array

        shape = property(lambda self: self.base.shape)
        dtype = property(lambda self: self.base.dtype)

        def materialize(self):
            return 2 * self.base

    model, params = linen_model()
    tree = {**params, "out": {**params["out"], "kernel": Doubled(params["out"]["kernel"])}}
    assert (
        relative_error(
            peft_jax.bind(model)(tree, TOKENS),
            model.apply({"params": peft_jax.merge(tree)}, TOKENS),
        )
        < 1e-6
    )
    assert count(tree)[0] == 0


@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_an_attachment_at_a_subclass_acts_once(kind):
    x = jnp.ones((2, 4))
    if kind == "linen":

        class Scaled(nn.Dense):
            @nn.compact
            def __call__(self, x):
                return 2 * super().__call__(x)

        layer = Scaled(3)
        params = layer.init(jax.random.key(0), x)["params"]
    else:

        class Scaled(nnx.Linear):
            def __call__(self, x):
                return 2 * super().__call__(x)

        layer = Scaled(4, 3, rngs=nnx.Rngs(0))
        params = nnx_params(layer)
    apply = peft_jax.bind(layer)
    halved = apply({**params, "halve": Halve(jnp.asarray(0.5))}, x)
    assert relative_error(halved, apply(params, x) / 2) < 1e-6


def listed(seed=0):
    model = ListedModel(nnx.Rngs(seed))
    return model, nnx_params(model)


def test_parameters_in_lists_and_in_values_are_those_of_the_tree():
    class Held(nnx.Module):
        def __init__(self):
            self.many = nnx.List([nnx.Param(jnp.ones((2, 2))), nnx.Param(jnp.ones((2, 2)))])
            self.named = nnx.Param({"w": jnp.ones((2, 2))})

        def __call__(self, x):
            return x @ self.many[0] @ self.many[1] @ self.named["w"]

    model, x = Held(), jnp.ones((1, 2))
    params = nnx_params(model)
    apply = peft_jax.bind(model)
    assert relative_error(apply(jax.tree.map(lambda w: 2 * w, params), x), 8 * model(x)) < 1e-6
    lora = small(params)
    assert relative_error(apply(lora, x), apply(peft_jax.merge(lora), x)) < 1e-6
    assert relative_error(apply(lora, x), model(x)) > 1e-3


def test_trees_of_an_nnx_model_may_be_states_or_have_numbers_as_text():
    (model, _), (other, params) = listed(), listed(1)
    apply = peft_jax.bind(model)
    expected = other(TOKENS)
    assert relative_error(apply(nnx.state(other, nnx.Param), TOKENS), expected) < 1e-6
    as_text = {**params, "layers": {str(i): layer for i, layer in params["layers"].items()}}
    assert relative_error(apply(as_text, TOKENS), expected) < 1e-6
    with pytest.raises(ValueError, match="the tree has no mixes/0, which the model has"):
        apply({k: w for k, w in params.items() if k != "mixes"}, TOKENS)
    with pytest.raises(ValueError, match=r"is boxed \(Param\); call flax.nnx.to_pure_dict first"):
        peft_jax.lora(nnx.state(other, nnx.Param), jax.random.key(0))


def test_lists_of_modules_have_layers_with_numbers():
    _, params = listed()
    tree = bottleneck(params, jax.random.key(0), size=3, targets="layers", layers=[1])
    assert [p for p in places(tree) if "bottleneck" in p] == ["layers/1/bottleneck_default"]
    lora = peft_jax.lora(params, jax.random.key(0), rank=2, targets="up", layers=[1])
    assert [p for p, w in places(lora).items() if isinstance(w, Weight)] == ["layers/1/up/kernel"]
    back = drop_adapters(tree, ["default"])
    assert jax.tree.structure(back) == jax.tree.structure(params)


def test_an_adapter_in_a_list_is_saved_and_loaded(tmp_path):
    model, params = listed()
    tree = perturb(bottleneck(params, jax.random.key(0), size=3, targets="layers"))
    peft_jax.save_adapter(tmp_path, tree)
    apply = peft_jax.bind(model)
    np.testing.assert_array_equal(
        apply(peft_jax.load_adapter(params, tmp_path), TOKENS), apply(tree, TOKENS)
    )


def test_compressed_weights_in_lists():
    model, params = listed()
    apply = peft_jax.bind(model)
    targets = ["layers/*/up", "mixes"]
    for tree in (
        peft_jax.quantize(params, "int8", targets=targets),
        peft_jax.prune(params, 0.5, targets=targets),
    ):
        assert any(isinstance(w, Weight) for p, w in places(tree).items() if p.startswith("mixes"))
        assert relative_error(apply(tree, TOKENS), apply(peft_jax.merge(tree), TOKENS)) < 1e-5


def test_methods_beside_call_use_the_weights_of_their_module():
    class Embedder(nnx.Module):
        def __init__(self, rngs):
            self.table = nnx.Param(rngs.params.normal((5, 4)))

        def encode(self, ids):
            return self.table[ids]

    class Whole(nnx.Module):
        def __init__(self, rngs):
            self.embedder = Embedder(rngs)

        def __call__(self, ids):
            return self.embedder.encode(ids)

    model = Whole(nnx.Rngs(0))
    params = nnx_params(model)
    lora = small(params)
    apply = peft_jax.bind(model)
    assert (
        relative_error(apply(lora, jnp.arange(3)), apply(peft_jax.merge(lora), jnp.arange(3)))
        < 1e-6
    )
    with pytest.raises(
        ValueError, match="embedder/bottleneck_default stands beside no module that has __call__"
    ):
        apply(
            bottleneck(params, jax.random.key(0), size=2, targets="embedder", width=4),
            jnp.arange(3),
        )


def test_batch_statistics_of_a_linen_model():
    model, x = LinenNormed(), jax.random.normal(jax.random.key(0), (6, 4))
    found = model.init(jax.random.key(1), x)
    lora = small(found["params"])
    merged = {"params": peft_jax.merge(lora), "batch_stats": found["batch_stats"]}
    apply = peft_jax.bind(model)
    others = {"batch_stats": found["batch_stats"]}
    assert relative_error(apply(lora, x, variables=others), model.apply(merged, x)) < 1e-5
    out, changed = apply(lora, x, train=True, variables=others, mutable=["batch_stats"])
    expected, wanted = model.apply(merged, x, train=True, mutable=["batch_stats"])
    assert relative_error(out, expected) < 1e-4
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), changed, wanted
    )


def test_batch_statistics_and_dropout_of_an_nnx_model():
    model, twin = VisionModel(nnx.Rngs(0)), VisionModel(nnx.Rngs(0))
    images = jax.random.normal(jax.random.key(0), (2, 4, 4, 3))
    params = nnx_params(model)
    apply = peft_jax.bind(model)
    out, state = apply(params, images, mutable=nnx.BatchStat)
    assert relative_error(out, twin(images)) < 1e-6
    np.testing.assert_allclose(
        state["norm"]["mean"][...], twin.norm.mean[...], rtol=1e-5, atol=1e-6
    )
    np.testing.assert_array_equal(model.norm.mean[...], 0)  # the model itself is left alone
    model.eval()
    twin.eval()
    apply = peft_jax.bind(model)
    assert relative_error(apply(params, images, variables=state), twin(images)) < 1e-5
    assert relative_error(apply(params, images), twin(images)) > 1e-3
    model.dropout.deterministic = False
    apply = peft_jax.bind(model)
    one, two, again = (apply(params, images, rng=jax.random.key(i)) for i in (0, 1, 0))
    assert relative_error(one, two) > 1e-3
    np.testing.assert_array_equal(one, again)


def test_a_collection_of_an_nnx_model_goes_on_from_call_to_call():
    model, params = listed()
    apply = peft_jax.bind(model)
    _, state = apply(params, TOKENS, mutable=True)
    _, state = apply(params, TOKENS, variables=state, mutable=True)
    assert int(state["calls"][...]) == 2
    assert int(model.calls[...]) == 0


class Normed(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(8, rngs=rngs)
        self.last = nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, x):
        return self.last(self.norm(x))


def test_a_norm_of_nnx_that_holds_a_weight_is_recorded():
    """Two of binding's subclasses over one module still find the class that it had."""
    model, x = Normed(nnx.Rngs(0)), jax.random.normal(jax.random.key(0), (2, 8))
    params = METHODS["ln_tuning"](nnx_params(model), jax.random.key(0), targets=["norm"])
    assert is_node(params["norm"]["scale"])
    out, found = capture(peft_jax.bind(model), {"normed": output_of("norm")})(params, x)
    np.testing.assert_allclose(found["normed"], model.norm(x), rtol=1e-6)
    np.testing.assert_allclose(out, model(x), rtol=1e-6)
