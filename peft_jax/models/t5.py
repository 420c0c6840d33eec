"""T5 (Raffel et al. 2019, arXiv:1910.10683), T5 1.1 and Flan-T5: an encoder and a decoder with
relative positions.

Scores are not scaled; a bucketed distance adds a bias to them, from a table that a stack's layers
share. The decoder's cache begins with what the encoder made of the input (`start`), whose keys and
values its first call puts there.
"""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any, ClassVar, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from peft_jax.core.mesh import split_tokens
from peft_jax.core.roles import Roles
from peft_jax.models.attention import Mask, make_mask
from peft_jax.models.blocks import (
    ACTIVATIONS,
    Architecture,
    AttentionCore,
    Block,
    Layers,
    Residual,
    Task,
    join_heads,
    layer_stack,
    split_heads,
)
from peft_jax.models.cache import Cache, Record, Slots, empty_cache
from peft_jax.models.encoder import encoder_shared
from peft_jax.models.family import Family
from peft_jax.models.operands import AttentionOperands, ScoreBias


@dataclasses.dataclass(frozen=True, kw_only=True)
class T5Config(Architecture):
    """What a T5 needs to know. `scale_logits`: with a tied head, hidden states are scaled by 1 /
    sqrt(D) before it.
    """

    intermediate_size: int
    num_decoder_layers: int
    num_heads: int
    head_dim: int
    buckets: int = 32
    max_distance: int = 128
    norm_eps: float = 1e-6
    activation: str = "relu"
    gated: bool = False
    scale_logits: bool = True
    dropout: float = 0.1
    start_token: int = 0


def t5_config(hf: Any) -> T5Config:
    """The configuration of a T5. Raises ValueError for an activation that is not known."""
    if hf.dense_act_fn not in ACTIVATIONS:
        raise ValueError(
            f"feed_forward_proj {hf.feed_forward_proj!r} is not supported; there are "
            f"{', '.join(ACTIVATIONS)}"
        )
    return T5Config(
        vocab_size=hf.vocab_size,
        hidden_size=hf.d_model,
        num_layers=hf.num_layers,
        num_labels=hf.num_labels,
        hf_config=json.dumps(hf.to_dict(), sort_keys=True, default=str),
        intermediate_size=hf.d_ff,
        num_decoder_layers=hf.num_decoder_layers,
        num_heads=hf.num_heads,
        head_dim=hf.d_kv,
        buckets=hf.relative_attention_num_buckets,
        max_distance=hf.relative_attention_max_distance,
        norm_eps=hf.layer_norm_epsilon,
        activation=hf.dense_act_fn,
        gated=hf.is_gated_act,
        scale_logits=bool(getattr(hf, "scale_decoder_outputs", True)),
        dropout=float(hf.dropout_rate),
        start_token=hf.pad_token_id
        if getattr(hf, "decoder_start_token_id", None) is None
        else hf.decoder_start_token_id,
    )


def bucket(
    distance: jax.Array, *, bidirectional: bool, buckets: int, max_distance: int
) -> jax.Array:
    """The bucket of key position minus query position: one each for near ones, then by the
    logarithm up to `max_distance`.
    """
    first = jnp.zeros_like(distance)
    if bidirectional:
        buckets //= 2
        first = (distance > 0).astype(distance.dtype) * buckets
        distance = jnp.abs(distance)
    else:
        distance = jnp.maximum(-distance, 0)
    exact = buckets // 2
    large = (
        jnp.log(jnp.maximum(distance, 1).astype(jnp.float32) / exact)
        / math.log(max_distance / exact)
        * (buckets - exact)
    )
    far = jnp.minimum(exact + large.astype(distance.dtype), buckets - 1)
    return first + jnp.where(distance < exact, distance, far)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Relative(ScoreBias):
    """The bias of relative positions, with the table [buckets, H] and positions that it is from."""

    table: jax.Array
    positions: jax.Array
    max_distance: int = dataclasses.field(metadata={"static": True})
    bidirectional: bool = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(
        cls, table: jax.Array, positions: jax.Array, kv_positions: jax.Array, **options: Any
    ) -> Relative:
        """The bias of keys at these positions [B or 1, S] for queries at those [B or 1, T]."""
        distance = kv_positions[:, None, :] - positions[:, :, None]
        scores = jnp.moveaxis(
            table[bucket(distance, buckets=table.shape[0], **options)], -1, 1
        ).astype(jnp.float32)
        return cls(scores, table, positions, **options)

    def with_keys_before(self, length: int) -> Relative:
        """The bias with `length` keys in front, at the positions before the first one."""
        options = {"max_distance": self.max_distance, "bidirectional": self.bidirectional}
        front = Relative.of(
            self.table, self.positions, jnp.arange(-length, 0)[None], **options
        ).scores
        rows = max(front.shape[0], self.scores.shape[0])
        both = [jnp.broadcast_to(x, (rows, *x.shape[1:])) for x in (front, self.scores)]
        return dataclasses.replace(self, scores=jnp.concatenate(both, axis=-1))


class Attention(Block):
    """Self-attention, or attention to what the encoder made."""

    implementation: str | None = None

    @nn.compact
    def __call__(
        self, x: jax.Array, source: jax.Array | None, mask: Mask, bias: Any, cache: Any, index: Any
    ) -> Any:
        """`source` [B, S, D] is what keys and values come from (None: they are in the cache
        already).
        """
        c = self.config
        width = c.num_heads * c.head_dim
        q = split_heads(self.dense(width, "q", False)(x), c.head_dim)
        kv = [self.dense(width, name, False) for name in ("k", "v")]
        if source is None:
            k, v = cache.read(q.dtype)
        else:
            k, v = (split_heads(layer(source), c.head_dim) for layer in kv)
            if cache is not None and index is None:  # kept whole
                cache = Slots(k.astype(cache.keys.dtype), v.astype(cache.values.dtype))
            elif cache is not None:
                cache = cache.write(k, v, index)
                k, v = cache.read(q.dtype)
        core = AttentionCore(1.0, None, self.implementation, name="core")
        y = core(AttentionOperands(q, k, v, mask, bias=bias))
        return self.dense(c.hidden_size, "o", False)(join_heads(y)), cache


class SelfLayer(Block):
    implementation: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, shared: dict[str, Any], cache: Any) -> Any:
        fields = (self.config, self.dtype, self.param_dtype)
        y = self.rms_norm("layer_norm")(x)
        attention = Attention(*fields, self.implementation, name="SelfAttention")
        y, cache = attention(y, y, shared["mask"], shared["bias"], cache, shared["index"])
        return Residual(name="attention_residual")(x, self.drop(y)), cache


class CrossLayer(Block):
    implementation: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, shared: dict[str, Any], cache: Any) -> Any:
        fields = (self.config, self.dtype, self.param_dtype)
        attention = Attention(*fields, self.implementation, name="EncDecAttention")
        y = self.rms_norm("layer_norm")(x)
        y, cache = attention(y, shared["encoded"], shared["cross_mask"], None, cache, None)
        return Residual(name="attention_residual")(x, self.drop(y)), cache


class DenseReluDense(Block):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        act = ACTIVATIONS[c.activation]
        if c.gated:
            y = act(self.dense(c.intermediate_size, "wi_0", False)(x)) * self.dense(
                c.intermediate_size, "wi_1", False
            )(x)
        else:
            y = act(self.dense(c.intermediate_size, "wi", False)(x))
        return self.dense(c.hidden_size, "wo", False)(self.drop(y))


class FeedForwardLayer(Block):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = DenseReluDense(self.config, self.dtype, self.param_dtype, name="DenseReluDense")(
            self.rms_norm("layer_norm")(x)
        )
        return Residual(name="mlp_residual")(x, self.drop(y))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache(Record):
    """Keys and values of the decoder's own tokens, and of what the encoder made."""

    own: Slots
    crossing: Slots


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SourceCache(Record):
    """The cache of an encoder-decoder: the decoder's `own`, and of what the encoder made its
    segments [B, T] and either itself, `encoded` [B, T, D], or its keys and values.
    """

    own: Cache
    segment_ids: jax.Array
    encoded: jax.Array | None = None
    crossing: Slots | None = None


class T5Block(Block):
    """One of the encoder's layers, or (`cross`) of the decoder's."""

    implementation: str | None = None
    cross: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, shared: dict[str, Any], cache: Any) -> Any:
        fields = (self.config, self.dtype, self.param_dtype)
        own, crossing = (None, None) if cache is None else (cache.own, cache.crossing)
        x = split_tokens(x)
        x, own = SelfLayer(*fields, self.implementation, name="layer_0")(x, shared, own)
        if self.cross:
            x, crossing = CrossLayer(*fields, self.implementation, name="layer_1")(
                x, shared, crossing
            )
        x = FeedForwardLayer(*fields, name="layer_2" if self.cross else "layer_1")(x)
        x = split_tokens(x)
        return x, None if cache is None else LayerCache(own, cast("Slots", crossing))


class Stack(Block):
    """The layers of the encoder or (`cross`) the decoder, the positions that they share, and the
    last norm.
    """

    scan_layers: bool
    remat: str
    implementation: str | None
    cross: bool

    def setup(self) -> None:
        c = self.config
        length = c.num_decoder_layers if self.cross else c.num_layers
        fields = (c, self.dtype, self.param_dtype, self.implementation, self.cross)
        self.block = layer_stack(T5Block, length, *fields, scan=self.scan_layers, remat=self.remat)
        self.relative_attention_bias = self.embed(c.buckets, c.num_heads)
        self.final_layer_norm = self.rms_norm()

    def __call__(
        self,
        x: jax.Array,
        shared: dict[str, Any],
        positions: Any,
        kv_positions: Any,
        cache: Any = None,
    ) -> Any:
        c = self.config
        table = self.relative_attention_bias(jnp.arange(c.buckets))
        options = {"max_distance": c.max_distance, "bidirectional": not self.cross}
        bias = Relative.of(table, positions, kv_positions, **options)
        shared, x = {**shared, "bias": bias}, self.drop(x)
        if not isinstance(self.block, list | tuple):
            x, cache = self.block(x, shared, cache)
        else:
            new = []
            for i, layer in enumerate(self.block):
                x, part = layer(
                    x, shared, None if cache is None else jax.tree.map(lambda a, i=i: a[i], cache)
                )
                new.append(part)
            cache = None if cache is None else jax.tree.map(lambda *a: jnp.stack(a), *new)
        return self.drop(self.final_layer_norm(x)), cache


class T5(Layers, nn.Module):
    """A T5. The fields are as of `Decoder`."""

    config: T5Config
    task: Task = "seq2seq_lm"
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    scan_layers: bool = True
    remat: str = "none"
    attention_implementation: str | None = None

    heads: ClassVar[tuple[str, ...]] = ()

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
        self.shared = self.embed(c.vocab_size)
        self.encoder, self.decoder = Stack(*fields, False), Stack(*fields, True)
        if not c.tie_embeddings:
            self.lm_head = self.dense(c.vocab_size, bias=False)

    def __call__(
        self,
        tokens: jax.Array,
        decoder_tokens: jax.Array | None = None,
        *,
        segment_ids: jax.Array | None = None,
        decoder_segment_ids: jax.Array | None = None,
    ) -> jax.Array:
        """Logits [B, U, V] in float32 of `decoder_tokens` [B, U] (by default the start token
        alone), given tokens [B, T].

        Segments of 0 are padding.
        """
        return self.unembed(
            self.hidden(
                tokens,
                decoder_tokens,
                segment_ids=segment_ids,
                decoder_segment_ids=decoder_segment_ids,
            )
        )

    def hidden(
        self,
        tokens: jax.Array,
        decoder_tokens: jax.Array | None = None,
        *,
        segment_ids: jax.Array | None = None,
        decoder_segment_ids: jax.Array | None = None,
    ) -> jax.Array:
        """The decoder's hidden states [B, U, D]; `unembed` turns them into logits."""
        if decoder_tokens is None:
            decoder_tokens = jnp.full((tokens.shape[0], 1), self.config.start_token, jnp.int32)
        encoded, segment_ids = self.encode(tokens, segment_ids)
        positions = jnp.arange(decoder_tokens.shape[1], dtype=jnp.int32)[None]
        own = (
            None
            if decoder_segment_ids is None
            else jnp.broadcast_to(decoder_segment_ids, decoder_tokens.shape)
        )
        shared = {
            "encoded": encoded,
            "cross_mask": self._cross_mask(decoder_tokens, encoded.shape[1], segment_ids),
            "mask": make_mask(positions, positions, own, own, window=None, aligned=True),
            "index": None,
            "positions": positions,
            "segment_ids": own,
        }
        return self.decoder(self.shared(decoder_tokens), shared, positions, positions)[0]

    def encode(
        self, tokens: jax.Array, segment_ids: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array | None]:
        """What the encoder makes of tokens [B, T], [B, T, D], and which of it is no padding, as
        `segment_ids` [B, T].
        """
        positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
        shared = {**encoder_shared(tokens, segment_ids, positions), "index": None}
        return self.encoder(self.shared(tokens), shared, positions, positions)[0], segment_ids

    def unembed(self, hidden: jax.Array) -> jax.Array:
        """Logits [..., V] in float32 from hidden states [..., D]."""
        c = self.config
        if c.scale_logits:
            hidden = hidden * c.hidden_size**-0.5
        return (self.shared.attend if c.tie_embeddings else self.lm_head)(hidden).astype(
            jnp.float32
        )

    def start(
        self, tokens: jax.Array, segment_ids: jax.Array, length: int, dtype: Any = None
    ) -> SourceCache:
        """A cache for decoding at most `length` tokens from `tokens` [B, T]."""
        c = self.config
        heads = (c.num_heads, c.head_dim)
        own = empty_cache(
            c.num_decoder_layers, tokens.shape[0], length, *heads, dtype or self.dtype
        )
        encoded, seen = self.encode(tokens, segment_ids)
        return SourceCache(own, cast("jax.Array", seen), encoded)

    def decode(
        self, tokens: jax.Array, *, positions: jax.Array, cache: SourceCache
    ) -> tuple[jax.Array, SourceCache]:
        """(logits [B, U, V], new cache) of the decoder's next tokens [B, U] at these positions [B,
        U].
        """
        own, update = cache.own, jax.lax.dynamic_update_slice_in_dim
        segments = jnp.ones(tokens.shape, jnp.int32)
        kv_positions = update(own.positions, positions.astype(jnp.int32), own.index, axis=1)
        kv_segments = update(own.segment_ids, segments, own.index, axis=1)
        crossing = cache.crossing
        if crossing is None:  # the first call makes them of what is `encoded`
            blank = jnp.zeros((self.config.num_decoder_layers, 1), self.dtype)
            crossing = Slots(blank, blank)
        shared = {
            "encoded": cache.encoded,
            "cross_mask": self._cross_mask(tokens, cache.segment_ids.shape[1], cache.segment_ids),
            "mask": make_mask(
                positions, kv_positions, segments, kv_segments, window=None, aligned=False
            ),
            "index": own.index,
            "positions": positions,
            "segment_ids": segments,
        }
        layers = LayerCache(own.slots, crossing)
        hidden, new = self.decoder(self.shared(tokens), shared, positions, kv_positions, layers)
        index = jnp.asarray(own.index + tokens.shape[1], jnp.int32)
        moved = Cache(new.own, kv_positions, kv_segments, index)
        return self.unembed(hidden), SourceCache(moved, cache.segment_ids, None, new.crossing)

    @nn.nowrap
    def _cross_mask(self, tokens: jax.Array, length: int, segment_ids: jax.Array | None) -> Mask:
        def zeros(n):
            return jnp.zeros((1, n), jnp.int32)

        ones = None if segment_ids is None else jnp.ones(tokens.shape, jnp.int32)
        seen = (
            None
            if segment_ids is None
            else (jnp.broadcast_to(segment_ids, (tokens.shape[0], length)) > 0).astype(jnp.int32)
        )
        return make_mask(
            zeros(tokens.shape[1]),
            zeros(length),
            ones,
            seen,
            window=None,
            aligned=False,
            causal=False,
        )


FAMILY = Family(
    name="t5",
    class_name="T5",
    module=T5,
    config=t5_config,
    tasks=("seq2seq_lm",),
    roles=Roles(
        name="t5",
        kind="encoder-decoder",
        stack=("block", "layer"),  # a block's parts are numbered as layers are
        embedding=("shared",),
        head=("lm_head",),
        attention=("SelfAttention",),
        cross_attention=("EncDecAttention",),
        q=("SelfAttention/q", "EncDecAttention/q"),
        k=("SelfAttention/k", "EncDecAttention/k"),
        v=("SelfAttention/v", "EncDecAttention/v"),
        o=("SelfAttention/o", "EncDecAttention/o"),
        feed_forward=("DenseReluDense",),
        gate=("DenseReluDense/wi_0",),
        up=("DenseReluDense/wi", "DenseReluDense/wi_1"),
        down=("DenseReluDense/wo",),
        relative=("relative_attention_bias",),
        norms=("layer_norm", "final_layer_norm"),
        core=("core",),
        attention_residual=("attention_residual",),
        mlp_residual=("mlp_residual",),
    ),
    example={
        "vocab_size": 96,
        "d_model": 32,
        "d_kv": 12,
        "d_ff": 48,
        "num_layers": 2,
        "num_heads": 4,
        "relative_attention_num_buckets": 8,
        "relative_attention_max_distance": 16,
        "decoder_start_token_id": 0,
        "feed_forward_proj": "gated-gelu",
    },
    prefix="",
    embedding="shared",
    head="lm_head",
    heads=("lm_head",),
    own_head=True,
    look_ups=("encoder.embed_tokens", "decoder.embed_tokens"),
    spare=r"(encoder|decoder)\.embed_tokens\.weight"
    r"|decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",
    without_kernel={"seq2seq_lm": "lm_head"},
    float32=("wo",),
    # all layers share it, and Hugging Face keeps it in the first one
    renamed=(
        (
            r"^(encoder|decoder)\.(relative_attention_bias)$",
            r"\1.block.0.layer.0.SelfAttention.\2",
        ),
    ),
)
