"""A family with names of its own in one file: Walnut, which computes what Llama does and calls
things as Meta's first code did (`wq`, `w1`, `tok_embeddings`, `output`).

The classes say how it computes, `roles` what its modules are: with these every technique of the
package works on it. As for every family, `load` reads a folder of its checkpoint.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from peft_jax.core.capture import CAPTURED
from peft_jax.core.roles import Roles
from peft_jax.models.blocks import ACTIVATIONS, REMAT_POLICIES, AttentionCore, Residual, RMSNorm
from peft_jax.models.config import llama_config
from peft_jax.models.decoder import Attention, Decoder, DecoderStack, layer_kinds
from peft_jax.models.decoders import TINY
from peft_jax.models.family import DECODER_TASKS, Family


class Mixer(Attention):
    """Attention, whose projections are called wq, wk, wv and wo."""

    def setup(self):
        c = self.config
        q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        self.wq, self.wk, self.wv = (self._dense(n, False) for n in (q, kv, kv))
        self.wo = self._dense(c.hidden_size, False)
        self.attend = AttentionCore(c.head_dim**-0.5, None, self.implementation)

    q_proj = property(lambda self: self.wq)  # as the class that computes with them calls them
    k_proj = property(lambda self: self.wk)
    v_proj = property(lambda self: self.wv)
    o_proj = property(lambda self: self.wo)
    core = property(lambda self: self.attend)


class WalnutLayer(nn.Module):
    config: object
    kind: object
    dtype: object
    param_dtype: object
    implementation: str | None = None

    @nn.compact
    def __call__(self, x, *rest):
        c, fields = self.config, (self.dtype, self.param_dtype)

        def norm(name):
            return RMSNorm(c.rms_norm_eps, 0.0, *fields, name=name)

        x = nn.with_logical_constraint(x, ("batch", "length", "embed"))
        mixer = Mixer(c, self.kind, *fields, self.implementation, name="mixer")
        y, cache = mixer(norm("attention_norm")(x), *rest)
        x = Residual(name="after_mixer")(x, y)
        y = FeedForward(c, *fields, name="feed_forward")(norm("ffn_norm")(x))
        x = Residual(name="after_feed_forward")(x, y)
        return nn.with_logical_constraint(x, ("batch", "length", "embed")), cache


class FeedForward(nn.Module):
    config: object
    dtype: object
    param_dtype: object

    @nn.compact
    def __call__(self, x):
        c = self.config

        def dense(n, name):
            return nn.Dense(n, False, self.dtype, self.param_dtype, name=name)

        gate = ACTIVATIONS[c.activation](dense(c.intermediate_size, "w1")(x))
        return dense(c.hidden_size, "w2")(gate * dense(c.intermediate_size, "w3")(x))


class WalnutStack(DecoderStack):
    """Embedding, layers and the last norm."""

    def setup(self):
        c, fields = self.config, (self.dtype, self.param_dtype)
        self.tok_embeddings = nn.Embed(c.vocab_size, c.hidden_size, *fields)
        layer = WalnutLayer
        if self.remat != "none":
            policy = REMAT_POLICIES[self.remat]
            layer = nn.remat(layer, policy=policy, prevent_cse=not self.scan_layers)
        kinds, rest = layer_kinds(c), (*fields, self.implementation)
        if self.scan_layers:
            layer = nn.scan(
                layer,
                variable_axes={"params": 0, CAPTURED: 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=(nn.broadcast, 0, 0),
                length=c.num_layers,
            )
            self.layers = layer(c, kinds[0], *rest)
        else:
            self.layers = [layer(c, kind, *rest) for kind in kinds]
        self.norm = RMSNorm(c.rms_norm_eps, 0.0, *fields)

    embed_tokens = property(lambda self: self.tok_embeddings)


class Walnut(Decoder):
    """The language model."""

    heads = ()

    def setup(self):
        c, fields = self.config, (self.dtype, self.param_dtype)
        rest = (self.scan_layers, self.remat, self.attention_implementation)
        self.model = WalnutStack(c, *fields, *rest)
        if not c.tie_embeddings:
            self.output = nn.Dense(c.vocab_size, False, *fields)

    def unembed(self, hidden: jax.Array) -> jax.Array:
        """Logits [..., V] in float32 from hidden states [..., D]."""
        tied = self.config.tie_embeddings
        head = self.model.tok_embeddings.attend if tied else self.output
        return head(hidden).astype(jnp.float32)

    @nn.nowrap
    def chain(self):
        """There is none: the model is calibrated as a whole."""
        return None


FAMILY = Family(
    name="walnut",
    class_name="Walnut",
    module=Walnut,
    config=llama_config,
    tasks=DECODER_TASKS[:1],
    roles=Roles(
        name="walnut",
        kind="decoder",
        stack=("layers",),
        embedding=("tok_embeddings",),
        head=("output",),
        attention=("mixer",),
        q=("mixer/wq",),
        k=("mixer/wk",),
        v=("mixer/wv",),
        o=("mixer/wo",),
        feed_forward=("feed_forward",),
        gate=("feed_forward/w1",),
        up=("feed_forward/w3",),
        down=("feed_forward/w2",),
        norms=("attention_norm", "ffn_norm", "norm"),
        core=("attend",),
        attention_residual=("after_mixer",),
        mlp_residual=("after_feed_forward",),
    ),
    example=TINY,
    prefix="model",
    embedding="model/tok_embeddings",
    head="output",
    heads=("output",),
    without_kernel={"causal_lm": "output"},
    like="llama",
    like_names=(  # how the test makes a folder of Walnut's out of one of Llama's
        (r"embed_tokens", "tok_embeddings"),
        (r"self_attn\.([qkvo])_proj", r"mixer.w\1"),
        (r"mlp\.gate_proj", "feed_forward.w1"),
        (r"mlp\.down_proj", "feed_forward.w2"),
        (r"mlp\.up_proj", "feed_forward.w3"),
        (r"input_layernorm", "attention_norm"),
        (r"post_attention_layernorm", "ffn_norm"),
        (r"lm_head", "output"),
    ),
)
