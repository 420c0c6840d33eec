"""Prompts and prefixes among packed and padded rows, caches and sliding windows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

import peft_jax
from peft_jax.adapters import (
    adaption_prompt,
    cpt,
    multitask_prompt_tuning,
    p_tuning,
    prefix_tuning,
    prompt_tuning,
    reft,
    unipelt,
)
from peft_jax.core import Attachment
from peft_jax.knowledge.hooks import feed_forward
from tests.reference import family_checkpoint, perturb, random_tokens, relative_error

KEY = jax.random.key(0)
METHODS = {
    "prompt": lambda p: prompt_tuning(p, KEY, num_virtual_tokens=4, init="vocabulary"),
    "prefix": lambda p: prefix_tuning(p, KEY, num_virtual_tokens=4),
    "prefix_without_offset": lambda p: prefix_tuning(p, KEY, num_virtual_tokens=4, offset=False),
    "unipelt": lambda p: unipelt(p, KEY, rank=2, num_virtual_tokens=4, reduction_factor=8),
    "adaption": lambda p: adaption_prompt(p, KEY, adapter_len=4),
    "reft": lambda p: reft(p, KEY, rank=2, first=2, last=2),
}
TOKENS = random_tokens(2, 12)
SIZES = dict(
    vocab_size=96, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2
)
T5_SIZES = dict(
    vocab_size=96, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0
)


@pytest.fixture(scope="module", params=["llama2", "mistral_sliding"])
def base(request, tmp_path_factory):
    folder, _, _ = family_checkpoint(request.param, tmp_path_factory.mktemp("base"))
    model, params = peft_jax.load(folder)
    return model, params, jax.jit(peft_jax.bind(model))


@pytest.fixture(scope="module", params=METHODS)
def case(request, base):
    model, params, run = base
    return model, perturb(METHODS[request.param](params), scale=0.3), run, request.param


def test_packed_sequences_are_as_alone(case):
    _, params, run, _ = case
    lengths = [5, 4, 3]
    segments = np.repeat([1, 2, 0], lengths)[None].repeat(2, 0).astype(np.int32)
    positions = np.concatenate([np.arange(n) for n in lengths])[None].repeat(2, 0).astype(np.int32)
    packed = run(params, TOKENS, positions=positions, segment_ids=segments)
    for start, n in ((0, 5), (5, 4)):
        alone = run(params, TOKENS[:, start : start + n])
        assert relative_error(packed[:, start : start + n], alone) < 1e-5


def test_padding_on_the_left_changes_nothing(case):
    _, params, run, _ = case
    segments = np.ones_like(TOKENS)
    segments[:, :4] = 0
    positions = np.maximum(np.arange(12) - 4, 0)[None].repeat(2, 0).astype(np.int32)
    padded = run(params, TOKENS, positions=positions, segment_ids=segments)
    assert relative_error(padded[:, 4:], run(params, TOKENS[:, 4:])) < 1e-5


def test_cached_decoding_is_as_the_whole_pass(case):
    model, params, run, method = case
    if method == "reft":
        params = perturb(
            reft(jax.tree.map(lambda x: x, peft_jax.merge(_base_of(params))), KEY, rank=2, first=2)
        )
    apply, whole = peft_jax.bind(model), run(params, TOKENS)
    cache = model.empty_cache(2, 20)
    parts = []
    for start, end in ((0, 5), (5, 6), (6, 12)):  # positions are left to the cache
        logits, cache = apply(params, TOKENS[:, start:end], cache=cache)
        parts.append(logits)
    assert relative_error(jnp.concatenate(parts, axis=1), whole) < 1e-5


def _base_of(params):
    """The tree without what stands beside its modules."""
    if not isinstance(params, dict):
        return params
    return {k: _base_of(x) for k, x in params.items() if not isinstance(x, Attachment)}


def test_generation_continues_as_the_whole_pass(case):
    model, params, run, method = case
    if method == "reft":
        pytest.skip("what is last differs while a sequence grows")
    rows = TOKENS[:, :6]
    for _ in range(5):
        rows = np.concatenate(
            [rows, np.asarray(run(params, rows))[:, -1].argmax(-1)[:, None].astype(np.int32)],
            axis=1,
        )
    # rows of different lengths, so that one of them is padded
    out = peft_jax.generate(
        model,
        params,
        [TOKENS[0, :6].tolist(), TOKENS[1, :6].tolist(), [5]],
        max_tokens=5,
        eos_token_id=[],
    )
    assert out[:2] == rows[:, 6:].tolist()


def test_a_cache_without_room_for_the_prompt_is_refused(base):
    model, params, _ = base
    prompted = METHODS["prompt"](params)
    with pytest.raises(
        ValueError, match="the cache has 14 slots, and 12 tokens after a prompt of 4 need 16"
    ):
        peft_jax.bind(model)(prompted, TOKENS, cache=model.empty_cache(2, 14))


def test_a_closed_gate_leaves_the_base(base):
    model, params, run = base
    gated = perturb(METHODS["unipelt"](params), scale=0.3)

    def close(x):
        return (
            x.replace(gating_bias=jnp.full_like(x.gating_bias, -1e4))
            if hasattr(x, "gating_bias")
            else x
        )

    closed = jax.tree.map(close, gated, is_leaf=lambda x: isinstance(x, Attachment))
    assert relative_error(run(gated, TOKENS), run(params, TOKENS)) > 1e-2
    assert relative_error(run(closed, TOKENS), run(params, TOKENS)) < 1e-5


def test_local_layers_see_the_prefix_within_their_window(base):
    """Far tokens of a model whose layers are all local do not depend on the prefix."""
    model, params, run = base
    if model.config.sliding_window is None:
        pytest.skip("the model has no local layers")
    tokens = random_tokens(1, 40)
    a, b = (perturb(METHODS["prefix"](params), seed=s, scale=0.3) for s in (1, 2))
    difference = jnp.abs(run(a, tokens) - run(b, tokens)).max((0, 2))
    reach = model.config.num_layers * (model.config.sliding_window - 1)
    assert difference[reach:].max() < 1e-5
    assert difference[0] > 1e-2


def test_prompts_start_from_text_and_from_the_vocabulary(base):
    _, params, _ = base
    table = params["model"]["embed_tokens"]["embedding"]
    text = prompt_tuning(params, KEY, num_virtual_tokens=5, init="text", token_ids=[7, 8])
    np.testing.assert_array_equal(
        text["model"]["embed_tokens"]["tokens_default"].embeddings,
        table[jnp.asarray([7, 8, 7, 8, 7])],
    )
    drawn = METHODS["prompt"](params)["model"]["embed_tokens"]["tokens_default"].embeddings
    assert (jnp.abs(drawn[:, None] - table[None]).max(-1).min(-1) == 0).all()


def test_tasks_of_a_multitask_prompt_go_by_row(base):
    model, params, run = base
    tree = perturb(
        multitask_prompt_tuning(params, KEY, num_virtual_tokens=3, num_tasks=3), scale=0.3
    )
    out = run(tree, TOKENS, adapter_ids=jnp.asarray([2, 0]))
    assert relative_error(out[:1], run(tree, TOKENS[:1], adapter_ids=jnp.asarray([2]))) < 1e-5
    assert relative_error(out[:1], run(tree, TOKENS[:1], adapter_ids=jnp.asarray([1]))) > 1e-3
    with pytest.raises(ValueError, match="needs apply"):
        peft_jax.bind(model)(tree, TOKENS)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: METHODS["prompt"](METHODS["prompt"](p)), "has a prompt already"),
        (
            lambda p: METHODS["prefix"](METHODS["prefix"](p)),
            "prefix 'default' already; give this one another name",
        ),
        (lambda p: prompt_tuning(p, KEY, init="words"), "unknown init 'words'"),
        (
            lambda p: prompt_tuning(p, KEY, init="text", token_ids=[999]),
            "token_ids must be ids below 96",
        ),
        (
            lambda p: prompt_tuning(p, KEY, num_virtual_tokens=0),
            "num_virtual_tokens must be at least 1",
        ),
        (lambda p: p_tuning(p, KEY, encoder="gru"), "unknown encoder 'gru'"),
        (
            lambda p: multitask_prompt_tuning(p, KEY, num_tasks=0),
            "num_tasks and num_ranks",
        ),
        (
            lambda p: cpt(p, KEY, token_ids=[3, 4], token_types=[1]),
            "1 token_types for 2 token_ids",
        ),
        (lambda p: prefix_tuning(p, KEY, activation="rleu"), "Did you mean 'relu'"),
        (lambda p: prefix_tuning(p, KEY, gating="sequence"), "unknown gating 'sequence'"),
        (lambda p: prefix_tuning(p, KEY, targets="mlp"), "name no attention"),
        (
            lambda p: prefix_tuning({"embed": p["model"]["embed_tokens"]}, KEY),
            "no attention was found",
        ),
        (
            lambda p: adaption_prompt(p, KEY, adapter_layers=9),
            "between 1 and the 3 layers, got 9",
        ),
        (
            lambda p: adaption_prompt(p["lm_head"], KEY),
            "attention with projections of keys and values",
        ),
        (lambda p: prompt_tuning(p["lm_head"], KEY), "no token embedding"),
    ],
)
def test_bad_requests_are_refused_by_name(base, make, message):
    with pytest.raises(ValueError, match=message):
        make(base[1])


ENDS = {  # family -> the modules whose outputs are edited
    "llama2": "layers",
    "gpt2": "re:.*/h",
    "bert": "re:.*encoder/layer",
    "t5": "re:encoder/block",
}


@functools.cache
def ended(family, root):
    """A model, its tree and a function from a tree to states [2, 12, D] right after its last
    layer.
    """
    folder = root / family
    if family in ("bert", "t5"):
        config = (
            transformers.BertConfig(**SIZES)
            if family == "bert"
            else transformers.T5Config(**T5_SIZES)
        )
        made = (
            transformers.BertForMaskedLM
            if family == "bert"
            else transformers.T5ForConditionalGeneration
        )
        made(config).save_pretrained(folder)
    else:
        family_checkpoint(family, root)
    model, params = peft_jax.load(folder)
    apply = peft_jax.bind(model)
    if family == "t5":
        return params, jax.jit(lambda p: apply(p, TOKENS, method="encode")[0])
    return params, jax.jit(lambda p: apply(p, TOKENS))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("ends")


VIRTUAL = ["none", "prompt", "prefix", "prefix_without_offset"]


@pytest.mark.parametrize("virtual", VIRTUAL)
@pytest.mark.parametrize("family", ENDS)
def test_first_and_last_are_tokens_and_no_virtual_ones(root, family, virtual):
    """An intervention after the last layer moves the outputs of the tokens that it edits, and of no
    other one.
    """
    params, run = ended(family, root)
    last = 1 if family == "t5" else 2
    params = METHODS[virtual](params) if virtual != "none" else params
    params = reft(params, KEY, rank=2, first=2, last=3, targets=ENDS[family], layers=[last])
    before = run(params)
    virtual_ones = before.shape[1] - 12  # T5's encoder keeps them
    moved = np.abs(np.asarray(run(_intervened(params)) - before)).max((0, 2)) > 1e-6
    assert not moved[:virtual_ones].any()
    moved = moved[virtual_ones:]
    np.testing.assert_array_equal(moved, [True] * 2 + [False] * 7 + [True] * 3)


def _intervened(params):
    """The interventions alone moved."""

    def move(x):
        return x.replace(source_bias=x.source_bias + 1.0) if hasattr(x, "source_bias") else x

    return jax.tree.map(move, params, is_leaf=lambda x: hasattr(x, "source_bias"))


@pytest.mark.parametrize("family", ["llama2", "gpt2"])
def test_a_generated_token_is_neither_first_nor_last(root, family):
    """After the last layer an intervention reaches the tokens that it edits alone: of a cached
    prompt, not of what follows.
    """
    params, _ = ended(family, root)
    model, _ = peft_jax.load(root / family)
    apply = jax.jit(peft_jax.bind(model))
    edited = _intervened(
        reft(params, KEY, rank=2, first=2, last=3, targets=ENDS[family], layers=[2])
    )
    cache = model.empty_cache(2, 12)
    logits, cache = apply(edited, TOKENS[:, :6], cache=cache)
    whole = apply(params, TOKENS[:, :7])
    assert relative_error(logits[:, 2:3], whole[:, 2:3]) < 1e-5
    assert relative_error(logits[:, 3:6], whole[:, 3:6]) > 1e-3
    assert relative_error(apply(edited, TOKENS[:, 6:7], cache=cache)[0], whole[:, 6:7]) < 1e-5


def test_edits_of_a_tree_with_virtual_tokens_are_refused(root):
    params, _ = ended("llama2", root)
    assert (
        feed_forward(METHODS["prefix"](params)).layers == 3
    )  # a prefix leaves places what they are
    with pytest.raises(ValueError, match="the tree has virtual tokens"):
        feed_forward(METHODS["prompt"](params))
