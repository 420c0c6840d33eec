# %% [markdown]
# # Low-rank factorization
#
# What fine-tuning adds to a weight has low rank, nearly. LoRA learns it as a product of two thin matrices and leaves the weight as it
# is:
#
# $$W' = W + \frac{\alpha}{r} A B, \qquad A \in \mathbb{R}^{d \times r},\; B \in \mathbb{R}^{r \times k}$$
#
# The weights themselves can be factorized too: a truncated SVD stores $U V$ in the place of $W$.

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
# ## LoRA in two lines

# %%
import jax

import peft_jax

model, params = peft_jax.load("builtin:base")
tree = peft_jax.lora(params, jax.random.key(0), rank=8, alpha=16)
trained, everything = peft_jax.core.count(tree)
print(f"{trained:,} of {everything:,} parameters train ({trained / everything:.1%})")

# %% [markdown]
# ## LoRA and an SVD beside full fine-tuning

# %%
lora = fine_tune("lora", {"method": {"name": "lora", "rank": 8}, "optimizer": ADAPTED})
factorized = fine_tune("svd", {**FULL, "factorize": {"keep": 0.5, "calibration_batches": 4}})
runs = {"full fine-tuning": full, "LoRA, rank 8": lora, "SVD to half, trained": factorized}
draw("Trained parameters", "thousands", {k: r["trained"] / 1e3 for k, r in runs.items()})
draw("Bytes to store for the task", "MB", {k: r["disk"] / 1e6 for k, r in runs.items()})
draw("Accuracy on held-out questions", "share", {k: r["accuracy"] for k, r in runs.items()})
print(f"LoRA trains {full['trained'] / lora['trained']:.0f} times fewer parameters,")
print(f"with {full['flops'] / lora['flops']:.2f} times fewer operations in a step.")
print(f"The factorized model has {factorized['disk'] / full['disk']:.2f} of the bytes.")
assert full["trained"] > 10 * lora["trained"]
assert lora["flops"] < full["flops"]
assert factorized["disk"] < full["disk"]

# %% [markdown]
# ## When to use it
#
# LoRA is the first thing to try: small files, less memory, no cost once it is merged. Factorize the weights when the model itself has
# to become smaller and can be trained again afterwards.
#
# Read on: Hu et al. 2021, [LoRA](https://arxiv.org/abs/2106.09685); Liu et al. 2024, [DoRA](https://arxiv.org/abs/2402.09353); Wang et
# al. 2024, [SVD-LLM](https://arxiv.org/abs/2403.07378); the [PEFT library](https://github.com/huggingface/peft), whose files this
# package reads and writes.
