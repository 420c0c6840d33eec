"""Passages before prompts: what BM25 finds, the oracle's share, and what is refused."""

import numpy as np
import pytest

from peft_jax.data import Record
from peft_jax.knowledge.facts import part_of, verbalise
from peft_jax.knowledge.retrieval import passages_of, with_passages

COUNTRIES = [
    ("Peru", "Lima"),
    ("Cuba", "Havana"),
    ("Chile", "Santiago"),
    ("Kenya", "Nairobi"),
    ("Iran", "Tehran"),
]
FACTS = [
    Record({"subject": s, "relation": r, "object": o}, f"{s}/{r}")
    for s, capital in COUNTRIES
    for r, o in (("capital", capital), ("known", "wide and far"))
]
TEMPLATES = {
    "capital": [
        "The capital of {{ subject }} is {{ object }}",
        "What is the capital of {{ subject }}? It is {{ object }}",
    ],
    "known": ["{{ subject }} is known {{ object }}", "How is {{ subject }} known? {{ object }}"],
}
PASSAGES = passages_of(FACTS, TEMPLATES)


def test_a_passage_tells_a_subjects_facts():
    assert PASSAGES[0] == "The capital of Peru is Lima. Peru is known wide and far."
    assert len(PASSAGES) == len(COUNTRIES)


def test_the_nearest_passages_are_read_first():
    asked = with_passages(verbalise(FACTS[:1], TEMPLATES, asking=True), PASSAGES, each=2)
    *passages, question = asked[0].value["prompt"].replace("\n\n", "\n").split("\n")
    assert question == "What is the capital of Peru? It is"
    assert passages[-1] == PASSAGES[0]  # the best one is the nearest
    assert len(passages) == 2
    assert asked[0].value["completion"] == " Lima"


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_in_training_the_oracle_has_its_share(share):
    records = verbalise(FACTS * 20, TEMPLATES)
    made = with_passages(records, PASSAGES, each=2, oracle_share=share, seed=0)

    def passage(r):
        return next(p for p in PASSAGES if r.origin.split("/")[0] in p)

    there = np.mean([passage(r) in r.value["prompt"] for r in made])
    assert abs(there - share) < 0.12
    assert all(r.value["prompt"].count("The capital of") >= 2 for r in made)
    again = with_passages(records, PASSAGES, each=2, oracle_share=share, seed=0)
    assert [r.value for r in again] == [r.value for r in made]


def test_too_few_passages_are_refused():
    with pytest.raises(ValueError, match="5 passages before each question: there are 5"):
        with_passages(verbalise(FACTS[:1], TEMPLATES), PASSAGES, each=5)


def test_no_fact_of_an_unseen_subject_is_known_under_an_alias():
    facts = [
        Record({"subject": f"s{i}", "relation": "r", "object": "o", "aliases": [f"s{i + 1}"]}, "")
        for i in range(0, 200, 2)
    ]
    facts += [Record({"subject": f"s{i}", "relation": "q", "object": "o"}, "") for i in range(200)]
    known, unseen = (part_of(facts, part, 0.3) for part in ("known", "unseen"))
    assert len(known) + len(unseen) == len(facts)
    assert 0.1 < len(unseen) / len(facts) < 0.5
    names = [
        {n for f in part for n in (f.value["subject"], *f.value.get("aliases", ()))}
        for part in (known, unseen)
    ]
    assert not names[0] & names[1]
    with pytest.raises(ValueError, match="no subject is unseen"):
        part_of(facts, "unseen", 0.0)
