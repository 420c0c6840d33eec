"""AdapterHub's folders: adapters that its library made, with the logits that it computed
(scripts/make_adapterhub_fixtures.py).
"""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

import peft_jax
from peft_jax.adapters import bottleneck
from tests.reference import perturb, relative_error

FIXTURES = Path(__file__).parents[1] / "data" / "adapterhub"
NAMES = sorted(p.name for p in FIXTURES.iterdir() if p.name != "base")
WRITTEN = ("houlsby", "pfeiffer", "normed", "parallel", "gated", "prefix", "prefix_flat", "lora")


@pytest.fixture(scope="module", params=[True, False], ids=["scanned", "looped"])
def base(request):
    model, params = peft_jax.load(FIXTURES / "base", scan_layers=request.param)
    return jax.jit(peft_jax.bind(model)), params


@pytest.mark.parametrize("name", NAMES)
def test_their_adapters_give_their_logits(base, name):
    run, params = base
    expected = np.load(FIXTURES / name / "logits.npz")
    loaded = peft_jax.load_adapter(params, FIXTURES / name)
    tokens = expected["tokens"].astype(np.int32)
    assert relative_error(run(loaded, tokens), expected["logits"]) < 1e-5
    assert relative_error(run(params, tokens), expected["logits"]) > 1e-2


@pytest.mark.parametrize("name", WRITTEN)
def test_what_we_write_reads_back(base, name, tmp_path):
    run, params = base
    loaded = peft_jax.load_adapter(params, FIXTURES / name)
    tokens = np.load(FIXTURES / name / "logits.npz")["tokens"].astype(np.int32)
    peft_jax.save_adapter(tmp_path / "ours", loaded, format="adapterhub")
    again = peft_jax.load_adapter(params, tmp_path / "ours", name="again")
    np.testing.assert_array_equal(run(again, tokens), run(loaded, tokens))
    theirs, ours = (
        json.loads((f / "adapter_config.json").read_text())
        for f in (FIXTURES / name, tmp_path / "ours")
    )
    if name != "prefix":  # written without its encoder
        assert {k: v for k, v in theirs["config"].items() if k in ours["config"]}.items() >= {
            k: v for k, v in ours["config"].items() if k in theirs["config"]
        }.items()


def test_a_fresh_adapter_is_written_in_their_format_where_it_fits(base, tmp_path):
    _, params = base
    fresh = perturb(bottleneck(params, jax.random.key(0), placement="parallel", size=4))
    peft_jax.save_adapter(tmp_path / "a", fresh)
    assert (tmp_path / "a" / "adapter.safetensors").exists()
    odd = perturb(bottleneck(params, jax.random.key(0), placement="parallel_mlp", size=4))
    peft_jax.save_adapter(tmp_path / "b", odd)
    assert json.loads((tmp_path / "b" / "adapter_config.json").read_text())["format"] == "peft_jax"
    with pytest.raises(
        ValueError, match="places adapters after attention and feed-forward, not at mlp"
    ):
        peft_jax.save_adapter(tmp_path / "c", odd, format="adapterhub")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 8}, "is for a model of 8 features; this one has 16"),
        ({"config": {"architecture": "mtl_lora"}}, "architecture 'mtl_lora' is not supported"),
        ({"config": {"shared_W_phm": True, "non_linearity": "relu"}}, "option shared_W_phm=True"),
        (
            {"config": {"non_linearity": "rleu"}},
            "unknown non_linearity 'rleu'. Did you mean 'relu'",
        ),
        ({"config": {"original_ln_after": False, "non_linearity": "relu"}}, "drops the residual"),
        (
            {"config": {"ln_after": True, "non_linearity": "relu"}},
            "lacks a tensor 'adapter_norm_after.weight'",
        ),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(base, change, message, tmp_path):
    _, params = base
    folder = shutil.copytree(FIXTURES / "houlsby", tmp_path / "a")
    config = json.loads((folder / "adapter_config.json").read_text()) | change
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        peft_jax.load_adapter(params, folder)
