"""BERT (Devlin et al. 2018, arXiv:1810.04805), RoBERTa (Liu et al. 2019, arXiv:1907.11692) and
DeBERTa-v2 and -v3 (He et al. 2020, arXiv:2006.03654; 2021, arXiv:2111.09543), whose modules have
the same names but for a few.

Layers are normalised after each residual sum.
"""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from peft_jax.core.mesh import split_tokens
from peft_jax.core.roles import Roles
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
from peft_jax.models.operands import AttentionOperands, ScoreBias


@dataclasses.dataclass(frozen=True, kw_only=True)
class DebertaConfig(EncoderConfig):
    """A DeBERTa's: P relative positions each way, in `position_buckets` where that is not 0."""

    relative_attention: bool = True
    max_relative: int = 512
    position_buckets: int = 0
    position_terms: tuple[str, ...] = ("p2c", "c2p")
    share_att_key: bool = True
    norm_relative: bool = True
    absolute_positions: bool = False
    pooler_activation: str = "gelu"
    pooler_dropout: float = 0.0

    @property
    def learned_positions(self) -> int | None:
        return super().learned_positions if self.absolute_positions else None

    @property
    def span(self) -> int:
        """P."""
        return self.position_buckets or self.max_relative


def encoder_values(hf: Any, **names: str) -> dict[str, Any]:
    """What the encoders' configurations have in common; `names` maps ours to the family's own."""

    def of(ours: str, usual: str) -> Any:
        return getattr(hf, names.get(ours, usual))

    dropout = float(of("dropout", "hidden_dropout_prob"))
    classifier = getattr(hf, "classifier_dropout", None)
    values: dict[str, Any] = dict(
        vocab_size=hf.vocab_size,
        hidden_size=of("hidden_size", "hidden_size"),
        intermediate_size=of("intermediate_size", "intermediate_size"),
        num_layers=of("num_layers", "num_hidden_layers"),
        num_heads=of("num_heads", "num_attention_heads"),
        max_position=hf.max_position_embeddings,
        activation=of("activation", "hidden_act"),
        dropout=dropout,
        classifier_dropout=dropout if classifier is None else float(classifier),
        num_labels=hf.num_labels,
        hf_config=json.dumps(hf.to_dict(), sort_keys=True, default=str),
    )
    if not getattr(hf, "tie_word_embeddings", True):
        raise ValueError(
            f"{hf.model_type} with tie_word_embeddings=false is not supported: the head is the "
            "embedding"
        )
    if values["activation"] not in ACTIVATIONS:
        raise ValueError(
            f"activation {values['activation']!r} is not supported; there are "
            f"{', '.join(ACTIVATIONS)}"
        )
    return values


def bert_config(hf: Any) -> EncoderConfig:
    """The configuration of a BERT or RoBERTa."""
    if getattr(hf, "is_decoder", False) or getattr(hf, "add_cross_attention", False):
        raise ValueError(
            "is_decoder and add_cross_attention are not supported: the model is an encoder"
        )
    offset = 0 if hf.model_type == "bert" else hf.pad_token_id + 1
    return EncoderConfig(
        **encoder_values(hf),
        type_vocab_size=hf.type_vocab_size,
        norm_eps=hf.layer_norm_eps,
        position_offset=offset,
    )


def deberta_config(hf: Any) -> DebertaConfig:
    """The configuration of a DeBERTa-v2 or -v3. Raises ValueError for a convolution or embeddings
    of another width.
    """
    if getattr(hf, "conv_kernel_size", 0):
        raise ValueError("conv_kernel_size of DeBERTa-v2 is not supported; v3 has none")
    if getattr(hf, "embedding_size", hf.hidden_size) != hf.hidden_size:
        raise ValueError("a DeBERTa with an embedding_size other than hidden_size is not supported")
    if not getattr(hf, "legacy", True):
        raise ValueError(
            "a DeBERTa with legacy=false (another head for masked tokens) is not supported"
        )
    known = hf.max_relative_positions
    return DebertaConfig(
        **encoder_values(hf)
        | {"classifier_dropout": getattr(hf, "cls_dropout", None) or hf.hidden_dropout_prob},
        type_vocab_size=hf.type_vocab_size,
        norm_eps=hf.layer_norm_eps,
        relative_attention=hf.relative_attention,
        max_relative=known if known > 0 else hf.max_position_embeddings,
        position_buckets=max(0, getattr(hf, "position_buckets", -1)),
        position_terms=tuple(hf.pos_att_type or ()),
        share_att_key=bool(getattr(hf, "share_att_key", False)),
        norm_relative="layer_norm" in getattr(hf, "norm_rel_ebd", "none").lower(),
        absolute_positions=hf.position_biased_input,
        pooler_activation=hf.pooler_hidden_act,
        pooler_dropout=float(hf.pooler_dropout),
    )


class Embeddings(Block):
    """Words, positions and types, normalised."""

    def setup(self) -> None:
        c = self.config
        self.word_embeddings = self.embed(c.vocab_size)
        if getattr(c, "absolute_positions", True):
            self.position_embeddings = self.embed(c.max_position)
        if c.type_vocab_size:
            self.token_type_embeddings = self.embed(c.type_vocab_size)
        self.LayerNorm = self.layer_norm()

    def __call__(
        self, tokens: jax.Array, token_type_ids: jax.Array | None, positions: jax.Array
    ) -> jax.Array:
        c = self.config
        x = self.word_embeddings(tokens)
        if getattr(c, "absolute_positions", True):
            x = x + self.position_embeddings(positions + c.position_offset)
        if c.type_vocab_size:
            types = (
                jnp.zeros((1, 1), jnp.int32)
                if token_type_ids is None or c.type_vocab_size == 1
                else token_type_ids
            )
            x = x + self.token_type_embeddings(types)
        return self.drop(self.LayerNorm(x))


class SelfAttention(Block):
    """Queries, keys and values, and attention among them."""

    implementation: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, shared: dict[str, Any]) -> jax.Array:
        c = self.config
        q, k, v = (
            split_heads(self.dense(c.hidden_size, n)(x), c.head_dim)
            for n in ("query", "key", "value")
        )
        return join_heads(
            AttentionCore(c.head_dim**-0.5, None, self.implementation, name="core")(
                AttentionOperands(q, k, v, shared["mask"])
            )
        )


class DisentangledSelfAttention(Block):
    """Attention with terms of content to position and back (He et al. 2020, equation 4), scaled by
    1 / sqrt(terms d).
    """

    implementation: str | None = None

    def setup(self) -> None:
        c = self.config

        def make():
            return self.dense(c.hidden_size)

        self.query_proj, self.key_proj, self.value_proj = make(), make(), make()
        self.core = AttentionCore(self.scale, None, self.implementation)
        if c.relative_attention and not c.share_att_key:
            if "c2p" in c.position_terms:
                self.pos_key_proj = make()
            if "p2c" in c.position_terms:
                self.pos_query_proj = make()

    @property
    def scale(self) -> float:
        """Of the scores."""
        return (self.config.head_dim * (1 + len(self.config.position_terms))) ** -0.5

    def __call__(self, x: jax.Array, shared: dict[str, Any]) -> jax.Array:
        c = self.config
        q, k, v = (
            split_heads(layer(x), c.head_dim)
            for layer in (self.query_proj, self.key_proj, self.value_proj)
        )
        scores = self._positions(q, k, shared) if c.relative_attention else None
        bias = None if scores is None else ScoreBias(scores)
        return join_heads(self.core(AttentionOperands(q, k, v, shared["mask"], bias=bias)))

    def _positions(self, q: jax.Array, k: jax.Array, shared: dict[str, Any]) -> jax.Array | None:
        """The terms with positions, [B, H, T, T], float32."""
        c, table, at = self.config, self.drop(shared["relative"]), shared["distance"]
        total = None
        for term, content, own, common in (
            ("c2p", q, "pos_key_proj", "key_proj"),
            ("p2c", k, "pos_query_proj", "query_proj"),
        ):
            if term not in c.position_terms:
                continue
            project = getattr(self, common if c.share_att_key else own)
            heads = split_heads(project(table), c.head_dim)  # [2P, H, d]
            scores = jnp.einsum(
                "bthd,phd->bhtp", content * self.scale, heads, preferred_element_type=jnp.float32
            )
            index = jnp.clip((at if term == "c2p" else -at) + c.span, 0, 2 * c.span - 1)
            found = jnp.take_along_axis(scores, index[None, None], axis=-1)
            found = (
                found if term == "c2p" else found.swapaxes(-1, -2)
            )  # it was looked up by key, then query
            total = found if total is None else total + found
        return total


def relative_positions(length: int, buckets: int, max_relative: int) -> jax.Array:
    """Distances i - j [T, T]; with `buckets` those above half of them grow by their logarithm
    (DeBERTa-v2).
    """
    distance = jnp.arange(length)[:, None] - jnp.arange(length)[None, :]
    if not buckets:
        return distance
    middle = buckets // 2
    size = jnp.maximum(jnp.abs(distance), middle - 1).astype(jnp.float32)
    size = jnp.where((distance < middle) & (distance > -middle), middle - 1, size)
    steps = (
        jnp.ceil(jnp.log(size / middle) / math.log((max_relative - 1) / middle) * (middle - 1))
        + middle
    )
    return jnp.where(size <= middle, distance, (steps * jnp.sign(distance)).astype(distance.dtype))


class Output(Block):
    """A dense layer, added to the stream and normalised."""

    @nn.compact
    def __call__(self, x: jax.Array, stream: jax.Array, residual: Residual) -> jax.Array:
        y = self.drop(self.dense(self.config.hidden_size, "dense")(x))
        return self.layer_norm("LayerNorm")(residual(stream, y))


class Attention(Block):
    implementation: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, shared: dict[str, Any], residual: Residual) -> jax.Array:
        kind = (
            DisentangledSelfAttention if isinstance(self.config, DebertaConfig) else SelfAttention
        )
        fields = (self.config, self.dtype, self.param_dtype)
        y = kind(*fields, self.implementation, name="self")(x, shared)
        return Output(*fields, name="output")(y, x, residual)


class Intermediate(Block):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return ACTIVATIONS[self.config.activation](
            self.dense(self.config.intermediate_size, "dense")(x)
        )


class Layer(Block):
    implementation: str | None = None

    @nn.compact
    def __call__(
        self, x: jax.Array, shared: dict[str, Any], own: dict[str, Any]
    ) -> tuple[jax.Array, None]:
        fields = (self.config, self.dtype, self.param_dtype)
        x = split_tokens(x)
        x = Attention(*fields, self.implementation, name="attention")(
            x, shared, Residual(name="attention_residual")
        )
        y = Intermediate(*fields, name="intermediate")(x)
        x = Output(*fields, name="output")(y, x, Residual(name="mlp_residual"))
        return split_tokens(x), None


class LayerStack(Block):
    """The layers, with what DeBERTa's share: the table of relative positions."""

    scan_layers: bool
    remat: str
    implementation: str | None

    def setup(self) -> None:
        c = self.config
        fields = (c, self.dtype, self.param_dtype, self.implementation)
        self.layer = layer_stack(
            Layer, c.num_layers, *fields, scan=self.scan_layers, remat=self.remat
        )
        if getattr(c, "relative_attention", False):
            self.rel_embeddings = self.embed(2 * c.span)
            if c.norm_relative:
                self.LayerNorm = self.layer_norm()

    def __call__(self, x: jax.Array, shared: dict[str, Any]) -> jax.Array:
        c = self.config
        if getattr(c, "relative_attention", False):
            table = self.rel_embeddings(jnp.arange(2 * c.span))
            table = self.LayerNorm(table) if c.norm_relative else table
            distance = relative_positions(x.shape[1], c.position_buckets, c.max_relative)
            shared = {**shared, "relative": table, "distance": distance}
        return run_layers(self.layer, x, shared, {})


class Pooler(Block):
    """A dense layer over the first token."""

    activation: str = "tanh"
    dropout: float = 0.0

    @nn.compact
    def __call__(self, first: jax.Array) -> jax.Array:
        x = self.drop(first, self.dropout)
        return ACTIVATIONS[self.activation](self.dense(self.config.hidden_size, "dense")(x))


class BertStack(Block):
    """Hugging Face's `bert`, `roberta` and `deberta`."""

    scan_layers: bool
    remat: str
    implementation: str | None
    task: str

    def setup(self) -> None:
        fields = (self.config, self.dtype, self.param_dtype)
        self.embeddings = Embeddings(*fields)
        self.encoder = LayerStack(*fields, self.scan_layers, self.remat, self.implementation)
        if self.config.model_type == "bert" and self.task == "sequence_classification":
            self.pooler = Pooler(*fields)

    def __call__(self, inputs: Inputs) -> Hidden:
        tokens, positions = inputs.tokens, inputs.positions
        if positions is None:
            positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
        x = self.embeddings(tokens, inputs.token_type_ids, positions)
        x = self.encoder(x, encoder_shared(tokens, inputs.segment_ids, positions))
        return Hidden(x, x[:, 0])

    def pool(self, first: jax.Array) -> jax.Array:
        """The sequence's vector [B, D]."""
        return self.pooler(first)

    def attend(self, x: jax.Array) -> jax.Array:
        """Products with the word embeddings, [..., V]."""
        return self.embeddings.word_embeddings.attend(x)


class Transform(Block):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = ACTIVATIONS[self.config.activation](self.dense(self.config.hidden_size, "dense")(x))
        return self.layer_norm("LayerNorm")(x)


class Predictions(Block):
    """What comes before the embedding in a head of masked tokens, and the bias after it."""

    def setup(self) -> None:
        self.transform = Transform(self.config, self.dtype, self.param_dtype)
        self.bias = self.param(
            "bias", nn.initializers.zeros_init(), (self.config.vocab_size,), self.param_dtype
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.transform(x)

    def shift(self, logits: jax.Array) -> jax.Array:
        """Logits with the bias."""
        return logits + self.bias.astype(logits.dtype)


class MaskedHead(Block):
    """Hugging Face's `cls`."""

    def setup(self) -> None:
        self.predictions = Predictions(self.config, self.dtype, self.param_dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.predictions(x)

    def shift(self, logits: jax.Array) -> jax.Array:
        """Logits with the bias."""
        return self.predictions.shift(logits)


class Bert(Encoder):
    """BERT with the head of its task."""

    prefix: ClassVar[str] = "bert"

    def setup(self) -> None:
        self.bert = BertStack(*self.stack_fields)
        if self.task == "masked_lm":
            self.cls = MaskedHead(*self.stack_fields[:3])
        self.label_head()

    def unembed(self, hidden: jax.Array) -> jax.Array:
        return self.cls.shift(self.bert.attend(self.cls(hidden)).astype(jnp.float32))

    def label_logits(self, hidden: Hidden, segment_ids: jax.Array | None) -> jax.Array:
        if self.task == "question_answering":
            return self.qa_outputs(hidden.states)
        one = self.task == "sequence_classification"
        pooled = self.bert.pool(hidden.first) if one else hidden.states
        return self.classifier(self.drop(pooled, self.config.classifier_dropout))


class RobertaHead(Block):
    """A head of masked tokens, but for the embedding."""

    def setup(self) -> None:
        self.dense_layer = self.dense(self.config.hidden_size, "dense")
        self.norm = self.layer_norm("layer_norm")
        self.bias = self.param(
            "bias", nn.initializers.zeros_init(), (self.config.vocab_size,), self.param_dtype
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.norm(ACTIVATIONS["gelu"](self.dense_layer(x)))

    def shift(self, logits: jax.Array) -> jax.Array:
        """Logits with the bias."""
        return logits + self.bias.astype(logits.dtype)


class RobertaClassifier(Block):
    """A dense layer over the first token, and the labels."""

    @nn.compact
    def __call__(self, first: jax.Array) -> jax.Array:
        c = self.config
        x = self.drop(first, c.classifier_dropout)
        x = self.drop(jnp.tanh(self.dense(c.hidden_size, "dense")(x)), c.classifier_dropout)
        return self.dense(c.num_labels, "out_proj")(x)


class Roberta(Encoder):
    """RoBERTa with the head of its task."""

    prefix: ClassVar[str] = "roberta"

    def setup(self) -> None:
        self.roberta = BertStack(*self.stack_fields)
        if self.task == "masked_lm":
            self.lm_head = RobertaHead(*self.stack_fields[:3])
        if self.task == "sequence_classification":
            self.classifier = RobertaClassifier(*self.stack_fields[:3])
        else:
            self.label_head()

    def unembed(self, hidden: jax.Array) -> jax.Array:
        return self.lm_head.shift(self.roberta.attend(self.lm_head(hidden)).astype(jnp.float32))

    def label_logits(self, hidden: Hidden, segment_ids: jax.Array | None) -> jax.Array:
        if self.task == "question_answering":
            return self.qa_outputs(hidden.states)
        if self.task == "sequence_classification":
            return self.classifier(hidden.first)
        return self.classifier(self.drop(hidden.states, self.config.classifier_dropout))


class Deberta(Encoder):
    """DeBERTa-v2 or -v3 with the head of its task."""

    prefix: ClassVar[str] = "deberta"

    def setup(self) -> None:
        c, fields = self.config, self.stack_fields[:3]
        self.deberta = BertStack(*self.stack_fields)
        if self.task == "masked_lm":
            self.cls = MaskedHead(*fields)
        if self.task == "sequence_classification":
            self.pooler = Pooler(*fields, activation=c.pooler_activation, dropout=c.pooler_dropout)
        self.label_head()

    def unembed(self, hidden: jax.Array) -> jax.Array:
        return self.cls.shift(self.deberta.attend(self.cls(hidden)).astype(jnp.float32))

    def label_logits(self, hidden: Hidden, segment_ids: jax.Array | None) -> jax.Array:
        if self.task == "question_answering":
            return self.qa_outputs(hidden.states)
        one = self.task == "sequence_classification"
        x = self.pooler(hidden.first) if one else hidden.states
        return self.classifier(self.drop(x, self.config.classifier_dropout))


_SHARED: dict[str, Any] = {
    "kind": "encoder",
    "stack": ("layer",),
    "embedding": ("embeddings/word_embeddings",),
    "labels": ("classifier", "qa_outputs"),
    "attention": ("attention",),
    "o": ("attention/output/dense",),
    "up": ("intermediate/dense",),
    "down": ("output/dense",),
    "norms": ("LayerNorm", "lm_head/layer_norm"),
    "others": (
        "pooler/dense",
        "transform/dense",
        "lm_head/dense",
        "classifier/dense",
        "classifier/out_proj",
    ),
    "core": ("core",),
    "attention_residual": ("attention_residual",),
    "mlp_residual": ("mlp_residual",),
}
BERT_ROLES = Roles(name="bert", q=("self/query",), k=("self/key",), v=("self/value",), **_SHARED)
DEBERTA_ROLES = Roles(
    name="deberta",
    q=("query_proj",),
    k=("key_proj",),
    v=("value_proj",),
    relative=("pos_key_proj", "pos_query_proj"),
    **_SHARED,
)
TINY = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
_BERT = Family(
    name="bert",
    class_name="Bert",
    module=Bert,
    config=bert_config,
    tasks=ENCODER_TASKS,
    roles=BERT_ROLES,
    example=TINY,
    prefix="bert",
    embedding="bert/embeddings/word_embeddings",
    head="cls.predictions.decoder",
    heads=("cls", "classifier", "qa_outputs", "pooler"),
    spare=r".*\.position_ids|cls\.predictions\.decoder\..*|cls\.seq_relationship\..*"
    r"|bert\.pooler\..*",
    without_kernel={"masked_lm": "cls.predictions.decoder", "feature_extraction": "pooler.dense"},
)
_ROBERTA = Family(
    name="roberta",
    class_name="Roberta",
    module=Roberta,
    config=bert_config,
    tasks=ENCODER_TASKS,
    roles=BERT_ROLES,
    example={**TINY, "pad_token_id": 1, "type_vocab_size": 1},
    prefix="roberta",
    embedding="roberta/embeddings/word_embeddings",
    head="lm_head.decoder",
    heads=("lm_head", "classifier", "qa_outputs", "pooler"),
    spare=r".*\.position_ids|lm_head\.decoder\..*|roberta\.pooler\..*",
    without_kernel={"masked_lm": "lm_head.decoder", "feature_extraction": "pooler.dense"},
)
_DEBERTA = Family(
    name="deberta-v2",
    class_name="DebertaV2",
    module=Deberta,
    config=deberta_config,
    tasks=ENCODER_TASKS,
    roles=DEBERTA_ROLES,
    example={
        **TINY,
        "relative_attention": True,
        "pos_att_type": ["p2c", "c2p"],
        "pooler_hidden_size": 32,
        "share_att_key": False,
    },
    prefix="deberta",
    embedding="deberta/embeddings/word_embeddings",
    head="cls.predictions.decoder",
    heads=("cls", "classifier", "qa_outputs", "pooler"),
    spare=r".*\.position_ids|deberta\.embeddings\.position_embeddings\..*"
    r"|cls\.predictions\.decoder\..*|(lm|mask)_predictions\..*",
    without_kernel={"masked_lm": "cls.predictions.decoder"},
)
FAMILY = (
    _BERT,
    _ROBERTA,
    dataclasses.replace(_ROBERTA, name="xlm-roberta", class_name="XLMRoberta"),
    dataclasses.replace(_ROBERTA, name="camembert", class_name="Camembert"),
    _DEBERTA,
)
