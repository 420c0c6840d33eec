"""Where arrays lie on a mesh: by roles, by rules of the user's own, by default."""

import dataclasses
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import transformers as tr
from jax.sharding import PartitionSpec as P

import peft_jax
from peft_jax.core import layout_of, places, select, sharding
from peft_jax.core.mesh import make_mesh
from peft_jax.core.roles import REGISTERED, register_roles, roles_from
from peft_jax.core.sharding import layer_counts, shardings
from peft_jax.models.blocks import abstract_params
from peft_jax.models.families import family_of
from tests import third_party
from tests.models.test_encoders import ENCODERS, T5_SIZES
from tests.reference import FAMILIES, perturb, random_tokens, relative_error
from tests.third_party import nnx_model

COLUMNS = (
    "((q|k|v|qkv|gate|up|gate_up|query|key|value)_proj|(q|k|v)_lin|query|key|value|c_attn|c_fc|lin1"
    "|Wqkv|Wi|wi(_[01])?|(Self|EncDec)Attention/[qkv]|intermediate/dense)"
)
ROWS = "((o|down)_proj|out_lin|lin2|Wo|wo|(Self|EncDec)Attention/o|c_proj|output/dense)"
# How the families' arrays have been split from the first release on, by their names.
EVER = (
    (r".*experts/gate_up_proj", P("expert", "fsdp", "tensor")),
    (r".*experts/down_proj", P("expert", "tensor", "fsdp")),
    (rf".*{COLUMNS}/kernel", P("fsdp", "tensor")),
    (rf".*{ROWS}/kernel", P("tensor", "fsdp")),
    (r".*/(output_)?embedding", P("tensor", "fsdp")),
    (r".*lm_head/kernel", P("fsdp", "tensor")),
    (rf".*{COLUMNS}/bias", P("tensor")),
)
CONFIGS = {
    **FAMILIES,
    **ENCODERS,
    "t5": lambda: tr.T5Config(**T5_SIZES),
    "t5_gated": lambda: tr.T5Config(
        **T5_SIZES, feed_forward_proj="gated-gelu", tie_word_embeddings=False
    ),
}
MESHES = ({"fsdp": 8}, {"expert": 2, "fsdp": 2, "tensor": 2}, {"tensor": 8})


def spec_ever(path, shape, mesh):
    rule = next((spec for pattern, spec in EVER if re.fullmatch(pattern, path)), P())
    lead = len(shape) - len(rule)
    if lead < 0:
        return P()
    fits = (
        a if a is None or n % mesh.shape[a] == 0 else None
        for n, a in zip(shape[lead:], rule, strict=True)
    )
    return P(*[None] * lead, *fits)


@pytest.mark.parametrize("name", CONFIGS)
def test_families_lie_where_they_ever_lay(name):
    config = CONFIGS[name]()
    family = family_of(config.model_type)
    heads = [t for t in family.tasks if t != "feature_extraction"]
    for i, task in enumerate(heads):
        looped = {"scan_layers": i > 0}
        tree = abstract_params(family.module(family.config(config), task=task, **looped))
        for axes in MESHES:
            mesh = make_mesh(axes)
            found = places(shardings(tree, mesh))
            assert {p: s.spec for p, s in found.items()} == {
                p: spec_ever(p, w.shape, mesh) for p, w in places(tree).items()
            }


def splits(params):
    """path -> whether the array there is split over devices."""
    return {p: not x.sharding.is_fully_replicated for p, x in places(params).items()}


@pytest.fixture(params=["linen", "nnx"])
def stranger(request):
    """A third-party model, its parameters and the layout of its weights."""
    model, params = third_party.linen_model() if request.param == "linen" else nnx_model()
    tokens = random_tokens(8, 4, vocab=third_party.VOCAB)
    layout = layout_of(model, tokens)
    return model, params, layout, tokens


def test_models_without_roles_are_split_by_their_largest_axis(stranger, caplog):
    model, params, layout, tokens = stranger
    apply, mesh = peft_jax.bind(model), make_mesh({"fsdp": 8})
    placed = peft_jax.shard(params, mesh)
    found = splits(placed)
    for path, x in places(params).items():
        stacked = int(path.startswith("blocks"))
        assert found[path] == (x.ndim - stacked > 1 and not path.endswith(("bias", "scale"))), path
        assert not stacked or placed_axis(placed, path) != 0
    assert "whole on each" not in caplog.text
    run = jax.jit(apply)
    with jax.set_mesh(mesh):
        out = run(placed, tokens)
    assert relative_error(out, run(params, tokens)) < 1e-5

    trained = perturb(peft_jax.lora(params, jax.random.key(0), rank=2, layout=layout))

    def loss(trainable, frozen):
        return (apply(peft_jax.combine(trainable, frozen), tokens) ** 2).mean()

    step = jax.jit(jax.value_and_grad(loss))
    alone = step(*peft_jax.partition(trained))
    with jax.set_mesh(mesh):
        together = step(*peft_jax.partition(peft_jax.shard(trained, mesh)))
    for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
        assert relative_error(a, b) < 1e-4


def placed_axis(params, path):
    """The axis of the array at `path` that is split, None where none is."""
    spec = places(params)[path].sharding.spec
    return next((i for i, axis in enumerate(spec) if axis is not None), None)


def test_a_stack_of_any_name_is_not_split_along_its_layers():
    stack = {"up": {"kernel": zeros(8, 16, 32)}, "norm": {"weight": zeros(8, 16)}}
    tree = {"pile": stack, "one": {"up": {"kernel": zeros(8, 4)}, "down": {"kernel": zeros(8, 2)}}}
    counts = layer_counts(tree)
    assert counts["pile/up/kernel"] == counts["pile/norm/weight"] == 1
    assert counts["one/up/kernel"] == 0
    found = places(shardings(tree, make_mesh({"fsdp": 8})))
    assert found["pile/up/kernel"].spec == P(None, None, "fsdp")
    assert found["pile/norm/weight"].is_fully_replicated
    assert found["one/up/kernel"].spec == P("fsdp", None)


def zeros(*shape):
    return jnp.zeros(shape)


LARGE = 600  # columns of an array that is worth a word
SAID = r"{} arrays, .* MiB, are whole on each of 8 devices, {} the largest"


@pytest.mark.parametrize(
    ("axes", "tree", "rules", "said"),
    [
        # no rule, and no axis for the default one
        ({"tensor": 8}, {"a": {"kernel": zeros(512, LARGE)}}, (), SAID.format(1, "a/kernel")),
        # an axis that does not divide: by default, by a role and by a rule
        ({"fsdp": 8}, {"a": {"kernel": zeros(601, LARGE + 1)}}, (), SAID.format(1, "a/kernel")),
        (
            {"fsdp": 8},
            {"q_proj": {"kernel": zeros(601, LARGE)}, "b": {"kernel": zeros(3, 7)}},
            (),
            SAID.format(2, "q_proj/kernel"),
        ),
        (
            {"fsdp": 8},
            {"a": {"kernel": zeros(512, LARGE + 1)}},
            ((".*/kernel", P(None, "fsdp")),),
            SAID.format(1, "a/kernel"),
        ),
        # what is small, a vector, meant to be whole, or on a mesh for rows alone is no news
        ({"fsdp": 8}, {"a": {"kernel": zeros(601, 7)}}, (), None),
        ({"fsdp": 8}, {"a": {"bias": zeros(2**20)}}, (), None),
        ({"tensor": 8}, {"a": {"kernel": zeros(512, LARGE)}}, ((".*", P()),), None),
        ({"tensor": 8}, {"a": {"kernel": zeros(512, LARGE)}}, ((".*", P("tensor", None)),), None),
        ({"data": 8}, {"a": {"kernel": zeros(512, LARGE)}}, (), None),
        ({"expert": 8}, {"q_proj": {"kernel": zeros(512, LARGE)}}, (), None),
    ],
)
def test_what_stays_whole_is_said_once(axes, tree, rules, said, caplog, monkeypatch):
    monkeypatch.setattr(sharding, "_SAID", set())
    for _ in range(2):
        peft_jax.shard(tree, make_mesh(axes), rules)
    lines = [r.getMessage() for r in caplog.records if "whole on each" in r.getMessage()]
    assert len(lines) == (said is not None)
    assert said is None or re.match(said, lines[0])


def test_rules_come_first_and_name_axes_that_there_are():
    tree, mesh = {"q_proj": {"kernel": zeros(16, 32)}}, make_mesh({"fsdp": 2, "tensor": 4})
    kernel = peft_jax.shard(tree, mesh, [(".*/kernel", P("tensor"))])["q_proj"]["kernel"]
    assert kernel.sharding.spec == P(None, "tensor")
    with pytest.raises(ValueError, match=r"'.\*/kernel' has an unknown axis 'model'; the axes are"):
        peft_jax.shard(tree, mesh, [(".*/kernel", P("model"))])


def test_roles_of_a_model_of_ones_own(monkeypatch):
    monkeypatch.setattr(REGISTERED, "_records", dict(REGISTERED._records))
    mesh = make_mesh({"fsdp": 2, "tensor": 4})
    tree = {"pile": {"mix": {"inward": {"kernel": zeros(2, 16, 32), "bias": zeros(2, 32)}}}}
    tree["pile"]["mix"] |= {"outward": {"kernel": zeros(2, 32, 16)}, "odd": {"w": zeros(2, 3, 64)}}
    roles = roles_from(
        "mine",
        {"stack": ["pile"], "q": ["mix/inward"], "o": ["outward"], "head": ["outward"]},
        rules=((".*/odd/w", P(None, "tensor")),),
    )
    with pytest.raises(ValueError, match="'outward' is both head and o"):
        register_roles(roles)
    roles = dataclasses.replace(roles, head=())
    assert register_roles(roles) is register_roles(dataclasses.replace(roles)) is roles
    found = {p: s.spec for p, s in places(shardings(tree, mesh)).items()}
    assert found == {
        "pile/mix/inward/kernel": P(None, "fsdp", "tensor"),
        "pile/mix/inward/bias": P(None, "tensor"),
        "pile/mix/outward/kernel": P(None, "tensor", "fsdp"),
        "pile/mix/odd/w": P(None, None, "tensor"),
    }
    assert select(tree, "pile.1.mix.outward") == ["pile/mix/outward/kernel"]
    with pytest.raises(ValueError, match=r"unknown role 'dwon'\. Did you mean 'down'"):
        roles_from("other", {"dwon": ["x"]})


def test_the_guides_example_runs(monkeypatch):
    monkeypatch.setattr(REGISTERED, "_records", dict(REGISTERED._records))
    guide = (Path(__file__).parents[2] / "docs" / "guide.md").read_text(encoding="utf-8")
    (code,) = [c for c in re.findall(r"```python\n(.*?)```", guide, re.S) if "Roles(" in c]
    mix = {name: {"kernel": zeros(16, 16)} for name in ("inward", "outward", "gate")}
    names = {"params": {"mix": mix}}
    exec(compile(code, "guide.md", "exec"), names)
    found = {p: x.sharding.spec for p, x in places(names["params"]).items()}
    assert found == {
        "mix/inward/kernel": P("fsdp", "tensor"),
        "mix/outward/kernel": P("tensor", "fsdp"),
        "mix/gate/kernel": P(None, "tensor"),
    }
