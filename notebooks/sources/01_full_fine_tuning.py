# %% [markdown]
# # Traditional fine-tuning and its limits
#
# Fine-tuning takes a trained model and goes on training all of its weights on a new task:
#
# $$\theta \leftarrow \theta - \eta \, \nabla_\theta L(\theta)$$
#
# It is simple and it works. It has three limits: the memory of training, a whole copy of the model for each task, and forgetting.
# This notebook counts and measures the first two. The other notebooks each take one technique that lifts them.

# %%
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("peft_jax") is None:  # on Colab, with a CPU, GPU or TPU
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "peft-jax"], check=True)

# %% [markdown]
# ## The task
#
# A small model of English novels answers questions about countries. It has 5.5 million parameters and comes with the package.
# `fine_tune` is one run, as `peft-jax train` does it. It returns what the run measured: loss and accuracy on held-out questions,
# bytes and seconds.

# %%
from pathlib import Path

import matplotlib.pyplot as plt
from rich.console import Console

from peft_jax.recipes.config import parse_config
from peft_jax.recipes.train import run_training
from peft_jax.reports.folder import numbers

countries = "builtin:countries"
TASK = {
    "data": {
        "kind": "completion",
        "sequence_length": 128,
        "train": {"path": countries, "split": "train"},
        "validation": None,
        "test": {"path": countries, "split": "test"},
    },
    "train": {"steps": 30, "batch_size": 8, "log_every": 5, "tensorboard": False},
    "evaluate": {"metrics": ["perplexity"]},
}
FULL = {"method": {"name": "full"}, "optimizer": {"learning_rate": 2e-3, "warmup_steps": 5}}
ADAPTED = {"learning_rate": 1e-2, "warmup_steps": 5}


def fine_tune(name, changes):
    """Run the task with some options changed, and return the numbers of the run."""
    out = Path("runs/notebooks") / name
    run_training(
        parse_config({**TASK, **changes, "output": str(out), "resume": False}),
        Console(quiet=True, force_jupyter=False),
    )
    return numbers(out)


def draw(title, unit, found):
    """Bars of one number of each run."""
    figure, axis = plt.subplots(figsize=(7, 0.7 + 0.4 * len(found)))
    axis.bar_label(axis.barh(list(found), list(found.values())), fmt="%.3g", padding=3)
    axis.set(xlabel=unit, title=title)
    axis.invert_yaxis()
    axis.margins(x=0.15)
    plt.show()


full = fine_tune("full", FULL)
print(f"full fine-tuning: accuracy {full['accuracy']:.2f}, {full['disk'] / 1e6:.1f} MB on disk")

# %% [markdown]
# ## Memory, counted
#
# With AdamW in float32 each trained parameter needs 16 bytes: 4 for the weight, 4 for its gradient, 8 for the two moments.
# Activations come on top; they grow with the batch, not with what trains.

# %%
import jax

import peft_jax

model, params = peft_jax.load("builtin:base")
count = sum(x.size for x in jax.tree.leaves(params))
counted = {"weights": 4 * count, "gradients": 4 * count, "moments": 8 * count}
for what, size in counted.items():
    print(f"{what:10} {size / 1e6:6.1f} MB")

# %% [markdown]
# ## Memory, measured
#
# The compiled training step tells how many bytes it takes. What is more than counted is activations. The same step with LoRA has
# gradients and moments for a few weights only.

# %%
lora = fine_tune("lora", {"method": {"name": "lora", "rank": 8}, "optimizer": ADAPTED})
total = sum(counted.values())
print(f"counted {total / 1e6:.1f} MB, measured {full['memory'] / 1e6:.1f} MB")
assert full["memory"] > 0.9 * total  # the count is a lower bound, but for buffers used twice

figure, axis = plt.subplots(figsize=(7, 2.6))
left = 0.0
for what, size in counted.items():
    axis.barh("counted", size / 1e6, left=left, label=what)
    left += size / 1e6
axis.barh("measured, full", full["memory"] / 1e6, color="0.6")
axis.barh("measured, LoRA", lora["memory"] / 1e6, color="0.6")
axis.set(xlabel="MB of a training step", title="What a training step takes")
axis.legend(fontsize="small")
plt.show()

# %% [markdown]
# ## A whole copy for each task
#
# Ten tasks are ten models. An adapter is a small file beside one model.

# %%
draw(
    "Bytes to store for ten tasks",
    "MB on disk",
    {"full fine-tuning": full["disk"] / 1e5, "LoRA": lora["disk"] / 1e5},
)
print(f"LoRA stores {full['disk'] / lora['disk']:.0f} times fewer bytes for each task,")
print(f"and its step takes {full['memory'] / lora['memory']:.1f} times less memory.")
assert full["disk"] > 10 * lora["disk"]
assert full["memory"] > lora["memory"]

# %% [markdown]
# ## When to use it
#
# Train everything when the task is far from what the model knows, the data are many, and memory is no question. For all else try an
# adapter first.
#
# Read on: Howard and Ruder 2018, [ULMFiT](https://arxiv.org/abs/1801.06146); Aghajanyan et al. 2020,
# [intrinsic dimension](https://arxiv.org/abs/2012.13255).
