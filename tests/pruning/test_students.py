"""Students of some of their teacher's layers."""

import json

import jax
import numpy as np
import pytest
import torch
import transformers as tr

import peft_jax
from peft_jax.hub.checkpoint import load_fresh
from peft_jax.models import unstack_layers
from peft_jax.pruning.students import spaced, take_layers
from peft_jax.quantization import NF4
from tests.reference import relative_error

SMALL = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
}
KINDS = ["sliding_attention", "full_attention"]
MODELS = {
    "bert": (lambda: tr.BertForMaskedLM(tr.BertConfig(**SMALL)), "bert.encoder.layer"),
    "gpt2": (
        lambda: tr.GPT2LMHeadModel(
            tr.GPT2Config(
                vocab_size=40, n_embd=16, n_layer=4, n_head=2, bos_token_id=1, eos_token_id=2
            )
        ),
        "transformer.h",
    ),
    "gemma3": (
        lambda: tr.Gemma3ForCausalLM(
            tr.Gemma3TextConfig(
                **SMALL,
                num_key_value_heads=1,
                head_dim=8,
                layer_types=["sliding_attention", "full_attention"] * 2,
            )
        ),
        "model.layers",
    ),
}


@pytest.mark.parametrize("looped", [False, True])
@pytest.mark.parametrize("family", MODELS)
def test_the_student_is_transformers_with_these_layers(family, looped, tmp_path):
    torch.manual_seed(0)
    make, stack = MODELS[family]
    reference = make().eval()
    reference.save_pretrained(tmp_path / "teacher")
    model, params = peft_jax.load(tmp_path / "teacher", scan_layers=not looped)
    student, small = take_layers(model, params, [0, 3])
    peft_jax.save(tmp_path / "student", student, small)
    theirs = type(reference).from_pretrained(tmp_path / "student").eval()
    config = json.loads((tmp_path / "student" / "config.json").read_text())
    assert config.get("layer_types", KINDS) == KINDS
    layers, kept = (m.get_submodule(stack) for m in (reference, theirs))
    for i, j in enumerate((0, 3)):
        for a, b in zip(kept[i].parameters(), layers[j].parameters(), strict=True):
            torch.testing.assert_close(a, b)
    tokens = np.arange(12).reshape(2, 6) + 3
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
    assert relative_error(peft_jax.bind(student)(small, tokens), expected) < 1e-5


def test_nodes_are_taken_with_their_layers(tiny_folder):
    model, params = peft_jax.load(tiny_folder)
    moved = peft_jax.lora(peft_jax.quantize(params, NF4(block_size=16)), jax.random.key(0), rank=2)
    student, small = take_layers(model, moved, [1])
    tokens = np.arange(10).reshape(2, 5)
    looped = unstack_layers(moved)
    looped["model"] = {
        k if k != "layers_1" else "layers_0": v
        for k, v in looped["model"].items()
        if k != "layers_0"
    }
    expected = peft_jax.bind(student.clone(scan_layers=False))(looped, tokens)
    assert relative_error(peft_jax.bind(student)(small, tokens), expected) < 1e-6


def test_spacing():
    assert spaced(12, 6) == [0, 2, 4, 7, 9, 11]  # DistilBERT's
    assert spaced(6, 1) == [0]
    assert spaced(3, 3) == [0, 1, 2]
    with pytest.raises(ValueError, match="keeps between 1 and 3, got 4"):
        spaced(3, 4)


def test_what_cannot_be_taken_is_refused(tiny_folder):
    model, params = peft_jax.load(tiny_folder)
    with pytest.raises(ValueError, match="ascending numbers from 0 to 2"):
        take_layers(model, params, [1, 0])


def test_fresh_students_have_the_config_they_are_given(tiny_folder):
    model, params = load_fresh(
        tiny_folder, config={"num_hidden_layers": 1, "intermediate_size": 20}, seed=1
    )
    assert model.config.num_layers == 1
    assert params["model"]["layers"]["mlp"]["up_proj"]["kernel"].shape == (1, 32, 20)
    other = load_fresh(
        tiny_folder, config={"num_hidden_layers": 1, "intermediate_size": 20}, seed=2
    )[1]
    assert np.abs(
        other["model"]["layers"]["mlp"]["up_proj"]["kernel"]
        - params["model"]["layers"]["mlp"]["up_proj"]["kernel"]
    ).max()
    with pytest.raises(
        ValueError, match=r"a llama config has no 'hidden_sise'. Did you mean 'hidden_size'\?"
    ):
        load_fresh(tiny_folder, config={"hidden_sise": 16})
