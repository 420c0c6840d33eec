"""`peft-jax quantize` refuses before any work what it could not write in the end."""

import pytest

from peft_jax.core.options import ConfigError
from peft_jax.recipes.config import load_config
from peft_jax.recipes.quantize import run_quantization


@pytest.mark.parametrize(
    ("quantize", "said"),
    [
        ("{format: nf4, tool: compressed-tensors}", "compressed-tensors folders hold no nf4"),
        ("{format: int4, tool: bitsandbytes}", "bitsandbytes folders hold no int4"),
    ],
)
def test_a_format_that_no_folder_holds_is_refused_before_anything_is_loaded(
    tmp_path, quantize, said
):
    given = [f"model.path={tmp_path / 'nothing'}", f"output={tmp_path}", f"quantize={quantize}"]
    with pytest.raises(ConfigError, match=said):
        run_quantization(load_config(None, given))
    assert not list(tmp_path.iterdir())
