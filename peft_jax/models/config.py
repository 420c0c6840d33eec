"""From a Hugging Face config to the one decoder's `DecoderConfig`.

Each family is a function of the Hugging Face config that states only how the family departs from
Llama.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any

from peft_jax.models.blocks import Architecture
from peft_jax.models.rotary import RotaryConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig(Architecture):
    """Everything that `Decoder` needs to know, hashable, so that a module may hold it.

    Sizes: V vocabulary, D hidden, F feed-forward, L layers, H query heads, K key/value heads, d
    head size.
    """

    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int = 2048
    rms_norm_eps: float = 1e-6
    activation: str = "silu"
    tie_embeddings: bool = False
    rotary: RotaryConfig = RotaryConfig()
    local_rotary: RotaryConfig | None = None  # Gemma 3: sliding layers rotate with their own base
    no_rope_layers: tuple[bool, ...] | None = (
        None  # SmolLM3: True where a layer has no rotary positions
    )
    sliding_layers: tuple[bool, ...] | None = (
        None  # True where attention is limited to `sliding_window`
    )
    sliding_window: int | None = None
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    fused_projections: bool = False  # Phi-3: qkv_proj and gate_up_proj
    qk_norm: str | None = None  # "head" (Qwen3, Gemma 3) or "full" (OLMo 2)
    norm_position: str = "pre"  # "pre" (Llama), "post" (OLMo 2), "both" (Gemma 2 and 3)
    norm_offset: float = 0.0  # Gemma stores the RMSNorm scale minus one
    embedding_scale: float | None = None  # of rows looked up in the embedding (Gemma)
    attention_scale: float | None = None  # None: 1/sqrt(d)
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    num_experts: int = 0  # 0: each layer has one feed-forward
    experts_per_token: int = 2
    expert_size: int = 0
    shared_expert_size: int = 0  # Qwen 2: an expert that all tokens go through
    normalise_router: bool = True  # a token's chosen probabilities sum to 1
    dense_layers: tuple[int, ...] = ()  # layers with one feed-forward among those with experts
    router_loss: float = 0.0  # what the load-balancing loss counts in training

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_attention_heads={self.num_heads} is not a multiple of "
                f"num_key_value_heads={self.num_kv_heads}"
            )


def rotary_config(hf: Any, parameters: Mapping[str, Any] | None, head_dim: int) -> RotaryConfig:
    """Rotary settings out of one `rope_parameters` mapping (transformers 5 standardises older keys
    to it).
    """
    p = dict(parameters or {})
    known = {field.name for field in dataclasses.fields(RotaryConfig)}
    values: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v
        for k, v in p.items()
        if k in known and v is not None
    }
    theta = p.get("rope_theta", getattr(hf, "rope_theta", None) or 10000.0)
    partial = p.get("partial_rotary_factor") or getattr(hf, "partial_rotary_factor", None) or 1.0
    values.update(
        rope_theta=float(theta),
        dim=int(head_dim * partial),
        max_position=hf.max_position_embeddings,
    )
    if original := getattr(hf, "original_max_position_embeddings", None):
        values.setdefault("original_max_position_embeddings", original)
    return RotaryConfig(**values)


def llama_config(hf: Any, **changes: Any) -> DecoderConfig:
    """Llama's configuration, with what a family has otherwise as `changes`."""
    head_dim = getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads
    bias = bool(getattr(hf, "attention_bias", False))
    values: dict[str, Any] = dict(
        vocab_size=hf.vocab_size,
        hidden_size=hf.hidden_size,
        intermediate_size=hf.intermediate_size,
        num_layers=hf.num_hidden_layers,
        num_heads=hf.num_attention_heads,
        num_kv_heads=getattr(hf, "num_key_value_heads", None) or hf.num_attention_heads,
        head_dim=head_dim,
        max_position=hf.max_position_embeddings,
        rms_norm_eps=hf.rms_norm_eps,
        activation=getattr(hf, "hidden_act", None) or "silu",
        tie_embeddings=bool(hf.tie_word_embeddings),
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=bool(getattr(hf, "mlp_bias", False)),
        num_labels=hf.num_labels,
        hf_config=json.dumps(hf.to_dict(), sort_keys=True, default=str),
    )
    if "rotary" not in changes:
        values["rotary"] = rotary_config(hf, hf.rope_parameters, head_dim)
    return DecoderConfig(**{**values, **changes})


def _sliding(hf: Any) -> dict[str, Any]:
    """Which layers slide: `layer_types` where the config has it, else all of them when a window is
    set.
    """
    window = getattr(hf, "sliding_window", None)
    if not window:
        return {}
    types = getattr(hf, "layer_types", None)
    layers = (
        tuple(t == "sliding_attention" for t in types) if types else (True,) * hf.num_hidden_layers
    )
    return dict(sliding_window=int(window), sliding_layers=layers) if any(layers) else {}


def _mistral(hf: Any) -> DecoderConfig:
    return llama_config(hf, **_sliding(hf))


def _qwen2(hf: Any) -> DecoderConfig:
    return llama_config(hf, qkv_bias=True, output_bias=False, **_sliding(hf))


def _qwen3(hf: Any) -> DecoderConfig:
    return llama_config(hf, qk_norm="head", **_sliding(hf))


def _gemma(hf: Any, **changes: Any) -> DecoderConfig:
    if getattr(hf, "use_bidirectional_attention", None):
        raise ValueError(
            "use_bidirectional_attention=true is not supported: the decoder's attention is causal"
        )
    activation = (
        getattr(hf, "hidden_activation", None)
        or getattr(hf, "hidden_act", None)
        or "gelu_pytorch_tanh"
    )
    scale = float(hf.hidden_size) ** 0.5
    return llama_config(
        hf, activation=activation, norm_offset=1.0, embedding_scale=scale, **changes
    )


def _gemma2(hf: Any, **changes: Any) -> DecoderConfig:
    return _gemma(
        hf,
        norm_position="both",
        attention_scale=hf.query_pre_attn_scalar**-0.5,
        attention_softcap=hf.attn_logit_softcapping,
        logit_softcap=hf.final_logit_softcapping,
        **_sliding(hf),
        **changes,
    )


def _gemma3(hf: Any) -> DecoderConfig:
    rope = hf.rope_parameters
    return _gemma2(
        hf,
        qk_norm="head",
        rotary=rotary_config(hf, rope["full_attention"], hf.head_dim),
        local_rotary=rotary_config(hf, rope["sliding_attention"], hf.head_dim),
    )


def _phi3(hf: Any) -> DecoderConfig:
    return llama_config(hf, fused_projections=True, **_sliding(hf))


def _smollm3(hf: Any) -> DecoderConfig:
    sliding = _sliding(hf) if hf.use_sliding_window else {}
    return llama_config(hf, no_rope_layers=tuple(not keep for keep in hf.no_rope_layers), **sliding)


def _olmo2(hf: Any) -> DecoderConfig:
    return llama_config(hf, qk_norm="full", norm_position="post")


def _experts(hf: Any, number: int, **changes: Any) -> dict[str, Any]:
    return dict(
        num_experts=number,
        experts_per_token=hf.num_experts_per_tok,
        router_loss=float(hf.router_aux_loss_coef) if hf.output_router_logits else 0.0,
        **changes,
    )


def _mixtral(hf: Any) -> DecoderConfig:
    return llama_config(
        hf, **_experts(hf, hf.num_local_experts, expert_size=hf.intermediate_size), **_sliding(hf)
    )


def _qwen_experts(hf: Any) -> dict[str, Any]:
    sparse = [i for i in range(hf.num_hidden_layers) if (i + 1) % hf.decoder_sparse_step == 0]
    sparse = (
        [i for i in sparse if i not in (hf.mlp_only_layers or [])] if hf.num_experts > 0 else []
    )
    dense = tuple(i for i in range(hf.num_hidden_layers) if i not in sparse)
    size = dict(
        expert_size=hf.moe_intermediate_size, normalise_router=hf.norm_topk_prob, dense_layers=dense
    )
    return _experts(hf, hf.num_experts, **size)


def _qwen2_moe(hf: Any) -> DecoderConfig:
    shared = dict(shared_expert_size=hf.shared_expert_intermediate_size)
    return llama_config(
        hf, qkv_bias=hf.qkv_bias, output_bias=False, **_qwen_experts(hf), **shared, **_sliding(hf)
    )


def _qwen3_moe(hf: Any) -> DecoderConfig:
    return llama_config(hf, qk_norm="head", **_qwen_experts(hf), **_sliding(hf))


DECODERS: dict[str, Callable[[Any], DecoderConfig]] = {
    "llama": llama_config,  # Llama 2 and 3.x, SmolLM2, TinyLlama, Yi, ...
    "mistral": _mistral,
    "qwen2": _qwen2,  # and 2.5
    "qwen3": _qwen3,
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gemma3_text": _gemma3,
    "phi3": _phi3,  # and Phi-4
    "smollm3": _smollm3,
    "olmo2": _olmo2,
    "mixtral": _mixtral,
    "qwen2_moe": _qwen2_moe,
    "qwen3_moe": _qwen3_moe,
}


def decoder_config(hf_config: Any) -> DecoderConfig:
    """The `DecoderConfig` of a Hugging Face config.

    Raises ValueError for another `model_type`, naming the supported ones.
    """
    family = DECODERS.get(hf_config.model_type)
    if family is None:
        known = ", ".join(sorted(DECODERS))
        raise ValueError(
            f"model_type {hf_config.model_type!r} is not supported; supported families: {known}"
        )
    return family(hf_config)
