"""`peft-jax data`: what is shown of what a run would learn; several sources; told formats."""

import json

import numpy as np
import pytest
from click.testing import CliRunner

from peft_jax.cli import main
from peft_jax.core.options import ConfigError
from peft_jax.data.mixture import mixed
from peft_jax.data.source import MixedSource
from peft_jax.recipes.config import load_config
from peft_jax.recipes.data import run_data

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello there"}]


def config_of(file, *more):
    options = [f"data.train.path={file}", "data.validation=null", "data.sequence_length=64", *more]
    return load_config(None, options)


def write(path, records):
    path.write_text("".join(f"{json.dumps(r)}\n" for r in records))
    return path


def test_numbers_and_samples_of_a_source(tmp_path):
    other = [*CHAT, {"role": "user", "content": "Go on " * 40}, CHAT[1]]
    records = [{"messages": CHAT}, {"text": "no chat"}, {"messages": other}]
    (report,) = run_data(config_of(write(tmp_path / "c.jsonl", records)))
    assert (report.records, report.examples, report.rows) == (2, 2, 1)
    assert report.lengths[1] > 65 > report.lengths[0]
    assert report.longest.endswith("c.jsonl:3")
    assert "a text record" in report.skipped.table()
    assert "more than the row's 64" in report.skipped.table()
    (first, _) = report.samples
    assert "".join(p.text for p in first.pieces if p.learnt) == "Hello there</s>\n\n"
    assert [p.text for p in first.pieces if p.special] == ["<s>", "</s>"]


def test_the_command_prints_what_is_learnt(tmp_path):
    file = write(tmp_path / "c.jsonl", [{"messages": CHAT}, {"messages": []}])
    options = [f"data.train.path={file}", "data.validation=null", "--records", "1"]
    result = CliRunner().invoke(main, ["data", *options])
    assert result.exit_code == 0, result.output
    for part in ("«Hello there</s>", "« » is learnt", "tokens in an example", "skipped, as"):
        assert part in result.output


def test_nothing_left_ends_with_the_reasons(tmp_path):
    records = [{"messages": CHAT * 40}, {"messages": CHAT * 50}, {"messages": [*CHAT, "x"]}]
    with pytest.raises(ValueError, match=r"no record fits") as caught:
        run_data(config_of(write(tmp_path / "c.jsonl", records)))
    said = str(caught.value)
    assert "2  " in said
    assert "c.jsonl:1: " in said
    assert "more than the row's 64" in said


FORMATS = {
    "ShareGPT": (
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]},
        "Ho</s>",
    ),
    "messages": ({"messages": [CHAT[0], {"role": "assistant", "content": "Ho"}]}, "Ho</s>"),
    "prompt and completion of messages": (
        {"prompt": [CHAT[0]], "completion": [{"role": "assistant", "content": "Ho"}]},
        "Ho</s>",
    ),
    "Alpaca": ({"instruction": "Greet", "input": "", "output": "Ho"}, "Ho</s>"),
    "prompt and completion": ({"prompt": "Hi ", "completion": "Ho"}, "Ho</s>"),
    "question and answer": ({"question": "Hi", "answer": "Ho"}, "Ho</s>"),
    "text": ({"text": "Hi Ho"}, "<s>Hi Ho</s>"),
}


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_is_told_from_its_columns(tmp_path, name):
    record, learnt = FORMATS[name]
    (report,) = run_data(config_of(write(tmp_path / "d.jsonl", [record])))
    (sample,) = report.samples
    assert "".join(p.text for p in sample.pieces if p.learnt).rstrip("\n") == learnt
    if name != "text" and "messages" not in name and name != "ShareGPT":
        asked = run_data(config_of(tmp_path / "d.jsonl", "data.kind=chat"))[0].samples[0]
        text = "".join(p.text for p in asked.pieces)
        assert text.startswith("<s>### User:\n")
        assert "".join(p.text for p in asked.pieces if p.learnt).strip() == "Ho</s>"


def test_preference_pairs_are_recognised_and_refused(tmp_path):
    file = write(tmp_path / "p.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    with pytest.raises(ConfigError, match="holds preference pairs"):
        run_data(config_of(file))
    columns = "data.columns={prompt: prompt, completion: chosen}"
    assert run_data(config_of(file, "data.kind=completion", columns))[0].records == 1


def test_sources_are_mixed_by_weight_or_by_epochs(tmp_path):
    parts = [
        [f"a{i}" for i in range(10)],
        [f"b{i}" for i in range(30)],
        [f"c{i}" for i in range(4)],
    ]
    sources = [MixedSource(weight=3), MixedSource(weight=1), MixedSource(epochs=2.5)]
    found = mixed(parts, sources, seed=0)
    assert found == mixed(parts, sources, seed=0)
    counts = {k: [f for f in found if f[0] == k] for k in "abc"}
    assert {k: len(v) for k, v in counts.items()} == {"a": 30, "b": 10, "c": 10}
    assert {counts["a"].count(x) for x in parts[0]} == {3}
    assert {counts["c"].count(x) for x in parts[2]} == {2, 3}
    a = write(tmp_path / "a.jsonl", [{"messages": CHAT}] * 3)
    b = write(tmp_path / "b.jsonl", [{"question": "q", "answer": "a"}] * 2)
    both = f"data.sources=[{{path: {a}}}, {{path: {b}, epochs: 2, kind: chat}}]"
    (report,) = run_data(config_of(a, both))
    assert report.records == 7
    with pytest.raises(ConfigError, match=r"data.sources.0.weight must be above 0"):
        config_of(a, "data.sources=[{weight: 0}]")


def test_the_last_rows_are_filled_as_packing_says(tmp_path):
    file = write(tmp_path / "t.jsonl", [{"prompt": "a" * n, "completion": "b"} for n in (3, 9, 27)])
    packed, apart = (run_data(config_of(file, f"data.packing={p}"))[0] for p in ("true", "false"))
    assert packed.rows < apart.rows == 3
    assert packed.filled > apart.filled
    np.testing.assert_array_equal(packed.lengths, apart.lengths)
