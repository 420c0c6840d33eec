"""Attention against a plain softmax, with gradients; the TPU kernel in its interpreter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from transformers import Gemma3TextConfig

import peft_jax
from peft_jax.core.attachment import Attachment, attach
from peft_jax.core.reparametrised import node
from peft_jax.models.attention import attention, cudnn, make_mask, splash
from peft_jax.models.attention.splash import splash_attention, splash_supports
from peft_jax.models.blocks import fresh_params
from peft_jax.models.config import decoder_config
from peft_jax.models.decoder import Decoder
from tests.reference import FAMILIES, random_tokens, relative_error, torch_model


def plain(q, k, v, visible, scale, softcap, bias=0.0):
    H, K = q.shape[2], k.shape[2]
    k, v = jnp.repeat(k, H // K, axis=2), jnp.repeat(v, H // K, axis=2)
    scores = jnp.einsum("bthd,bshd->bhts", q, k) * scale
    scores = scores if softcap is None else softcap * jnp.tanh(scores / softcap)
    scores = scores + bias
    return jnp.einsum(
        "bhts,bshd->bthd", jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), -1), v
    )


def inputs(T, H=4, K=2, d=8, S=None):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = [(2, T, H, d), (2, S or T, K, d), (2, S or T, K, d)]
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("T", [24, 256])
def test_blocks_equal_plain_softmax_with_gradients(T, packed, window, softcap):
    q, k, v = inputs(T)
    positions = np.arange(T)[None].repeat(2, 0)
    segments = None
    if packed:
        segments = np.stack([np.r_[np.ones(T // 3), np.full(T - T // 3, 2)], np.ones(T)]).astype(
            np.int32
        )
        positions = positions - np.where(segments == 2, T // 3, 0)
    mask = make_mask(
        jnp.asarray(positions),
        jnp.asarray(positions),
        segments,
        segments,
        window=window,
        aligned=True,
    )
    visible = mask.visible(window is not None)

    def ours(q, k, v):
        return attention(q, k, v, mask, sliding=window is not None, scale=0.3, softcap=softcap)

    def reference(q, k, v):
        return plain(q, k, v, visible, 0.3, softcap)

    out, pull = jax.vjp(ours, q, k, v)
    expected, pull_expected = jax.vjp(reference, q, k, v)
    assert relative_error(out, expected) < 1e-5
    grad = jax.random.normal(jax.random.key(9), out.shape)
    for a, b in zip(pull(grad), pull_expected(grad), strict=True):
        assert relative_error(a, b) < 1e-5


def test_traced_choice_of_window():
    q, k, v = inputs(24)
    positions = jnp.arange(24)[None]
    mask = make_mask(positions, positions, None, None, window=5, aligned=True)
    for sliding in (False, True):
        traced = jax.jit(lambda s: attention(q, k, v, mask, sliding=s, scale=1.0))(sliding)
        assert relative_error(traced, attention(q, k, v, mask, sliding=sliding, scale=1.0)) < 1e-6


def test_unknown_implementation_is_refused():
    q, k, v = inputs(8)
    positions = jnp.arange(8)[None]
    mask = make_mask(positions, positions, None, None, window=None, aligned=True)
    with pytest.raises(ValueError, match="use xla, cudnn or splash"):
        attention(q, k, v, mask, scale=1.0, implementation="flash")


@pytest.mark.parametrize(("window", "softcap"), [(None, None), (100, None), (None, 5.0)])
def test_splash_kernel_equals_plain_softmax(window, softcap):
    q, k, v = inputs(256, d=128)
    segments = jnp.asarray(
        np.stack([np.r_[np.ones(100), np.full(156, 2)], np.ones(256)]).astype(np.int32)
    )
    positions = jnp.arange(256)[None].repeat(2, 0)
    mask = make_mask(positions, positions, segments, segments, window=window, aligned=True)
    out = splash_attention(
        q, k, v, segments, window=window, scale=0.1, softcap=softcap, interpret=True
    )
    expected = plain(q, k, v, mask.visible(window is not None), 0.1, softcap)
    assert relative_error(out, expected) < 2e-3
    assert splash_supports(q.shape)
    assert not splash_supports((1, 100, 4, 128))


def test_scanned_layers_that_differ_run_a_kernel_each_with_its_own_window(monkeypatch):
    """The splash kernel in its interpreter, in a scanned model of which only some layers slide."""
    kernel = splash.kernel.make_splash_mha
    monkeypatch.setattr(
        splash.kernel,
        "make_splash_mha",
        lambda *a, **options: kernel(*a, **{**options, "interpret": True}),
    )
    config = Gemma3TextConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=128,
        sliding_window=100,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    )
    models = {
        name: Decoder(decoder_config(config), attention_implementation=name)
        for name in ("xla", "splash")
    }
    params, tokens = fresh_params(models["xla"]), random_tokens(1, 256, vocab=64)
    hidden = {
        name: jax.jit(peft_jax.bind(model), static_argnames="method")(
            params, tokens, method="hidden"
        )
        for name, model in models.items()
    }
    assert relative_error(hidden["splash"], hidden["xla"]) < 1e-4


@pytest.fixture(scope="module", params=["gemma2_caps", "gemma3"])
def alternating(request, tmp_path_factory):
    """The folder of a tiny model in which layers with and without a sliding window take turns."""
    folder = tmp_path_factory.mktemp(request.param)
    torch_model(FAMILIES[request.param]()).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("remat", ["none", "full"])
def test_no_mask_is_kept_for_the_backward_pass(alternating, scan, remat):
    """What a packed and padded call keeps: 72 x 72 is the shape of a mask alone, once or once a
    layer.
    """
    T = 72
    model, params = peft_jax.load(alternating, scan_layers=scan, remat=remat)
    tokens, segments = random_tokens(2, T), np.ones((2, T), np.int32)
    segments[0, 40:], segments[1, 60:] = 2, 0
    apply = peft_jax.bind(model)
    kept = jax.eval_shape(
        lambda p: jax.vjp(lambda p: apply(p, tokens, segment_ids=segments).sum(), p)[1], params
    )
    assert len(jax.tree.leaves(kept)) > 10
    assert [x.shape for x in jax.tree.leaves(kept) if x.shape[-2:] == (T, T)] == []


def test_a_kernel_that_needs_a_mask_keeps_none_where_layers_differ(monkeypatch):
    """With XLA's attention in the place of cuDNN's kernel."""
    monkeypatch.setattr(cudnn, "DTYPES", (jnp.float32,))
    kernel = jax.nn.dot_product_attention
    monkeypatch.setattr(
        jax.nn,
        "dot_product_attention",
        lambda *a, implementation, **options: kernel(*a, implementation="xla", **options),
    )
    q, k, v = inputs(24)
    positions = jnp.arange(24)[None]
    segments = jnp.asarray(
        np.stack([np.r_[np.ones(10), np.full(14, 2)], np.ones(24)]).astype(np.int32)
    )
    mask = make_mask(positions, positions, segments, segments, window=5, aligned=True)

    def of(implementation):
        return lambda q, k, v: attention(
            q, k, v, mask, sliding=jnp.asarray(True), scale=1.0, implementation=implementation
        )

    out, pull = jax.vjp(of("cudnn"), q, k, v)
    expected, pull_expected = jax.vjp(of("xla"), q, k, v)
    assert [x.shape for x in jax.tree.leaves(pull) if x.shape[-2:] == (24, 24)] == []
    assert relative_error(out, expected) < 1e-5
    for a, b in zip(pull(out), pull_expected(out), strict=True):
        assert relative_error(a, b) < 1e-5


@node
class Scaled(Attachment):
    """Around an attention core: twice the values, and nothing else."""

    def around(self, call, operands):
        return call(operands.replace(value=2 * operands.value))


@node
class Apart(Attachment):
    """Around a stack: positions twice as far apart."""

    def around(self, call, inputs):
        return call(inputs.replace(positions=2 * inputs.positions))


def test_attachments_change_what_modules_are_called_with_by_name(tiny_folder):
    """Against a model whose weights do the same, and a call that says the same."""
    model, params = peft_jax.load(tiny_folder, scan_layers=False)
    apply = jax.jit(peft_jax.bind(model))
    tokens, positions = random_tokens(2, 6), np.arange(6)[None]
    attention = params["model"]["layers_0"]["self_attn"]
    twice = {**attention, "v_proj": jax.tree.map(lambda w: 2 * w, attention["v_proj"])}
    layer = {**params["model"]["layers_0"], "self_attn": twice}
    expected = apply({**params, "model": {**params["model"], "layers_0": layer}}, tokens)
    scaled = attach(params, {"model/layers_0/self_attn/core": {"scaled": Scaled()}})
    assert relative_error(apply(scaled, tokens), expected) < 1e-6
    moved = attach(params, {"model": {"apart": Apart()}})
    found = apply(moved, tokens, positions=positions)
    np.testing.assert_array_equal(found, apply(params, tokens, positions=2 * positions))
    assert relative_error(found, apply(params, tokens)) > 1e-3
