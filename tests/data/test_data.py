"""Records, templates, packing and batches."""

import gzip
import json
import logging

import numpy as np
import pytest

import peft_jax
from peft_jax.data import (
    Record,
    batch_at,
    builtin,
    encode,
    evaluation_batches,
    fingerprint,
    fit,
    pack,
    read_records,
)
from peft_jax.data.encode import Example
from peft_jax.data.records import MalformedRecordError
from peft_jax.hub.checkpoint import BASE


@pytest.fixture(scope="module")
def tokenizer():
    return peft_jax.load_tokenizer(BASE)


GOOD = {"prompt": "2+2=", "completion": "4"}


@pytest.mark.parametrize("gz", [False, True])
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet", ".txt"])
def test_every_kind_of_file(tmp_path, suffix, gz):
    file = tmp_path / f"data{suffix}{'.gz' if gz else ''}"
    text = {
        ".jsonl": json.dumps(GOOD) + "\n\n" + json.dumps(GOOD) + "\n",
        ".json": json.dumps([GOOD, GOOD]),
        ".csv": 'completion,prompt\n4,2+2=\n"4",2+2=\n',
        ".txt": "2+2= || 4\n2+2=||4\n",
    }.get(suffix)
    if text is None:
        if gz:
            pytest.skip("Parquet compresses by itself")
        from datasets import Dataset

        Dataset.from_list([GOOD, GOOD]).to_parquet(str(file))
    elif gz:
        file.write_bytes(gzip.compress(text.encode()))
    else:
        file.write_text(text)
    records = read_records(
        str(file), kind="completion", delimiter="||" if suffix == ".txt" else None
    )
    assert [r.value for r in records] == [GOOD, GOOD]


def test_a_text_file_is_one_document(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    assert read_records(str(tmp_path / "a.txt"), kind="text")[0].value == {"text": "one\ntwo\n"}


def test_columns_and_limit(tmp_path):
    file = tmp_path / "q.jsonl"
    file.write_text(
        "".join(json.dumps({"question": str(i), "answer": "a"}) + "\n" for i in range(5))
    )
    columns = {"prompt": "question", "completion": "answer"}
    records = read_records(str(file), kind="completion", columns=columns, limit=2)
    assert [r.value["prompt"] for r in records] == ["0", "1"]
    with pytest.raises(
        ValueError, match="columns names 'promt'; a completion record has prompt, completion"
    ):
        read_records(str(file), kind="completion", columns={"promt": "question"})


BAD_LINES = [
    ("{bad", "not valid JSON"),
    ("[1]", "expected an object, found list"),
    ('{"prompt": "x"}', r"no field 'completion' \(fields here: prompt\)"),
    ('{"prompt": 3, "completion": "x"}', "'prompt' is no text"),
]


@pytest.mark.parametrize(("line", "message"), BAD_LINES)
def test_a_bad_line_is_named_and_ends_nothing_unless_told_to(tmp_path, caplog, line, message):
    file = tmp_path / "d.jsonl"
    file.write_text(json.dumps(GOOD) + "\n" + line + "\n" + json.dumps(GOOD) + "\n")
    with caplog.at_level(logging.WARNING, "peft_jax"):
        assert len(read_records(str(file), kind="completion")) == 2
    assert f"{file}:2: " in caplog.text
    with pytest.raises(MalformedRecordError, match=rf"d.jsonl:2: {message}"):
        read_records(str(file), kind="completion", on_error="stop")


def test_bad_rows_of_a_csv_and_bad_chats(tmp_path):
    (tmp_path / "d.csv").write_text("prompt,completion\na,b\nc\nd,e\n")
    with pytest.raises(MalformedRecordError, match=r"d.csv:3: not 2 columns"):
        read_records(str(tmp_path / "d.csv"), kind="completion", on_error="stop")
    for messages, message in [
        ([], "list of objects"),
        ([{"role": "user", "content": "hi"}], "no assistant turn"),
    ]:
        (tmp_path / "c.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
        with pytest.raises(MalformedRecordError, match=message):
            read_records(str(tmp_path / "c.jsonl"), kind="chat", on_error="stop")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: "./nothing.jsonl", "data file ./nothing.jsonl does not exist"),
        (lambda p: str(p / "x.docx"), "does not exist|unknown kind of file"),
        (
            lambda p: [(p / "e.jsonl").write_text(""), str(p / "e.jsonl")][1],
            "holds no usable completion record",
        ),
        (
            lambda p: [(p / "e.jsonl").write_text("{"), str(p / "e.jsonl")][1],
            r"no usable completion record \(1 malformed\)",
        ),
        (lambda p: [(p / "e.json").write_text("{"), str(p / "e.json")][1], "not valid JSON"),
        (
            lambda p: [(p / "e.xyz").write_text("{"), str(p / "e.xyz")][1],
            "unknown kind of file; known: .jsonl",
        ),
        (lambda p: "nobody/nothing", "neither a file nor a dataset"),
        (lambda p: "builtin:pythn-docs", "no built-in dataset 'pythn-docs'; there are python-docs"),
    ],
)
def test_sources_that_cannot_be_read(tmp_path, make, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        read_records(make(tmp_path), kind="completion")


def test_builtin_datasets_have_fixed_disjoint_splits():
    for name in builtin.DATASETS:
        parts = {split: builtin.dataset(name, split) for split in builtin.SPLITS}
        keys = [json.dumps(r) for part in parts.values() for r in part]
        assert len(set(keys)) > 0.97 * len(keys), name
        assert len(parts["train"]) > 5 * len(parts["test"]) > 0, name
    text = sum(len(r["text"]) for s in builtin.SPLITS for r in builtin.dataset("python-docs", s))
    assert 300_000 < text < 900_000
    pairs = [r for s in builtin.SPLITS for r in builtin.dataset("python-docstrings", s)]
    assert 3_000 < len(pairs) < 8_000
    with pytest.raises(ValueError, match="splits train, validation, test and all, not 'dev'"):
        builtin.dataset("countries", "dev")


def test_completions_learn_only_the_answer(tokenizer):
    (example,) = encode([Record(GOOD, "x:1")], tokenizer, "completion")
    assert tokenizer.decode(example.ids[example.learn]) == "4</s>"
    assert tokenizer.decode(example.ids[~example.learn]) == "<s>2+2="


def test_chats_learn_only_assistant_turns(tokenizer):
    messages = [
        {"role": "user", "content": "Hello there"},
        {"role": "assistant", "content": "General Kenobi"},
        {"role": "user", "content": "Bye"},
        {"role": "assistant", "content": "Farewell"},
    ]
    (example,) = encode([Record({"messages": messages}, "x:1")], tokenizer, "chat")
    learnt = tokenizer.decode(example.ids[example.learn])
    assert "General Kenobi</s>" in learnt
    assert "Farewell</s>" in learnt
    assert "Hello" not in learnt
    assert "User" not in learnt
    assert tokenizer.decode(example.ids).startswith("<s>### User:\nHello there")


def test_a_template_that_rewrites_history_has_a_row_for_each_turn(tokenizer):
    import copy

    other = copy.deepcopy(tokenizer)
    other.chat_template = (
        "{% for m in messages %}{{ loop.length }}{{ m['content'] }}</s>{% endfor %}"
    )
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d"},
    ]
    record = Record({"messages": messages}, "f:7")
    made = list(encode([record], other, "chat", on_error="stop"))
    assert [other.decode(e.ids) for e in made] == ["2a</s>2b</s>", "4a</s>4b</s>4c</s>4d</s>"]
    assert [other.decode(e.ids[e.learn]) for e in made] == ["b</s>", "d</s>"]
    other.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        list(encode([record], other, "chat"))


def examples_of(sizes):
    rng = np.random.default_rng(0)
    return [Example(rng.integers(3, 99, n).astype(np.int32), np.ones(n, bool)) for n in sizes]


def test_packing_keeps_every_prediction_once():
    rng = np.random.default_rng(1)
    examples = examples_of(rng.integers(2, 33, 200))
    rows = pack(examples, 32)
    assert rows.weights.sum() == sum(len(e.ids) - 1 for e in examples)
    pairs = sorted(
        (int(a), int(b)) for e in examples for a, b in zip(e.ids[:-1], e.ids[1:], strict=True)
    )
    used = rows.segment_ids > 0
    assert (
        sorted(zip(rows.tokens[used].tolist(), rows.targets[used].tolist(), strict=True)) == pairs
    )
    assert len(rows.tokens) <= 1.1 * rows.weights.sum() / 32 + 1  # little is wasted
    starts = np.diff(rows.segment_ids, axis=1, prepend=0) != 0
    assert (rows.positions[starts & used] == 0).all()
    assert (rows.weights[~used] == 0).all()
    apart = pack(examples, 32, packing=False)
    assert len(apart.tokens) == 200
    assert fingerprint(rows) != fingerprint(apart)
    assert fingerprint(rows) == fingerprint(pack(examples, 32))


def test_long_records():
    long = examples_of([100])
    pieces = fit(long, 32, "text", "skip")
    assert [len(p.ids) for p in pieces] == [33, 33, 33, 4]
    assert np.concatenate([p.ids[1:] for p in pieces]).tolist() == long[0].ids[1:].tolist()
    assert len(fit(long, 32, "completion", "truncate")[0].ids) == 33
    with pytest.raises(ValueError, match="record 0 has 100 tokens; sequence_length is 32"):
        fit(long, 32, "completion", "stop")
    with pytest.raises(ValueError, match="no record fits into sequence_length=32"):
        fit(long, 32, "completion", "skip")


def test_completions_that_are_cut_away_are_told(caplog):
    """A prompt that fills the row leaves nothing to learn: a loss of nothing would look like a good
    one.
    """
    cut, whole = Example(np.arange(9), np.arange(9) > 6), Example(np.arange(4), np.arange(4) > 2)
    assert fit([cut, whole], 5, "completion", "truncate") == [whole]
    assert "1 records have nothing to learn within 5 tokens and are left out" in caplog.text


def test_batches_depend_on_seed_and_index_alone():
    rows = pack(examples_of([9] * 10), 8, packing=False)
    seen = [batch_at(rows, i, 4, seed=0)["tokens"] for i in range(5)]
    np.testing.assert_array_equal(seen[3], batch_at(rows, 3, 4, seed=0)["tokens"])
    epochs = np.concatenate(seen)
    for epoch in (epochs[:10], epochs[10:]):  # every row once an epoch, though 4 does not divide 10
        assert sorted(map(tuple, epoch.tolist())) == sorted(map(tuple, rows.tokens.tolist()))
    assert (epochs[:10] != epochs[10:]).any()
    assert (batch_at(rows, 0, 4, seed=1)["tokens"] != seen[0]).any()


def test_evaluation_batches_pad_with_weightless_rows():
    rows = pack(examples_of([9] * 10), 8, packing=False)
    batches = evaluation_batches(rows, 4)
    assert [b["tokens"].shape for b in batches] == [(4, 8)] * 3
    assert sum(b["weights"].sum() for b in batches) == rows.weights.sum()
