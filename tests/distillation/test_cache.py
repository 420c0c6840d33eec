"""Predictions on disk: exact, resumed, read back by rows, refused where they are somebody else's or
broken.
"""

import json

import numpy as np
import pytest

from peft_jax.distillation.cache import CacheHeader, open_cache, write_cache

HEADER = CacheHeader(
    "model", "tokens", "rows", rows=10, length=3, vocabulary=50, k=4, temperature=1.0, shard_rows=4
)
WANTED = {"tokenizer": "tokens", "data": "rows", "rows": 10, "length": 3, "temperature": 1.0}


def predictions():
    rng = np.random.default_rng(0)
    return rng.integers(0, 50, (10, 3, 4)), -10 * rng.random((10, 3, 5)).astype(np.float32)


def reader(asked=None):
    ids, log_probs = predictions()

    def read(start, stop):
        if asked is not None:
            asked.append((start, stop))
        return ids[start:stop], log_probs[start:stop]

    return read


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_rows_come_back_in_any_order(tmp_path, dtype):
    header = HEADER._replace(dtype=dtype)
    assert write_cache(tmp_path / "c", header, reader()) == 0
    cached = open_cache(tmp_path / "c", **WANTED)
    ids, log_probs = predictions()
    chosen = [9, 0, 3, 4, 0]
    np.testing.assert_array_equal(cached.ids[chosen], ids[chosen])
    np.testing.assert_allclose(
        cached.log_probs[chosen], log_probs[chosen], rtol=0 if dtype == "float32" else 1e-3
    )
    np.testing.assert_array_equal(cached.ids[2:6], ids[2:6])
    assert cached.ids.shape == (10, 3, 4)
    assert len(cached.log_probs) == 10
    assert cached.header == header
    assert header.bytes_per_token == 4 * 2 + 5 * (2 if dtype == "float16" else 4)
    assert HEADER._replace(vocabulary=2**17).ids_dtype == np.uint32


def test_an_interrupted_cache_goes_on_where_it_ended(tmp_path):
    def failing(start, stop):
        if start >= 4:
            raise KeyboardInterrupt
        return reader()(start, stop)

    with pytest.raises(KeyboardInterrupt):
        write_cache(tmp_path, HEADER, failing)
    with pytest.raises(
        ValueError, match=r"holds 1 of 3 shards; run `peft-jax teach` again, which goes on"
    ):
        open_cache(tmp_path, **WANTED)
    asked = []
    assert write_cache(tmp_path, HEADER, reader(asked)) == 1
    assert asked == [(4, 8), (8, 10)]
    np.testing.assert_array_equal(open_cache(tmp_path, **WANTED).ids[:], predictions()[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"tokenizer": "other"},
            r"was written with another tokenizer: 'tokens', and here it is 'other'; run "
            r"`peft-jax teach`",
        ),
        ({"data": "other"}, "with another data"),
        ({"length": 4}, "with another sequence length: 3, and here it is 4"),
        ({"temperature": 2.0}, "with another temperature"),
    ],
)
def test_a_cache_of_something_else_is_refused(tmp_path, change, message):
    write_cache(tmp_path, HEADER, reader())
    with pytest.raises(ValueError, match=message):
        open_cache(tmp_path, **(WANTED | change))


def test_another_teacher_does_not_write_into_it(tmp_path):
    write_cache(tmp_path, HEADER, reader())
    before = sorted((p.name, p.stat().st_mtime_ns) for p in tmp_path.iterdir())
    with pytest.raises(
        ValueError, match="with another teacher: 'model', and here it is 'other'; remove it"
    ):
        write_cache(tmp_path, HEADER._replace(teacher="other"), reader())
    assert sorted((p.name, p.stat().st_mtime_ns) for p in tmp_path.iterdir()) == before


def test_broken_caches_are_refused_with_the_reason(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"holds no teacher.json; `peft-jax teach` writes one"
    ):
        open_cache(tmp_path, **WANTED)
    write_cache(tmp_path, HEADER, reader())
    shard = tmp_path / "shard-00001.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-7])
    with pytest.raises(
        ValueError, match=r"shard-00001.safetensors is truncated or changed: \d+ bytes of \d+"
    ):
        open_cache(tmp_path, **WANTED)
    asked = []
    write_cache(tmp_path, HEADER, reader(asked))  # which mends it
    assert asked == [(4, 8)]
    shard.unlink()
    with pytest.raises(ValueError, match=r"shard-00001\.safetensors is missing"):
        open_cache(tmp_path, **WANTED)
    (tmp_path / "shard-00002.safetensors").rename(shard)
    manifest = json.loads((tmp_path / "teacher.json").read_text())
    manifest["shards"]["shard-00001.safetensors"] = shard.stat().st_size
    (tmp_path / "teacher.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"holds ids \(2, 3, 4\), expected \(4, 3, 4\)"):
        open_cache(tmp_path, **WANTED)
    (tmp_path / "teacher.json").write_text("{}")
    with pytest.raises(ValueError, match="has format None; this version reads 1"):
        open_cache(tmp_path, **WANTED)
