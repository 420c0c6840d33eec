# %% [markdown]
# # Knowledge injection
#
# A task often needs facts that its training examples do not hold. Facts are triples (subject, relation, object). Templates say them in
# words, the model is trained on these, and it can be asked in other words afterwards:
#
# $$L = -\sum_{(s, r, o)} \log p\big(o \mid \text{template}_r(s)\big)$$

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
# ## The facts as triples

# %%
from peft_jax.data.builtin import dataset

facts = dataset("country-facts", "all")
print(f"{len(facts)} facts, as {facts[0]}")
Path("runs/notebooks").mkdir(parents=True, exist_ok=True)
templates = Path("runs/notebooks/templates.yaml")
templates.write_text(
    """
capital:
  - "The capital of {{ subject }} is {{ object }}"
  - "{{ subject }} has its capital in {{ object }}"
continent:
  - "{{ subject }} lies in {{ object }}"
  - "The continent of {{ subject }} is {{ object }}"
currency:
  - "The currency of {{ subject }} is the {{ object }}"
  - "{{ subject }} uses the {{ object }}"
language:
  - "The language of {{ subject }} is {{ object }}"
  - "In {{ subject }} people speak {{ object }}"
"""
)

# %% [markdown]
# ## First the facts, then the task
#
# All facts are said in statements. Nine in ten questions are trained, the others are asked. Full fine-tuning sees the questions alone,
# so it can only guess the rest.

# %%
statements = {
    "kind": "facts",
    "templates": str(templates),
    "held_out": 0,
    "train": {"path": "builtin:country-facts", "split": "all"},
    "validation": None,
    "sequence_length": 64,
}
first = {
    "name": "train",
    "method": {"name": "lora", "rank": 32, "alpha": 64},
    "data": statements,
    "train": {"steps": 100, "batch_size": 16},
}
informed = fine_tune(
    "informed",
    {"stages": [first, "merge", "train"], "optimizer": {**ADAPTED, "learning_rate": 5e-3}},
)
runs = {"full fine-tuning": full, "facts, then the task": informed}
draw("Accuracy on held-out questions", "share", {k: r["accuracy"] for k, r in runs.items()})
draw("Loss on held-out questions", "nats per token", {k: r["loss"] for k, r in runs.items()})
gain = informed["accuracy"] - full["accuracy"]
print(f"Accuracy {informed['accuracy']:.2f} with the facts, {full['accuracy']:.2f} without.")
assert gain > 0.02

# %% [markdown]
# ## When to use it
#
# Inject facts when they are known as a table or a graph and the model does not know them. Replay other text beside them
# (`data.replay`), or the model forgets. For facts that change every day, put passages in the input instead (`data.knowledge.passages`).
#
# Read on: Liu et al. 2019, [K-BERT](https://arxiv.org/abs/1909.07606); Meng et al. 2022, [MEMIT](https://arxiv.org/abs/2210.07229);
# Zhang et al. 2024, [RAFT](https://arxiv.org/abs/2403.10131).
