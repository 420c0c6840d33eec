"""Files that are there whole or as they were."""

import pytest

from peft_jax.core.files import read_json, write_json


def test_json_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    write_json(path, {"loss": float("nan"), "steps": 1})
    assert read_json(path) == {"loss": None, "steps": 1}

    def full(*_):
        raise OSError("disk full")

    monkeypatch.setattr("peft_jax.core.files.os.replace", full)
    with pytest.raises(OSError, match="disk full"):
        write_json(path, {"steps": 2})
    assert read_json(path) == {"loss": None, "steps": 1}
