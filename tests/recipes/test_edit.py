"""`peft-jax edit` from YAML: scores before and after, and a PEFT folder."""

import json

import numpy as np
import pytest

import peft_jax
from peft_jax.core import places
from peft_jax.core.options import ConfigError
from peft_jax.recipes.config import parse_config
from peft_jax.recipes.edit import run_editing


def configuration(tiny_folder, tmp_path, **section):
    facts = [
        {
            "prompt": "It was the {} of",
            "subject": w,
            "target": "days",
            "true": "times",
            "neighbours": ["the winter of"],
        }
        for w in ("best", "worst")
    ]
    (tmp_path / "edits.jsonl").write_text("".join(json.dumps(f) + "\n" for f in facts))
    (tmp_path / "texts.jsonl").write_text(
        json.dumps({"text": "It was the age of wisdom and the season of light. " * 40}) + "\n"
    )
    source = {"path": str(tmp_path / "texts.jsonl")}
    return parse_config(
        {
            "output": str(tmp_path / "run"),
            "model": {"path": str(tiny_folder)},
            "mesh": {"data": 1, "fsdp": 2, "tensor": 4},
            "data": {"train": source, "validation": None, "test": source, "sequence_length": 16},
            "train": {"batch_size": 8},
            "generate": {"max_tokens": 4},
            "edit": {
                "edits": str(tmp_path / "edits.jsonl"),
                "prefixes": 2,
                "calibration_batches": 2,
                **section,
            },
        }
    )


def test_facts_are_written_scored_and_saved(tiny_folder, tmp_path):
    folder = run_editing(
        configuration(tiny_folder, tmp_path, layers=[0, 1], options={"weight": 1.0})
    )
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["edits"] == 2
    assert "<td>efficacy</td>" in (tmp_path / "run" / "report.html").read_text()
    assert results["after"]["target"] > results["before"]["target"]
    assert {"efficacy", "neighbourhood", "score", "fluency", "perplexity"} <= set(results["after"])
    model, params = peft_jax.load(tiny_folder)
    edited = peft_jax.load_adapter(params, folder)
    node = places(edited)["model/layers/mlp/down_proj/kernel"]
    assert np.asarray(node.gate).tolist() == [1.0, 1.0, 0.0]
    assert np.abs(np.asarray(node.delta())[:2]).max() > 0


def test_what_cannot_be_edited_is_refused(tiny_folder, tmp_path):
    with pytest.raises(
        ConfigError,
        match=r"unknown option 'edit.options.wait'. Did you mean 'weight'\? Those of memit: weight",
    ):
        configuration(tiny_folder, tmp_path, options={"wait": 1.0})
    with pytest.raises(ConfigError, match=r"edit needs edit\.edits"):
        run_editing(parse_config({"model": {"path": str(tiny_folder)}}))
