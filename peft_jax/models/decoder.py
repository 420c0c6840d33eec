"""One readable decoder for every supported family: a vanilla Flax Linen module, configured by
`DecoderConfig`.

Module and parameter names follow the Hugging Face checkpoints (`model.layers.self_attn.q_proj`), so
a path here is a path there. Layers are stacked on a leading axis and scanned by default, which
keeps compile time independent of depth. Letters: B batch, T tokens, S cache slots, D model, H
heads, K kv-heads, d head size, F feed-forward, V vocabulary.
"""

from __future__ import annotations

import functools
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.core import Tracer

from peft_jax.core.bind import bind
from peft_jax.core.capture import CAPTURED
from peft_jax.core.in_turn import Chain
from peft_jax.core.mesh import split_tokens
from peft_jax.models.attention import Mask, make_mask
from peft_jax.models.blocks import (
    ACTIVATIONS,
    REMAT_POLICIES,
    AttentionCore,
    Residual,
    RMSNorm,
    ScaledEmbed,
    Task,
)
from peft_jax.models.cache import Cache, Inputs, Slots, empty_cache
from peft_jax.models.config import DecoderConfig
from peft_jax.models.moe import SparseMLP
from peft_jax.models.operands import AttentionOperands
from peft_jax.models.rotary import (
    RotaryConfig,
    rotary_tables,
    rotate,
    sequence_lengths,
    table_of,
)


class LayerKind(NamedTuple):
    """What one layer does that another may not; None where scanned layers differ and `layer` says
    it per layer.

    `rope` is the number of its way to rotate among `rotaries`.
    """

    sliding: bool | None
    rope: int | None
    experts: bool


class Attention(nn.Module):
    config: DecoderConfig
    kind: LayerKind
    dtype: Any
    param_dtype: Any
    implementation: str | None = None

    def setup(self) -> None:
        c = self.config
        q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        if c.fused_projections:
            self.qkv_proj = self._dense(q + 2 * kv, c.qkv_bias)
        else:
            self.q_proj, self.k_proj, self.v_proj = (
                self._dense(n, c.qkv_bias) for n in (q, kv, kv)
            )
        self.o_proj = self._dense(c.hidden_size, c.output_bias)
        if c.qk_norm:
            self.q_norm, self.k_norm = (
                RMSNorm(c.rms_norm_eps, c.norm_offset, self.dtype, self.param_dtype)
                for _ in range(2)
            )
        scale = c.head_dim**-0.5 if c.attention_scale is None else c.attention_scale
        self.core = AttentionCore(scale, c.attention_softcap, self.implementation)

    def _dense(self, features: int, bias: bool) -> nn.Dense:
        return nn.Dense(
            features,
            use_bias=bias,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=nn.initializers.normal(0.02),
        )

    def _project(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        c = self.config
        if c.fused_projections:
            q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
            q, k, v = jnp.split(self.qkv_proj(x), [q, q + kv], axis=-1)
        else:
            q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if c.qk_norm == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (y.reshape(*y.shape[:-1], -1, c.head_dim) for y in (q, k, v))
        if c.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v

    def __call__(
        self, x: jax.Array, shared: dict[str, Any], layer: dict[str, Any], cache: Any
    ) -> tuple[jax.Array, Any]:
        q, k, v = self._project(x)
        q, k = self._rotate(q, k, shared, layer)
        if cache is not None:
            cache = cache.write(k, v, shared["index"])
            k, v = cache.read(q.dtype, k.shape[1] if shared["mask"].aligned else None)
        sliding = self._flag("sliding", layer)
        out = self.core(AttentionOperands(q, k, v, shared["mask"], sliding))
        return self.o_proj(out.reshape(*out.shape[:-2], -1)), cache

    def _flag(self, name: str, layer: dict[str, jax.Array]) -> Any:
        static = getattr(self.kind, name)
        return layer[name] if static is None else static

    def _rotate(
        self, q: jax.Array, k: jax.Array, shared: dict[str, Any], layer: dict[str, jax.Array]
    ) -> list[jax.Array]:
        way = self._flag("rope", layer)
        if isinstance(way, int) and rotaries(self.config)[way] is None:
            return [q, k]
        cos, sin = table_of(shared["rope"], way)
        return [rotate(y, cos, sin) for y in (q, k)]


class MLP(nn.Module):
    """A gated feed-forward of `size` units, the config's by default."""

    config: DecoderConfig
    dtype: Any
    param_dtype: Any
    size: int | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config

        def dense(features: int, name: str) -> nn.Dense:
            return nn.Dense(
                features,
                use_bias=c.mlp_bias,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                name=name,
                kernel_init=nn.initializers.normal(0.02),
            )

        size = self.size or c.intermediate_size
        if c.fused_projections:
            gate, up = jnp.split(dense(2 * size, "gate_up_proj")(x), 2, axis=-1)
        else:
            gate, up = dense(size, "gate_proj")(x), dense(size, "up_proj")(x)
        return dense(c.hidden_size, "down_proj")(_gated(c.activation, gate, up))


@functools.partial(
    jax.checkpoint, static_argnums=0
)  # keeps two arrays for the backward pass instead of five
def _gated(activation: str, gate: jax.Array, up: jax.Array) -> jax.Array:
    return ACTIVATIONS[activation](gate) * up


class DecoderLayer(nn.Module):
    """Attention and feed-forward with residuals; normalised before, after or on both sides of
    each.
    """

    config: DecoderConfig
    kind: LayerKind
    dtype: Any
    param_dtype: Any
    implementation: str | None = None

    @nn.compact
    def __call__(
        self, x: jax.Array, shared: dict[str, Any], layer: dict[str, Any], cache: Any
    ) -> tuple[jax.Array, Any]:
        c = self.config

        def norm(name: str, x: jax.Array) -> jax.Array:
            return RMSNorm(c.rms_norm_eps, c.norm_offset, self.dtype, self.param_dtype, name=name)(
                x
            )

        x = split_tokens(x)
        pre, post = c.norm_position != "post", c.norm_position != "pre"
        before_mlp = "pre_feedforward_layernorm" if post else "post_attention_layernorm"

        y = norm("input_layernorm", x) if pre else x
        attention = Attention(
            c, self.kind, self.dtype, self.param_dtype, self.implementation, name="self_attn"
        )
        y, cache = attention(y, shared, layer, cache)
        x = Residual(name="attention_residual")(
            x, norm("post_attention_layernorm", y) if post else y
        )

        y = norm(before_mlp, x) if pre else x
        if self.kind.experts:
            y = SparseMLP(c, self.dtype, self.param_dtype, MLP, name="mlp")(
                y, shared["segment_ids"]
            )
        else:
            y = MLP(c, self.dtype, self.param_dtype, name="mlp")(y)
        x = Residual(name="mlp_residual")(x, norm("post_feedforward_layernorm", y) if post else y)
        return split_tokens(x), cache


class DecoderStack(nn.Module):
    """Embedding, layers and the final norm: Hugging Face's `model`."""

    config: DecoderConfig
    dtype: Any
    param_dtype: Any
    scan_layers: bool
    remat: str
    implementation: str | None

    def setup(self) -> None:
        c = self.config
        scale: dict[str, Any] = {} if c.embedding_scale is None else {"scale": c.embedding_scale}
        self.embed_tokens = (ScaledEmbed if scale else nn.Embed)(
            c.vocab_size,
            c.hidden_size,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            embedding_init=nn.initializers.normal(0.02),
            **scale,
        )
        block: Any = DecoderLayer
        if self.remat != "none":
            block = nn.remat(
                block, policy=REMAT_POLICIES[self.remat], prevent_cse=not self.scan_layers
            )
        rest = (self.dtype, self.param_dtype, self.implementation)
        kinds = layer_kinds(c)
        if self.scan_layers:
            if len({kind.experts for kind in kinds}) > 1:
                raise ValueError(
                    "some layers have experts and others not, which cannot be stacked; load with "
                    "scan_layers=False"
                )
            self.layers = nn.scan(
                block,
                variable_axes={"params": 0, "router": 0, CAPTURED: 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=(nn.broadcast, 0, 0),  # pyright: ignore[reportArgumentType] - as in blocks
                length=c.num_layers,
            )(
                c,
                LayerKind._make(
                    values[0] if len(set(values)) == 1 else None
                    for values in zip(*kinds, strict=True)
                ),
                *rest,
            )
        else:
            self.layers = [block(c, kind, *rest) for kind in kinds]
        self.norm = RMSNorm(c.rms_norm_eps, c.norm_offset, self.dtype, self.param_dtype)

    def __call__(self, inputs: Inputs) -> tuple[jax.Array, Cache | None]:
        """(hidden states [B, T, D], the new cache)."""
        c = self.config
        x = self.embed_tokens(inputs.tokens)
        at = cached_mask(inputs, window=c.sliding_window)
        shared = shared_inputs(c, at)
        if self.scan_layers:
            columns = zip(LayerKind._fields, zip(*layer_kinds(c), strict=True), strict=True)
            differing = {
                name: jnp.asarray(values) for name, values in columns if len(set(values)) > 1
            }
            stack: Any = self.layers
            x, new = stack(x, shared, differing, at.slots)
        else:
            new = []
            for i, layer in enumerate(self.layers):
                part = None if at.slots is None else jax.tree.map(lambda a, i=i: a[i], at.slots)
                x, updated = layer(x, shared, {}, part)
                new.append(updated)
            new = None if at.slots is None else jax.tree.map(lambda *a: jnp.stack(a), *new)
        return self.norm(at.within(x)), at.moved(new)


def shared_inputs(c: DecoderConfig, at: Cached) -> dict[str, Any]:
    """What all layers are given of one call: who sees whom, and how queries and keys rotate."""
    lengths = at.lengths()
    return {
        "mask": at.mask,
        "index": at.index,
        "positions": at.positions,
        "segment_ids": at.segment_ids,
        "rope": rotary_tables(rotaries(c), at.positions, lengths),
    }


def rotaries(c: DecoderConfig) -> list[RotaryConfig | None]:
    """The ways in which the model's layers rotate; None is not at all."""
    ways: list[RotaryConfig | None] = [c.rotary]
    ways += [] if c.local_rotary is None else [c.local_rotary]
    return [*ways, None] if any(c.no_rope_layers or ()) else ways


def layer_kinds(c: DecoderConfig) -> list[LayerKind]:
    """The kind of each of the L layers."""
    sliding = c.sliding_layers or (False,) * c.num_layers
    no_rope = c.no_rope_layers or (False,) * c.num_layers
    experts = [c.num_experts > 0 and i not in c.dense_layers for i in range(c.num_layers)]
    ways = rotaries(c)
    rope = [
        ways.index(None if off else c.local_rotary if s and c.local_rotary else c.rotary)
        for s, off in zip(sliding, no_rope, strict=True)
    ]
    return [LayerKind(*values) for values in zip(sliding, rope, experts, strict=True)]


class Cached(NamedTuple):
    """What a decoder's layers share of one call, and the cache's keys and values, stacked over
    layers (None without one).
    """

    mask: Mask
    positions: jax.Array
    segment_ids: jax.Array | None
    index: Any  # of the cache's next slot
    kv_positions: jax.Array
    kv_segments: jax.Array | None
    slots: Slots | None

    def lengths(self) -> jax.Array:
        """How long the sequence of each of the call's tokens is, with what is cached of it."""
        lengths = sequence_lengths(self.kv_positions, self.kv_segments)
        if self.slots is None:
            return lengths
        return jax.lax.dynamic_slice_in_dim(lengths, self.index, self.positions.shape[1], axis=1)

    def within(self, x: jax.Array) -> jax.Array:
        """`x` [B, T, D] where the call's tokens found room in the cache, NaN where they overwrote
        its last ones.
        """
        if self.slots is None:
            return x
        return jnp.where(
            self.index + self.positions.shape[1] <= self.kv_positions.shape[1], x, jnp.nan
        )

    def moved(self, slots: Slots | None) -> Cache | None:
        """The cache after the call's tokens, whose keys and values are in `slots`; None where there
        is none.
        """
        if slots is None or self.kv_segments is None:
            return None
        index = jnp.asarray(self.index + self.positions.shape[1], jnp.int32)
        return Cache(slots, self.kv_positions, self.kv_segments, index)


def cached_mask(inputs: Inputs, *, window: int | None) -> Cached:
    """Positions and visibility of tokens [B, T] among themselves, or among those in the cache.

    Raises ValueError for tokens that find no room in the cache, where its index is known while
    tracing; see `Cached.within`. Into an empty cache tokens look among themselves, not at slots
    that nothing is in.
    """
    tokens, positions, segment_ids = inputs.tokens, inputs.positions, inputs.segment_ids
    cache, (B, T) = inputs.cache, tokens.shape
    start = 0 if cache is None else cache.index
    if positions is None:
        positions = jnp.broadcast_to(
            start + jnp.arange(T, dtype=jnp.int32), (B, T) if cache is not None else (1, T)
        )
    if cache is None:
        kv_positions, kv_segments, slots = positions, segment_ids, None
    else:
        segment_ids = jnp.ones((B, T), jnp.int32) if segment_ids is None else segment_ids
        positions = jnp.broadcast_to(positions, (B, T))
        update = jax.lax.dynamic_update_slice_in_dim
        kv_positions = update(cache.positions, positions.astype(jnp.int32), start, axis=1)
        kv_segments = update(cache.segment_ids, segment_ids.astype(jnp.int32), start, axis=1)
        slots = cache.slots
    alone = cache is None or cache.empty
    keys = (positions, segment_ids) if alone else (kv_positions, kv_segments)
    mask = make_mask(
        positions,
        keys[0],
        segment_ids,
        keys[1],
        window=window,
        aligned=alone,
        common=inputs.common,
    )
    if cache is not None and not isinstance(start, Tracer) and start + T > cache.length:
        raise ValueError(
            f"{T} tokens from slot {int(start)} on find no room in a cache of {cache.length} slots"
        )
    return Cached(mask, positions, segment_ids, start, kv_positions, kv_segments, slots)


class Decoder(nn.Module):
    """A causal language model, or a decoder with the head of another `task`.

    `dtype` is the dtype of computation, `param_dtype` that of fresh parameters. `remat` is "none",
    "full" (keep only each layer's input) or "dots" (keep products of weights).
    `attention_implementation` as in `attention`.
    """

    config: DecoderConfig
    task: Task = "causal_lm"
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    scan_layers: bool = True
    remat: str = "none"
    attention_implementation: str | None = None

    heads: ClassVar[tuple[str, ...]] = ("score",)  # modules that a checkpoint of another task lacks

    def setup(self) -> None:
        c = self.config
        self.model = DecoderStack(
            c,
            self.dtype,
            self.param_dtype,
            self.scan_layers,
            self.remat,
            self.attention_implementation,
        )
        if self.task == "causal_lm" and not c.tie_embeddings:
            self.lm_head = self._head(c.vocab_size, False)
        elif self.task.endswith("classification"):
            self.score = self._head(c.num_labels, self.task == "token_classification")

    @nn.nowrap
    def _head(self, features: int, bias: bool) -> nn.Dense:
        init = nn.initializers.normal(0.02)
        return nn.Dense(
            features,
            use_bias=bias,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=init,
        )

    def __call__(
        self,
        tokens: jax.Array,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        cache: Cache | None = None,
    ) -> Any:
        """Logits [B, T, V] in float32 for integer tokens [B, T]; with a cache, (logits, new cache).

        Of another task: logits [B, C] of a sequence (at its last token), [B, T, C] of tokens, or
        hidden states [B, T, D]. `positions` [B, T] default to 0, 1, 2, ...; `segment_ids` [B, T]
        keep packed sequences apart, 0 being padding.
        """
        hidden, cache_out = self.model(Inputs(tokens, positions, segment_ids, cache=cache))
        if self.task == "causal_lm":
            logits = self.unembed(hidden)
        elif self.task == "feature_extraction":
            logits = hidden.astype(jnp.float32)
        else:
            hidden = (
                last_of(hidden, segment_ids) if self.task == "sequence_classification" else hidden
            )
            logits = self.score(hidden).astype(jnp.float32)
        return logits if cache is None else (logits, cache_out)

    def hidden(
        self,
        tokens: jax.Array,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        cache: Cache | None = None,
    ) -> Any:
        """The final normalised hidden states [B, T, D], which `unembed` turns into logits; with a
        cache, (these, new cache).
        """
        hidden, cache_out = self.model(Inputs(tokens, positions, segment_ids, cache=cache))
        return hidden if cache is None else (hidden, cache_out)

    def unembed(self, hidden: jax.Array) -> jax.Array:
        """Logits [..., V] in float32 from hidden states [..., D]."""
        head = self.model.embed_tokens.attend if self.config.tie_embeddings else self.lm_head
        logits = head(hidden).astype(jnp.float32)
        cap = self.config.logit_softcap
        return logits if cap is None else cap * jnp.tanh(logits / cap)

    def empty_cache(self, batch: int, length: int, dtype: Any = None) -> Cache:
        """A fresh key/value cache for `batch` rows of at most `length` tokens."""
        c = self.config
        return empty_cache(
            c.num_layers, batch, length, c.num_kv_heads, c.head_dim, dtype or self.dtype
        )

    @nn.nowrap
    def chain(self) -> Chain | None:
        """The model taken apart (see `in_turn`); None where its layers are stacked."""
        if self.scan_layers:
            return None
        c = self.config
        rest = (self.dtype, self.param_dtype, self.attention_implementation)

        def layer_of(kind: LayerKind) -> Any:
            apply = bind(DecoderLayer(c, kind, *rest))

            def layer(
                params: Any, x: jax.Array, positions: Any = None, segment_ids: Any = None
            ) -> jax.Array:
                inputs = Inputs(x[..., 0], positions, segment_ids)
                at = cached_mask(inputs, window=c.sliding_window)
                return apply(params, x, shared_inputs(c, at), {}, None)[0]

            return layer

        of = {kind: layer_of(kind) for kind in layer_kinds(c)}
        enter = functools.partial(bind(self), method="embed")
        return Chain(
            enter, {f"model/layers_{i}": of[kind] for i, kind in enumerate(layer_kinds(c))}
        )

    def embed(
        self, tokens: jax.Array, *, positions: Any = None, segment_ids: Any = None
    ) -> jax.Array:
        """What the first layer is given for tokens [B, T]: [B, T, D]."""
        return self.model.embed_tokens(tokens)

    def outdated(self, cache: Cache) -> jax.Array | None:
        """Whether one more token makes what is cached of its row [B] wrong, since all rotate in
        another way then: it has to be computed again, with that token. None for a model of which
        that is never so.
        """
        kinds = [
            r
            for r in (self.config.rotary, self.config.local_rotary)
            if r is not None and r.by_length
        ]
        if not kinds:
            return None
        length = jnp.where(cache.segment_ids == 0, 0, cache.positions + 1).max(-1)
        return functools.reduce(jnp.logical_or, (r.changes(length + 1) for r in kinds))


def last_of(hidden: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
    """The hidden state [B, D] of each row's last token that is no padding."""
    if segment_ids is None:
        return hidden[:, -1]
    last = jnp.max(jnp.where(segment_ids > 0, jnp.arange(hidden.shape[1]), 0), axis=-1)
    return jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
