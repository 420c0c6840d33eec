"""Where arrays lie on a mesh: by roles, by rules of the user's own, by default."""

import re

import pytest
import transformers as tr
from jax.sharding import PartitionSpec as P

import peft_jax
from peft_jax.core.sharding import make_mesh, shardings
from peft_jax.models.blocks import abstract_params
from peft_jax.models.families import family_of
from tests.models.test_encoders import ENCODERS, T5_SIZES
from tests.reference import FAMILIES

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
            found = peft_jax.places(shardings(tree, mesh))
            assert {p: s.spec for p, s in found.items()} == {
                p: spec_ever(p, w.shape, mesh) for p, w in peft_jax.places(tree).items()
            }
