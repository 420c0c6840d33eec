"""What all of the models are made of: configuration, dtypes, norms, attention, residual sums and
stacks of layers.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from peft_jax.core.bind import register_rule
from peft_jax.core.bind.rules import embed as rows_of
from peft_jax.core.capture import CAPTURED
from peft_jax.models.attention import attention
from peft_jax.models.operands import AttentionOperands

Task = Literal[
    "causal_lm",
    "masked_lm",
    "seq2seq_lm",
    "sequence_classification",
    "token_classification",
    "question_answering",
    "feature_extraction",
]
ACTIVATIONS: dict[str, Any] = {
    "silu": nn.silu,
    "swish": nn.silu,
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "gelu_pytorch_tanh": nn.gelu,
    "gelu_new": nn.gelu,
    "relu": nn.relu,
    "tanh": jnp.tanh,
}

REMAT_POLICIES: dict[str, Any] = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """What the configuration of every model of this package has."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_labels: int = 2  # of a classification head
    tie_embeddings: bool = True
    hf_config: str = "{}"  # the Hugging Face config as JSON, written back on export
    generation_config: str | None = (
        None  # the folder's generation_config.json, written back on export
    )

    @property
    def model_type(self) -> str:
        """The Hugging Face `model_type`, such as "bert"."""
        return json.loads(self.hf_config).get("model_type", "llama")

    @property
    def learned_positions(self) -> int | None:
        """How many positions have a learned row; None where positions are computed."""
        return None


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


class Layers:
    """The layers that all of a model's modules are made of, for modules with a `config`, a `dtype`
    and a `param_dtype`.
    """

    config: Any
    dtype: Any
    param_dtype: Any

    @nn.nowrap
    def dense(self, features: int, name: str | None = None, bias: bool = True) -> nn.Dense:
        """A dense layer that starts as N(0, 0.02^2)."""
        return nn.Dense(
            features,
            use_bias=bias,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name=name,
            kernel_init=nn.initializers.normal(0.02),
        )

    @nn.nowrap
    def layer_norm(
        self, name: str | None = None, eps: float | None = None, bias: bool = True
    ) -> nn.LayerNorm:
        """Layer normalisation, in float32."""
        return nn.LayerNorm(
            epsilon=self.config.norm_eps if eps is None else eps,
            use_bias=bias,
            use_fast_variance=False,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name=name,
        )

    @nn.nowrap
    def rms_norm(self, name: str | None = None) -> RMSNorm:
        """Root mean square normalisation, in float32."""
        return RMSNorm(self.config.norm_eps, 0.0, self.dtype, self.param_dtype, name=name)

    @nn.nowrap
    def embed(self, size: int, features: int | None = None, name: str | None = None) -> nn.Embed:
        """An embedding that starts as N(0, 0.02^2)."""
        return nn.Embed(
            size,
            features or self.config.hidden_size,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name=name,
            embedding_init=nn.initializers.normal(0.02),
        )

    @nn.nowrap
    def drop(self: Any, x: jax.Array, rate: float | None = None) -> jax.Array:
        """`x` with dropout, where the call has randomness for it."""
        share: float = self.config.dropout if rate is None else rate
        if share == 0.0 or not self.has_rng("dropout"):
            return x
        keep = jax.random.bernoulli(self.make_rng("dropout"), 1.0 - share, x.shape)
        return jnp.where(keep, x / (1.0 - share), 0).astype(x.dtype)


class Block(Layers, nn.Module):
    """A module with the dtypes that all of a model's modules have."""

    config: Any
    dtype: Any
    param_dtype: Any


class AttentionCore(nn.Module):
    """Attention proper, a module of its own so that something can be attached to it (a prefix,
    say).
    """

    scale: float
    softcap: float | None = None
    implementation: str | None = None

    def __call__(self, operands: AttentionOperands) -> jax.Array:
        """[B, T, H, d] in the queries' dtype.

        A layer that shares a scan with layers of another kind takes the branch of its own, so that
        a kernel is told statically what it has to do.
        """
        sliding, o = operands.sliding, operands.replace(sliding=False)
        if isinstance(sliding, bool):
            return self._of_kind(sliding, o)
        local, full = (functools.partial(self._of_kind, kind) for kind in (True, False))
        return jax.lax.cond(sliding, local, full, o)

    def _of_kind(self, sliding: bool, o: AttentionOperands) -> jax.Array:
        return attention(
            o.query,
            o.key,
            o.value,
            o.mask,
            sliding=sliding,
            bias=None if o.bias is None else o.bias.scores,
            scale=self.scale,
            softcap=self.softcap,
            implementation=self.implementation,
        )


class ScaledEmbed(nn.Embed):
    """An embedding whose rows are multiplied by `scale` as they are looked up (Gemma), but not
    where it is the head.

    The scale is the module's, as in transformers: what is attached to the embedding acts on scaled
    rows.
    """

    scale: float = 1.0

    def __call__(self, inputs: jax.Array) -> jax.Array:
        return scaled(super().__call__(inputs), self.scale)


def scaled(x: jax.Array, scale: float) -> jax.Array:
    """`x` times a number in x's dtype."""
    return x * jnp.asarray(scale, x.dtype)


def _scaled_embed(module: ScaledEmbed, params: Mapping[str, Any], inputs: jax.Array) -> jax.Array:
    return scaled(rows_of(inputs, params["embedding"], dtype=module.dtype), module.scale)


register_rule(ScaledEmbed, _scaled_embed)


def embedding_scale(model: Any) -> float:
    """What a model multiplies the rows of its token embedding by, inside of the embedding."""
    return getattr(getattr(model, "config", None), "embedding_scale", None) or 1.0


class Residual(nn.Module):
    """x + y, a module of its own so that something can be attached to the sum (an adapter after it,
    or beside y).
    """

    def __call__(self, x: jax.Array, y: jax.Array) -> jax.Array:
        return x + y


class AttentionOutput(nn.Module):
    """What attention puts out, y [B, T, D], as it is: a module of its own so that something for
    queries q [B, T, H, d] may be added.
    """

    def __call__(self, y: jax.Array, q: jax.Array) -> jax.Array:
        return y


def split_heads(x: jax.Array, head_dim: int) -> jax.Array:
    """x [B, T, H d] as [B, T, H, d]."""
    return x.reshape(*x.shape[:-1], -1, head_dim)


def join_heads(x: jax.Array) -> jax.Array:
    """x [B, T, H, d] as [B, T, H d]."""
    return x.reshape(*x.shape[:-2], -1)


def layer_stack(
    block: type[nn.Module], length: int, *args: Any, scan: bool, remat: str, broadcast: int = 1
) -> Any:
    """`length` layers of a class whose call takes (x, what all layers share ..., what is its own)
    and returns (x, None).

    One module whose parameters have a leading axis where they are scanned, else a list. `broadcast`
    counts what is shared.
    """
    made: Any = block
    if remat != "none":
        made = nn.remat(made, policy=REMAT_POLICIES[remat], prevent_cse=not scan)
    if not scan:
        return [made(*args) for _ in range(length)]
    axes = (*[nn.broadcast] * broadcast, 0)
    return nn.scan(
        made,
        variable_axes={"params": 0, CAPTURED: 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=axes,  # pyright: ignore[reportArgumentType] - flax's default is a number
        length=length,
    )(*args)


def run_layers(layers: Any, x: jax.Array, shared: Any, own: dict[str, Any]) -> jax.Array:
    """`x` through the layers of a `layer_stack`; `own` maps names to one value a layer."""
    if not isinstance(layers, list | tuple):
        return layers(x, shared, {n: jnp.asarray(v) for n, v in own.items()})[0]
    for i, layer in enumerate(layers):
        x, _ = layer(x, shared, {n: v[i] for n, v in own.items()})
    return x


def mean_of(hidden: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
    """The mean [B, D] of hidden states [B, T, D] over the tokens that are no padding."""
    seen = jnp.ones(hidden.shape[:2]) if segment_ids is None else segment_ids > 0
    seen = seen.astype(jnp.float32)[..., None]
    return ((hidden * seen).sum(1) / jnp.maximum(seen.sum(1), 1.0)).astype(hidden.dtype)


def abstract_params(model: nn.Module) -> Any:
    """Shapes and dtypes of a model's parameters, nothing allocated."""
    return jax.eval_shape(lambda: fresh_params(model))


def fresh_params(model: nn.Module, seed: int = 0) -> Any:
    """A model's parameters before any training."""
    plain: Any = model.clone(attention_implementation=None)  # a kernel may not take one token
    return plain.init(jax.random.key(seed), jnp.zeros((1, 1), jnp.int32))["params"]
