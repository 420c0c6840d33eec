"""Packed rows on disk: the same as those in memory, read as batches ask for them."""

import json

import numpy as np
import pytest

import peft_jax
from peft_jax.core.options import ConfigError
from peft_jax.data import Record, batch_at, cache, evaluation_batches, fingerprint, pack, workers
from peft_jax.data.batches import parts_at
from peft_jax.data.cache import cache_key, identity_of_file, open_rows, write_rows
from peft_jax.data.encode import Example
from peft_jax.data.skipped import Skipped
from peft_jax.hub.checkpoint import BASE
from peft_jax.training.data import DataConfig, Subject
from peft_jax.training.rows import make_rows


def examples_of(sizes, seed=0):
    rng = np.random.default_rng(seed)
    made = []
    for n in sizes:
        learn = rng.random(n) < 0.5
        learn[-1] = True
        made.append(Example(rng.integers(3, 60_000, n).astype(np.int32), learn))
    return made


@pytest.mark.parametrize("packing", [True, False])
def test_rows_on_disk_are_those_in_memory(tmp_path, packing):
    examples = examples_of(np.random.default_rng(1).integers(2, 33, 200))
    rows = pack(examples, 32, packing=packing)
    assert open_rows(tmp_path / "none") is None
    write_rows(tmp_path / "kept", examples, 32, packing=packing)
    kept = open_rows(tmp_path / "kept")
    assert kept.tokens.shape == rows.tokens.shape
    for name, array in rows._asdict().items():
        np.testing.assert_array_equal(np.asarray(getattr(kept, name)), array, err_msg=name)
        assert getattr(kept, name).dtype == array.dtype
    for i in (0, 7):
        batches = (batch_at(r, i, 8, seed=3) for r in (rows, kept))
        for (name, ours), theirs in zip(next(batches).items(), next(batches).values(), strict=True):
            np.testing.assert_array_equal(ours, theirs, err_msg=name)
    for ours, theirs in zip(
        evaluation_batches(rows, 16), evaluation_batches(kept, 16), strict=True
    ):
        for name in ours:
            np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
    assert int(np.max(kept.tokens)) == max(rows.tokens.max(), rows.targets.max())
    assert int(np.max(kept.positions)) == rows.positions.max()
    about = json.loads((tmp_path / "kept" / "rows.json").read_text())
    assert about["learnt"] == int(rows.weights.sum())
    assert about["filled"] == pytest.approx(float((rows.segment_ids > 0).mean()))
    assert fingerprint(kept) == fingerprint(open_rows(tmp_path / "kept"))


def test_blocks_are_packed_one_after_another(tmp_path, monkeypatch):
    """Memory does not grow with the data; every prediction is there once."""
    monkeypatch.setattr(cache, "BLOCK", 16)
    examples = examples_of(np.random.default_rng(1).integers(2, 33, 100))
    seen = []

    def stream():
        for i, example in enumerate(examples):
            assert i < 16 * (len(seen) + 1)  # no more than a block is read before it is written
            yield example

    write_rows(tmp_path / "kept", stream(), 32, tell=lambda n, rows: seen.append(n))
    assert seen == [16, 32, 48, 64, 80, 96, 100]
    kept = open_rows(tmp_path / "kept")
    assert np.asarray(kept.weights).sum() == sum(int(e.learn[1:].sum()) for e in examples)
    assert sorted(np.asarray(kept.targets)[np.asarray(kept.segment_ids) > 0].tolist()) == sorted(
        int(i) for e in examples for i in e.ids[1:]
    )


def test_a_cache_that_was_not_finished_is_none(tmp_path):
    def broken():
        yield from examples_of([5, 6])
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        write_rows(tmp_path / "kept", broken(), 8)
    assert open_rows(tmp_path / "kept") is None
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="no example to keep"):
        write_rows(tmp_path / "kept", [], 8)


def test_a_file_that_changes_is_another_one(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text("{}\n")
    before = cache_key(file=identity_of_file(str(file)))
    assert before == cache_key(file=identity_of_file(str(file)))
    file.write_text("{}\n{}\n")
    assert before != cache_key(file=identity_of_file(str(file)))
    assert identity_of_file("builtin:countries") is None


@pytest.mark.parametrize("on_disk", [True, False])
def test_two_processes_read_disjoint_rows_and_together_the_batch(tmp_path, on_disk, monkeypatch):
    examples = examples_of([9] * 40)
    rows = pack(examples, 8, packing=False)
    if on_disk:
        write_rows(tmp_path / "kept", examples, 8, packing=False)
        rows = open_rows(tmp_path / "kept")
    read: list[list[int]] = []
    store = cache._Store._fields
    monkeypatch.setattr(
        cache._Store, "_fields", lambda self, chosen: (read.append(chosen), store(self, chosen))[1]
    )
    if on_disk:
        rows = open_rows(tmp_path / "kept")
    for step in (0, 6):
        parts = parts_at(rows, step, 8, seed=1)
        halves = (np.s_[0:4, 0:8], np.s_[4:8, 0:8])  # what each of two processes asks for
        made = {n: [part[half] for half in halves] for n, part in parts.items()}
        asked = {row for chosen in read for row in chosen}
        assert not on_disk or (len(set(read)) == 2 and len(asked) == 8)
        whole = batch_at(rows, step, 8, seed=1)
        for name, two in made.items():
            np.testing.assert_array_equal(np.concatenate(two), whole[name], err_msg=name)
        read.clear()


def test_several_processes_make_the_same_examples(monkeypatch):
    tokenizer = peft_jax.load_tokenizer(BASE)
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    values = [{"prompt": "a" * i, "completion": "b"} for i in range(30)] + [{"messages": turns}] * 3
    values.insert(7, {"messages": [{"role": "wizard", "content": ""}, *turns]})
    records = [Record(v, f"x:{i}") for i, v in enumerate(values)]
    monkeypatch.setattr(workers, "BLOCK", 8)
    tables = []
    made = []
    for count in (0, 2):
        skipped = Skipped()
        made.append(list(workers.encode_with(count, records, tokenizer, skipped=skipped)))
        tables.append(skipped.table())
    assert len(made[0]) == len(made[1]) == 33
    for one, two in zip(*made, strict=True):
        np.testing.assert_array_equal(one.ids, two.ids)
        np.testing.assert_array_equal(one.learn, two.learn)
        assert one.origin == two.origin
    assert tables[0] == tables[1] != ""


class _Model:
    task = "causal_lm"


def test_rows_of_a_source_are_kept_under_what_they_depend_on(tmp_path, monkeypatch):
    file = tmp_path / "a.jsonl"
    file.write_text("".join(f'{{"prompt": "{i} is ", "completion": "{i}"}}\n' for i in range(40)))
    train = {"path": str(file)}
    tokenizer = peft_jax.load_tokenizer(BASE)

    def rows(**options):
        data = DataConfig(train=train, sequence_length=32, **options)
        return make_rows(Subject(_Model(), tokenizer, data, 4, None), data.train)

    folder = tmp_path / "cache"
    plain, kept = rows(), rows(cache=str(folder))
    for name in plain._fields:
        np.testing.assert_array_equal(getattr(plain, name), np.asarray(getattr(kept, name)))
    (made,) = folder.iterdir()
    monkeypatch.setattr("peft_jax.training.rows.write_rows", None)  # nothing is made again
    assert fingerprint(rows(cache=str(folder))) == fingerprint(kept)
    monkeypatch.undo()
    rows(cache=str(folder), too_long="truncate")
    file.write_text('{"prompt": "a", "completion": "b"}\n')
    assert len(rows(cache=str(folder)).tokens) == 1
    assert len(list(folder.iterdir())) == 3
    with pytest.raises(ConfigError, match="holds no facts"):
        rows(cache=str(folder), kind="facts")
