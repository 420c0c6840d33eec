# %% [markdown]
# # Knowledge distillation
#
# A small student learns to say what a large teacher says. The loss is the divergence of the two distributions of the next token:
#
# $$L = \mathrm{KL}\big(p_{\text{teacher}}(\cdot \mid x) \,\|\, p_{\text{student}}(\cdot \mid x)\big)$$
#
# The teacher's distribution tells more than the right answer alone: it says which wrong answers are nearly right.

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
# ## A student of three layers
#
# The student keeps every second layer of the base. It learns once from the data alone, and once from the fine-tuned model too.

# %%
STUDENT = {**FULL, "prune": {"keep": {"layers": 3}, "importance": "spaced"}}
teacher = {"path": "runs/notebooks/full/model"}

alone = fine_tune("student-alone", STUDENT)
taught = fine_tune(
    "student-taught", {**STUDENT, "distill": {"teachers": [teacher], "data_weight": 0.5}}
)
runs = {"teacher (6 layers)": full, "student, data alone": alone, "student, taught": taught}
for name, run in runs.items():
    print(f"{name:22} loss {run['loss']:.3f}  accuracy {run['accuracy']:.3f}  {run['trained']:,}")

# %%
draw("What is stored and served", "MB on disk", {k: r["disk"] / 1e6 for k, r in runs.items()})
draw("Loss on held-out questions", "nats per token", {k: r["loss"] for k, r in runs.items()})
print(f"The student has {taught['disk'] / full['disk']:.2f} of the bytes.")
helps = "lowers" if taught["loss"] < alone["loss"] else "does not lower"
print(f"On this small task the teacher {helps} the student's loss below that of the data alone.")
assert taught["disk"] < 0.8 * full["disk"]

# %% [markdown]
# ## When to use it
#
# Distil when the model must be small and fast where it is used, and a good large one is at hand. Training is not cheaper: the teacher
# runs beside the student. Its predictions can be stored once (`peft-jax teach`).
#
# Read on: Hinton et al. 2015, [Distilling the knowledge in a neural network](https://arxiv.org/abs/1503.02531); Sanh et al. 2019,
# [DistilBERT](https://arxiv.org/abs/1910.01108); Agarwal et al. 2023, [GKD](https://arxiv.org/abs/2306.13649); Gu et al. 2023,
# [MiniLLM](https://arxiv.org/abs/2306.08543).
