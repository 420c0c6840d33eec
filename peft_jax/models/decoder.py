"""One readable decoder for every supported family: a vanilla Flax Linen module, configured by `DecoderConfig`.

Module and parameter names follow the Hugging Face checkpoints (`model.layers.self_attn.q_proj`), so a path here is a
path there. Layers are stacked on a leading axis and scanned by default, which keeps compile time independent of depth.
Letters: B batch, T tokens, S cache slots, D model, H heads, K kv-heads, d head size, F feed-forward, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from peft_jax.models.attention import Mask, attention, empty_cache, make_mask, read_cache, write_cache
from peft_jax.models.config import DecoderConfig
from peft_jax.models.rotary import rotary_table, rotate

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": nn.silu,
    "swish": nn.silu,
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "gelu_pytorch_tanh": nn.gelu,
    "gelu_new": nn.gelu,
    "relu": nn.relu,
}

REMAT_POLICIES: dict[str, Any] = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class RMSNorm(nn.Module):
    """Root mean square normalisation (Zhang and Sennrich 2019) over the last axis, in float32."""

    eps: float
    offset: float = 0.0
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.initializers.constant(1.0 - self.offset)
        scale = self.param("scale", init, (x.shape[-1],), self.param_dtype)
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
        return (y * (self.offset + scale.astype(jnp.float32))).astype(self.dtype or x.dtype)


class AttentionCore(nn.Module):
    """Attention proper, a module of its own so that something can be attached to it (a prefix, say)."""

    config: DecoderConfig
    implementation: str | None = None

    def __call__(self, q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, sliding: bool | jax.Array) -> jax.Array:
        c = self.config
        scale = c.head_dim**-0.5 if c.attention_scale is None else c.attention_scale
        return attention(
            q, k, v, mask, sliding=sliding, scale=scale, softcap=c.attention_softcap, implementation=self.implementation
        )


class LayerKind(NamedTuple):
    """What one layer does that another may not; None where scanned layers differ and `layer` says it per layer."""

    sliding: bool | None
    rope: bool | None


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
            self.q_proj, self.k_proj, self.v_proj = (self._dense(n, c.qkv_bias) for n in (q, kv, kv))
        self.o_proj = self._dense(c.hidden_size, c.output_bias)
        if c.qk_norm:
            self.q_norm, self.k_norm = (RMSNorm(c.rms_norm_eps, c.norm_offset, self.dtype, self.param_dtype) for _ in range(2))
        self.core = AttentionCore(c, self.implementation)

    def _dense(self, features: int, bias: bool) -> nn.Dense:
        return nn.Dense(
            features, use_bias=bias, dtype=self.dtype, param_dtype=self.param_dtype, kernel_init=nn.initializers.normal(0.02)
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

    def __call__(self, x: jax.Array, shared: dict[str, Any], layer: dict[str, Any], cache: Any) -> tuple[jax.Array, Any]:
        q, k, v = self._project(x)
        q, k = self._rotate(q, k, shared, layer)
        if cache is not None:
            cache = write_cache(cache, k, v, shared["index"])
            k, v = read_cache(cache, q.dtype)
        out = self.core(q, k, v, shared["mask"], self._flag("sliding", layer))
        return self.o_proj(out.reshape(*out.shape[:-2], -1)), cache

    def _flag(self, name: str, layer: dict[str, jax.Array]) -> bool | jax.Array:
        static = getattr(self.kind, name)
        return layer[name] if static is None else static

    def _rotate(self, q: jax.Array, k: jax.Array, shared: dict[str, Any], layer: dict[str, jax.Array]) -> list[jax.Array]:
        cos, sin = shared["rope"]
        if shared["local_rope"] is not None:
            sliding = self._flag("sliding", layer)
            cos, sin = (jnp.where(sliding, a, b) for a, b in zip(shared["local_rope"], (cos, sin), strict=True))
        rope = self._flag("rope", layer)
        if isinstance(rope, bool):
            return [rotate(y, cos, sin) if rope else y for y in (q, k)]
        return [jnp.where(rope, rotate(y, cos, sin), y) for y in (q, k)]


class MLP(nn.Module):
    config: DecoderConfig
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config

        def dense(features: int, name: str) -> nn.Dense:
            return nn.Dense(
                features, use_bias=c.mlp_bias, dtype=self.dtype, param_dtype=self.param_dtype, name=name,
                kernel_init=nn.initializers.normal(0.02),
            )  # fmt: skip

        if c.fused_projections:
            gate, up = jnp.split(dense(2 * c.intermediate_size, "gate_up_proj")(x), 2, axis=-1)
        else:
            gate, up = dense(c.intermediate_size, "gate_proj")(x), dense(c.intermediate_size, "up_proj")(x)
        return dense(c.hidden_size, "down_proj")(_gated(c.activation, gate, up))


@functools.partial(jax.checkpoint, static_argnums=0)  # keeps two arrays for the backward pass instead of five
def _gated(activation: str, gate: jax.Array, up: jax.Array) -> jax.Array:
    return ACTIVATIONS[activation](gate) * up


class Residual(nn.Module):
    """x + y, a module of its own so that something can be attached to the sum (an adapter after it, or beside y)."""

    def __call__(self, x: jax.Array, y: jax.Array) -> jax.Array:
        return x + y


# Modules without parameters that something may be attached to, by the name of a module among their neighbours.
HOOKS = {"q_proj": ("core",), "qkv_proj": ("core",), "self_attn": ("attention_residual", "mlp_residual")}


class DecoderLayer(nn.Module):
    """Attention and feed-forward with residuals; normalised before, after or on both sides of each."""

    config: DecoderConfig
    kind: LayerKind
    dtype: Any
    param_dtype: Any
    implementation: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, shared: dict[str, Any], layer: dict[str, Any], cache: Any) -> tuple[jax.Array, Any]:
        c = self.config

        def norm(name: str, x: jax.Array) -> jax.Array:
            return RMSNorm(c.rms_norm_eps, c.norm_offset, self.dtype, self.param_dtype, name=name)(x)

        x = nn.with_logical_constraint(x, ("batch", "length", "embed"))
        pre, post = c.norm_position != "post", c.norm_position != "pre"
        before_mlp = "pre_feedforward_layernorm" if post else "post_attention_layernorm"

        y = norm("input_layernorm", x) if pre else x
        attention = Attention(c, self.kind, self.dtype, self.param_dtype, self.implementation, name="self_attn")
        y, cache = attention(y, shared, layer, cache)
        x = Residual(name="attention_residual")(x, norm("post_attention_layernorm", y) if post else y)

        y = norm(before_mlp, x) if pre else x
        y = MLP(c, self.dtype, self.param_dtype, name="mlp")(y)
        x = Residual(name="mlp_residual")(x, norm("post_feedforward_layernorm", y) if post else y)
        return nn.with_logical_constraint(x, ("batch", "length", "embed")), cache


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
        self.embed_tokens = nn.Embed(
            c.vocab_size, c.hidden_size, dtype=self.dtype, param_dtype=self.param_dtype,
            embedding_init=nn.initializers.normal(0.02),
        )  # fmt: skip
        block: Any = DecoderLayer
        if self.remat != "none":
            block = nn.remat(block, policy=REMAT_POLICIES[self.remat], prevent_cse=not self.scan_layers)
        rest = (self.dtype, self.param_dtype, self.implementation)
        kinds = layer_kinds(c)
        if self.scan_layers:
            self.layers = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=(nn.broadcast, 0, 0),
                length=c.num_layers,
            )(c, LayerKind(*(values[0] if len(set(values)) == 1 else None for values in zip(*kinds, strict=True))), *rest)
        else:
            self.layers = [block(c, kind, *rest) for kind in kinds]
        self.norm = RMSNorm(c.rms_norm_eps, c.norm_offset, self.dtype, self.param_dtype)

    def __call__(self, tokens, positions, segment_ids, cache, common: int = 0):
        """The first `common` tokens of each row are seen by all its segments; they have the segment -1."""
        c = self.config
        x = self.embed_tokens(tokens)
        if c.embedding_scale is not None:
            x = x * jnp.asarray(c.embedding_scale, x.dtype)
        shared, slots = _shared(c, tokens, positions, segment_ids, cache, common)
        if self.scan_layers:
            columns = zip(LayerKind._fields, zip(*layer_kinds(c), strict=True), strict=True)
            differing = {name: jnp.asarray(values) for name, values in columns if len(set(values)) > 1}
            stack: Any = self.layers
            x, new = stack(x, shared, differing, slots)
        else:
            new = []
            for i, layer in enumerate(self.layers):
                part = None if slots is None else jax.tree.map(lambda a, i=i: a[i], slots)
                x, updated = layer(x, shared, {}, part)
                new.append(updated)
            new = {} if slots is None else jax.tree.map(lambda *a: jnp.stack(a), *new)
        if cache is not None:
            index = cache["index"] + tokens.shape[1]
            cache = {**new, "index": index, "positions": shared["kv_positions"], "segment_ids": shared["kv_segments"]}
        return self.norm(x), cache


def layer_kinds(c: DecoderConfig) -> list[LayerKind]:
    """The kind of each of the L layers."""
    sliding = c.sliding_layers or (False,) * c.num_layers
    no_rope = c.no_rope_layers or (False,) * c.num_layers
    return [LayerKind(s, not off) for s, off in zip(sliding, no_rope, strict=True)]


def _shared(c: DecoderConfig, tokens, positions, segment_ids, cache, common: int) -> tuple[dict[str, Any], Any]:
    """What all layers share (rotary tables, masks), and the cache's keys and values, stacked over layers."""
    B, T = tokens.shape
    start = 0 if cache is None else cache["index"]
    aligned = cache is None
    if positions is None:
        positions = jnp.broadcast_to(start + jnp.arange(T, dtype=jnp.int32), (B, T) if cache is not None else (1, T))
    shared: dict[str, Any] = {"index": start, "positions": positions, "segment_ids": segment_ids}
    if cache is None:
        kv_positions, kv_segments, slots = positions, segment_ids, None
    else:
        segment_ids = jnp.ones((B, T), jnp.int32) if segment_ids is None else segment_ids
        positions = jnp.broadcast_to(positions, (B, T))
        update = jax.lax.dynamic_update_slice_in_dim
        kv_positions = update(cache["positions"], positions.astype(jnp.int32), start, axis=1)
        kv_segments = update(cache["segment_ids"], segment_ids.astype(jnp.int32), start, axis=1)
        slots = {name: x for name, x in cache.items() if name in ("k", "v", "k_scale", "v_scale")}
        shared.update(kv_positions=kv_positions, kv_segments=kv_segments)
    shared["mask"] = make_mask(
        positions, kv_positions, segment_ids, kv_segments, window=c.sliding_window, aligned=aligned, common=common > 0
    )
    shared["rope"] = rotary_table(c.rotary, positions)
    shared["local_rope"] = None if c.local_rotary is None else rotary_table(c.local_rotary, positions)
    return shared, slots


class Decoder(nn.Module):
    """A causal language model.

    `dtype` is the dtype of computation, `param_dtype` that of fresh parameters. `remat` is "none", "full" (keep only
    each layer's input) or "dots" (keep products of weights). `attention_implementation` as in `attention`.
    """

    config: DecoderConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    scan_layers: bool = True
    remat: str = "none"
    attention_implementation: str | None = None

    def setup(self) -> None:
        c = self.config
        self.model = DecoderStack(c, self.dtype, self.param_dtype, self.scan_layers, self.remat, self.attention_implementation)
        if not c.tie_embeddings:
            self.lm_head = nn.Dense(
                c.vocab_size, use_bias=False, dtype=self.dtype, param_dtype=self.param_dtype,
                kernel_init=nn.initializers.normal(0.02),
            )  # fmt: skip

    def __call__(
        self,
        tokens: jax.Array,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        cache: dict[str, jax.Array] | None = None,
    ) -> Any:
        """Logits [B, T, V] in float32 for integer tokens [B, T]; with a cache, (logits, new cache).

        `positions` [B, T] default to 0, 1, 2, ...; `segment_ids` [B, T] keep packed sequences apart, 0 being padding.
        """
        hidden, cache_out = self.model(tokens, positions, segment_ids, cache)
        logits = self.unembed(hidden)
        return logits if cache is None else (logits, cache_out)

    def hidden(
        self, tokens: jax.Array, *, positions: jax.Array | None = None, segment_ids: jax.Array | None = None
    ) -> jax.Array:
        """The final normalised hidden states [B, T, D]; `unembed` turns them into logits."""
        return self.model(tokens, positions, segment_ids, None)[0]

    def unembed(self, hidden: jax.Array) -> jax.Array:
        """Logits [..., V] in float32 from hidden states [..., D]."""
        head = self.model.embed_tokens.attend if self.config.tie_embeddings else self.lm_head
        logits = head(hidden).astype(jnp.float32)
        cap = self.config.logit_softcap
        return logits if cap is None else cap * jnp.tanh(logits / cap)

    def empty_cache(self, batch: int, length: int, dtype: Any = None) -> dict[str, jax.Array]:
        """A fresh key/value cache for `batch` rows of at most `length` tokens; see `attention.empty_cache`."""
        c = self.config
        return empty_cache(c.num_layers, batch, length, c.num_kv_heads, c.head_dim, dtype or self.dtype)


def abstract_params(model: Decoder) -> Any:
    """Shapes and dtypes of a decoder's parameters, nothing allocated."""
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
