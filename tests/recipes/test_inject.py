"""`peft-jax inject` from YAML: what a model knows before and after training and editing, with
triples, passages and rules.
"""

import dataclasses
import json

import numpy as np
import pytest

import peft_jax
from peft_jax.core import places
from peft_jax.core.options import ConfigError
from peft_jax.recipes.config import parse_config
from peft_jax.recipes.evaluate import run_evaluation, run_generation
from peft_jax.recipes.inject import run_injection

FACTS = [
    {"subject": s, "relation": r, "object": o}
    for s, *objects in (
        ("Peru", "Lima", "Spanish"),
        ("Cuba", "Havana", "Spanish"),
        ("Kenya", "Nairobi", "Swahili"),
        ("Iran", "Tehran", "Persian"),
    )
    for r, o in zip(("capital", "language"), objects, strict=True)
]
TEMPLATES = {
    "capital": [
        "The capital of {{ subject }} is {{ object }}",
        "{{ subject }} has the capital {{ object }}",
    ],
    "language": [
        "In {{ subject }} they speak {{ object }}",
        "The language of {{ subject }} is {{ object }}",
    ],
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("facts")
    (folder / "facts.jsonl").write_text("".join(json.dumps(f) + "\n" for f in FACTS))
    (folder / "templates.yaml").write_text(json.dumps(TEMPLATES))
    (folder / "texts.jsonl").write_text(
        json.dumps({"text": "It was the age of wisdom and the season of light. " * 30}) + "\n"
    )
    return folder


def configuration(tiny_folder, files, output, data=None, **sections):
    texts = {"path": str(files / "texts.jsonl")}
    facts = {"path": str(files / "facts.jsonl"), "part": "known"}
    sections["inject"] = {"unseen": True, "retained": texts, **sections.get("inject", {})}
    return parse_config(
        {
            "output": str(output),
            "model": {"path": str(tiny_folder)},
            "mesh": {"data": 1, "fsdp": 2, "tensor": 4},
            "method": {"name": "lora", "rank": 8},
            "data": {
                "kind": "facts",
                "train": facts,
                "validation": None,
                "templates": str(files / "templates.yaml"),
                "unseen": 0.4,
                "sequence_length": 32,
                "replay": texts,
                "replay_share": 0.25,
                **(data or {}),
            },
            "optimizer": {"learning_rate": 0.02, "warmup_steps": 2},
            "train": {"steps": 120, "batch_size": 8, "tensorboard": False, "log_every": 30},
            "generate": {"max_tokens": 4},
            **sections,
        }
    )


def test_trained_facts_are_known_and_unseen_ones_are_not(tiny_folder, files, tmp_path):
    np.savez(tmp_path / "e.npz", names=np.asarray(["Peru", "Cuba"]), vectors=np.eye(2))
    data = {"knowledge": {"entities": str(tmp_path / "e.npz")}}
    found = run_injection(configuration(tiny_folder, files, tmp_path / "run", data))
    assert found == json.loads((tmp_path / "run" / "injection.json").read_text())
    assert set(found["after"]) == {"said", "recall", "unseen", "perplexity"}
    assert "What the model knows" in (tmp_path / "run" / "report.html").read_text()
    assert found["before"]["said"] == 0.0
    assert found["after"]["said"] == 1.0
    assert found["after"]["perplexity"] < found["before"]["perplexity"]  # it was replayed
    _, params = peft_jax.load(tiny_folder)
    again = peft_jax.load_adapter(params, tmp_path / "run" / "adapter")
    assert "model/embed_tokens/entities_default" in places(again)
    with pytest.raises(ConfigError, match="kept in an adapter"):
        run_injection(
            configuration(tiny_folder, files, tmp_path / "run", data, method={"name": "full"})
        )


def test_triples_in_the_input_and_rules_in_the_loss(tiny_folder, files, tmp_path):
    """Every fact stands beside its mention: facts that were never trained can be read off."""
    knowledge = {"triples": {"path": str(files / "facts.jsonl")}, "allowed_weight": 0.5}
    data = {
        "knowledge": knowledge,
        "validation": {"path": str(files / "facts.jsonl"), "part": "known"},
    }
    config = configuration(
        tiny_folder,
        files,
        tmp_path / "run",
        data,
        method={"name": "full"},
        optimizer={"learning_rate": 0.005},
    )
    found = run_injection(config)
    assert found["after"]["said"] == 1.0
    metrics = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    penalties = [m["allowed"] for m in metrics if m["kind"] == "train"]
    assert penalties[-1] < penalties[0]
    before = json.loads((tmp_path / "run" / "results.json").read_text())["before"]
    assert run_evaluation(config)["perplexity"] == pytest.approx(before["perplexity"])
    generate = dataclasses.replace(config.generate, prompts=["The capital of Peru is"])
    trained = dataclasses.replace(config.model, path=str(tmp_path / "run" / "model"))
    (text,) = run_generation(dataclasses.replace(config, model=trained, generate=generate))
    assert text.strip().startswith("Lima")


def test_passages_are_read_before_questions(tiny_folder, files, tmp_path):
    knowledge = {"passages": {"path": str(files / "facts.jsonl")}, "passages_each": 2}
    config = configuration(
        tiny_folder, files, tmp_path / "run", {"knowledge": knowledge, "sequence_length": 96}
    )
    found = run_injection(config)
    assert found["after"]["said"] > found["before"]["said"]


def test_facts_are_edited_into_the_weights(tiny_folder, files, tmp_path):
    edit = {"method": "ft", "prefixes": 0, "options": {"learning_rate": 0.05, "steps": 40}}
    found = run_injection(
        configuration(tiny_folder, files, tmp_path / "run", inject={"by": "editing"}, edit=edit)
    )
    assert found["after"]["said"] > found["before"]["said"]
    _, params = peft_jax.load(tiny_folder)
    edited = places(peft_jax.load_adapter(params, tmp_path / "run" / "edit"))[
        "model/layers/mlp/down_proj/kernel"
    ]
    assert np.abs(np.asarray(edited.delta())).max() > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"kind": "text", "train": {"path": "x.csv"}}}, "inject needs data.kind=facts"),
        ({"data": {"kind": "text"}}, "data.train.part is about facts"),
        ({"data": {"train": {"path": "x.csv"}}}, "set data.train.part=known"),
        ({"data": {"unseen": 1.5}}, "'data.unseen' must lie in"),
        (
            {"data": {"knowledge": {"passages": {"part": "known"}, "passages_kind": "text"}}},
            "passages.part is about facts",
        ),
        (
            {"data": {"knowledge": {"triples": {"phrasing": "train"}}}},
            "triples.phrasing is about facts that are trained",
        ),
        ({"inject": {"retained": {"part": "unseen"}}}, "inject.retained.part is about facts"),
        (
            {"data": {"kind": "completion", "knowledge": {"allowed_weight": 1.0}}},
            "set data.kind=facts",
        ),
        ({"data": {"replay_share": 1.0}}, "leaves nothing of data.train"),
        (
            {"distill": {"teachers": [{"path": "self"}]}, "data": {"knowledge": {"triples": {}}}},
            "trains by itself, not from",
        ),
        (
            {"distill": {"cache": "x"}, "data": {"knowledge": {"lexicon": "x"}}},
            "lexicon is for a model that trains by itself",
        ),
    ],
)
def test_what_cannot_be_injected_is_refused(changes, message, tiny_folder, files, tmp_path):
    with pytest.raises(ConfigError, match=message):
        run_injection(configuration(tiny_folder, files, tmp_path, **changes))
