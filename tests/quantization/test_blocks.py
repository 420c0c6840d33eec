"""Quantization block by block, where later blocks see what quantized earlier ones pass on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import peft_jax
from peft_jax.core import calibrate, layout_of, matmul, places
from peft_jax.quantization import Int, Quantized, quantize_in_turn
from tests.reference import random_tokens, relative_error
from tests.third_party import linen_model, nnx_model


@pytest.fixture(scope="module")
def base():
    """The embedded model with looped layers, and batches of its own kind of text."""
    model, params = peft_jax.load("builtin:base", scan_layers=False)
    return model, params, [{"tokens": random_tokens(4, 64, seed=i, vocab=4096)} for i in range(2)]


def loss_of(model, params, dense, batches):
    apply = jax.jit(peft_jax.bind(model))
    return float(
        np.mean(
            [
                jnp.square(apply(params, b["tokens"]) - apply(dense, b["tokens"])).mean()
                for b in batches
            ]
        )
    )


def test_gptq_in_turn_beats_one_pass_and_nearest(base):
    model, params, batches = base
    apply, format = peft_jax.bind(model), Int(bits=3, block_size=32)
    where = {"targets": ["*/layers_0/*/kernel", "*/layers_1/*/kernel"]}
    nearest = peft_jax.quantize(params, format, **where)
    statistics = {"covariance": calibrate(apply, params, batches, token_cap=4.0, **where)}
    at_once = peft_jax.quantize(params, format, rounding="gptq", statistics=statistics, **where)
    in_turn = quantize_in_turn(apply, params, batches, format, rounding="gptq", **where)
    losses = [loss_of(model, tree, params, batches) for tree in (nearest, at_once, in_turn)]
    assert losses[1] < 0.8 * losses[0]
    assert losses[2] < 1.02 * losses[1]
    # The first block sees the same inputs either way; the second sees others.
    first, second = (f"model/layers_{i}/self_attn/q_proj/kernel" for i in (0, 1))

    def pick(tree, path):
        return places(tree)[path].codes

    np.testing.assert_array_equal(pick(at_once, first), pick(in_turn, first))
    assert (pick(at_once, second) != pick(in_turn, second)).any()


@pytest.mark.parametrize("make", [linen_model, nnx_model])
def test_third_party_models(make):
    model, params = make()
    tokens = random_tokens(2, 8, vocab=13)
    layout = layout_of(model, tokens)
    apply, batches = peft_jax.bind(model), [{"tokens": tokens}]
    where = {"layout": layout, "exclude": "conv"}
    quantized = quantize_in_turn(apply, params, batches, Int(bits=8), rounding="gptq", **where)
    assert relative_error(apply(quantized, tokens), apply(params, tokens)) < 0.05
    assert any(isinstance(w, Quantized) for w in places(quantized).values())


def test_a_token_that_is_written_large_does_not_take_all_of_gptq():
    """One token of 128 has nearly all of the energy: without a cap the others gain next to nothing
    over nearest.
    """
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(128, 64)) @ rng.normal(size=(64, 64))).astype(np.float32) / 8
    x[0] = 300 * rng.normal(size=64)
    w = jnp.asarray(rng.normal(size=(64, 16)), jnp.float32)

    def apply(params, tokens, **_):
        return matmul(jnp.asarray(x)[tokens], params["up_proj"]["kernel"])

    given = (
        apply,
        {"up_proj": {"kernel": w}},
        [{"tokens": np.arange(128)[None]}],
        Int(bits=3, block_size=32),
    )

    def error(tree):
        return float(np.linalg.norm(x[1:] @ (tree["up_proj"]["kernel"].materialize() - w)))

    nearest = error(quantize_in_turn(*given, rounding="nearest"))
    assert error(quantize_in_turn(*given)) < 0.8 * nearest
    assert error(quantize_in_turn(*given, token_cap=None)) > 0.9 * nearest
