"""Synthetic texts: entities that stand in the documents, groups of them, and a real model that
writes.
"""

import pytest

import peft_jax
from peft_jax.data import Record
from peft_jax.generation.generate import generate
from peft_jax.knowledge.entigraph import entigraph, extract_entities

DOCUMENT = "Anna met Boris in Rome. Boris knew Clara."


def test_entities_are_those_of_the_document():
    def write(prompts):
        return ["Boris\n2. Anna\n* Rome.\n- Boris\n- Dora\n" for _ in prompts]

    assert extract_entities(write, [DOCUMENT]) == [["Anna", "Boris", "Rome"]]

    def write(prompts):
        return ["Rom\n- Bo\n- ROME\n- knew clara" for _ in prompts]

    assert extract_entities(write, [DOCUMENT]) == [
        ["ROME", "knew clara"]
    ]  # nothing inside of a word


def test_groups_are_related_and_named_by_their_document():
    asked = []

    def write(prompts):
        asked.extend(prompts)
        return [f"said {i}" if i else "" for i in range(len(prompts))]

    names = [["Anna", "Boris", "Clara"]]
    made = entigraph(write, [Record({"text": DOCUMENT}, "doc:1")], entities=names, each=10)
    assert len(asked) == 4  # three pairs and a triple
    assert [r.value["text"] for r in made] == [
        "said 1",
        "said 2",
        "said 3",
    ]  # the empty answer is left out
    assert made[-1].origin == "doc:1 (Anna, Boris and Clara)"
    assert all(DOCUMENT in prompt for prompt in asked)

    def again(seed):
        return [
            r.origin
            for r in entigraph(
                lambda p: p, [Record({"text": DOCUMENT}, "")], entities=names, each=2, seed=seed
            )
        ]

    assert again(0) == again(0)
    assert len({tuple(again(s)) for s in range(8)}) > 1
    with pytest.raises(ValueError, match="no document has two entities"):
        entigraph(lambda p: ["" for _ in p], [Record({"text": DOCUMENT}, "")])


def test_any_local_model_writes(tiny_folder):
    model, params = peft_jax.load(tiny_folder)
    tokenizer = peft_jax.load_tokenizer(tiny_folder)

    def write(prompts):
        return generate(model, params, prompts, tokenizer=tokenizer, max_tokens=4)

    assert entigraph(write, [Record({"text": DOCUMENT}, "")], entities=[["Anna", "Boris"]])
