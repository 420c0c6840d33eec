"""What a configuration says of a model, before it is loaded."""

import pytest
from jax.sharding import PartitionSpec as P

from peft_jax.core import places
from peft_jax.core.roles import REGISTERED, role_of
from peft_jax.recipes.config import load_config
from peft_jax.recipes.setup import set_up
from tests.reference import tiny_llama_folder

YAML = """
model:
  path: {path}
  roles: {{q: [mixer/inward], down: [narrow]}}
mesh: {{fsdp: 2, tensor: 4}}
sharding:
  .*lm_head/kernel: [null, [fsdp, tensor]]
"""


@pytest.fixture
def written(tmp_path, monkeypatch):
    monkeypatch.setattr(REGISTERED, "_records", dict(REGISTERED._records))
    path = tmp_path / "run.yaml"

    def write(text):
        path.write_text(text)
        return load_config(str(path))

    return write


def test_roles_and_rules_in_yaml(written, tmp_path):
    config = written(YAML.format(path=tiny_llama_folder(tmp_path / "model")))
    for _ in range(2):  # what is said again is no other thing
        params = set_up(config).params
    assert params["lm_head"]["kernel"].sharding.spec == P(None, ("fsdp", "tensor"))
    q = places(params)["model/layers/self_attn/q_proj/kernel"]
    assert q.sharding.spec == P(None, "fsdp", "tensor")
    assert (role_of("a/mixer/inward"), role_of("a/narrow")) == ("q", "down")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("model: {roles: {dwon: [w2]}}", "unknown role 'dwon'. Did you mean 'down'"),
        ("sharding: {a/kernel: [model]}", "rule of 'a/kernel' has an unknown axis 'model'"),
    ],
)
def test_wrong_ones_are_refused(written, line, message):
    with pytest.raises(ValueError, match=message):
        set_up(written(line))
