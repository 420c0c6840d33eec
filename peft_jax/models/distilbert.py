"""DistilBERT (Sanh et al. 2019, arXiv:1910.01108): BERT's layers under other names, without types
and pooler.
"""

from __future__ import annotations

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from peft_jax.core.mesh import split_tokens
from peft_jax.core.roles import Roles
from peft_jax.models.bert import encoder_values
from peft_jax.models.blocks import (
    ACTIVATIONS,
    AttentionCore,
    Block,
    Residual,
    join_heads,
    layer_stack,
    run_layers,
    split_heads,
)
from peft_jax.models.cache import Hidden, Inputs
from peft_jax.models.encoder import Encoder, EncoderConfig, encoder_shared
from peft_jax.models.family import ENCODER_TASKS, Family
from peft_jax.models.operands import AttentionOperands


def distilbert_config(hf: Any) -> EncoderConfig:
    """The configuration of a DistilBERT. Raises ValueError for sinusoidal positions."""
    if hf.sinusoidal_pos_embds:
        raise ValueError(
            "sinusoidal_pos_embds=true is not supported: DistilBERT's released checkpoints learn "
            "their positions"
        )
    values = encoder_values(
        hf,
        hidden_size="dim",
        intermediate_size="hidden_dim",
        num_layers="n_layers",
        num_heads="n_heads",
        dropout="dropout",
        activation="activation",
    )
    values["classifier_dropout"] = float(hf.seq_classif_dropout)
    return EncoderConfig(**values, type_vocab_size=0)


class Embeddings(Block):
    def setup(self) -> None:
        self.word_embeddings = self.embed(self.config.vocab_size)
        self.position_embeddings = self.embed(self.config.max_position)
        self.LayerNorm = self.layer_norm()

    def __call__(self, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        return self.drop(
            self.LayerNorm(self.word_embeddings(tokens) + self.position_embeddings(positions))
        )


class SelfAttention(Block):
    implementation: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, shared: dict[str, Any]) -> jax.Array:
        c = self.config
        q, k, v = (
            split_heads(self.dense(c.hidden_size, n)(x), c.head_dim)
            for n in ("q_lin", "k_lin", "v_lin")
        )
        y = AttentionCore(c.head_dim**-0.5, None, self.implementation, name="core")(
            AttentionOperands(q, k, v, shared["mask"])
        )
        return self.dense(c.hidden_size, "out_lin")(join_heads(y))


class FeedForward(Block):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = ACTIVATIONS[self.config.activation](
            self.dense(self.config.intermediate_size, "lin1")(x)
        )
        return self.drop(self.dense(self.config.hidden_size, "lin2")(x))


class Layer(Block):
    implementation: str | None = None

    @nn.compact
    def __call__(
        self, x: jax.Array, shared: dict[str, Any], own: dict[str, Any]
    ) -> tuple[jax.Array, None]:
        fields = (self.config, self.dtype, self.param_dtype)
        x = split_tokens(x)
        y = SelfAttention(*fields, self.implementation, name="attention")(x, shared)
        x = self.layer_norm("sa_layer_norm")(Residual(name="attention_residual")(x, y))
        y = FeedForward(*fields, name="ffn")(x)
        x = self.layer_norm("output_layer_norm")(Residual(name="mlp_residual")(x, y))
        return split_tokens(x), None


class LayerStack(Block):
    scan_layers: bool
    remat: str
    implementation: str | None

    def setup(self) -> None:
        fields = (self.config, self.dtype, self.param_dtype, self.implementation)
        self.layer = layer_stack(
            Layer, self.config.num_layers, *fields, scan=self.scan_layers, remat=self.remat
        )

    def __call__(self, x: jax.Array, shared: dict[str, Any]) -> jax.Array:
        return run_layers(self.layer, x, shared, {})


class DistilBertStack(Block):
    """Hugging Face's `distilbert`."""

    scan_layers: bool
    remat: str
    implementation: str | None
    task: str

    def setup(self) -> None:
        fields = (self.config, self.dtype, self.param_dtype)
        self.embeddings = Embeddings(*fields)
        self.transformer = LayerStack(*fields, self.scan_layers, self.remat, self.implementation)

    def __call__(self, inputs: Inputs) -> Hidden:
        """As of `BertStack`; there are no types."""
        tokens, positions = inputs.tokens, inputs.positions
        if positions is None:
            positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
        shared = encoder_shared(tokens, inputs.segment_ids, positions)
        x = self.transformer(self.embeddings(tokens, positions), shared)
        return Hidden(x, x[:, 0])

    def attend(self, x: jax.Array) -> jax.Array:
        """Products with the word embeddings, [..., V]."""
        return self.embeddings.word_embeddings.attend(x)


class Projector(Block):
    """The bias after the embedding in a head of masked tokens."""

    @nn.compact
    def __call__(self, logits: jax.Array) -> jax.Array:
        bias = self.param(
            "bias", nn.initializers.zeros_init(), (self.config.vocab_size,), self.param_dtype
        )
        return logits + bias.astype(logits.dtype)


class DistilBert(Encoder):
    """DistilBERT with the head of its task."""

    prefix: ClassVar[str] = "distilbert"
    heads: ClassVar[tuple[str, ...]] = ("pre_classifier", "classifier", "qa_outputs")

    def setup(self) -> None:
        c = self.config
        self.distilbert = DistilBertStack(*self.stack_fields)
        if self.task == "masked_lm":
            self.vocab_transform = self.dense(c.hidden_size)
            self.vocab_layer_norm = self.layer_norm()
            self.vocab_projector = Projector(c, self.dtype, self.param_dtype)
        if self.task == "sequence_classification":
            self.pre_classifier = self.dense(c.hidden_size)
        self.label_head()

    def unembed(self, hidden: jax.Array) -> jax.Array:
        x = self.vocab_layer_norm(ACTIVATIONS[self.config.activation](self.vocab_transform(hidden)))
        return self.vocab_projector(self.distilbert.attend(x).astype(jnp.float32))

    def label_logits(self, hidden: Hidden, segment_ids: jax.Array | None) -> jax.Array:
        if self.task == "question_answering":
            return self.qa_outputs(hidden.states)
        x = (
            nn.relu(self.pre_classifier(hidden.first))
            if self.task == "sequence_classification"
            else hidden.states
        )
        return self.classifier(self.drop(x, self.config.classifier_dropout))


FAMILY = Family(
    name="distilbert",
    class_name="DistilBert",
    module=DistilBert,
    config=distilbert_config,
    tasks=ENCODER_TASKS,
    roles=Roles(
        name="distilbert",
        kind="encoder",
        stack=("layer",),
        embedding=("embeddings/word_embeddings",),
        labels=("classifier", "qa_outputs"),
        attention=("attention",),
        q=("q_lin",),
        k=("k_lin",),
        v=("v_lin",),
        o=("out_lin",),
        feed_forward=("ffn",),
        up=("lin1",),
        down=("lin2",),
        norms=("LayerNorm", "sa_layer_norm", "output_layer_norm", "vocab_layer_norm"),
        others=("vocab_transform", "pre_classifier"),
        core=("core",),
        attention_residual=("attention_residual",),
        mlp_residual=("mlp_residual",),
    ),
    example={
        "vocab_size": 96,
        "dim": 32,
        "hidden_dim": 48,
        "n_layers": 2,
        "n_heads": 4,
        "max_position_embeddings": 64,
    },
    prefix="distilbert",
    embedding="distilbert/embeddings/word_embeddings",
    head="vocab_projector",
    heads=(
        "pre_classifier",
        "classifier",
        "qa_outputs",
        "vocab_transform",
        "vocab_layer_norm",
        "vocab_projector",
    ),
    spare=r".*\.position_ids|vocab_projector\.weight",
    without_kernel={"masked_lm": "vocab_projector"},
)
