"""ModernBERT (Warner et al. 2024, arXiv:2412.13663): rotary positions, gated feed-forward, layers
normalised before; every few of them are global and the others see a window.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from peft_jax.core.mesh import split_tokens
from peft_jax.core.roles import Roles
from peft_jax.models.bert import TINY, encoder_values
from peft_jax.models.blocks import (
    ACTIVATIONS,
    AttentionCore,
    Block,
    Residual,
    join_heads,
    layer_stack,
    mean_of,
    run_layers,
    split_heads,
)
from peft_jax.models.cache import Hidden, Inputs
from peft_jax.models.config import rotary_config
from peft_jax.models.encoder import Encoder, EncoderConfig, encoder_shared
from peft_jax.models.family import ENCODER_TASKS, Family
from peft_jax.models.operands import AttentionOperands
from peft_jax.models.rotary import (
    RotaryConfig,
    rotary_tables,
    rotate,
    sequence_lengths,
    table_of,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModernBertConfig(EncoderConfig):
    """A ModernBERT's. `sliding_layers` says which layers see `window` tokens on each side only,
    themselves counted.
    """

    rotary: RotaryConfig
    local_rotary: RotaryConfig
    sliding_layers: tuple[bool, ...]
    window: int
    norm_bias: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    decoder_bias: bool = True
    classifier_bias: bool = False
    classifier_activation: str = "gelu"
    classifier_pooling: str = "cls"
    embedding_dropout: float = 0.0
    attention_dropout: float = 0.0

    @property
    def learned_positions(self) -> int | None:
        return None


def modernbert_config(hf: Any) -> ModernBertConfig:
    """The configuration of a ModernBERT."""
    head_dim = hf.hidden_size // hf.num_attention_heads
    rotary = {
        k: rotary_config(hf, hf.rope_parameters[f"{k}_attention"], head_dim)
        for k in ("full", "sliding")
    }
    return ModernBertConfig(
        **encoder_values(hf, dropout="mlp_dropout", activation="hidden_activation"),
        type_vocab_size=0,
        norm_eps=hf.norm_eps,
        rotary=rotary["full"],
        local_rotary=rotary["sliding"],
        sliding_layers=tuple(t == "sliding_attention" for t in hf.layer_types),
        window=hf.local_attention // 2 + 1,
        norm_bias=hf.norm_bias,
        attention_bias=hf.attention_bias,
        mlp_bias=hf.mlp_bias,
        decoder_bias=hf.decoder_bias,
        classifier_bias=hf.classifier_bias,
        classifier_activation=hf.classifier_activation,
        classifier_pooling=hf.classifier_pooling,
        embedding_dropout=float(hf.embedding_dropout),
        attention_dropout=float(hf.attention_dropout),
    )


class Embeddings(Block):
    def setup(self) -> None:
        self.tok_embeddings = self.embed(self.config.vocab_size)
        self.norm = self.layer_norm(bias=self.config.norm_bias)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        return self.drop(self.norm(self.tok_embeddings(tokens)), self.config.embedding_dropout)


class Attention(Block):
    implementation: str | None = None

    @nn.compact
    def __call__(
        self, x: jax.Array, shared: dict[str, Any], sliding: bool | jax.Array
    ) -> jax.Array:
        c = self.config
        qkv = self.dense(3 * c.hidden_size, "Wqkv", c.attention_bias)(x)
        q, k, v = (split_heads(y, c.head_dim) for y in jnp.split(qkv, 3, axis=-1))
        cos, sin = table_of(shared["rope"], jnp.asarray(sliding, jnp.int32))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        y = AttentionCore(c.head_dim**-0.5, None, self.implementation, name="core")(
            AttentionOperands(q, k, v, shared["mask"], sliding)
        )
        return self.drop(
            self.dense(c.hidden_size, "Wo", c.attention_bias)(join_heads(y)), c.attention_dropout
        )


class MLP(Block):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        value, gate = jnp.split(
            self.dense(2 * c.intermediate_size, "Wi", c.mlp_bias)(x), 2, axis=-1
        )
        return self.dense(c.hidden_size, "Wo", c.mlp_bias)(
            self.drop(ACTIVATIONS[c.activation](value) * gate)
        )


class Layer(Block):
    """The first layer has no norm before its attention: the embedding's is enough. (Its scale is
    there, unused.)
    """

    implementation: str | None = None

    @nn.compact
    def __call__(
        self, x: jax.Array, shared: dict[str, Any], own: dict[str, Any]
    ) -> tuple[jax.Array, None]:
        c = self.config
        fields = (c, self.dtype, self.param_dtype)
        x = split_tokens(x)
        y = jnp.where(own["first"], x, self.layer_norm("attn_norm", bias=c.norm_bias)(x))
        y = Attention(*fields, self.implementation, name="attn")(y, shared, own["sliding"])
        x = Residual(name="attention_residual")(x, y)
        y = MLP(*fields, name="mlp")(self.layer_norm("mlp_norm", bias=c.norm_bias)(x))
        return split_tokens(Residual(name="mlp_residual")(x, y)), None


class ModernBertStack(Block):
    """Hugging Face's `model`."""

    scan_layers: bool
    remat: str
    implementation: str | None
    task: str

    def setup(self) -> None:
        c, fields = self.config, (self.config, self.dtype, self.param_dtype)
        self.embeddings = Embeddings(*fields)
        self.layers = layer_stack(
            Layer,
            c.num_layers,
            *fields,
            self.implementation,
            scan=self.scan_layers,
            remat=self.remat,
        )
        self.final_norm = self.layer_norm(bias=c.norm_bias)

    def __call__(self, inputs: Inputs) -> Hidden:
        """As of `BertStack`; there are no types."""
        c, tokens, positions = self.config, inputs.tokens, inputs.positions
        segment_ids = inputs.segment_ids
        if positions is None:
            positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
        lengths = sequence_lengths(positions, segment_ids)
        shared = {
            **encoder_shared(tokens, segment_ids, positions, c.window),
            "rope": rotary_tables([c.rotary, c.local_rotary], positions, lengths),
        }
        own = {"first": [i == 0 for i in range(c.num_layers)], "sliding": list(c.sliding_layers)}
        x = self.final_norm(run_layers(self.layers, self.embeddings(tokens), shared, own))
        return Hidden(x, x[:, 0])

    def attend(self, x: jax.Array) -> jax.Array:
        """Products with the word embeddings, [..., V]."""
        return self.embeddings.tok_embeddings.attend(x)


class PredictionHead(Block):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        x = ACTIVATIONS[c.classifier_activation](
            self.dense(c.hidden_size, "dense", c.classifier_bias)(x)
        )
        return self.layer_norm("norm", bias=c.norm_bias)(x)


class DecoderBias(Block):
    @nn.compact
    def __call__(self, logits: jax.Array) -> jax.Array:
        if not self.config.decoder_bias:
            return logits
        bias = self.param(
            "bias", nn.initializers.zeros_init(), (self.config.vocab_size,), self.param_dtype
        )
        return logits + bias.astype(logits.dtype)


class ModernBert(Encoder):
    """ModernBERT with the head of its task."""

    prefix: ClassVar[str] = "model"
    heads: ClassVar[tuple[str, ...]] = ("head", "classifier")

    def setup(self) -> None:
        c = self.config
        self.model = ModernBertStack(*self.stack_fields)
        if self.task != "feature_extraction":
            self.head = PredictionHead(c, self.dtype, self.param_dtype)
        if self.task == "masked_lm":
            self.decoder = DecoderBias(c, self.dtype, self.param_dtype)
        elif self.task != "feature_extraction":
            self.classifier = self.dense(2 if self.task == "question_answering" else c.num_labels)

    def unembed(self, hidden: jax.Array) -> jax.Array:
        return self.decoder(self.model.attend(self.head(hidden)).astype(jnp.float32))

    def label_logits(self, hidden: Hidden, segment_ids: jax.Array | None) -> jax.Array:
        c = self.config
        x = hidden.states
        if self.task == "sequence_classification":
            x = hidden.first if c.classifier_pooling == "cls" else mean_of(x, segment_ids)
        return self.classifier(self.drop(self.head(x), c.classifier_dropout))


FAMILY = Family(
    name="modernbert",
    class_name="ModernBert",
    module=ModernBert,
    config=modernbert_config,
    tasks=ENCODER_TASKS,
    roles=Roles(
        name="modernbert",
        kind="encoder",
        stack=("layers",),
        embedding=("embeddings/tok_embeddings",),
        labels=("classifier",),
        attention=("attn",),
        qkv=("Wqkv",),
        o=("attn/Wo",),
        feed_forward=("mlp",),
        gate_up=("Wi",),
        down=("mlp/Wo",),
        norms=("attn_norm", "mlp_norm", "final_norm", "norm"),
        others=("head/dense",),
        core=("core",),
        attention_residual=("attention_residual",),
        mlp_residual=("mlp_residual",),
    ),
    example={
        **TINY,
        "local_attention": 8,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "cls_token_id": 1,
        "sep_token_id": 2,
    },
    prefix="model",
    embedding="model/embeddings/tok_embeddings",
    head="decoder",
    heads=("head", "classifier", "decoder"),
    absent=r"model\.layers\.0\.attn_norm\..*",
    spare=r"decoder\.weight",
    without_kernel={"masked_lm": "decoder"},
)
