"""The families that are one decoder with another configuration: Llama and its kin."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from peft_jax.core.roles import Roles
from peft_jax.models.config import decoder_config
from peft_jax.models.decoder import Decoder
from peft_jax.models.family import DECODER_TASKS, Family

DECODER_ROLES = Roles(
    name="decoder",
    kind="decoder",
    stack=("layers",),
    embedding=("embed_tokens",),
    head=("lm_head",),
    labels=("score",),
    attention=("self_attn",),
    q=("q_proj",),
    k=("k_proj",),
    v=("v_proj",),
    qkv=("qkv_proj",),
    o=("o_proj",),
    feed_forward=("mlp",),
    gate=("gate_proj",),
    up=("up_proj",),
    gate_up=("gate_up_proj",),
    down=("down_proj",),
    experts=("experts",),
    router=("mlp/gate",),
    norms=(
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
        "norm",
    ),
    q_norm=("q_norm",),
    k_norm=("k_norm",),
    others=("shared_expert_gate",),
    core=("core",),
    attention_residual=("attention_residual",),
    mlp_residual=("mlp_residual",),
)
TINY = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def decoder_family(
    name: str, class_name: str, config: Callable[[Any], Any] = decoder_config, **more: Any
) -> Family:
    """A family whose checkpoints name things as Llama's; `more` are fields of `Family`, values of
    `example` beside the usual sizes.
    """
    example: Mapping[str, Any] = {**TINY, **more.pop("example", {})}
    fields: dict[str, Any] = {
        "module": Decoder,
        "tasks": DECODER_TASKS,
        "roles": DECODER_ROLES,
        "prefix": "model",
        "embedding": "model/embed_tokens",
        "head": "lm_head",
        "heads": ("lm_head", "score"),
        "spare": r".*\.rotary_emb\.inv_freq",  # buffers of old Llama checkpoints
        "without_kernel": {"causal_lm": "lm_head"},
        "expert_parts": {
            "gate_up_proj": ("gate_proj", "up_proj"),
            "down_proj": ("down_proj",),
        },
    }
    return Family(
        name=name, class_name=class_name, config=config, example=example, **{**fields, **more}
    )


_SLIDING = {"head_dim": 8, "sliding_window": 6}
_GEMMA = {**_SLIDING, "query_pre_attn_scalar": 12}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
FAMILY = (
    decoder_family("llama", "Llama"),  # 2 and 3.x, SmolLM2, TinyLlama, Yi, ...
    decoder_family("mistral", "Mistral", example=_SLIDING),
    decoder_family("qwen2", "Qwen2"),  # and 2.5
    decoder_family("qwen3", "Qwen3", example={"head_dim": 12}),
    decoder_family("gemma", "Gemma", example={"head_dim": 16}),
    decoder_family("gemma2", "Gemma2", example=_GEMMA),
    decoder_family(
        "gemma3_text",
        "Gemma3Text",
        classes={"causal_lm": "Gemma3ForCausalLM"},
        example=_GEMMA,
    ),
    decoder_family("phi3", "Phi3"),  # and Phi-4
    decoder_family("smollm3", "SmolLM3"),
    decoder_family("olmo2", "Olmo2"),
    decoder_family(
        "mixtral",
        "Mixtral",
        disk=(
            (r"\.mlp\.(gate|experts)\.", r".block_sparse_moe.\1."),
            (r"(\.experts\.\d+)\.gate_proj\.", r"\1.w1."),
            (r"(\.experts\.\d+)\.up_proj\.", r"\1.w3."),
            (r"(\.experts\.\d+)\.down_proj\.", r"\1.w2."),
        ),
        example={"num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    decoder_family(
        "qwen2_moe",
        "Qwen2Moe",
        example={**_EXPERTS, "shared_expert_intermediate_size": 40},
    ),
    decoder_family("qwen3_moe", "Qwen3Moe", example=_EXPERTS),
)
