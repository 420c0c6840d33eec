"""Loading and saving checkpoints: dtypes, shardings, and what must be refused."""

import errno
import json
import os
import shutil
import struct
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import peft_jax
from peft_jax.core.mesh import make_mesh
from peft_jax.hub import safetensors_io
from peft_jax.hub.checkpoint.folder import default_dtype
from tests.reference import random_tokens, relative_error


@pytest.fixture
def folder(tiny_folder, tmp_path):
    return shutil.copytree(tiny_folder, tmp_path / "model")


def edit(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize("axes", [{"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}, {"tensor": 8}])
def test_tensors_go_straight_to_their_sharding(folder, axes):
    mesh = make_mesh(axes)
    model, placed = peft_jax.load(folder, mesh=mesh)
    _, plain = peft_jax.load(folder)
    for (path, a), b in zip(
        jax.tree_util.tree_flatten_with_path(placed)[0], jax.tree.leaves(plain), strict=True
    ):
        np.testing.assert_array_equal(a, b)
        name = jax.tree_util.keystr(path)
        if "q_proj" in name and mesh.shape["tensor"] < 8:
            assert a.sharding.spec == jax.P(None, "fsdp", "tensor")
            assert (
                a.addressable_shards[0].data.size * mesh.shape["fsdp"] * mesh.shape["tensor"]
                == a.size
            )
    tokens = random_tokens(8, 8)
    with jax.set_mesh(mesh):
        out = np.asarray(jax.jit(peft_jax.bind(model))(placed, tokens))
    assert relative_error(out, model.apply({"params": plain}, tokens)) < 1e-5


def test_loading_reads_one_tensor_at_a_time(folder, monkeypatch):
    """Host memory: what is read at once is one checkpoint tensor (or a device's part of it), never
    the model.
    """
    sizes = []
    read = safetensors_io.Checkpoint.read
    monkeypatch.setattr(
        safetensors_io.Checkpoint,
        "read",
        lambda self, name, index=None: sizes.append((x := read(self, name, index)).nbytes) or x,
    )
    peft_jax.load(folder)
    assert max(sizes) == 4096 * 32 * 4
    sizes.clear()
    peft_jax.load(folder, mesh=make_mesh({"fsdp": 8}))
    assert max(sizes) == 4096 * 32 * 4 // 8


def test_default_dtype_is_float32_on_the_cpu(folder):
    edit_config(folder, dtype="bfloat16")
    model, params = peft_jax.load(folder)
    assert model.dtype == jnp.float32
    assert jax.tree.leaves(params)[0].dtype == jnp.float32


def test_the_devices_of_a_mesh_decide_the_default_dtype():
    """Also where a program for them is made on a machine that has only a CPU."""
    config = types.SimpleNamespace(dtype="torch.bfloat16")
    tpus = types.SimpleNamespace(devices=np.array([types.SimpleNamespace(platform="tpu")]))
    assert default_dtype(config, tpus) == jnp.bfloat16
    assert default_dtype(config, make_mesh()) == jnp.float32


def test_saving_keeps_bfloat16(folder, tmp_path):
    model, params = peft_jax.load(folder, dtype="bfloat16")
    peft_jax.save(tmp_path / "half", model, params)
    assert {v.dtype.name for v in load_file(tmp_path / "half" / "model.safetensors").values()} == {
        "bfloat16"
    }
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"


def test_saving_adapters_as_a_model_is_refused(folder, tmp_path):
    model, params = peft_jax.load(folder)
    lora = peft_jax.lora(params, jax.random.key(0), rank=2)
    with pytest.raises(ValueError, match=r"is a LoRA; call peft_jax.merge\(params\) before save"):
        peft_jax.save(tmp_path / "out", model, lora)
    with pytest.raises(ValueError, match=r"params do not fit the model at lm_head/kernel"):
        peft_jax.save(tmp_path / "out", model, {**params, "lm_head": {"kernel": jnp.ones((2, 2))}})
    assert not (tmp_path / "out").exists()


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def corrupt_header(folder):
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[8:40] = b"\xff" * 32
    path.write_bytes(bytes(data))


def huge_header(folder):
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 2**60) + b"{}")


def only_pickle(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def escaping_index(folder):
    index = {"weight_map": {"model.norm.weight": "../model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def lying_index(folder):
    index = {"weight_map": {"model.nothing": "model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def index_without_file(folder):
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


UP = "model.layers.1.mlp.up_proj.weight"
BAD = {
    "truncated file": (
        truncate,
        ValueError,
        r"model.safetensors is not a readable safetensors file \(corrupt or truncated\)",
    ),
    "corrupt header": (corrupt_header, ValueError, "not a readable safetensors file"),
    "huge header": (huge_header, ValueError, "not a readable safetensors file"),
    "pickle": (only_pickle, FileNotFoundError, r"PyTorch .bin files \(pickle, which is not read\)"),
    "no weights": (
        lambda f: (f / "model.safetensors").unlink(),
        FileNotFoundError,
        "holds no model.safetensors",
    ),
    "index escapes": (escaping_index, ValueError, "which is not a file beside it"),
    "index lies": (lying_index, ValueError, "which does not hold it"),
    "shard missing": (
        index_without_file,
        FileNotFoundError,
        "named by the index and does not exist",
    ),
    "missing tensor": (lambda f: edit(f, lambda t: t.pop(UP)), ValueError, f"lacks {UP}"),
    "surplus tensor": (
        lambda f: edit(f, lambda t: t.update(extra=t[UP])),
        ValueError,
        "holds extra, which a llama model",
    ),
    "wrong shape": (
        lambda f: edit(f, lambda t: t.update({UP: np.zeros((48, 31), np.float32)})),
        ValueError,
        rf"{UP} in .* has shape \(48, 31\), expected \(48, 32\)",
    ),
    "integers": (
        lambda f: edit(f, lambda t: t.update({UP: np.zeros((48, 32), np.int8)})),
        ValueError,
        "has dtype int8: no quantization_config says how to read it",
    ),
    "no config": (
        lambda f: (f / "config.json").unlink(),
        FileNotFoundError,
        "config.json does not exist",
    ),
    "config is no JSON": (
        lambda f: (f / "config.json").write_text("{"),
        ValueError,
        "config.json is not valid JSON",
    ),
    "config is a list": (
        lambda f: (f / "config.json").write_text("[]"),
        ValueError,
        "should hold a JSON object",
    ),
    "no model type": (
        lambda f: (f / "config.json").write_text("{}"),
        ValueError,
        "has no model_type",
    ),
    "unknown family": (
        lambda f: edit_config(f, model_type="mamba"),
        ValueError,
        "supported families: bert, .*gemma",
    ),
    "unheard-of family": (
        lambda f: edit_config(f, model_type="wonder"),
        ValueError,
        "supported families: bert, .*gemma",
    ),
    "heads do not divide": (
        lambda f: edit_config(f, num_key_value_heads=3),
        ValueError,
        "num_attention_heads=4 is not a multiple of num_key_value_heads=3",
    ),
    "unknown rope": (
        lambda f: edit_config(f, rope_parameters={"rope_type": "spiral", "rope_theta": 1e4}),
        (ValueError, KeyError),
        "spiral",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_checkpoints_are_refused_in_one_sentence(folder, name):
    harm, error, message = BAD[name]
    harm(folder)
    with pytest.raises(error, match=message) as caught:
        peft_jax.load(folder)
    assert "\n" not in str(caught.value).strip()


def test_no_such_folder():
    with pytest.raises(FileNotFoundError, match=r"./nothing/here is no folder"):
        peft_jax.load("./nothing/here")
    with pytest.raises(
        FileNotFoundError, match=r"nobody/nothing is neither a folder nor a repository"
    ):
        peft_jax.load("nobody/nothing")


def test_no_tokenizer(folder):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(ValueError, match=r"has no tokenizer that transformers can load"):
        peft_jax.load_tokenizer(folder)


@pytest.mark.parametrize("fail_at", [1, 2])
def test_a_full_disk_leaves_the_earlier_model_intact(folder, monkeypatch, fail_at):
    model, params = peft_jax.load(folder)
    before = {f.name: f.read_bytes() for f in folder.iterdir()}
    calls = []

    def full(*args, **kwargs):
        calls.append(1)
        if len(calls) == fail_at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save_file(*args, **kwargs)

    monkeypatch.setattr(safetensors_io, "save_file", full)
    with pytest.raises(OSError, match=f"could not write {folder}: No space left on device"):
        peft_jax.save(folder, model, jax.tree.map(lambda x: x + 1, params), max_shard_bytes=300_000)
    assert {f.name: f.read_bytes() for f in folder.iterdir()} == before
    assert [p.name for p in folder.parent.iterdir()] == ["model"]


def test_saving_over_a_file_is_refused(folder, tmp_path):
    model, params = peft_jax.load(folder)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(NotADirectoryError, match=r"exists and is not a folder"):
        peft_jax.save(tmp_path / "file", model, params)
    assert (tmp_path / "file").read_text() == "mine"
