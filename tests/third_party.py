"""Flax models that know nothing of this package, in the styles that people write."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

VOCAB, WIDTH, DEPTH = 13, 16, 3


class Gate(nn.Module):
    """A module with a matrix of its own, for which there is no rule."""

    @nn.compact
    def __call__(self, x):
        w = self.param("w", nn.initializers.normal(0.3), (x.shape[-1], x.shape[-1]))
        return x * nn.sigmoid(x @ w)


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        causal = nn.make_causal_mask(x[..., 0])
        x = x + nn.MultiHeadDotProductAttention(num_heads=2, name="attention")(
            nn.LayerNorm()(x), mask=causal
        )
        y = nn.Einsum((WIDTH, 2, WIDTH), "btd,dnf->btnf", name="up")(x)
        x = x + nn.DenseGeneral(WIDTH, axis=(-2, -1), name="down")(nn.gelu(y))
        return x + Gate(name="gate")(x), None


class LinenModel(nn.Module):
    """Scanned and rematerialised blocks, DenseGeneral attention, a causal convolution and a tied
    head.
    """

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(VOCAB, WIDTH, name="embed", embedding_init=nn.initializers.normal(1.0))
        x = embed(tokens)
        blocks = nn.scan(
            nn.remat(LinenBlock),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=DEPTH,
        )
        x, _ = blocks(name="blocks")(x, None)
        x = x + nn.Conv(WIDTH, (3,), padding=[(2, 0)], name="conv")(x)
        x = nn.Dense(WIDTH, name="out")(x)
        return embed.attend(x)


class NNXBlock(nnx.Module):
    def __init__(self, rngs):
        self.attention = nnx.MultiHeadAttention(2, WIDTH, decode=False, rngs=rngs)
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 2 * WIDTH, rngs=rngs)
        self.mix = nnx.Einsum("btd,df->btf", (2 * WIDTH, 2 * WIDTH), (2 * WIDTH,), rngs=rngs)
        self.down = nnx.LinearGeneral((2 * WIDTH,), (WIDTH,), rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm(x), mask=nnx.make_causal_mask(x[..., 0]))
        return x + self.down(nnx.gelu(self.mix(self.up(x))))


class NNXModel(nnx.Module):
    """Blocks stacked with nnx.vmap, run with nnx.scan and nnx.remat."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(VOCAB, WIDTH, rngs=rngs)
        self.blocks = nnx.vmap(NNXBlock, in_axes=0, out_axes=0)(rngs.split(DEPTH))
        self.conv = nnx.Conv(WIDTH, WIDTH, (3,), padding=[(2, 0)], rngs=rngs)

    def __call__(self, tokens):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def run(x, block):
            return nnx.remat(lambda b, x: b(x))(block, x)

        x = run(self.embed(tokens), self.blocks)
        return self.embed.attend(x + self.conv(x))


class Calls(nnx.Variable):
    """How often a model was called: a collection of the model's own."""


class ListedModel(nnx.Module):
    """Blocks in a list beside modules with names, as tunix's decoders have them; a list of
    parameters, and a count.
    """

    def __init__(self, rngs):
        self.embedder = nnx.Embed(VOCAB, WIDTH, rngs=rngs)
        self.layers = nnx.List([NNXBlock(rngs) for _ in range(2)])
        self.final_norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.mixes = nnx.List([nnx.Param(jnp.eye(WIDTH)), nnx.Param(jnp.eye(WIDTH))])
        self.calls = Calls(jnp.zeros((), jnp.int32))

    def __call__(self, tokens):
        self.calls[...] += 1
        x = self.embedder(tokens)
        for layer, mix in zip(self.layers, self.mixes, strict=True):
            x = layer(x) @ mix
        return self.embedder.attend(self.final_norm(x))


class VisionModel(nnx.Module):
    """A small vision transformer: blocks in nnx.Sequential, parameters of its own, batch statistics
    and dropout.
    """

    def __init__(self, rngs):
        self.patches = nnx.Conv(3, WIDTH, (2, 2), strides=(2, 2), rngs=rngs)
        self.token = nnx.Param(jnp.ones((1, 1, WIDTH)))
        self.layers = nnx.Sequential(NNXBlock(rngs), NNXBlock(rngs))
        self.norm = nnx.BatchNorm(WIDTH, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, deterministic=True, rngs=rngs)
        self.head = nnx.Linear(WIDTH, 5, rngs=rngs)

    def __call__(self, images):
        x = self.patches(images)
        x = x.reshape(x.shape[0], -1, WIDTH)
        x = jnp.concatenate([jnp.broadcast_to(self.token, (x.shape[0], 1, WIDTH)), x], axis=1)
        return self.head(self.dropout(self.norm(self.layers(x))))[:, -1]


class ShiftedModel(nnx.Module):
    """A language model that adds what it holds beside its parameters, `shift`, to hidden states."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(VOCAB, WIDTH, rngs=rngs)
        self.shift = nnx.BatchStat(jnp.zeros(WIDTH))
        self.head = nnx.Linear(WIDTH, VOCAB, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, deterministic=True, rngs=rngs)

    def __call__(self, tokens, *, positions=None, segment_ids=None, rng=None):
        return self.head(self.dropout(self.embed(tokens) + self.shift))


class LinenNormed(nn.Module):
    """A model with batch statistics."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(WIDTH, name="up")(x)
        return nn.Dense(3, name="out")(nn.BatchNorm(use_running_average=not train, name="norm")(x))


def linen_model():
    """(model, params, layout of its weights by hand)."""
    model = LinenModel()
    params = model.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    return model, params


def nnx_model():
    """(model, params)."""
    from peft_jax.core import nnx_params

    model = NNXModel(nnx.Rngs(0))
    return model, nnx_params(model)
