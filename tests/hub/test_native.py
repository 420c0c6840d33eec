"""This package's own adapter folders: what no other format can say, and files that lie."""

import json
import shutil

import jax
import numpy as np
import pytest

import peft_jax
from peft_jax.models.layers import unstack_layers
from tests.reference import family_checkpoint, perturb, random_tokens, relative_error

KEY = jax.random.key(0)
TOKENS = random_tokens(2, 9)


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """(model, params, run, a mixture of methods under one name, its folder)."""
    folder, _, _ = family_checkpoint("llama2", tmp_path_factory.mktemp("base"))
    model, params = peft_jax.load(folder)
    tree = peft_jax.dora(params, KEY, rank=2, targets="q_proj")
    tree = peft_jax.vera(tree, KEY, rank=4, targets=["gate_proj", "up_proj"])
    tree = peft_jax.compacter(tree, KEY, size=4, dimension=2, layers=[0, 2])
    tree = peft_jax.prompt_tuning(tree, KEY, num_virtual_tokens=2)
    tree = peft_jax.reft(tree, KEY, rank=2)
    tree = perturb(peft_jax.ln_tuning(tree, targets="*/norm"))
    peft_jax.save_adapter(tmp_path_factory.mktemp("out") / "a", tree)
    return (
        model,
        params,
        jax.jit(peft_jax.bind(model)),
        tree,
        next(tmp_path_factory.getbasetemp().glob("out*/a")),
    )


def test_a_mixture_comes_back_stacked_and_looped(setting):
    model, params, run, tree, folder = setting
    expected = run(tree, TOKENS)
    back = peft_jax.load_adapter(params, folder, name="again")
    np.testing.assert_allclose(run(back, TOKENS), expected, rtol=1e-6, atol=1e-6)
    assert [x.shape for x in jax.tree.leaves(back)] == [x.shape for x in jax.tree.leaves(tree)], (
        "numbers stay numbers"
    )
    looped = peft_jax.load_adapter(unstack_layers(params), folder)
    assert (
        relative_error(peft_jax.bind(model.clone(scan_layers=False))(looped, TOKENS), expected)
        < 1e-5
    )
    assert peft_jax.partition(back)[0] is not None
    assert peft_jax.count(back)[0] == peft_jax.count(tree)[0], "what trains, trains again"


def test_peft_has_no_format_for_a_mixture(setting, tmp_path):
    with pytest.raises(ValueError, match=r"PEFT has no format for|holds one method"):
        peft_jax.save_adapter(tmp_path / "a", setting[3], format="peft")
    with pytest.raises(ValueError, match="unknown format 'pfet'"):
        peft_jax.save_adapter(tmp_path / "a", setting[3], format="pfet")


def edit(folder, change):
    config = json.loads((folder / "adapter_config.json").read_text())
    change(config)
    (folder / "adapter_config.json").write_text(json.dumps(config))


PLACE = "model/layers/0/reft"
CHANGES = {
    "version": (lambda c: c.update(version=9), "version 9 of the format is not known"),
    "older": (lambda c: c.update(trained={"lm_head/kernel": {}}), "is of an older version"),
    "width": (lambda c: c.update(hidden_size=64), "is for a model of 64 features; this one has 32"),
    "class": (
        lambda c: c["nodes"][PLACE].update({"class": "os.system"}),
        "unknown class 'os.system'",
    ),
    "field": (
        lambda c: c["nodes"][PLACE]["options"].update(rnak=2),
        "a field 'rnak', which a ReFT lacks",
    ),
    "tensor": (
        lambda c: c["nodes"][PLACE]["fields"].update(source={"tensor": "gone"}),
        "needs the tensor 'gone'",
    ),
    "missing": (lambda c: c["nodes"][PLACE]["fields"].pop("source"), "is no whole ReFT"),
    "module": (
        lambda c: c["nodes"].update({"model/blocks/0/reft": c["nodes"].pop(PLACE)}),
        "which the model lacks",
    ),
    "layer": (
        lambda c: c["nodes"].update({"model/layers/7/reft": c["nodes"][PLACE]}),
        "model/layers/7/reft, which the model",
    ),
    "spec": (lambda c: c["nodes"].update({PLACE: [1]}), "is no description of a node"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_folders_that_lie_are_refused_by_name(setting, case, tmp_path):
    change, message = CHANGES[case]
    folder = shutil.copytree(setting[4], tmp_path / "a")
    edit(folder, change)
    with pytest.raises(ValueError, match=message):
        peft_jax.load_adapter(setting[1], folder)


def test_an_adapter_for_another_architecture_is_refused(setting, tmp_path):
    other, _, _ = family_checkpoint("phi3_longrope", tmp_path)
    _, params = peft_jax.load(other)
    with pytest.raises(ValueError, match="gate_proj/kernel, which the model lacks"):
        peft_jax.load_adapter(params, setting[4])
