# %% [markdown]
# # A chain, from pruning to distillation
#
# Every technique takes a tree of parameters and gives one back, so techniques can be chained:
#
# $$\theta_0 \xrightarrow{\text{prune}} \theta_1 \xrightarrow{\text{recover}} \theta_2 \xrightarrow{\text{merge}} \theta_3
# \xrightarrow{\text{quantize}} \theta_4 \xrightarrow{\text{distil}} \theta_5$$
#
# A chain is a list of stages in one configuration. It can be stopped at any point and goes on there.

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
# ## Five stages
#
# The base is pruned to 2:4, recovered by LoRA under the masks, merged, and quantized to four bits. Then an adapter over it learns from the
# fine-tuned model.

# %%
import json

teacher = {"path": "runs/notebooks/full/model"}
short = {"steps": 15}
stages = [
    {"name": "prune", "prune": {"pattern": "2:4", "score": "wanda", "calibration_batches": 4}},
    {"name": "train", "train": short},
    "merge",
    {"name": "quantize", "quantize": {"format": "int4"}},
    {
        "name": "train",
        "train": {**short, "mask_updates": False},
        "distill": {"teachers": [teacher], "data_weight": 0.5},
    },
]
chain = fine_tune("chain", {"stages": stages, "method": {"name": "lora"}, "optimizer": ADAPTED})
told = json.loads(Path("runs/notebooks/chain/results.json").read_text())["stages"]
loss = {label: stage["metrics"]["loss"] for label, stage in told.items()}
draw("Loss on held-out questions after each stage", "nats per token", loss)

# %% [markdown]
# ## What came of it

# %%
import numpy as np

import peft_jax
from peft_jax.pruning import sparsity_of

base = peft_jax.load("runs/notebooks/chain/base")[1]
zeros = float(np.mean([share.mean() for share in sparsity_of(base).values()]))
runs = {"full fine-tuning": full, "chain": chain}
draw(
    "Stored: the model, or the small base and its adapter",
    "MB",
    {k: r["disk"] / 1e6 for k, r in runs.items()},
)
draw("Accuracy on held-out questions", "share", {k: r["accuracy"] for k, r in runs.items()})
print(f"{zeros:.0%} zeros, four bits, and {chain['disk'] / full['disk']:.2f} of the bytes.")
assert chain["disk"] < 0.8 * full["disk"]
assert loss["2-train"] < loss["1-prune"]
assert loss["5-train"] < loss["4-quantize"]

# %% [markdown]
# ## When to use it
#
# Chain when one technique alone does not make the model small enough. Recover after each loss, and distil last: the teacher also
# mends what quantization broke.
#
# Read on: Muralidharan et al. 2024, [Minitron](https://arxiv.org/abs/2407.14679); Xia et al. 2023,
# [Sheared LLaMA](https://arxiv.org/abs/2310.06694).
