"""A program is split by the mesh of its parameters: counted in the compiled program."""

import contextlib
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.tree_util import Partial

import peft_jax
from peft_jax.core.mesh import make_mesh, mesh_of
from peft_jax.core.partition import combine
from peft_jax.core.program import read_program
from peft_jax.core.weight import matmul
from peft_jax.objectives.reading import nll_and_hits, over_positions, with_head
from peft_jax.quantization import NF4, quantize

ROWS, TOKENS, WIDTH = 16, 64, 32


class Linen(nn.Module):
    """A model of somebody else's, which knows of no mesh."""

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(96, WIDTH)(tokens)
        for i in range(2):
            x = x + nn.Dense(WIDTH, name=f"out{i}")(nn.gelu(nn.Dense(128, name=f"in{i}")(x)))
        return nn.Dense(96, name="last")(x)


class NNX(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(96, WIDTH, rngs=rngs)
        self.into = nnx.Linear(WIDTH, 128, rngs=rngs)
        self.out = nnx.Linear(128, WIDTH, rngs=rngs)
        self.last = nnx.Linear(WIDTH, 96, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        return self.last(x + self.out(nnx.gelu(self.into(x))))


def made(kind):
    """(model, params)"""
    if kind == "nnx":
        model = NNX(nnx.Rngs(0))
        return model, peft_jax.core.nnx_params(model)
    return Linen(), Linen().init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]


def program_of(kind, axes, *, method, context, rows=ROWS):
    model, params = made(kind)
    params = peft_jax.lora(params, jax.random.key(1), rank=4) if method == "lora" else params
    mesh = make_mesh(axes)
    params = peft_jax.shard(params, mesh)
    trained, frozen = peft_jax.partition(params) if method == "lora" else (params, None)
    apply = peft_jax.bind(model)

    def loss(trained, frozen, tokens):
        whole = trained if frozen is None else combine(trained, frozen)
        return jnp.square(apply(whole, tokens)).mean()

    tokens = np.arange(rows * TOKENS).reshape(rows, TOKENS) % 96
    entered = jax.set_mesh(mesh) if context else contextlib.nullcontext()
    with entered:
        run = jax.jit(jax.value_and_grad(loss)).lower(trained, frozen, tokens)
    return read_program(run.compile().as_text())


@pytest.mark.parametrize("context", [False, True], ids=["bare", "in a mesh's context"])
@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_rows_are_split_and_weights_gathered_with_or_without_a_context(kind, method, context):
    """No activation of the whole batch is gathered or added up; a product of a device is of its
    own rows.
    """
    program = program_of(kind, {"fsdp": 8}, method=method, context=context)
    tokens = ROWS * TOKENS
    whole = (str(tokens), f"{ROWS},{TOKENS}")
    moved = [c for c in program.collectives if any(w in c.type for w in whole)]
    assert program.collectives
    assert not moved, moved
    alone = program_of(kind, {"data": 1, "fsdp": 8}, method=method, context=context, rows=8 * ROWS)
    assert alone.flops == pytest.approx(8 * program.flops, rel=0.05)


def test_the_mesh_of_parameters():
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    _, params = made("linen")
    assert mesh_of(params) is None
    placed = peft_jax.shard(params, mesh)
    assert dict(mesh_of(placed).shape) == dict(mesh.shape)
    assert math.prod(mesh_of(placed).shape.values()) == 8


VOCABULARY = 512


def head_loss(head, params, states, targets):
    found = over_positions(
        with_head(_nll, Partial(head, params)), (states, targets), VOCABULARY, 16 * ROWS
    )
    return found.mean()


def _nll(head, states, targets, rng=None):
    return nll_and_hits(head(states), targets)[0]


def untied(params, states, rng=None):
    return matmul(states, params["lm_head"]["kernel"])


def tied(params, states, rng=None):
    return states @ params["embed"]["embedding"].T


@pytest.mark.parametrize("axes", [{"fsdp": 8}, {"fsdp": 2, "tensor": 2, "sequence": 2}], ids=str)
@pytest.mark.parametrize("kind", ["untied", "tied", "lora"])
def test_the_head_is_gathered_once_for_all_chunks_of_the_loss(kind, axes):
    """Values and gradients are those of one device; no loop gathers the head or adds up its
    gradient.
    """
    keys = jax.random.split(jax.random.key(0), 4)
    states = jax.random.normal(keys[0], (ROWS, TOKENS, WIDTH))
    targets = jax.random.randint(keys[1], (ROWS, TOKENS), 0, VOCABULARY)
    params = {
        "lm_head": {"kernel": jax.random.normal(keys[2], (WIDTH, VOCABULARY))},
        "embed": {"embedding": jax.random.normal(keys[3], (VOCABULARY, WIDTH))},
    }
    if kind == "lora":
        params = peft_jax.lora(params, keys[3], rank=4, targets=["lm_head"])
        params["lm_head"]["kernel"] = params["lm_head"]["kernel"].replace(
            b=jax.random.normal(keys[3], (4, VOCABULARY))
        )
    head = tied if kind == "tied" else untied
    run = jax.jit(jax.value_and_grad(functools.partial(head_loss, head), argnums=(0, 1)))
    alone = run(params, states, targets)
    placed = peft_jax.shard(params, make_mesh(axes))
    program = read_program(run.lower(placed, states, targets).compile().as_text())
    for a, b in zip(*map(jax.tree.leaves, (alone, run(placed, states, targets))), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
    ours = VOCABULARY // axes.get("tensor", 1)  # what a device has of the vocabulary
    assert not [c for c in program.collectives if c.times > 1 and str(ours) in c.type]
    whole = WIDTH * VOCABULARY * 4 // axes.get("tensor", 1)
    gathered = [c for c in program.collectives if c.kind == "all-gather" and c.size == whole]
    assert len(gathered) <= 2, gathered  # once forward, once backward


def test_a_quantized_weight_is_gathered_as_its_codes():
    """Of QLoRA's base no decoded weight moves, and the result is one device's."""
    model, params = made("linen")
    small = {"targets": ["in0", "in1", "out0", "out1"]}
    params = quantize(params, NF4(block_size=4, double=False), **small)
    params = peft_jax.lora(params, jax.random.key(1), rank=4, **small)
    apply = peft_jax.bind(model)
    tokens = np.arange(ROWS * TOKENS).reshape(ROWS, TOKENS) % 96

    def loss(trained, frozen, tokens):
        return jnp.square(apply(combine(trained, frozen), tokens)).mean()

    run = jax.jit(jax.value_and_grad(loss))
    alone = run(*peft_jax.partition(params), tokens)
    parts = peft_jax.partition(peft_jax.shard(params, make_mesh({"fsdp": 8})))
    program = read_program(run.lower(*parts, tokens).compile().as_text())
    sizes = {c.size for c in program.collectives if c.kind == "all-gather"}
    assert WIDTH * 128 // 2 in sizes  # codes of 4 bits
    assert WIDTH * 128 * 4 not in sizes
    for a, b in zip(*map(jax.tree.leaves, (alone, run(*parts, tokens))), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-8)
