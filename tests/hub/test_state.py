"""A stage's folder: trees with any nodes come back as they were, with their model."""

import dataclasses
import json
from typing import ClassVar

import jax
import numpy as np
import pytest

import peft_jax
from peft_jax.adapters import bottleneck, prefix_tuning
from peft_jax.core import freeze, full
from peft_jax.core.stage import State
from peft_jax.hub.state import FILE, read_identity, read_state, write_state
from peft_jax.low_rank import factorize, vera
from peft_jax.pruning import mask_updates
from peft_jax.quantization import FP8, NF4, Int

KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def base(tiny_folder):
    return peft_jax.load(tiny_folder)


def pruned(params):
    return peft_jax.prune(params, None, score="magnitude", pattern="2:4")


TREES = {
    "arrays": lambda p: p,
    "masked lora": lambda p: mask_updates(peft_jax.lora(pruned(p), KEY, rank=2)),
    "lora on masked codes": lambda p: peft_jax.lora(
        peft_jax.quantize(pruned(p), Int(bits=4, block_size=16)), KEY, rank=2
    ),
    "doubled scales": lambda p: peft_jax.quantize(p, NF4(block_size=16, double=True)),
    "float8": lambda p: peft_jax.quantize(p, FP8()),
    "two adapters": lambda p: peft_jax.lora(
        bottleneck(p, KEY, size=4), KEY, rank=2, adapter="second"
    ),
    "shared arrays": lambda p: vera(p, KEY, rank=4),
    "attachments": lambda p: prefix_tuning(p, KEY, num_virtual_tokens=3),
    "factors": lambda p: factorize(p, keep=0.5)[0],
    "trained whole": lambda p: full(p),
    "frozen": lambda p: freeze(peft_jax.lora(p, KEY, rank=2)),
}


def back(folder):
    return read_state(folder, lambda tree: tree, remat="none", attention=None)


@pytest.mark.parametrize("name", TREES)
def test_trees_come_back_bit_for_bit(base, name, tmp_path):
    model, params = base
    params = TREES[name](params)
    write_state(tmp_path / "state", State(model, params, False, True, {"n": 1.5}), {"a": [1, None]})
    found = back(tmp_path / "state")
    assert jax.tree.structure(found.params) == jax.tree.structure(params)
    for one, other in zip(jax.tree.leaves(found.params), jax.tree.leaves(params), strict=True):
        assert one.dtype == other.dtype
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()
    assert found.model == model
    assert (found.mask_updates, found.trained, found.numbers) == (False, True, {"n": 1.5})
    assert read_identity(tmp_path / "state") == {"a": [1, None]}


def test_half_precision_and_numbers_that_are_not_finite(base, tmp_path):
    model, params = base
    half = jax.tree.map(lambda x: x.astype("bfloat16"), params)
    write_state(tmp_path / "state", State(model, half, numbers={"x": float("inf")}), {})
    found = back(tmp_path / "state")
    assert found.numbers["x"] == float("inf")
    assert {str(x.dtype) for x in jax.tree.leaves(found.params)} == {"bfloat16"}


def test_a_folder_appears_whole_or_not_at_all(base, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("peft_jax.hub.state.write_shards", fail)
    with pytest.raises(OSError, match="disk full"):
        write_state(tmp_path / "state", State(*base), {})
    assert not (tmp_path / "state").exists()
    monkeypatch.undo()
    write_state(tmp_path / "state", State(*base), {})
    assert [p.name for p in tmp_path.iterdir()] == ["state"]


def test_what_cannot_be_kept_or_read_is_named(base, tmp_path):
    model, params = base
    with pytest.raises(ValueError, match=r"params.extra is a function, which a stage's folder"):
        write_state(tmp_path / "a", State(model, {**params, "extra": print_nothing}), {})
    write_state(tmp_path / "b", State(model, params), {})
    file = tmp_path / "b" / FILE
    described = json.loads(file.read_text())
    described["config"]["class"] = "os:system"
    file.write_text(json.dumps(described))
    with pytest.raises(ValueError, match="has a node of the class os:system"):
        back(tmp_path / "b")
    described["config"]["class"] = f"{__name__}:Foreign"  # imported, a record, and of nobody known
    file.write_text(json.dumps(described))
    with pytest.raises(ValueError, match="of a package that registered no family"):
        back(tmp_path / "b")
    assert Foreign.made == []
    with pytest.raises(ValueError, match=r"params.extra is of the class .*Foreign"):
        write_state(tmp_path / "c", State(model, {**params, "extra": Foreign()}), {})
    assert not (tmp_path / "c").exists()
    file.write_text(json.dumps({**described, "version": 9}))
    with pytest.raises(ValueError, match="version 9 is not known; this package reads 1"):
        back(tmp_path / "b")


def print_nothing():
    """No array."""


@dataclasses.dataclass(frozen=True)
class Foreign:
    """A record that does something when it is made."""

    made: ClassVar[list[int]] = []
    value: int = 0

    def __post_init__(self):
        self.made.append(1)
