"""Adapters exchanged with PyTorch's PEFT, both ways, with the options that adapters in the wild
use.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import load_file, save_file

import peft_jax
from peft_jax.core import full
from tests.reference import (
    FAMILIES,
    perturb,
    random_tokens,
    relative_error,
    torch_logits,
    torch_model,
)

TOKENS = random_tokens(2, 12)
FROM_PEFT = {
    "plain": dict(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]),
    "all linear, rslora": dict(r=4, lora_alpha=8, target_modules="all-linear", use_rslora=True),
    "patterns": dict(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "up_proj"],
        rank_pattern={"up_proj": 2},
        alpha_pattern={"layers.1.*up_proj": 3},
    ),
    "ranks differ between layers": dict(
        r=4,
        target_modules=["q_proj", "down_proj"],
        rank_pattern={r".*layers\.1\.mlp\.down_proj": 7, "layers.0.self_attn.q_proj": 1},
    ),
    "some layers": dict(r=4, target_modules=["q_proj", "gate_proj"], layers_to_transform=[0, 2]),
    "regular expression": dict(r=4, target_modules=r".*layers\.[01]\..*(k|o)_proj"),
    "all biases": dict(r=4, target_modules=["q_proj", "down_proj"], bias="all"),
    "biases of LoRA": dict(r=4, target_modules=["q_proj", "down_proj"], bias="lora_only"),
    "whole modules": dict(
        r=4, target_modules=["v_proj"], modules_to_save=["lm_head", "input_layernorm"]
    ),
    "embedding": dict(r=4, target_modules=["embed_tokens", "k_proj"]),
    "head": dict(r=4, target_modules=["lm_head", "k_proj"]),
    "gaussian": dict(r=4, target_modules=["q_proj"], init_lora_weights="gaussian"),
}


def base_config(family):
    config = FAMILIES[family]()
    if family == "llama3_tied_biased":
        config.tie_word_embeddings = False
    return config


@pytest.fixture(scope="module", params=["llama3_tied_biased", "gemma2_caps"])
def base(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    torch_model(base_config(request.param)).save_pretrained(folder)
    model, params = peft_jax.load(folder)
    return request.param, folder, model, params, jax.jit(peft_jax.bind(model))


def fresh(name):
    return torch_model(base_config(name))


@pytest.mark.parametrize("kind", FROM_PEFT)
@pytest.mark.filterwarnings("ignore")
def test_adapters_from_pytorch(base, kind, tmp_path):
    name, _, _, params, run = base
    options = FROM_PEFT[kind]
    adapted = get_peft_model(fresh(name), LoraConfig(**options))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    expected = torch_logits(adapted, TOKENS)
    adapted.save_pretrained(tmp_path)
    loaded = peft_jax.load_adapter(params, tmp_path)
    assert relative_error(run(loaded, TOKENS), expected) < 1e-4
    assert relative_error(run(params, TOKENS), expected) > 1e-3  # the adapter does something
    # and out again
    peft_jax.save_adapter(tmp_path / "again", loaded)
    back = PeftModel.from_pretrained(fresh(name), tmp_path / "again")
    assert relative_error(torch_logits(back.eval(), TOKENS), expected) < 1e-4


TO_PEFT = {
    "plain": dict(rank=4, alpha=8),
    "rslora": dict(rank=4, alpha=8, rslora=True, dropout=0.1),
    "patterns": dict(
        rank=4,
        targets=["q_proj", "up_proj"],
        rank_pattern={"up_proj": 2},
        alpha_pattern={"q_proj": 12.0},
    ),
    "extras": dict(
        rank=2, targets=["o_proj"], modules_to_save=["norm", "post_attention_layernorm"]
    ),
}


@pytest.mark.parametrize("kind", TO_PEFT)
@pytest.mark.filterwarnings("ignore")
def test_adapters_to_pytorch(base, kind, tmp_path):
    name, folder, model, params, run = base
    lora = perturb(peft_jax.lora(params, jax.random.key(1), **TO_PEFT[kind]))
    peft_jax.save_adapter(tmp_path, lora, base=str(folder))
    loaded = PeftModel.from_pretrained(fresh(name), tmp_path)
    assert relative_error(torch_logits(loaded.eval(), TOKENS), run(lora, TOKENS)) < 1e-4
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(folder)


@pytest.mark.filterwarnings("ignore")
def test_biases_to_pytorch(base, tmp_path):
    name, _, _, params, run = base
    if name != "llama3_tied_biased":
        pytest.skip("no biases in this family")
    for bias in ("all", "lora_only"):
        lora = perturb(
            peft_jax.lora(params, jax.random.key(1), rank=2, targets="q_proj", bias=bias)
        )
        peft_jax.save_adapter(tmp_path / bias, lora)
        loaded = PeftModel.from_pretrained(fresh(name), tmp_path / bias)
        assert relative_error(torch_logits(loaded.eval(), TOKENS), run(lora, TOKENS)) < 1e-4


def test_a_tied_embedding_adapted_alone_is_apart_from_the_head(base, tmp_path):
    """PEFT adapts the look-up and leaves the tied head as it was: merged, there are two arrays."""
    name, _, _, params, run = base
    adapted = get_peft_model(
        fresh(name), LoraConfig(r=2, target_modules=["embed_tokens"], init_lora_weights=False)
    )
    adapted.save_pretrained(tmp_path)
    loaded = peft_jax.load_adapter(params, tmp_path)
    assert (
        relative_error(run(peft_jax.merge(loaded), TOKENS), torch_logits(adapted.eval(), TOKENS))
        < 1e-4
    )
    assert ("output_embedding" in loaded["model"]["embed_tokens"]) == (name == "gemma2_caps")


def test_padding_of_ranks_stays_zero_in_training(base, tmp_path):
    """Layers of a stacked tree that differ in rank are padded; the padding never learns, so export
    strips it again.
    """
    name, _, _, params, run = base
    adapted = get_peft_model(
        fresh(name),
        LoraConfig(r=3, target_modules=["q_proj"], rank_pattern={"layers.1.self_attn.q_proj": 1}),
    )
    adapted.save_pretrained(tmp_path / "in")
    loaded = peft_jax.load_adapter(params, tmp_path / "in")
    trainable, frozen = peft_jax.partition(loaded)
    import optax

    optimizer = optax.adamw(0.01, weight_decay=0.1)
    state = optimizer.init(trainable)
    for _ in range(3):
        grads = jax.grad(lambda t: (run(peft_jax.combine(t, frozen), TOKENS) ** 2).mean())(
            trainable
        )
        updates, state = optimizer.update(grads, state, trainable)
        trainable = optax.apply_updates(trainable, updates)
    peft_jax.save_adapter(tmp_path / "out", peft_jax.combine(trainable, frozen))
    shapes = {
        k.split("layers.")[1][:1]: v.shape[0]
        for k, v in load_file(tmp_path / "out/adapter_model.safetensors").items()
        if "lora_A" in k
    }
    assert shapes["0"] == 3
    assert shapes["1"] == 1


@pytest.fixture
def adapter(base, tmp_path):
    peft_jax.save_adapter(
        tmp_path / "a", perturb(peft_jax.lora(base[3], jax.random.key(1), rank=2, targets="q_proj"))
    )
    return tmp_path / "a"


def edit_config(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(folder, change):
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
BAD = {
    "another kind": (
        lambda f: edit_config(f, peft_type="POLY"),
        "peft_type 'POLY' is not supported",
    ),
    "dora": (
        lambda f: edit_config(f, use_dora=True),
        "lacks lora_magnitude_vector, which use_dora needs",
    ),
    "lora bias": (
        lambda f: edit_config(f, lora_bias=True),
        "option lora_bias=True is not supported",
    ),
    "pissa": (
        lambda f: edit_config(f, init_lora_weights="pissa"),
        "changes the base model's weights",
    ),
    "no rank": (lambda f: edit_config(f, r=None), "needs a number r, got None"),
    "wrong rank": (lambda f: edit_config(f, r=3), "expected rank 3"),
    "half": (lambda f: edit_tensors(f, lambda t: t.pop(A)), "only one of lora_A and lora_B"),
    "prefix": (
        lambda f: edit_tensors(f, lambda t: t.update(x=t.pop(A))),
        "tensor x does not begin with",
    ),
    "integers": (
        lambda f: edit_tensors(f, lambda t: t.update({A: t[A].astype(np.int32)})),
        "expected floating point",
    ),
    "magnitude": (
        lambda f: edit_tensors(
            f, lambda t: t.update({A.replace("lora_A.weight", "lora_magnitude_vector"): t[A]})
        ),
        "has lora_magnitude_vector, but the adapter does not say use_dora",
    ),
    "another model": (
        lambda f: edit_tensors(
            f,
            lambda t: [
                t.update({k.replace("layers.0", "layers.9"): t.pop(k)})
                for k in list(t)
                if "layers.0" in k
            ],
        ),
        r"has model.layers.9.self_attn.q_proj, which the model lacks. Did you mean",
    ),
    "another width": (
        lambda f: edit_tensors(f, lambda t: t.update({A: np.zeros((2, 31), np.float32)})),
        "the adapter's arrays for model.layers.0.self_attn.q_proj are",
    ),
    "pickle": (
        lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"),
        r"adapter_model.bin \(pickle, which is not read\)",
    ),
    "truncated": (
        lambda f: (f / "adapter_model.safetensors").write_bytes(b"123"),
        "not a readable safetensors file",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_cannot_be_loaded_is_refused_by_name(base, adapter, kind):
    harm, message = BAD[kind]
    harm(adapter)
    with pytest.raises(ValueError, match=message):
        peft_jax.load_adapter(base[3], adapter)


def test_what_cannot_be_saved_is_refused_by_name(base, tmp_path):
    params = base[3]
    with pytest.raises(ValueError, match="no adapter named 'default'"):
        peft_jax.save_adapter(tmp_path / "x", params)
    with pytest.raises(ValueError, match="fully fine-tuned, which an adapter cannot hold"):
        peft_jax.save_adapter(tmp_path / "x", full(params))
    assert not (tmp_path / "x").exists()


def test_two_adapters_are_saved_apart(base, tmp_path):
    params = base[3]
    one = perturb(peft_jax.lora(params, jax.random.key(1), rank=2, targets="q_proj", adapter="one"))
    two = perturb(peft_jax.lora(one, jax.random.key(2), rank=3, targets="q_proj", adapter="two"))
    for name, rank in (("one", 2), ("two", 3)):
        peft_jax.save_adapter(tmp_path / name, two, name=name)
        assert json.loads((tmp_path / name / "adapter_config.json").read_text())["r"] == rank
    loaded = peft_jax.load_adapter(
        peft_jax.load_adapter(params, tmp_path / "one", name="one"), tmp_path / "two", name="two"
    )
    run = base[4]
    assert relative_error(run(loaded, TOKENS), run(two, TOKENS)) < 1e-5
    assert jnp.issubdtype(jax.tree.leaves(loaded)[0].dtype, jnp.floating)
