"""Losses on hidden states against their formulas in PyTorch, and what they capture of models."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from flax import nnx

import peft_jax
from peft_jax.core import materialize, nnx_params
from peft_jax.core.capture import capture, input_of, output_of
from peft_jax.distillation.hidden import (
    States,
    attention,
    cosine,
    layer_map,
    minilm,
    minilmv2,
    places_of,
    squared,
    visible_tokens,
)
from peft_jax.models import unstack_layers
from tests.reference import relative_error
from tests.third_party import linen_model

B, T, H, D = 2, 7, 4, 8
SEGMENTS = np.asarray([[1] * 7, [1] * 4 + [0] * 3])


def states(seed, heads=H, size=D):
    rng = np.random.default_rng(seed)
    return States(*(rng.normal(size=(B, T, heads, size)).astype(np.float32) for _ in range(3)))


def test_hidden_losses_are_pytorchs():
    a, b = (np.random.default_rng(i).normal(size=(B, T, 6)).astype(np.float32) for i in range(2))
    weights = (SEGMENTS > 0).astype(np.float32)
    s, t = (torch.tensor(x)[torch.tensor(weights) > 0] for x in (a, b))
    ones = torch.ones(len(s))
    assert (
        relative_error(cosine(a, b, weights), F.cosine_embedding_loss(s, t, ones).item()) < 1e-5
    )  # as DistilBERT's script
    assert relative_error(squared(a, b, weights), F.mse_loss(s, t).item()) < 1e-5


def _rows(scores, visible):
    """Attention distributions [B, T, T] rows that see something, from scores [B, H, T, T]."""
    scores = torch.where(torch.tensor(np.asarray(visible))[:, None], scores, -1e9)
    return scores.softmax(-1).clamp_min(1e-30), torch.tensor(np.asarray(visible).any(-1))


def _scaled(x, y):
    return torch.einsum("bthd,bshd->bhts", x, y) / x.shape[-1] ** 0.5


def _kl(student, teacher, visible):
    p, rows = _rows(teacher, visible)
    q, _ = _rows(student, visible)
    return ((p * (p / q).log()).sum(-1).mean(1) * rows).sum() / rows.sum()


@pytest.mark.parametrize("causal", [False, True])
def test_attention_losses_are_the_papers(causal):
    visible = visible_tokens(SEGMENTS, causal=causal)
    ours, theirs = states(0), states(1)
    s, t = (States(*(torch.tensor(x, dtype=torch.float64) for x in y)) for y in (ours, theirs))
    seen = torch.tensor(np.asarray(visible))
    squares = ((_scaled(s.query, s.key) - _scaled(t.query, t.key)) ** 2).mean(1)[seen].mean()
    assert relative_error(attention(ours, theirs, visible), squares.item()) < 1e-5
    expected = _kl(_scaled(s.query, s.key), _scaled(t.query, t.key), visible)
    expected = expected + _kl(_scaled(s.value, s.value), _scaled(t.value, t.value), visible)
    assert relative_error(minilm(ours, theirs, visible), expected.item()) < 1e-5
    # two models of different widths and heads, in 8 relation heads
    wide = states(2, heads=2, size=32)
    w = States(*(torch.tensor(x, dtype=torch.float64) for x in wide))

    def split(x):
        return x.reshape(B, T, 8, -1)

    expected = sum(
        _kl(_scaled(split(a), split(a)), _scaled(split(b), split(b)), visible)
        for a, b in zip(s, w, strict=True)
    )
    assert relative_error(minilmv2(ours, wide, visible, relation_heads=8), expected.item()) < 1e-5


def test_layers_are_paired_at_even_distances():
    assert layer_map("cosine", 6, 12) == [(i, 2 * i) for i in range(1, 7)]
    assert layer_map("squared", 2, 5) == [(1, 2), (2, 5)]
    assert layer_map("minilm", 4, 12) == [(4, 12)]


@pytest.mark.parametrize("looped", [False, True])
def test_captured_states_are_transformers(looped, tiny_folder):
    from transformers import AutoModelForCausalLM

    model, params = peft_jax.load(tiny_folder)
    if looped:
        model, params = model.clone(scan_layers=False), unstack_layers(params)
    tokens = np.arange(10).reshape(2, 5) + 7
    wanted = places_of(params, {"hidden", "query"}, embedded=True)
    logits, found = jax.jit(capture(peft_jax.bind(model), wanted))(params, tokens)
    with torch.no_grad():
        reference = AutoModelForCausalLM.from_pretrained(tiny_folder)(
            torch.tensor(tokens), output_hidden_states=True
        )
    expected = [x.numpy() for x in reference.hidden_states]
    assert relative_error(found["embedded"][0], expected[0]) < 1e-6
    for i, theirs in enumerate(expected[1:-1]):  # the last of theirs is normalised
        assert relative_error(found["hidden"][i], theirs) < 1e-5
    assert relative_error(logits, reference.logits.numpy()) < 1e-5


class Loop(nnx.Module):
    """An NNX model with a list of layers."""

    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(6, 6, rngs=rngs) for _ in range(2)])

    def __call__(self, x):
        for layer in self.layers:
            x = jnp.tanh(layer(x))
        return x


def updated(params, targets):
    """With LoRA whose update is not zero."""
    trainable, frozen = peft_jax.partition(
        peft_jax.lora(params, jax.random.key(0), rank=2, targets=targets)
    )
    return peft_jax.combine(jax.tree.map(lambda x: x + 0.1, trainable), frozen)


def test_a_linen_model_of_anyones_is_looked_into():
    """What a layer with LoRA gives is with its update; a scan that does not carry the collection is
    told of.
    """
    model, params = linen_model()
    params, apply, tokens = (
        updated(params, ["re:out/kernel"]),
        peft_jax.bind(model),
        np.arange(10, dtype=np.int32).reshape(2, 5),
    )
    out, found = capture(apply, {"x": input_of("out"), "y": output_of("out")})(params, tokens)
    np.testing.assert_array_equal(out, apply(params, tokens))
    expected = found["x"] @ materialize(params["out"]["kernel"]) + params["out"]["bias"]
    assert relative_error(found["y"], expected) < 1e-5
    with pytest.raises(
        ValueError,
        match=r"nothing was captured at 'blocks/up': .* does not carry the collection 'captured'",
    ):
        capture(apply, {"x": output_of("blocks/up")})(params, tokens)


def test_an_nnx_model_of_anyones_is_looked_into():
    model = Loop(nnx.Rngs(0))
    params, apply = updated(nnx_params(model), ["layers/1"]), peft_jax.bind(model)
    x = np.ones((2, 6), np.float32)
    out, found = jax.jit(capture(apply, {"x": input_of("layers"), "y": output_of("layers")}))(
        params, x
    )
    assert found["y"].shape == (2, 2, 6)
    assert relative_error(out, np.tanh(found["y"][1])) < 1e-6
    for i in range(2):
        own = params["layers"][i]
        assert (
            relative_error(found["y"][i], found["x"][i] @ materialize(own["kernel"]) + own["bias"])
            < 1e-5
        )
