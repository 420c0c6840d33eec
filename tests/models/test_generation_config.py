"""Where a text ends: against transformers, in chat templates, and in folders that are written."""

import copy
import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

import peft_jax
from peft_jax.models.generation_config import end_of_turn, end_tokens
from peft_jax.pruning.structured import shrink
from peft_jax.pruning.students import take_layers
from peft_jax.pruning.vocabulary import renumbered
from tests.reference import tiny_llama_folder

PROMPTS = [[5, 6, 7], [9, 30]]
MORE = {
    "temperature": 0.7,
    "top_p": 0.95,
    "do_sample": True,
    "bos_token_id": 0,
    "pad_token_id": 2,
    "_from_model_config": True,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model whose generation config names a second end, one that it soon writes."""
    path = tiny_llama_folder(tmp_path_factory.mktemp("ends"))
    reference = AutoModelForCausalLM.from_pretrained(path)
    free = reference.generate(
        torch.tensor(PROMPTS[:1]), max_new_tokens=20, do_sample=False, eos_token_id=None
    )
    end = int(free[0, 3 + 6])
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, end], **MORE}))
    return path


@pytest.fixture(scope="module")
def loaded(folder):
    return *peft_jax.load(folder), peft_jax.load_tokenizer(folder)


def test_a_model_ends_where_transformers_does(folder, loaded):
    model, params, tokenizer = loaded
    reference = AutoModelForCausalLM.from_pretrained(folder)
    ends = reference.generation_config.eos_token_id
    rows = peft_jax.generate(model, params, PROMPTS, max_tokens=20)
    for prompt, row in zip(PROMPTS, rows, strict=True):
        theirs = reference.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False)[
            0, len(prompt) :
        ].tolist()
        assert row == [i for i in theirs if i not in ends]
    assert len(rows[0]) <= 6
    assert peft_jax.generate(model, params, PROMPTS, max_tokens=20, eos_token_id=ends) == rows
    assert peft_jax.generate(model, params, PROMPTS, max_tokens=20, tokenizer=tokenizer) == rows
    assert [
        len(row)
        for row in peft_jax.generate(model, params, PROMPTS, max_tokens=20, eos_token_id=[])
    ] == [20, 20]
    with pytest.raises(
        ValueError, match="eos_token_id must be a token's number, or a list of such, got '</s>'"
    ):
        peft_jax.generate(model, params, PROMPTS, eos_token_id="</s>")


def test_a_saved_model_has_its_generation_config(folder, loaded, tmp_path):
    model, params, tokenizer = loaded
    peft_jax.save(tmp_path / "saved", model, params, tokenizer=tokenizer)
    ours, theirs = (
        GenerationConfig.from_pretrained(path).to_dict() for path in (tmp_path / "saved", folder)
    )
    assert ours == theirs
    assert (
        peft_jax.load(tmp_path / "saved")[0].config.generation_config
        == model.config.generation_config
    )
    ends = end_tokens(model)
    for smaller, _ in (take_layers(model, params, 1), shrink(model, params, layers=[0, 2])):
        assert end_tokens(smaller) == ends
    kept = np.unique([0, *ends, 2, *range(20, 60)])
    fewer = shrink(model, params, tokens=kept)[0]
    assert [kept[i] for i in end_tokens(fewer)] == list(ends)
    with pytest.raises(ValueError, match=f"tokens leave out {ends[1]}, the model's eos_token_id"):
        shrink(model, params, tokens=[i for i in kept if i != ends[1]])


def test_renumbered_settings():
    """Ids move, numbers that are no token's stay, and what is avoided goes with its tokens."""
    settings = {
        "eos_token_id": [4, 6],
        "pad_token_id": -1,
        "bos_token_id": None,
        "top_k": 6,
        "suppress_tokens": [2, 5],
        "bad_words_ids": [[2, 4], [4, 6]],
        "sequence_bias": [[[4], 6], [[5], 1.0]],
        "forced_bos_token_id": 2,
    }
    assert renumbered(settings, {2: 0, 4: 1, 6: 2}, 9) == {
        "eos_token_id": [1, 2],
        "pad_token_id": -1,
        "bos_token_id": None,
        "top_k": 6,
        "suppress_tokens": [0],
        "bad_words_ids": [[0, 1], [1, 2]],
        "sequence_bias": [[[1], 6]],
        "forced_bos_token_id": 0,
    }


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}", "<|end|>"),
        (
            "{% for m in messages %}{{ m.role }}: {{ m.content | trim }}\n\n{% endfor %}{{ "
            "eos_token }}",
            "</s>",
        ),
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n\n{% endfor %}", None),
        ("{{ raise_exception('a system message is needed') }}", None),
        (None, None),
    ],
    ids=["end of turn", "end of text", "blank lines", "refuses", "no template"],
)
def test_what_ends_a_turn(loaded, template, expected):
    tokenizer = copy.deepcopy(loaded[2])
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<|end|>", "<|user|>", "<|assistant|>"], "eos_token": "</s>"}
    )
    tokenizer.add_tokens("\n\n")  # Gemma's blank lines are added tokens too
    tokenizer.chat_template = template
    assert end_of_turn(tokenizer) == (expected and tokenizer.convert_tokens_to_ids(expected))
    wanted = {1, tokenizer.eos_token_id, *end_tokens(loaded[0])} | (
        {end_of_turn(tokenizer)} - {None}
    )
    assert set(end_tokens(loaded[0], tokenizer)) == wanted


def test_a_special_token_stops(loaded):
    """As a stop string, alone or with what stands before it; results have no special tokens."""
    model, params, tokenizer = loaded
    tokenizer = copy.deepcopy(tokenizer)
    prompt, options = "Hello", {"max_tokens": 60, "eos_token_id": []}
    row = peft_jax.generate(model, params, [tokenizer(prompt)["input_ids"]], **options)[0]

    def plain(n):
        return tokenizer.decode(row[n - 1]).strip().isalnum() and row[n] not in row[:n]

    place = next(n for n in range(4, 60) if plain(n))
    token = tokenizer.convert_ids_to_tokens(row[place])
    tokenizer.add_special_tokens({"additional_special_tokens": [token]})

    def stopped(prompt, *stop):
        return peft_jax.generate(
            model, params, [prompt], tokenizer=tokenizer, stop=stop, **options
        )[0]

    text = tokenizer.decode(row[:place], skip_special_tokens=True)
    assert stopped(prompt, token) == stopped(prompt, "never this", token) == text
    assert stopped(prompt, text[-1] + token) == text[:-1]
    assert stopped(tokenizer(prompt)["input_ids"], token) == row[:place]
    assert stopped(prompt, text[-1]) == text[: text.index(text[-1])]
