"""Adapters of AdapterHub's library with the logits it computes, for
tests/adapters/test_adapterhub.py.

pip install adapters==1.3.0 torch      # in an environment of its own: it needs an older
transformers python scripts/make_adapterhub_fixtures.py make tests/data/adapterhub      # the
fixtures, anew python scripts/make_adapterhub_fixtures.py check tests/data/adapterhub FOLDER  #
logits of an adapter that we wrote
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import adapters  # type: ignore[import-not-found]
import numpy as np
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

CONFIGS = {
    "houlsby": adapters.DoubleSeqBnConfig(reduction_factor=4),
    "pfeiffer": adapters.SeqBnConfig(reduction_factor=4, ln_before=True),
    "normed": adapters.SeqBnConfig(
        reduction_factor=4, ln_after=True, adapter_residual_before_ln=True, scaling="channel"
    ),
    "parallel": adapters.ParBnConfig(reduction_factor=4, scaling="learned"),
    "gated": adapters.SeqBnConfig(reduction_factor=4, mh_adapter=True, use_gating=True),
    "adapter_plus": adapters.AdapterPlusConfig(reduction_factor=4, stochastic_depth=0.0),
    "compacter": adapters.CompacterConfig(reduction_factor=2, phm_dim=2),
    "compacter_own": adapters.CompacterPlusPlusConfig(
        reduction_factor=2, phm_dim=2, shared_phm_rule=False, factorized_phm_W=False
    ),
    "invertible": adapters.SeqBnInvConfig(reduction_factor=4),
    "prefix": adapters.PrefixTuningConfig(prefix_length=3, bottleneck_size=8, cross_prefix=False),
    "prefix_flat": adapters.PrefixTuningConfig(prefix_length=3, flat=True, cross_prefix=False),
    "lora": adapters.LoRAConfig(r=2, alpha=4),
    "loreft": adapters.LoReftConfig(r=2, prefix_positions=2, suffix_positions=1),
    "noreft": adapters.NoReftConfig(r=2, prefix_positions=2, suffix_positions=1),
}
TOKENS = np.random.default_rng(0).integers(3, 96, (2, 7))
_save = safetensors.torch.save_file


def base_model(folder: Path) -> Any:
    """A tiny Llama with random weights, made where it is not there yet."""
    if not folder.exists():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=96,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=4,
            max_position_embeddings=64,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        model.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    adapters.init(model)
    return model.eval()


def logits(model: Any) -> np.ndarray:
    """Logits of the tokens."""
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.numpy()


def make(root: Path) -> None:
    """All fixtures."""
    for name, config in CONFIGS.items():
        torch.manual_seed(1)
        model = base_model(root / "base")
        model.add_adapter("a", config=config)
        model.train_adapter("a")
        model.eval()
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                if parameter.requires_grad and not parameter_name.endswith(
                    ".original"
                ):  # of which training leaves a diagonal
                    parameter.add_(torch.randn_like(parameter) * 0.3)
        model.save_adapter(str(root / name), "a", use_safetensors=True, with_head=False)
        np.savez(root / name / "logits.npz", tokens=TOKENS, logits=logits(model))


def check(root: Path, folder: str) -> None:
    """The largest difference between the library's logits of an adapter and those that stand beside
    it.
    """
    model = base_model(root / "base")
    model.set_active_adapters(model.load_adapter(folder, use_safetensors=True))
    expected = np.load(Path(folder) / "logits.npz")["logits"]
    print(folder, float(np.abs(logits(model) - expected).max() / np.abs(expected).max()))


if __name__ == "__main__":
    # The library hands over arrays that share memory (a norm that is listed twice, a prefix in
    # every layer), which are refused.
    safetensors.torch.save_file = lambda tensors, *rest, **more: _save(
        {k: v.contiguous().clone() for k, v in tensors.items()}, *rest, **more
    )
    {"make": make, "check": check}[sys.argv[1]](Path(sys.argv[2]), *sys.argv[3:])
