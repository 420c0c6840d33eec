"""Physically smaller decoders: what stays computes what it did, `transformers` agrees, importance
is what the papers define.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import peft_jax
from peft_jax.core import places
from peft_jax.models import stack_layers, unstack_layers
from peft_jax.models.blocks import abstract_params
from peft_jax.models.decoder import DecoderLayer
from peft_jax.pruning.importance import block_influence, importance
from peft_jax.pruning.structured import keep_best, prune_structured, shrink, sizes_for
from peft_jax.pruning.vocabulary import prune_vocabulary
from tests.reference import FAMILIES, family_checkpoint, random_tokens, relative_error

OTHERS = (
    "gpt2",
    "gpt2_scaled_untied",
    "mixtral_sliding",
    "qwen2_moe",
    "qwen3_moe",
)  # not of `Decoder`'s one feed-forward

L = 3


def kept(model, rng):
    """Random numbers of everything that can go, different in each layer."""
    c = model.config

    def rows(n, keep):
        return np.stack([rng.permutation(n)[:keep] for _ in range(c.num_layers)])

    return {
        "layers": list(range(c.num_layers))[1:],
        "kv_heads": rows(c.num_kv_heads, 1),
        "units": rows(c.intermediate_size, 20),
        "channels": rng.permutation(c.hidden_size)[:24],
        "tokens": np.unique([0, 1, 2, *rng.permutation(c.vocab_size)[:60]]),
    }


def logits_of(folder, tokens):
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
        return model(torch.tensor(tokens)).logits.numpy()


@pytest.mark.parametrize(
    "family",
    [
        n
        for n in FAMILIES
        if n not in ("llama_linear", "llama_dynamic", "llama_yarn", "phi3_longrope", *OTHERS)
    ],
)
def test_transformers_agrees(family, tmp_path):
    folder, _, _ = family_checkpoint(family, tmp_path)
    model, params = peft_jax.load(folder)
    small, tree = shrink(model, params, **kept(model, np.random.default_rng(0)))
    assert small.config.num_layers == model.config.num_layers - 1
    peft_jax.save(tmp_path / "small", small, tree)
    tokens = random_tokens(2, 24, vocab=small.config.vocab_size)
    ours = jax.jit(peft_jax.bind(small))(tree, tokens)
    assert relative_error(ours, logits_of(tmp_path / "small", tokens)) < 2e-5
    again, loaded = peft_jax.load(tmp_path / "small")
    assert again.config == dataclasses.replace(small.config, hf_config=again.config.hf_config)
    jax.tree.map(np.testing.assert_array_equal, loaded, tree)


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    folder, tokens, _ = family_checkpoint("llama2", tmp_path_factory.mktemp("structured"))
    model, params = peft_jax.load(folder)
    return model, params, tokens, [{"tokens": random_tokens(2, 16, seed=i)} for i in range(2)]


@pytest.mark.parametrize("part", ["heads", "kv_heads", "units", "channels", "tokens"])
def test_what_contributes_nothing_can_go(decoder, part):
    """Weights of the parts that are to go are made to count for nothing; without them the logits
    are the same.
    """
    model, params, tokens, _ = decoder
    c, rng = model.config, np.random.default_rng(1)
    tree = jax.tree.map(np.array, params)
    layers = tree["model"]["layers"]
    stay = {
        "heads": np.array([[0, 2], [1, 3], [1, 2]]),
        "kv_heads": np.array([[0], [1], [1]]),
        "units": np.stack([rng.permutation(c.intermediate_size)[:20] for _ in range(L)]),
        "channels": np.arange(c.hidden_size),
        "tokens": np.arange(3, 90),
    }[part]
    if part in ("heads", "kv_heads"):
        heads = stay if part == "heads" else np.stack([2 * stay[:, 0], 2 * stay[:, 0] + 1], 1)
        for layer in range(L):
            gone = [h for h in range(4) if h not in heads[layer]]
            layers["self_attn"]["o_proj"]["kernel"].reshape(L, 4, 8, 32)[layer, gone] = 0
    if part == "units":
        for layer in range(L):
            layers["mlp"]["down_proj"]["kernel"][
                layer, np.setdiff1d(np.arange(c.intermediate_size), stay[layer])
            ] = 0
    expected = np.asarray(peft_jax.bind(model)(tree, tokens))
    if part == "tokens":
        with pytest.raises(ValueError, match="tokens leave out 1, the model's bos_token_id"):
            shrink(model, tree, tokens=stay)
        stay = np.arange(0, 90)
        tokens = np.minimum(tokens, 89)
        expected = np.asarray(peft_jax.bind(model)(tree, tokens))[..., stay]
    small, less = shrink(model, tree, **{part: stay})
    assert relative_error(peft_jax.bind(small)(less, tokens), expected) < 1e-5


def test_looped_equals_scanned(decoder):
    model, params, _, _ = decoder
    what = kept(model, np.random.default_rng(2))
    small, tree = shrink(model, params, **what)
    looped, other = shrink(model.clone(scan_layers=False), unstack_layers(params), **what)
    assert not looped.scan_layers
    jax.tree.map(np.testing.assert_array_equal, stack_layers(other), tree)


def hidden_states(model, params, tokens):
    """Inputs and outputs of every layer, from Flax's own capture of a looped model."""
    looped, tree = model.clone(scan_layers=False), unstack_layers(params)
    _, state = looped.apply(
        {"params": tree},
        tokens,
        capture_intermediates=lambda m, _: isinstance(m, DecoderLayer),
        mutable=["intermediates"],
    )
    found = state["intermediates"]["model"]
    outputs = [found[f"layers_{i}"]["__call__"][0][0] for i in range(model.config.num_layers)]
    return [params["model"]["embed_tokens"]["embedding"][tokens], *outputs]


def test_block_influence_is_shortgpts(decoder):
    model, params, _, batches = decoder
    states = [hidden_states(model, params, b["tokens"]) for b in batches]

    def cosine(a, b):
        return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)

    expected = [
        np.mean([1 - cosine(np.asarray(s[i]), np.asarray(s[i + 1])) for s in states])
        for i in range(L)
    ]
    np.testing.assert_allclose(block_influence(model, params, batches), expected, rtol=1e-5)
    looped = block_influence(model.clone(scan_layers=False), unstack_layers(params), batches)
    np.testing.assert_allclose(looped, expected, rtol=1e-5)


def test_importance_is_the_papers(decoder):
    """Minitron's and FLAP's scores, of units gathered by PyTorch hooks on the same weights."""
    model, params, _, batches = decoder
    tokens = np.concatenate([b["tokens"] for b in batches])
    torch_model = AutoModelForCausalLM.from_config(_hf(model)).eval()
    state = {k: v for k, v in _state(model, params).items()}
    torch_model.load_state_dict(state)
    seen = {}
    for i, layer in enumerate(torch_model.model.layers):
        for name, module in (("units", layer.mlp.down_proj), ("heads", layer.self_attn.o_proj)):
            module.register_forward_hook(
                lambda m, x, y, key=(name, i): seen.__setitem__(
                    key, x[0].detach().numpy().reshape(-1, x[0].shape[-1])
                )
            )
    with torch.no_grad():
        torch_model(torch.tensor(tokens))
    found = importance(model, params, batches)
    units = np.stack([np.sqrt((seen["units", i] ** 2).mean(0)) for i in range(L)])
    heads = np.stack(
        [np.sqrt((seen["heads", i] ** 2).mean(0).reshape(4, 8).sum(-1)) for i in range(L)]
    )
    assert relative_error(found["units"], units) < 1e-5
    assert relative_error(found["heads"], heads) < 1e-5
    flap = importance(model, params, batches, score="fluctuation")
    norms = [
        (layer.mlp.down_proj.weight.detach().numpy() ** 2).sum(0)
        for layer in torch_model.model.layers
    ]
    fluctuation = np.stack([seen["units", i].var(0) * norms[i] for i in range(L)])
    assert relative_error(np.square(flap["units"]), fluctuation) < 1e-4


def _hf(model):
    from transformers import LlamaConfig

    return LlamaConfig(**json.loads(model.config.hf_config))


def _state(model, params):
    from peft_jax.hub.names import tensors_of

    state = {}
    for path, w in places(params).items():
        for t in tensors_of(path, L):
            value = np.asarray(w if t.layer is None else w[t.layer])
            state[t.name] = torch.tensor(value.T.copy() if t.transposed else value.copy())
    return state


@pytest.mark.parametrize("score", ["activation", "fluctuation", "magnitude"])
def test_chosen_parts(decoder, score):
    model, params, tokens, batches = decoder
    small, tree = prune_structured(
        model, params, batches, layers=2, kv_heads=1, heads=1, units=24, channels=16, score=score
    )
    c = small.config
    assert (c.num_layers, c.num_heads, c.num_kv_heads, c.intermediate_size, c.hidden_size) == (
        2,
        1,
        1,
        24,
        16,
    )
    assert np.isfinite(peft_jax.bind(small)(tree, tokens)).all()
    units = importance(model, params, batches, score=score)["units"]
    only, tree = prune_structured(model, params, batches, units=24, score=score)
    best = np.sort(np.argsort(-np.asarray(units[1]))[:24])
    np.testing.assert_array_equal(
        tree["model"]["layers"]["mlp"]["up_proj"]["kernel"][1],
        params["model"]["layers"]["mlp"]["up_proj"]["kernel"][1][:, best],
    )


@pytest.mark.parametrize("scan", [True, False])
def test_compensation_keeps_the_mean_output(decoder, scan, tmp_path):
    """With FLAP's biases the mean of every layer's output on the calibration data is nearer to what
    it was.
    """
    model, params, _, batches = decoder
    model, params = (
        model.clone(scan_layers=scan),
        params if scan else unstack_layers(params),
    )
    apply = peft_jax.bind(model)
    dense = np.asarray(apply(params, batches[0]["tokens"]))
    errors = []
    for compensate in (False, True):
        small, tree = prune_structured(
            model, params, batches, units=24, kv_heads=1, score="fluctuation", compensate=compensate
        )
        errors.append(
            np.abs(
                np.asarray(peft_jax.bind(small)(tree, batches[0]["tokens"])).mean((0, 1))
                - dense.mean((0, 1))
            ).mean()
        )
    assert errors[1] < errors[0]
    peft_jax.save(tmp_path, small, tree)
    tokens = batches[0]["tokens"]
    assert relative_error(peft_jax.bind(small)(tree, tokens), logits_of(tmp_path, tokens)) < 1e-5


@pytest.mark.parametrize("by", ["layers", "width"])
@pytest.mark.parametrize("keep", [0.8, 0.7, 0.5])
def test_sizes_meet_the_budget(by, keep):
    model, _ = peft_jax.load("builtin:base")
    sizes = sizes_for(model, keep, by)

    def count(m):
        return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(abstract_params(m)))

    numbers = {
        "layers": range(sizes.get("layers", 6)),
        "units": [range(sizes.get("units", 704))] * 6,
    }
    numbers["kv_heads"] = [range(sizes.get("kv_heads", 4))] * 6
    small, _ = shrink(
        model,
        jax.tree.map(jnp.zeros_like, _params()),
        **{k: v for k, v in numbers.items() if k in sizes},
    )
    share = count(small) / count(model)
    assert share <= keep
    assert share > keep - (0.14 if by == "layers" else 0.002)


def _params():
    return peft_jax.load("builtin:base")[1]


def test_a_smaller_vocabulary(tmp_path):
    """Texts of the tokens that stay are tokenized as before and have the same logits over them."""
    model, params = peft_jax.load("builtin:base")
    tokenizer = peft_jax.load_tokenizer("builtin:base")
    texts = [
        "It was the best of times, it was the worst of times.",
        "To be, or not to be, that is the question.",
    ] * 3
    ids, smaller = prune_vocabulary(tokenizer, texts, keep=400)
    assert len(ids) <= 400
    assert len(smaller) == len(ids)
    small, tree = shrink(model, params, tokens=ids)
    for text in [*texts[:2], "Something unheard of: Ωmega & Δelta!"]:
        assert smaller.decode(smaller(text)["input_ids"], skip_special_tokens=True) == text
    for text in texts[:2]:
        old, new = tokenizer(text)["input_ids"], smaller(text)["input_ids"]
        assert [ids[i] for i in new] == old
        before = peft_jax.bind(model)(params, np.array([old]))
        assert (
            relative_error(
                peft_jax.bind(small)(tree, np.array([new])), np.asarray(before)[..., ids]
            )
            < 1e-5
        )
    assert smaller.bos_token_id == int(np.searchsorted(ids, tokenizer.bos_token_id))
    assert json.loads(small.config.hf_config)["eos_token_id"] == smaller.eos_token_id
    peft_jax.save(tmp_path, small, tree, tokenizer=smaller)
    assert (
        peft_jax.load_tokenizer(tmp_path)(texts[0])["input_ids"] == smaller(texts[0])["input_ids"]
    )
    with pytest.raises(ValueError, match="keep=10 is below the"):
        prune_vocabulary(tokenizer, texts, keep=10)
    with pytest.raises(ValueError, match="only fast byte-pair tokenizers"):
        prune_vocabulary(object(), texts, keep=10)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ({"layers": [0, 3]}, "layers has 3, but there are 3"),
        ({"layers": []}, "layers must leave at least one of 3"),
        ({"channels": [1, 1, 2]}, "channels names 1 twice"),
        (
            {"units": [[0, 1], [0, 1, 2], [0, 1]]},
            "units differ in number from layer to layer, which a llama config cannot say",
        ),
        ({"units": [[0, 1]]}, "units has 1 rows, one for each of the 3 layers"),
        ({"heads": [[0, 1]] * 3}, "heads of layer 0 must be as many for each key/value head"),
        ({"kv_heads": [[0, -1]] * 3}, "kv_heads of layer 0 has -1"),
        (
            {"heads": [[0, 1, 3]] * 3, "kv_heads": [[0, 1]] * 3},
            "must be as many for each key/value head",
        ),
        (
            {"channels": range(31)},
            "transformers has no llama model of .*'hidden_size': 31.*not a multiple",
        ),
    ],
    ids=lambda v: str(v)[:40],
)
def test_bad_input_is_refused_by_name(decoder, what, message):
    with pytest.raises(ValueError, match=message):
        shrink(decoder[0], decoder[1], **what)


def test_more_bad_input_is_refused_by_name(decoder):
    model, params, _, batches = decoder
    with pytest.raises(ValueError, match="is a Quantized; merge or densify before shrink"):
        shrink(model, peft_jax.quantize(params, "int8"), layers=[0])
    with pytest.raises(ValueError, match="units must leave between 1 and 48, got 49"):
        prune_structured(model, params, batches, units=49)
    with pytest.raises(ValueError, match="heads=3 is not a multiple of the 2 key/value heads"):
        prune_structured(model, params, batches, heads=3)
    with pytest.raises(ValueError, match="no batch to calibrate on"):
        prune_structured(model, params, [], units=4)
    with pytest.raises(ValueError, match="unknown importance 'size'"):
        prune_structured(model, params, batches, units=4, score="size")
    with pytest.raises(ValueError, match="leave no layer"):
        sizes_for(model, 0.1, "layers")
    with pytest.raises(ValueError, match=r"must lie in \(0, 1\], got 1.5"):
        sizes_for(model, 1.5, "width")
    np.testing.assert_array_equal(keep_best([[3.0, 1.0, 2.0]], 2), [[0, 2]])


def test_compensation_of_other_families_is_refused(tmp_path):
    folder, _, _ = family_checkpoint("qwen3_tied", tmp_path)
    model, params = peft_jax.load(folder)
    with pytest.raises(ValueError, match="which a qwen3 config cannot say"):
        prune_structured(
            model, params, [{"tokens": random_tokens(1, 8)}], units=24, compensate=True
        )
