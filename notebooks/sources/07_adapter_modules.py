# %% [markdown]
# # Adapter modules
#
# A small module stands beside each layer and is all that trains. A bottleneck adapter goes down to few units and up again:
#
# $$h \leftarrow h + W_{\text{up}}\, \sigma(W_{\text{down}}\, h)$$
#
# It starts as the identity, so the model begins where it was.

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
# ## An adapter in two lines

# %%
import jax
import numpy as np

import peft_jax

model, params = peft_jax.load("builtin:base")
tree = peft_jax.adapters.bottleneck(params, jax.random.key(0), size=32)
trained, everything = peft_jax.core.count(tree)
print(f"{trained:,} of {everything:,} parameters train ({trained / everything:.1%})")
tokens = np.arange(8)[None]
apply = peft_jax.bind(model)
assert np.allclose(apply(tree, tokens), apply(params, tokens), atol=1e-5)  # as before

# %% [markdown]
# ## Beside full fine-tuning

# %%
adapter = fine_tune(
    "bottleneck",
    {"method": {"name": "bottleneck", "placement": "pfeiffer", "size": 32}, "optimizer": ADAPTED},
)
ia3 = fine_tune("ia3", {"method": {"name": "ia3"}, "optimizer": {"learning_rate": 5e-2}})
runs = {"full fine-tuning": full, "bottleneck, 32": adapter, "IA3": ia3}
draw("Trained parameters", "thousands", {k: r["trained"] / 1e3 for k, r in runs.items()})
draw("Memory of a training step", "MB", {k: r["memory"] / 1e6 for k, r in runs.items()})
draw("Accuracy on held-out questions", "share", {k: r["accuracy"] for k, r in runs.items()})
print(f"The adapter trains {full['trained'] / adapter['trained']:.0f} times fewer parameters,")
print(f"and its file is {full['disk'] / adapter['disk']:.0f} times smaller than a whole model.")
assert full["trained"] > 10 * adapter["trained"]
assert adapter["memory"] < full["memory"]

# %% [markdown]
# ## When to use it
#
# Use adapters for many tasks on one base: a bank holds an adapter for each row of a batch. They cost a little time when the model
# generates, since they are not folded into the weights.
#
# Read on: Houlsby et al. 2019, [adapters](https://arxiv.org/abs/1902.00751); Pfeiffer et al. 2020,
# [AdapterHub](https://arxiv.org/abs/2007.07779); Liu et al. 2022, [IA3](https://arxiv.org/abs/2205.05638).
