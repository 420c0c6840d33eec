# %% [markdown]
# # Bring your own Flax model
#
# `peft_jax.bind` works on any Flax module: it looks at the tree of parameters, not at the model's code. Here a character model that
# is written in this notebook gets LoRA:
#
# $$y = x\,(W + A B)$$

# %%
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("peft_jax") is None:  # on Colab, with a CPU, GPU or TPU
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "peft-jax"], check=True)

# %% [markdown]
# ## A model that knows nothing of this package

# %%
import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import peft_jax


class Block(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x):
        mask = nn.make_causal_mask(x[..., 0])
        x = x + nn.MultiHeadDotProductAttention(num_heads=4)(nn.LayerNorm()(x), mask=mask)
        y = nn.Dense(4 * self.width, name="up")(nn.LayerNorm()(x))
        return x + nn.Dense(self.width, name="down")(nn.gelu(y))


class Characters(nn.Module):
    width: int = 96
    layers: int = 3

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(128, self.width)(tokens)
        x = x + nn.Embed(64, self.width, name="positions")(jnp.arange(tokens.shape[1]))
        for _ in range(self.layers):
            x = Block(self.width)(x)
        return nn.Dense(128, name="head")(x)


model = Characters()
params = model.init(jax.random.key(0), jnp.zeros((1, 64), jnp.int32))["params"]
print(f"{sum(x.size for x in jax.tree.leaves(params)):,} parameters")

# %% [markdown]
# ## Pre-trained on one text
#
# The model learns Python's documentation, character by character, with all its weights.

# %%
from peft_jax.data.builtin import dataset


def characters(texts):
    joined = "\n".join(texts).encode("ascii", "ignore")
    stream = np.frombuffer(joined, np.uint8).astype(np.int32)
    return stream[: len(stream) // 64 * 64].reshape(-1, 64)


docs = characters(x["text"] for x in dataset("python-docs", "train"))
answers = dataset("countries", "train")
task = characters(x["prompt"] + x["completion"] for x in answers)


def train(params, rows, steps, rate):
    """(the tree, losses): AdamW on the part of the tree that trains."""
    apply = peft_jax.bind(model)
    trainable, frozen = peft_jax.partition(params)
    optimizer = optax.adamw(rate)

    def loss(trainable, tokens):
        log = jax.nn.log_softmax(apply(peft_jax.combine(trainable, frozen), tokens)[:, :-1])
        return -jnp.take_along_axis(log, tokens[:, 1:, None], -1).mean()

    @jax.jit
    def step(trainable, state, tokens):
        value, gradients = jax.value_and_grad(loss)(trainable, tokens)
        updates, state = optimizer.update(gradients, state, trainable)
        return optax.apply_updates(trainable, updates), state, value

    state, losses = optimizer.init(trainable), []
    draw = np.random.default_rng(0)
    for _ in range(steps):
        batch = rows[draw.integers(len(rows), size=32)]
        trainable, state, value = step(trainable, state, batch)
        losses.append(float(value))
    moments = sum(x.nbytes for x in jax.tree.leaves(state))
    return peft_jax.combine(trainable, frozen), losses, moments


base, losses, _ = train(peft_jax.core.full(params), docs, 200, 2e-3)
base = peft_jax.merge(base)
print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f} nats per character")

# %% [markdown]
# ## LoRA on it, beside full fine-tuning
#
# The layout says which axes of a kernel are inputs: attention's kernels have three axes in Flax. `layout_of` reads it off the layers.

# %%
from peft_jax.core import layout_of

tokens = jnp.asarray(task[:1])
layout = layout_of(model, tokens)
tree = peft_jax.lora(base, jax.random.key(1), rank=4, layout=layout)
curves, memory = {}, {}
_, curves["full fine-tuning"], memory["full fine-tuning"] = train(
    peft_jax.core.full(base), task, 100, 1e-3
)
tuned, curves["LoRA, rank 4"], memory["LoRA, rank 4"] = train(tree, task, 100, 1e-2)

figure, axes = plt.subplots(1, 2, figsize=(11, 3.5), layout="constrained")
for name, values in curves.items():
    axes[0].plot(values, label=name)
axes[0].set(xlabel="step", ylabel="loss")
axes[0].legend()
bars = axes[1].barh(list(memory), [m / 1e3 for m in memory.values()])
axes[1].bar_label(bars, fmt="%.3g")
axes[1].set(xlabel="kB of optimizer state")
plt.show()
less = memory["full fine-tuning"] / memory["LoRA, rank 4"]
print(f"LoRA's optimizer state is {less:.0f} times smaller.")
assert less > 3
assert curves["LoRA, rank 4"][-1] < curves["LoRA, rank 4"][0]

# %% [markdown]
# ## Merged, the model is as it was
#
# `merge` folds the update in. What comes out is a plain tree for the plain module.

# %%
merged = peft_jax.merge(tuned)
assert jax.tree.structure(merged) == jax.tree.structure(params)
ours, plain = peft_jax.bind(model)(tuned, tokens), model.apply({"params": merged}, tokens)
print(f"largest difference of the logits: {float(jnp.abs(ours - plain).max()):.1e}")
assert jnp.allclose(ours, plain, atol=1e-3)

# %% [markdown]
# ## When to use it
#
# Whenever the model is your own. A layer of your own class joins with `peft_jax.core.register_rule`; see
# [write your own](../docs/write_your_own.md).
#
# Read on: the [Flax documentation](https://flax.readthedocs.io); Hu et al. 2021, [LoRA](https://arxiv.org/abs/2106.09685).
