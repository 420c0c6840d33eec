"""This package's own adapter folders: what no other format can say, and files that lie."""

import dataclasses
import json
import shutil
from typing import ClassVar

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import peft_jax
from peft_jax.adapters import compacter, ln_tuning, prompt_tuning, reft
from peft_jax.core.attachment import Attachment, attach
from peft_jax.core.nodes import register_node
from peft_jax.core.reparametrised import Additive, node
from peft_jax.core.tree import map_places
from peft_jax.core.weight import Node, static
from peft_jax.low_rank import dora, vera
from peft_jax.low_rank.lora import LoRA
from peft_jax.models.layers import unstack_layers
from tests.reference import family_checkpoint, perturb, random_tokens, relative_error

KEY = jax.random.key(0)
TOKENS = random_tokens(2, 9)


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """(model, params, run, a mixture of methods under one name, its folder)."""
    folder, _, _ = family_checkpoint("llama2", tmp_path_factory.mktemp("base"))
    model, params = peft_jax.load(folder)
    tree = dora(params, KEY, rank=2, targets="q_proj")
    tree = vera(tree, KEY, rank=4, targets=["gate_proj", "up_proj"])
    tree = compacter(tree, KEY, size=4, dimension=2, layers=[0, 2])
    tree = prompt_tuning(tree, KEY, num_virtual_tokens=2)
    tree = reft(tree, KEY, rank=2)
    tree = perturb(ln_tuning(tree, targets="*/norm"))
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
    assert peft_jax.core.count(back)[0] == peft_jax.core.count(tree)[0], "what trains, trains again"


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
        "unknown class 'os.system'; import what registers it",
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


@node
class Outer(Additive):
    """A node of another package: a [*lead, in] times b [*lead, out], `power` times."""

    trainable: ClassVar[tuple[str, ...]] = ("a", "b")
    a: jax.Array
    b: jax.Array
    power: float = static(default=1.0)

    def delta(self):
        return self.power * self.a[..., :, None] * self.b[..., None, :]

    def update(self, x):
        return (x @ self.a)[..., None] * self.b * self.power


@node
class Scaled(Attachment):
    """What a module puts out, times `by` [*lead]."""

    trainable: ClassVar[tuple[str, ...]] = ("by",)
    by: jax.Array
    name: str = static(default="default")

    @property
    def lead(self):
        return self.by.shape

    def around(self, call, *args, **kwargs):
        return call(*args, **kwargs) * self.by


@node
class Twice(LoRA):
    """A LoRA of another formula, which a folder of LoRAs would not tell from one."""

    def delta(self):
        return 2 * super().delta()

    def update(self, x):
        return 2 * super().update(x)


def over(params, name, make):
    """`params` with `make(weight)` at the up_proj of every layer."""
    return map_places(lambda p, w: make(w) if p.endswith(name) else w, params)


def foreign_trees(params):
    rng = np.random.default_rng(0)

    def outer(w, **options):
        a, b = (rng.normal(size=(*w.shape[:-2], n)) for n in w.shape[-2:])
        arrays = {"a": np.float32(a), "b": np.float32(b)}
        return Outer(base=w, in_axes=(-2,), out_axes=(-1,), **arrays, **options)

    def twice(w):
        return Twice(**{f.name: getattr(w, f.name) for f in dataclasses.fields(w)})

    lora = perturb(peft_jax.lora(params, KEY, rank=2, targets="q_proj"))
    count = params["model"]["layers"]["mlp"]["up_proj"]["kernel"].shape[0]
    return {
        "weight": over(params, "up_proj/kernel", lambda w: outer(w, power=0.5)),
        "attachment": attach(
            params, {"model/layers/mlp": {"scaled_default": Scaled(by=3 + rng.random(count))}}
        ),
        "subclass": map_places(lambda p, w: twice(w) if type(w) is LoRA else w, lora),
        "option": over(params, "up_proj/kernel", lambda w: outer(w, power=np.float32(2))),
    }


@pytest.mark.parametrize("kind", ["weight", "attachment", "subclass"])
def test_nodes_of_other_packages_are_registered_or_refused_when_saved(
    setting, kind, tmp_path, monkeypatch
):
    _, params, run, _, _ = setting
    tree = foreign_trees(params)[kind]
    cls = {"weight": Outer, "attachment": Scaled, "subclass": Twice}[kind]
    with pytest.raises(
        ValueError, match=rf"test_native\.{cls.__name__} is not of this package.*register_node"
    ):
        peft_jax.save_adapter(tmp_path / "a", tree)
    assert not (tmp_path / "a").exists()
    monkeypatch.setattr("peft_jax.core.nodes._REGISTERED", {})
    register_node(cls)
    peft_jax.save_adapter(tmp_path / "a", tree)
    back = peft_jax.load_adapter(params, tmp_path / "a")
    expected = run(tree, TOKENS)
    assert relative_error(expected, run(params, TOKENS)) > 1e-3
    np.testing.assert_array_equal(run(back, TOKENS), expected)
    monkeypatch.setattr("peft_jax.core.nodes._REGISTERED", {})
    with pytest.raises(
        ValueError, match=rf"unknown class '.*{cls.__name__}'; import what registers it"
    ):
        peft_jax.load_adapter(params, tmp_path / "a")


def test_what_is_no_node_and_options_that_are_not_plain_are_refused(setting, tmp_path, monkeypatch):
    monkeypatch.setattr("peft_jax.core.nodes._REGISTERED", {})
    for cls in (dict, Node, 3):
        with pytest.raises(TypeError, match="is no dataclass of nodes"):
            register_node(cls)
    register_node(Outer)
    with pytest.raises(ValueError, match=r"up_proj/kernel\.power is .*2\.0.*a number, a string"):
        peft_jax.save_adapter(tmp_path / "a", foreign_trees(setting[1])["option"])
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: np.concatenate([a, a], -1), "do not fit a weight of shape"),
        (lambda a: np.round(a).astype(np.int32), "has a of dtype int32, and what trains is float"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(setting, change, message, tmp_path):
    folder = shutil.copytree(setting[4], tmp_path / "a")
    tensors = load_file(folder / "adapter_model.safetensors")
    wrong = {n: change(a) for n, a in tensors.items() if n.endswith("q_proj/kernel.a")}
    save_file(tensors | wrong, folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=message):
        peft_jax.load_adapter(setting[1], folder)
