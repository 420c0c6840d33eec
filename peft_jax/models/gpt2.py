"""GPT-2 (Radford et al. 2019): learned positions, layer norms, one projection for queries, keys and
values.

Modules are called as in Hugging Face's checkpoints; `c_attn`, `c_proj` and `c_fc` are of its class
Conv1D there. Its cache and its call are those of `Decoder`.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from peft_jax.core.mesh import split_tokens
from peft_jax.core.roles import Roles
from peft_jax.models.blocks import (
    ACTIVATIONS,
    Architecture,
    AttentionCore,
    AttentionOutput,
    Block,
    Layers,
    Residual,
    Task,
    join_heads,
    layer_stack,
    split_heads,
)
from peft_jax.models.cache import Cache, Inputs, empty_cache
from peft_jax.models.decoder import cached_mask, last_of
from peft_jax.models.family import DECODER_TASKS, Family
from peft_jax.models.operands import AttentionOperands


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPT2Config(Architecture):
    """What a GPT-2 needs to know. `scale_by_layer`: scores are divided by the layer's number,
    counted from 1.
    """

    intermediate_size: int
    num_heads: int
    max_position: int = 1024
    norm_eps: float = 1e-5
    activation: str = "gelu_new"
    scale_attention: bool = True
    scale_by_layer: bool = False
    dropout: float = 0.1
    embedding_dropout: float = 0.1
    classifier_dropout: float = 0.1

    @property
    def learned_positions(self) -> int | None:
        return self.max_position

    @property
    def head_dim(self) -> int:
        """Features of an attention head."""
        return self.hidden_size // self.num_heads


def gpt2_config(hf: Any) -> GPT2Config:
    """The configuration of a GPT-2. Raises ValueError for cross-attention and an activation that is
    not known.
    """
    if hf.add_cross_attention:
        raise ValueError("add_cross_attention=true is not supported: the model is a decoder alone")
    if hf.activation_function not in ACTIVATIONS:
        raise ValueError(
            f"activation {hf.activation_function!r} is not supported; there are "
            f"{', '.join(ACTIVATIONS)}"
        )
    return GPT2Config(
        vocab_size=hf.vocab_size,
        hidden_size=hf.n_embd,
        num_layers=hf.n_layer,
        num_labels=hf.num_labels,
        tie_embeddings=bool(hf.tie_word_embeddings),
        hf_config=json.dumps(hf.to_dict(), sort_keys=True, default=str),
        intermediate_size=hf.n_inner or 4 * hf.n_embd,
        num_heads=hf.n_head,
        max_position=hf.n_positions,
        norm_eps=hf.layer_norm_epsilon,
        activation=hf.activation_function,
        scale_attention=hf.scale_attn_weights,
        scale_by_layer=hf.scale_attn_by_inverse_layer_idx,
        dropout=float(hf.resid_pdrop),
        embedding_dropout=float(hf.embd_pdrop),
        classifier_dropout=float(
            0.1 if getattr(hf, "classifier_dropout", None) is None else hf.classifier_dropout
        ),
    )


class Attention(Block):
    implementation: str | None = None

    @nn.compact
    def __call__(
        self, x: jax.Array, shared: dict[str, Any], number: Any, cache: Any
    ) -> tuple[jax.Array, Any]:
        c = self.config
        q, k, v = (
            split_heads(y, c.head_dim)
            for y in jnp.split(self.dense(3 * c.hidden_size, "c_attn")(x), 3, axis=-1)
        )
        queries = q
        if c.scale_by_layer:
            q = q / (number + 1)
        if cache is not None:
            cache = cache.write(k, v, shared["index"])
            k, v = cache.read(q.dtype, k.shape[1] if shared["mask"].aligned else None)
        scale = c.head_dim**-0.5 if c.scale_attention else 1.0
        core = AttentionCore(scale, None, self.implementation, name="core")
        y = core(AttentionOperands(q, k, v, shared["mask"]))
        y = self.drop(self.dense(c.hidden_size, "c_proj")(join_heads(y)))
        return AttentionOutput(name="output")(y, queries), cache


class MLP(Block):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        x = ACTIVATIONS[c.activation](self.dense(c.intermediate_size, "c_fc")(x))
        return self.drop(self.dense(c.hidden_size, "c_proj")(x))


class GPT2Block(Block):
    implementation: str | None = None

    @nn.compact
    def __call__(
        self, x: jax.Array, shared: dict[str, Any], own: tuple[Any, Any]
    ) -> tuple[jax.Array, Any]:
        fields = (self.config, self.dtype, self.param_dtype)
        x = split_tokens(x)
        y, cache = Attention(*fields, self.implementation, name="attn")(
            self.layer_norm("ln_1")(x), shared, *own
        )
        x = Residual(name="attention_residual")(x, y)
        y = MLP(*fields, name="mlp")(self.layer_norm("ln_2")(x))
        x = Residual(name="mlp_residual")(x, y)
        return split_tokens(x), cache


class GPT2Stack(Block):
    """Embeddings, layers and the final norm: Hugging Face's `transformer`."""

    scan_layers: bool
    remat: str
    implementation: str | None

    def setup(self) -> None:
        c, fields = self.config, (self.config, self.dtype, self.param_dtype, self.implementation)
        self.wte, self.wpe = self.embed(c.vocab_size), self.embed(c.max_position)
        self.h = layer_stack(
            GPT2Block, c.num_layers, *fields, scan=self.scan_layers, remat=self.remat
        )
        self.ln_f = self.layer_norm()

    def __call__(self, inputs: Inputs) -> tuple[jax.Array, Cache | None]:
        """As of `DecoderStack`."""
        c = self.config
        at = cached_mask(inputs, window=None)
        shared = {
            "mask": at.mask,
            "index": at.index,
            "positions": at.positions,
            "segment_ids": at.segment_ids,
        }
        x = self.drop(self.wte(inputs.tokens) + self.wpe(at.positions), c.embedding_dropout)
        if not isinstance(self.h, list | tuple):
            x, new = self.h(x, shared, (jnp.arange(c.num_layers), at.slots))
        else:
            new = []
            for i, layer in enumerate(self.h):
                part = None if at.slots is None else jax.tree.map(lambda a, i=i: a[i], at.slots)
                x, updated = layer(x, shared, (i, part))
                new.append(updated)
            new = None if at.slots is None else jax.tree.map(lambda *a: jnp.stack(a), *new)
        return self.ln_f(at.within(x)), at.moved(new)

    def attend(self, x: jax.Array) -> jax.Array:
        """Products with the token embeddings, [..., V]."""
        return self.wte.attend(x)


class GPT2(Layers, nn.Module):
    """A GPT-2 with the head of its task; fields and methods as of `Decoder`."""

    config: GPT2Config
    task: Task = "causal_lm"
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    scan_layers: bool = True
    remat: str = "none"
    attention_implementation: str | None = None

    heads: ClassVar[tuple[str, ...]] = ("score", "classifier")

    def setup(self) -> None:
        c = self.config
        fields = (
            c,
            self.dtype,
            self.param_dtype,
            self.scan_layers,
            self.remat,
            self.attention_implementation,
        )
        self.transformer = GPT2Stack(*fields)
        if self.task == "causal_lm" and not c.tie_embeddings:
            self.lm_head = self.dense(c.vocab_size, bias=False)
        elif self.task == "sequence_classification":
            self.score = self.dense(c.num_labels, bias=False)
        elif self.task == "token_classification":
            self.classifier = self.dense(c.num_labels)

    def __call__(
        self,
        tokens: jax.Array,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        cache: Cache | None = None,
    ) -> Any:
        """As of `Decoder`."""
        hidden, cache_out = self.transformer(Inputs(tokens, positions, segment_ids, cache=cache))
        if self.task == "causal_lm":
            logits = self.unembed(hidden)
        elif self.task == "sequence_classification":
            logits = self.score(last_of(hidden, segment_ids)).astype(jnp.float32)
        elif self.task == "token_classification":
            logits = self.classifier(self.drop(hidden, self.config.classifier_dropout)).astype(
                jnp.float32
            )
        else:
            logits = hidden.astype(jnp.float32)
        return logits if cache is None else (logits, cache_out)

    def hidden(
        self,
        tokens: jax.Array,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        cache: Cache | None = None,
    ) -> Any:
        """As of `Decoder`."""
        hidden, cache_out = self.transformer(Inputs(tokens, positions, segment_ids, cache=cache))
        return hidden if cache is None else (hidden, cache_out)

    def unembed(self, hidden: jax.Array) -> jax.Array:
        """Logits [..., V] in float32 from hidden states [..., D]."""
        head = self.transformer.attend if self.config.tie_embeddings else self.lm_head
        return head(hidden).astype(jnp.float32)

    def empty_cache(self, batch: int, length: int, dtype: Any = None) -> Cache:
        """A fresh key/value cache for `batch` rows of at most `length` tokens."""
        c = self.config
        return empty_cache(
            c.num_layers, batch, length, c.num_heads, c.head_dim, dtype or self.dtype
        )


FAMILY = Family(
    name="gpt2",
    class_name="GPT2",
    module=GPT2,
    config=gpt2_config,
    tasks=DECODER_TASKS,
    roles=Roles(
        name="gpt2",
        kind="decoder",
        stack=("h",),
        embedding=("wte",),
        head=("lm_head",),
        labels=("score", "classifier"),
        attention=("attn",),
        qkv=("c_attn",),
        o=("attn/c_proj",),
        feed_forward=("mlp",),
        up=("c_fc",),
        down=("mlp/c_proj",),
        norms=("ln_1", "ln_2", "ln_f"),
        core=("core",),
        attention_output=("attn/output",),
        attention_residual=("attention_residual",),
        mlp_residual=("mlp_residual",),
    ),
    example={
        "vocab_size": 96,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    },
    prefix="transformer",
    embedding="transformer/wte",
    head="lm_head",
    heads=("lm_head", "score", "classifier", "qa_outputs"),
    spare=r".*\.attn\.(bias|masked_bias)",
    without_kernel={"causal_lm": "lm_head"},
    conv1d=("c_attn", "c_proj", "c_fc"),
    classes={"causal_lm": "GPT2LMHeadModel"},
)
