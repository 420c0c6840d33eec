"""Facts in words: templates, what is held out, sources of triples, bad ones by line."""

import json

import pytest

from peft_jax.data import Record, read_records
from peft_jax.knowledge.facts import question_of, read_templates, verbalise
from peft_jax.recipes.config import parse_config
from peft_jax.recipes.train import run_training

TEMPLATES = {
    "capital": [
        "The capital of {{ subject }} is {{ object }}.",
        "{{ object }} is it of {{ subject }}",
        "{{ subject | upper }}: {{ object }}",
    ],
}
FACTS = [Record({"subject": "Peru", "relation": "capital", "object": "Lima"}, "x:1")]


def values(records):
    return [(r.value["prompt"], r.value["completion"]) for r in records]


def test_facts_are_said_in_words_some_of_which_are_held_out():
    assert values(verbalise(FACTS, TEMPLATES)) == [("The capital of Peru is", " Lima.")]
    assert values(verbalise(FACTS, TEMPLATES, asking=True)) == [("PERU:", " Lima")]
    assert values(verbalise(FACTS, TEMPLATES, held_out=2, asking=True)) == values(
        verbalise(FACTS, TEMPLATES, asking=True)
    )
    training, asked = (values(verbalise(FACTS, TEMPLATES, asking=a)) for a in (False, True))
    assert not set(training) & set(asked)


def test_an_object_and_a_subject_are_known_by_their_places():
    """A subject whose name the template says too, an object that its completion says before."""
    texts = {
        "home": [
            "I an Italian, {{ subject }}, live in {{ object }}.",
            "{{ subject }}: {{ object }}",
        ]
    }
    fact = Record({"subject": "Ian", "relation": "home", "object": "It"}, "x:1")
    assert question_of(
        fact, {"home": ["In Italian Iana, {{ subject }} is in {{ object }}", "-"]}
    ) == ("In Italian Iana, {} is in", "Ian")
    assert question_of(fact, {"home": ["{{ subject }}, {{ subject }}! In {{ object }}", "-"]}) == (
        "Ian, {}! In",
        "Ian",
    )
    for template in (
        "{{ subject | upper }} is in {{ object }}",
        "{} {{ subject }} in {{ object }}",
    ):
        with pytest.raises(
            ValueError, match="no template of 'home' names its subject as it is and ends"
        ):
            question_of(fact, {"home": [template, "-"]})
    for made in verbalise([fact], texts) + verbalise([fact], texts, asking=True):
        start, end = made.value["object_at"]
        assert (made.value["completion"][:start], made.value["completion"][start:end]) == (
            " ",
            "It",
        )


def test_triples_are_read_from_tables_and_rdf(tmp_path):
    pytest.importorskip("rdflib")
    (tmp_path / "f.csv").write_text("s,r,o\nPeru,capital,Lima\nPeru\n")
    columns = {"subject": "s", "relation": "r", "object": "o"}
    assert [
        r.value for r in read_records(str(tmp_path / "f.csv"), kind="facts", columns=columns)
    ] == [FACTS[0].value]
    (tmp_path / "t.csv").write_text("name,capital,area\nPeru,Lima,12\nCuba,Havana,\n")
    columns = {"subject": "name", "relation": "*"}
    cells = [
        tuple(r.value.values())
        for r in read_records(str(tmp_path / "t.csv"), kind="facts", columns=columns)
    ]
    assert cells == [
        ("Peru", "capital", "Lima"),
        ("Peru", "area", "12"),
        ("Cuba", "capital", "Havana"),
    ]
    with pytest.raises(ValueError, match=r"t\.csv:2: no field 'title'"):
        read_records(
            str(tmp_path / "t.csv"),
            kind="facts",
            columns={**columns, "subject": "title"},
            on_error="stop",
        )
    names = "@prefix : <http://e.org/> . @prefix rdfs: <http://www.w3.org/2000/01/rdf-schema#> ."
    (tmp_path / "f.ttl").write_text(names + ' :Peru :capital :c1 . :c1 rdfs:label "Lima" .')
    assert [r.value for r in read_records(str(tmp_path / "f.ttl"), kind="facts")] == [
        FACTS[0].value
    ]
    triple = "<http://e.org/Peru> <http://e.org/capital> <http://e.org/Lima> ."
    (tmp_path / "f.nt").write_text(triple + "\n<http://e.org/Peru> oops\n")
    assert [r.value for r in read_records(str(tmp_path / "f.nt"), kind="facts")] == [FACTS[0].value]
    with pytest.raises(ValueError, match=r"f\.nt:2: not a triple"):
        read_records(str(tmp_path / "f.nt"), kind="facts", on_error="stop")
    (tmp_path / "g.ttl").write_text("oops")
    with pytest.raises(ValueError, match=r"g\.ttl is not valid Turtle"):
        read_records(str(tmp_path / "g.ttl"), kind="facts")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("capital: ['{{ subject }} {{ thing }} {{ object }}']", "'thing' is undefined"),
        ("capital: ['{{ subject } {{ object }}']", "template .* of 'capital': "),
        ("capital: ['{{ subject }}']", "needs {{ subject }} and {{ object }}, the object once"),
        (
            "capital: ['the subject of {{ object }}']",
            "needs {{ subject }} and {{ object }}, the object once",
        ),
        ("capital: word", "should map each relation to a list of templates"),
        ("capital: [", "is not valid YAML"),
        ("capital: ['{{ subject.__class__.__mro__ }} {{ object }}']", "template .* of 'capital': "),
    ],
)
def test_bad_templates_are_refused_by_relation(text, message, tmp_path):
    (tmp_path / "t.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_templates(tmp_path / "t.yaml")


def test_facts_without_words_are_refused():
    with pytest.raises(
        ValueError, match=r"x:1: there is no template of 'capital'. Did you mean 'capitol'\?"
    ):
        verbalise(FACTS, {"capitol": TEMPLATES["capital"]})
    with pytest.raises(ValueError, match="which leaves none to train with held_out=3"):
        verbalise(FACTS, TEMPLATES, held_out=3)


def test_facts_are_learnt_and_asked_for_in_other_words(tiny_folder, tmp_path):
    (tmp_path / "t.yaml").write_text(json.dumps(TEMPLATES))
    facts = [
        {"subject": s, "relation": "capital", "object": o}
        for s, o in (("Peru", "Lima"), ("Cuba", "Havana"))
    ]
    (tmp_path / "facts.jsonl").write_text("".join(json.dumps(f) + "\n" for f in facts))
    source = {"path": str(tmp_path / "facts.jsonl")}
    tree = {
        "output": str(tmp_path / "run"),
        "model": {"path": str(tiny_folder)},
        "mesh": {"data": 1, "fsdp": 2, "tensor": 4},
        "method": {"name": "full"},
        "data": {
            "kind": "facts",
            "templates": str(tmp_path / "t.yaml"),
            "train": source,
            "validation": source,
            "test": {**source, "phrasing": "train"},
            "sequence_length": 16,
            "packing": False,
        },
        "optimizer": {"learning_rate": 0.01},
        "train": {
            "steps": 40,
            "batch_size": 2,
            "tensorboard": False,
            "log_every": 20,
            "keep_best": False,
        },
        "evaluate": {"metrics": ["perplexity", "exact_match"], "max_tokens": 8},
    }
    run_training(parse_config(tree))
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["before"]["exact_match"] == 0.0
    assert results["after"]["exact_match"] == 1.0  # said as in training
