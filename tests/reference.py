"""References in PyTorch and NumPy that tests compare with, and the models that they build."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path

import jax
import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Phi3Config,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
)

from peft_jax.hub.checkpoint import BASE

torch.set_num_threads(1)
VOCAB = 96
_SIZES = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
_HEADS = dict(_SIZES, head_dim=8)


_GPT2 = dict(
    vocab_size=VOCAB,
    n_embd=32,
    n_layer=3,
    n_head=4,
    n_positions=64,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)


def _rope(kind: str, **options):
    return {"rope_type": kind, "rope_theta": 10000.0, **options}


# Each family with the features switched on that real checkpoints use.
FAMILIES = {
    "llama2": lambda: LlamaConfig(**_HEADS),
    "llama3_tied_biased": lambda: LlamaConfig(
        **dict(_HEADS, max_position_embeddings=256),
        tie_word_embeddings=True,
        attention_bias=True,
        mlp_bias=True,
        rope_parameters=_rope(
            "llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=32,
        ),
    ),
    "llama_linear": lambda: LlamaConfig(**_HEADS, rope_parameters=_rope("linear", factor=4.0)),
    "llama_dynamic": lambda: LlamaConfig(
        **dict(_HEADS, max_position_embeddings=16), rope_parameters=_rope("dynamic", factor=4.0)
    ),
    "llama_yarn": lambda: LlamaConfig(
        **_HEADS, rope_parameters=_rope("yarn", factor=4.0, original_max_position_embeddings=16)
    ),
    "mistral_sliding": lambda: MistralConfig(**_HEADS, sliding_window=6),
    "qwen2_sliding": lambda: Qwen2Config(
        **_SIZES, use_sliding_window=True, sliding_window=6, max_window_layers=1
    ),
    "qwen3_tied": lambda: Qwen3Config(**dict(_HEADS, head_dim=12), tie_word_embeddings=True),
    "gemma": lambda: GemmaConfig(**dict(_HEADS, head_dim=16)),
    "gemma2_caps": lambda: Gemma2Config(
        **_HEADS,
        sliding_window=6,
        query_pre_attn_scalar=12,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
    ),
    "gemma3": lambda: Gemma3TextConfig(
        **dict(_HEADS, num_hidden_layers=7),
        sliding_window=6,
        query_pre_attn_scalar=12,
        rope_parameters={
            "sliding_attention": _rope("default"),
            "full_attention": _rope("linear", factor=8.0),
        },
    ),
    "phi3_longrope": lambda: Phi3Config(
        **_HEADS,
        sliding_window=7,
        original_max_position_embeddings=16,
        rope_parameters=_rope(
            "longrope",
            short_factor=[1.0, 1.1, 1.2, 1.3],
            long_factor=[2.0, 3.0, 4.0, 5.0],
            original_max_position_embeddings=16,
        ),
    ),
    "phi4_partial_rotary": lambda: Phi3Config(
        **dict(_HEADS, head_dim=16), rope_parameters=_rope("default", partial_rotary_factor=0.5)
    ),
    "smollm3": lambda: SmolLM3Config(
        **_HEADS,
        no_rope_layer_interval=2,
        use_sliding_window=True,
        sliding_window=6,
        layer_types=["full_attention", "sliding_attention", "full_attention"],
    ),
    "olmo2": lambda: Olmo2Config(**_HEADS),
    "gpt2": lambda: GPT2Config(**_GPT2),
    "gpt2_scaled_untied": lambda: GPT2Config(
        **_GPT2, scale_attn_by_inverse_layer_idx=True, tie_word_embeddings=False
    ),
    "mixtral_sliding": lambda: MixtralConfig(
        **_HEADS, num_local_experts=4, num_experts_per_tok=2, sliding_window=6
    ),
    "qwen2_moe": lambda: Qwen2MoeConfig(
        **_SIZES,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=40,
    ),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **dict(_HEADS, head_dim=12),
        num_experts=4,
        num_experts_per_tok=3,
        moe_intermediate_size=24,
        norm_topk_prob=True,
    ),
}


def torch_model(config, seed: int = 0):
    """A PyTorch model with random weights, norms and biases included."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def torch_logits(model, tokens, **inputs) -> np.ndarray:
    with torch.no_grad():
        return model(
            torch.tensor(np.asarray(tokens)), **{k: torch.tensor(v) for k, v in inputs.items()}
        ).logits.numpy()


@functools.cache
def family_checkpoint(name: str, root: Path) -> tuple[Path, np.ndarray, np.ndarray]:
    """(folder, tokens, PyTorch's logits) of a family's tiny checkpoint."""
    model = torch_model(FAMILIES[name]())
    folder = root / name
    model.save_pretrained(folder)
    tokens = random_tokens(2, 24)
    return folder, tokens, torch_logits(model, tokens)


def tiny_llama_folder(folder: Path, **changes) -> Path:
    config = LlamaConfig(
        **{
            **_HEADS,
            "vocab_size": 4096,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 2,
            **changes,
        }
    )
    torch_model(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(BASE / name, folder / name)
    return folder


def random_tokens(rows: int, length: int, seed: int = 0, vocab: int = VOCAB) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, vocab, (rows, length)).astype(np.int32)


def relative_error(a, b) -> float:
    """Largest difference over the largest magnitude of the reference `b`."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.abs(a - b).max() / np.abs(b).max())


def perturb(params, seed: int = 0, scale: float = 0.1):
    """All trainable arrays moved, so that no update is zero; in NumPy, which compiles nothing. They
    are fixed to a device only if they were: else a function that was compiled for `params` would be
    compiled again.
    """
    import peft_jax

    trainable, frozen = peft_jax.partition(params)
    draw = np.random.default_rng(seed).standard_normal

    def move(x):
        moved = (np.asarray(x) + scale * draw(x.shape)).astype(x.dtype)
        return jax.device_put(moved, x.sharding if x.committed else None)

    return peft_jax.combine(jax.tree.map(move, trainable), frozen)
