# %% [markdown]
# # Quantization
#
# A weight is stored as a small whole number and each block of weights has a scale:
#
# $$w \approx s \cdot q, \qquad q \in \{-2^{b-1}, \dots, 2^{b-1} - 1\}$$
#
# NF4 puts its 16 values where normally distributed weights are. QLoRA trains LoRA over such a base, which stays as it is.

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
# ## Bytes by format

# %%
import jax

import peft_jax

model, params = peft_jax.load("builtin:base")


def megabytes(tree):
    return sum(x.nbytes for x in jax.tree.leaves(tree)) / 1e6


sizes = {"float32": megabytes(params)}
for name in ("int8", "nf4", "int2"):
    sizes[name] = megabytes(peft_jax.quantize(params, name))
draw("The base on the device (its embedding stays in float32)", "MB", sizes)
assert sizes["nf4"] < 0.5 * sizes["float32"]

# %% [markdown]
# ## QLoRA beside full fine-tuning

# %%
nf4 = {"format": "nf4", "options": {"block_size": 64, "double": True}}
qlora = fine_tune(
    "qlora",
    {
        "quantize": nf4,
        "method": {"name": "lora", "rank": 8},
        "optimizer": {**ADAPTED, "name": "adamw8bit"},
    },
)
runs = {"full fine-tuning": full, "QLoRA": qlora}
draw("Memory of a training step", "MB", {k: r["memory"] / 1e6 for k, r in runs.items()})
draw("Accuracy on held-out questions", "share", {k: r["accuracy"] for k, r in runs.items()})
print(f"QLoRA's step takes {full['memory'] / qlora['memory']:.1f} times less memory,")
print(f"and what it stores for the task is {full['disk'] / qlora['disk']:.0f} times smaller.")
assert qlora["memory"] < full["memory"]

# %% [markdown]
# ## When to use it
#
# Quantize when the base does not fit beside what trains, or when the model is served where memory or bandwidth is short. At 4 bits a
# large model loses little; at 3 and 2 bits the rounding must be calibrated (GPTQ, AWQ).
#
# Read on: Dettmers et al. 2023, [QLoRA](https://arxiv.org/abs/2305.14314); Frantar et al. 2022,
# [GPTQ](https://arxiv.org/abs/2210.17323); Lin et al. 2023, [AWQ](https://arxiv.org/abs/2306.00978).
