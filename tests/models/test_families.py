"""Every family against PyTorch transformers, through the real loading code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from transformers import AutoModelForCausalLM, T5Config

import peft_jax
from peft_jax.models.config import DECODERS, decoder_config
from peft_jax.models.layers import stack_layers, unstack_layers
from tests.reference import FAMILIES, family_checkpoint, random_tokens, relative_error, torch_logits


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("families")


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, root):
    folder, tokens, logits = family_checkpoint(request.param, root)
    model, params = peft_jax.load(folder)
    run = jax.jit(lambda p, t, **k: model.apply({"params": p}, t, **k))
    return folder, tokens, logits, model, params, run


def test_logits_match_pytorch(family):
    _, tokens, logits, _, params, run = family
    assert relative_error(run(params, tokens), logits) < 1e-4


def test_looped_layers_equal_scanned(family):
    folder, tokens, logits, _, params, _ = family
    model, looped = peft_jax.load(folder, scan_layers=False)
    assert relative_error(model.apply({"params": looped}, tokens), logits) < 1e-4
    same = jax.tree.map(lambda a, b: bool((a == b).all()), unstack_layers(params), looped)
    assert all(jax.tree.leaves(same))
    assert all(
        jax.tree.leaves(
            jax.tree.map(lambda a, b: bool((a == b).all()), stack_layers(looped), params)
        )
    )


def test_left_padding_changes_nothing(family):
    _, tokens, logits, _, params, run = family
    pad = np.zeros((2, 5), np.int32)
    padded = np.concatenate([pad, tokens], axis=1)
    segments = np.concatenate([pad, np.ones_like(tokens)], axis=1)
    positions = np.concatenate(
        [pad, np.broadcast_to(np.arange(24, dtype=np.int32), (2, 24))], axis=1
    )
    out = run(params, padded, segment_ids=segments, positions=positions)[:, 5:]
    assert relative_error(out, logits) < 1e-4


def test_packed_segments_are_apart(family):
    _, tokens, _, _, params, run = family
    first, second = tokens[:1, :9], tokens[1:, :7]
    packed = np.concatenate([first, second], axis=1)
    segments = np.asarray([[1] * 9 + [2] * 7], np.int32)
    positions = np.asarray([[*range(9), *range(7)]], np.int32)
    out = run(params, packed, segment_ids=segments, positions=positions)
    assert relative_error(out[:, :9], run(params, first)) < 1e-5
    assert relative_error(out[:, 9:], run(params, second)) < 1e-5


def test_cached_decoding_equals_one_pass(family):
    _, tokens, _, model, params, run = family
    tokens = tokens[:, :14]  # below LongRoPE's switch, which depends on the length seen so far
    whole = run(params, tokens)
    logits, cache = run(params, tokens[:, :8], cache=model.empty_cache(2, 20))
    parts = [logits]
    for i in range(8, 14):
        logits, cache = run(params, tokens[:, i : i + 1], cache=cache)
        parts.append(logits)
    assert relative_error(jnp.concatenate(parts, axis=1), whole) < 1e-5


def test_export_loads_in_pytorch(family, tmp_path):
    _, tokens, logits, model, params, _ = family
    peft_jax.save(tmp_path / "out", model, params, max_shard_bytes=20_000)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")
    np.testing.assert_array_equal(torch_logits(back, tokens), logits)
    _, again = peft_jax.load(tmp_path / "out")
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), again, params)))


def test_bfloat16_stays_close(family):
    folder, tokens, logits, *_ = family
    model, params = peft_jax.load(folder, dtype="bfloat16")
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    out = np.asarray(model.apply({"params": params}, tokens), np.float32)
    assert np.abs(out - logits).mean() / np.abs(logits).mean() < 0.1


def test_unsupported_family_lists_the_supported():
    with pytest.raises(
        ValueError, match=r"'t5' is not supported; supported families: gemma, .*smollm3"
    ):
        decoder_config(T5Config())
    assert len(DECODERS) == 13


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_rematerialised_gradients_are_the_same(root, remat):
    folder, tokens, _ = family_checkpoint("llama2", root)
    grads = []
    for kind in ("none", remat):
        model, params = peft_jax.load(folder, remat=kind)
        grads.append(
            jax.grad(lambda p, m=model: (m.apply({"params": p}, tokens) ** 2).mean())(params)
        )
    for a, b in zip(*map(jax.tree.leaves, grads), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_stacking_refuses_layers_that_differ(root):
    _, params = peft_jax.load(family_checkpoint("llama2", root)[0], scan_layers=False)
    params["model"]["layers_1"]["mlp"]["up_proj"]["kernel"] = jnp.zeros((32, 40))
    with pytest.raises(ValueError, match="cannot be stacked"):
        stack_layers(params)
    with pytest.raises(ValueError, match="not stacked"):
        unstack_layers(params)


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_compile_time_does_not_grow_with_depth(kind):
    from transformers import Gemma3TextConfig, LlamaConfig

    from peft_jax.models.blocks import abstract_params
    from peft_jax.models.decoder import Decoder

    make, depths = {"llama": (LlamaConfig, (2, 8)), "gemma3": (Gemma3TextConfig, (7, 26))}[kind]
    sizes = []
    for layers in depths:
        config = make(
            hidden_size=16,
            intermediate_size=16,
            num_attention_heads=2,
            num_key_value_heads=2,
            num_hidden_layers=layers,
            **({} if kind == "llama" else {"sliding_window": 4, "head_dim": 8}),
        )
        model = Decoder(decoder_config(config))
        lowered = jax.jit(lambda p, t, m=model: m.apply({"params": p}, t)).lower(
            abstract_params(model), random_tokens(1, 8)
        )
        sizes.append(len(lowered.as_text()))
    assert abs(sizes[0] - sizes[1]) < 0.01 * sizes[0]
